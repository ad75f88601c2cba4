"""One forward and backward pass over a batch that leaves the saliency of each sample.

While the network runs, its calls of convolutions and linear layers on wanted weights are replaced by an autograd
function that hides the weight from autograd. Autograd thus makes no weight gradients; when the backward pass reaches
the call, `pss.engine.kernels` reduces them to row sums. What is made of wanted parameters and of no image, as a
standardized weight or a table of positions, is a weight like any other where it meets the batch: its gradient of each
sample is carried on to the parameters. A wanted parameter that autograd still reaches was used in some other way, and
is handed back to the caller to be computed otherwise: never as zero.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pss.engine.calls import METADATA, DeferredConvolution, LayerCall, OwnGradients, Unsupported, computed
from pss.engine.constants import Constants, parameters_of
from pss.engine.folding import NORMALIZATIONS, fold, mixes_samples
from pss.engine.hearing import FOLLOWED, KeptOutputs
from pss.engine.kernels import Convolution, Linear, Table, sum_rows
from pss.engine.locating import BatchDimension

QUANTITIES = ("gradient", "gain", "output")


@dataclass(frozen=True)
class Options:
    """How to profile: as documented there, where a profile is asked for."""

    signed: bool = False
    strategy: str = "auto"
    fold: bool = True
    precision: str = "fp32"
    of: tuple[str, ...] = ("gradient",)  # and "gain", the sum of weight times gradient; or "output", alone

    def __post_init__(self):
        if not self.of or any(of not in QUANTITIES or self.of.count(of) > 1 for of in self.of):
            raise ValueError(f"unknown quantity in of={self.of}: expected some of {QUANTITIES}, each once")
        if "output" in self.of and len(self.of) > 1:
            raise ValueError("of='output' needs no backward pass: ask for it alone")
        known = {"strategy": ("auto", "fast", "vmap", "loop"), "precision": ("fp32", "bf16")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown option {getattr(self, name)!r}: expected one of {values}")


class GradientRecorder(TorchFunctionMode):
    """Watches one batch run through a network, and keeps the row sums of its weights' gradients.

    Parameters
    ----------
    wanted : dict of str to Tensor
        Parameters by name. They must require gradients, and no other parameter may but ``others``.
    samples : int
        Size of the batch.
    options : Options
    others : dict of str to Tensor
        Parameters whose gradient is left to autograd.
    columns : dict of str to int
        Those of ``wanted`` of whose columns the means are asked for, and how many they have: of weights that are
        multiplied untransposed, and of transposed convolutions.
    visit : callable, optional
        Gets the number of each call, the call and its input. There is no backward pass then, and nothing is kept.
    """

    def __init__(
        self,
        wanted: dict[str, Tensor],
        samples: int,
        options: Options,
        others: dict[str, Tensor] | None = None,
        columns: dict[str, int] | None = None,
        visit: Callable[[int, LayerCall, Tensor], None] | None = None,
    ):
        super().__init__()
        self.names = {id(p): name for name, p in wanted.items()}
        self.wanted, self.others, self.samples, self.columns = wanted, others or {}, samples, columns or {}
        self.options, self.fold, self.visit = options, options.fold, visit
        self.signed, self.bf16 = options.signed, options.precision == "bf16"
        asked = visit is None and options.of != ("gradient",)
        self.kept = KeptOutputs(listens="output" in options.of) if asked else None
        like = next(iter({**wanted, **self.others}.values()))
        # Makes the outputs of layers require a gradient.
        self.token = torch.zeros((), device=like.device, requires_grad=visit is None)
        self.calls: list[tuple[LayerCall, Tensor]] = []  # with their inputs, until the batch is found in them
        self.constants: Constants | None = None
        self.seen = 0
        self.uses: Counter[str] = Counter()
        self.lost: dict[str, str] = {}  # parameters of calls in which the batch is not found, and why
        self.collecting = False
        self.sums: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def watching(self, samples: int, visit: Callable[[int, LayerCall, Tensor], None]) -> GradientRecorder:
        """A recorder alike that only has its calls visited."""
        return GradientRecorder(self.wanted, samples, self.options, self.others, self.columns, visit)

    # Watching the forward pass

    def outputs(self, model: nn.Module, images: Tensor):
        """Outputs of the model under watch."""
        self.fold = self.fold and not _has_hooks(model)  # they may keep what they see
        if not self.others:  # of which autograd must not lose sight
            self.constants = Constants([*model.parameters(), *model.buffers()])
        with self:
            outputs = model(images)
        return computed(outputs)

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        constant = self.constants is not None and self.constants.are_all(function, args, kwargs or {})
        result = self._call(function, kinds, args, kwargs or {}, constant)
        if constant:
            self.constants.add(result)
        return result

    def _call(self, function, kinds, args, kwargs, constant):
        if DeferredConvolution in kinds and function not in METADATA:
            if function is F.batch_norm and (folded := fold(*args, **kwargs)) is not None:
                return folded
            args, kwargs = computed((args, kwargs))
        if function in _CONVOLUTIONS:
            return self._convolution(function, *args, **kwargs)
        if function in _TRANSPOSED:
            return self._transposed(function, *args, **kwargs)
        if function is F.linear:
            return self._linear(*args, **kwargs)
        if function is torch.addmm:
            return self._addmm(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:  # calls inside it must be seen too
                return _attention(*args, **kwargs)
        if function is F.batch_norm and self.samples > 1 and mixes_samples(*args, **kwargs):
            raise Unsupported("BatchNorm without running statistics mixes the samples of a batch")
        run = NORMALIZATIONS.get(function, function)
        if self.kept is not None and function not in METADATA:
            self.kept.use(function, args, kwargs)
            if function in FOLLOWED:
                return self.kept.follow(function, run, *args, **kwargs)
        if function in _ELEMENTWISE and not constant:
            return self._elementwise(function, *args, **kwargs)
        if function is F.scaled_dot_product_attention and not constant:
            return self._attention(*args, **kwargs)
        if function in _DECISIONS and self.samples > 1 and not constant:
            raise Unsupported(f"the network reads values of a whole batch ({function.__name__})")
        return run(*args, **kwargs)

    def _convolution(self, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not self._is_ours(input, weight, bias) or self.names.get(id(weight)) in self.columns:
            return function(input, weight, bias, stride, padding, dilation, groups)
        dims = weight.dim() - 2
        strided = padding == "same" and stride not in (1, (1,) * dims)
        if isinstance(padding, str) and (strided or padding not in ("same", "valid")):
            return function(input, weight, bias, stride, padding, dilation, groups)  # an error, in its own words
        stride, dilation = _each(stride, dims), _each(dilation, dims)
        if isinstance(padding, str):
            input, padding = _numeric_padding(input, weight, padding, dilation)
        geometry = Convolution(weight.shape, stride, _each(padding, dims), dilation, groups)
        call = self._call_of(geometry, weight, bias)
        if input.dim() == 4 and not input.is_cuda and not input.is_contiguous():  # once, for both passes
            call.weight = call.weight.contiguous(memory_format=torch.channels_last)
        return call.deferred(input) if self.fold and torch.is_grad_enabled() else call(input)

    def _transposed(
        self, function, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        columns = self.columns.get(self.names.get(id(weight), ""))
        if columns != weight.shape[1] * groups or not self._is_ours(input, weight, bias):
            return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        sizes = [_each(size, weight.dim() - 2) for size in (stride, padding, dilation, output_padding)]
        return self._call_of(Convolution(weight.shape, *sizes[:3], groups, sizes[3]), weight, bias)(input)

    def _linear(self, input, weight, bias=None):
        if not self._is_ours(input, weight, bias) or input.dim() < 2 or self.names.get(id(weight)) in self.columns:
            return F.linear(input, weight, bias)
        return self._call_of(Linear(weight.shape), weight, bias)(input)

    def _addmm(self, input, mat1, mat2, **kwargs):
        """A linear layer whose units are the columns of its weight, or anything else."""
        name = self.names.get(id(mat2))
        if kwargs or name not in self.columns or not self._is_ours(mat1, mat2, input) or input.dim() > 1:
            return torch.addmm(input, mat1, mat2, **kwargs)
        return LayerCall(self, name, Linear(tuple(mat2.mT.shape)), mat2.detach().mT, input)(mat1)

    def _elementwise(self, function, input, other, *args, **kwargs):
        """Addition or multiplication, perhaps of a table."""
        if self._is_made(other):
            seen = input.detach().clone() if function in _INTO else input  # the batch is looked for later
            other = self._rows(other, seen)
        elif self._is_made(input) and function not in _INTO:
            input = self._rows(input, other)
        return function(input, other, *args, **kwargs)

    def _attention(self, query, key, value, attn_mask=None, *args, **kwargs):
        if self._is_made(attn_mask):
            attn_mask = self._rows(attn_mask, query)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _rows(self, table: Tensor, x) -> Tensor:
        """The table, with a row of its own for each of the input; as it is where that is not known to be the same."""
        if not isinstance(x, Tensor) or x.dtype != table.dtype or x.dim() < max(table.dim(), 1) or x in self.constants:
            return table
        by_row = table.dim() == x.dim() and len(table) > 1
        if by_row and len(table) != len(x):
            return table
        return self._call_of(Table(table.shape, by_row), table, None).rows(x)

    def _call_of(self, layer: Convolution | Linear | Table, weight: Tensor, bias: Tensor | None) -> LayerCall:
        if id(weight) in self.names and not isinstance(layer, Table):
            return LayerCall(self, self.names[id(weight)], layer, weight.detach(), bias)
        parameters = tuple(sorted(self.names[i] for i in parameters_of(weight) if i in self.names))
        return LayerCall(self, ", ".join(parameters), layer, weight.detach(), bias, weight, parameters)

    def _is_made(self, tensor) -> bool:
        """Whether it depends on wanted parameters and on no image."""
        if self.constants is None or not isinstance(tensor, Tensor) or tensor not in self.constants:
            return False
        if self.options.of != ("gradient",):  # what the weight says or gains is not what its parameters do
            return False
        return tensor.requires_grad and not tensor.is_complex()

    def output_means(self, losses: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Mean output of every row of the wanted parameters over positions and calls, ``(B, O)``; zero of idle ones."""
        means: dict[str, tuple[Tensor, ...]] = {}
        for call, output in self.kept.heard.items():
            if call.name not in self.lost:
                first = output if call.batch is None else call.batch.first(output)
                rows = first.reshape(self.samples, -1, first.shape[-1]).mean(1)
                mean = self._mean(call.name, rows, self.uses[call.name])
                means[call.name] = (mean + means[call.name][0] if call.name in means else mean,)
        known = {name: p for name, p in self.wanted.items() if name not in self.lost}
        used: tuple[Tensor | None, ...] = (None,) * len(known)
        if known and losses.requires_grad:  # autograd sees no weight whose calls are seen here
            used = torch.autograd.grad(losses.sum(), list(known.values()), allow_unused=True)
        if unseen := [name for name, g in zip(known, used, strict=True) if g is not None]:
            raise Unsupported(f"the outputs of {', '.join(unseen)} are not seen: leave these units out of of='output'")
        return {name: means.get(name, (self._mean(name, None),)) for name in known}

    def _is_ours(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the weight is wanted, and nothing else that is wanted would be lost from autograd's sight."""
        batched = weight.dim() == 2 or input.dim() == weight.dim()
        known = (id(weight) in self.names and not weight.is_complex()) or self._is_made(weight)
        if self.constants is not None and input in self.constants:
            return False  # what comes out is made of this weight, and no sample's
        return known and batched and (bias is None or not bias.requires_grad)

    def record(self, call: LayerCall, x: Tensor) -> None:
        """Keep a call until the batch is found in its input."""
        if not torch.is_grad_enabled():
            return
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise Unsupported("what autograd saves is changed or computed again, as by checkpointing")
        call.recorded = True
        self.uses.update(call.names)
        self.seen += 1
        if self.visit is not None:
            self.visit(self.seen - 1, call, x)
        elif self.samples > 1:
            self.calls.append((call, x))
        elif not isinstance(call.layer, Linear) and len(x) > 1:  # one sample that was cut into several
            call.batch = BatchDimension(0, 1, len(x))

    def course(self) -> tuple:
        """Which layers were called in which order, on what shapes: what decides where the batch is."""
        return self.samples, tuple((call.name, tuple(x.shape)) for call, x in self.calls)

    def place(self, batches: Iterable[BatchDimension | str | None]) -> None:
        """Say of each call where the batch is in its input, or why that is not known."""
        for (call, _), batch in zip(self.calls, batches, strict=True):
            if isinstance(batch, str):
                self.lost = dict.fromkeys(call.names, batch) | self.lost
            else:
                call.batch = batch
        self.calls.clear()

    # Collecting in the backward pass

    def collect_products(self, call: LayerCall, x: Tensor, g: Tensor) -> None:
        """Add up weight times gradient of each row, from what the call gave and what came back."""
        if "gain" not in self.options.of or not self._may_collect(call):
            return
        products = call.products(x, g)
        products = products if call.batch is None else call.batch.first(products)
        rows = products.reshape(self.samples, -1, products.shape[-1]).sum(1)
        self.products[call.name] = rows + self.products[call.name] if call.name in self.products else rows

    def _may_collect(self, call: LayerCall) -> bool:
        if not self.collecting:
            raise OwnGradients("the network takes gradients on its way")
        if not call.recorded:
            raise Unsupported("the output of a convolution was passed on without being looked at")
        return not all(name in self.lost for name in call.names)

    def collect(self, call: LayerCall, x: Tensor, g: Tensor) -> None:
        """Reduce a call's weight gradient to row sums, or add it up for a parameter that is used several times."""
        if "gradient" not in self.options.of or not self._may_collect(call):
            return
        if call.batch is not None:
            x, g = call.batch.first(x), call.batch.first(g)
        if isinstance(call.layer, Linear):
            x, g = (t.reshape(self.samples, -1, t.shape[-1]) for t in (x, g))
        in_parts = isinstance(call.layer, Convolution) and call.batch is not None
        if call.made is not None:
            self._collect_made(call, x, g)
        elif self.uses[call.name] == 1 and not in_parts:
            sums = call.layer.row_sums(x, g, self.signed).to(call.weight.dtype)
            if call.scale is not None:
                sums *= call.scale if self.signed else call.scale.abs()
            self.sums[call.name] = sums
        else:
            self._add(call.name, self._gradients(call, x, g))

    def _gradients(self, call: LayerCall, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of the call's weight for some samples, ``(b, *shape)``."""
        in_parts = isinstance(call.layer, Convolution) and call.batch is not None
        pairs = zip(x.unbind(1), g.unbind(1), strict=True) if in_parts else [(x, g)]
        parts = (call.layer.gradients(*pair).to(call.weight.dtype) for pair in pairs)
        gradients = next(parts)
        for part in parts:
            gradients += part
        if call.scale is not None:
            gradients *= call.scale.reshape(-1, *[1] * (gradients.dim() - 2))
        return gradients

    def _add(self, name: str, gradients: Tensor) -> None:
        total = self.gradients.get(name)
        self.gradients[name] = gradients if total is None else total.add_(gradients)

    def _collect_made(self, call: LayerCall, x: Tensor, g: Tensor) -> None:
        """Carry the gradient of a weight that is made of parameters on to these, one sample after the other."""
        parameters = [self.wanted[name] for name in call.parameters]
        parts: dict[str, list[Tensor]] = {name: [] for name in call.parameters}
        for b in range(self.samples):
            gradient = self._gradients(call, x[b : b + 1], g[b : b + 1])[0]
            if isinstance(call.layer, Table) and call.layer.by_row:
                own, gradient = gradient, torch.zeros_like(call.weight)
                (call.batch or BatchDimension(0, self.samples, 1)).first(gradient)[b] = own
            found = torch.autograd.grad(call.made, parameters, gradient, retain_graph=True)
            if len(found) > 1:  # they may be one tensor, which is written into below
                found = [of_one.clone() for of_one in found]
            for name, of_one in zip(call.parameters, found, strict=True):
                of_one = of_one.mT[None] if name in self.columns else of_one[None]
                parts[name].append(of_one if self.uses[name] > 1 else sum_rows(of_one, self.signed))
        for name, of_each in parts.items():
            if self.uses[name] == 1:
                self.sums[name] = torch.cat(of_each)
            else:
                self._add(name, torch.cat(of_each))

    def row_means(self, losses: Tensor) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
        """Run the backward pass.

        Returns
        -------
        means : dict of str to tuple of Tensor
            Of every row of the wanted parameters the mean (absolute) gradient or weight times gradient, ``(B, O)``, or
            of every column, ``(B, 1, O)``, a tensor for each quantity asked for; without those that were (also) used
            in a way that is not known here.
        gradients : dict of str to Tensor
            What autograd reached, summed over the batch: of the others, and of wanted parameters, then perhaps in part.
        """
        if self.kept is not None and self.kept.listens:
            return self.output_means(losses), {}
        watched = {**self.wanted, **self.others}
        found: tuple[Tensor | None, ...] = (None,) * len(watched)
        if losses.requires_grad:
            self.collecting = True
            if self.kept is not None:
                self.kept.calls.clear()
            found = torch.autograd.grad(losses.sum(), [self.token, *watched.values()], allow_unused=True)[1:]
        reached = {name: g for name, g in zip(watched, found, strict=True) if g is not None}
        means = {}
        for name in self.wanted:
            if name in self.gradients:
                self.sums[name] = sum_rows(self.gradients.pop(name), self.signed)
            sums = {"gradient": self.sums.get(name), "gain": self.products.get(name)}
            means[name] = tuple(self._mean(name, sums[quantity]) for quantity in self.options.of)
        return {name: m for name, m in means.items() if name not in reached and name not in self.lost}, reached

    def _mean(self, name: str, sums: Tensor | None, size: int | None = None) -> Tensor:
        """Mean of each row or column from its sum over so many numbers, by default all; zero where there is none."""
        parameter = self.wanted[name]
        count = self.columns.get(name, len(parameter))
        sums = parameter.new_zeros(self.samples, count) if sums is None else sums
        mean = sums / (size or parameter.numel() // count)
        return mean[:, None] if name in self.columns else mean


def _has_hooks(model: nn.Module) -> bool:
    everywhere = nn.modules.module
    shared = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    return bool(shared) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _numeric_padding(input: Tensor, weight: Tensor, padding: str, dilation: tuple[int, ...]):
    """Padding "same" or "valid" in numbers; an odd amount is padded beforehand, the larger part at the end."""
    if padding == "valid":
        return input, 0
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return input, tuple(t // 2 for t in total)
    return F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)]), 0


def _each(value, dims: int) -> tuple[int, ...]:
    """One number for each dimension, given one or a sequence."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_INTO = {Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__}
_ELEMENTWISE = _INTO | {torch.add, torch.sub, torch.mul, Tensor.add, Tensor.sub, Tensor.mul}
_ELEMENTWISE |= {Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__mul__, Tensor.__rmul__}
_DECISIONS = {Tensor.item, Tensor.tolist, Tensor.numpy, torch.equal, torch.allclose, torch.is_nonzero}
_DECISIONS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
# The same function, blind to overrides: it would otherwise hand itself to the mode instead of calling what is inside.
_BLIND = {name: lambda *_: False for name in vars(F) if name.startswith("has_torch_function")}
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), **_BLIND},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
