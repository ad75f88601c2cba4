"""One forward and backward pass over a batch that leaves the saliency of each sample: the fast path.

While the network runs, its calls of convolutions and linear layers on wanted weights are replaced by an autograd
function that hides the weight from autograd. Autograd thus makes no weight gradients; when the backward pass reaches
the call, `pss.engine.kernels` reduces them to row sums. A wanted weight that autograd still reaches was used in
some other way, and is handed back to the caller to be computed otherwise: never as zero.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pss.engine.kernels import Convolution, Linear


class Unknown(RuntimeError):
    """The fast path cannot say whose gradient is whose in this network: use the general path."""


class OwnGradients(Unknown):
    """The network runs a backward pass within its forward pass."""


@dataclass
class Use:
    """One call of a layer: which parameter, how, and what to multiply its gradient by."""

    sweep: Sweep
    name: str
    layer: Convolution | Linear
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None  # per row, where BatchNorm was folded into the weight
    split: Callable[[Tensor], Tensor] | None = None  # brings the batch to the front, of an input or its gradient

    def __call__(self, x: Tensor) -> Tensor:
        """Output of the layer."""
        self.sweep.note(self, x)
        return _Call.apply(x, self.sweep.token, self)


class _Call(torch.autograd.Function):
    """A layer's call whose weight autograd does not see. The token makes the output require a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, use: Use) -> Tensor:
        ctx.save_for_backward(x)
        ctx.use = use
        return use.layer.forward(x, use.weight, use.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple:
        (x,), use = ctx.saved_tensors, ctx.use
        weight = use.weight
        if use.sweep.bf16 and use.layer.groups == 1:  # depthwise convolutions are slower in bfloat16
            x, g, weight = x.bfloat16(), g.bfloat16(), weight.bfloat16()
        use.sweep.collect(use, x, g)
        return use.layer.input_gradient(x, g, weight) if ctx.needs_input_grad[0] else None, None, None


class Sweep(TorchFunctionMode):
    """Watches one batch run through a network, and keeps the row sums of its weights' gradients.

    Parameters
    ----------
    wanted : dict of str to Tensor
        Parameters by name. They must require gradients, and no other parameter may.
    samples : int
        Size of the batch.
    """

    def __init__(self, wanted: dict[str, Tensor], samples: int, signed: bool, fold: bool, bf16: bool):
        super().__init__()
        self.names = {id(p): name for name, p in wanted.items()}
        self.wanted, self.samples, self.signed, self.fold, self.bf16 = wanted, samples, signed, fold, bf16
        self.token = next(iter(wanted.values())).new_zeros((), requires_grad=True)
        self.calls: Counter[str] = Counter()
        self.unplaced: dict[int, tuple[Use, Tensor]] = {}  # by number of the call: where is the batch?
        self.watched: Collection[int] = ()
        self.images: Tensor | None = None
        self.collecting = False
        self.sums: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    # Watching the forward pass

    def outputs(self, model: nn.Module, images: Tensor):
        """Outputs of the model under watch."""
        self.images = images
        with self:
            outputs = model(images)
        return tree_map_only(_Pending, _Pending.value, outputs)

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _Pending in kinds and function not in _METADATA:
            if function is F.batch_norm and (folded := _fold(self, *args, **kwargs)) is not None:
                return folded
            args, kwargs = tree_map_only(_Pending, _Pending.value, (args, kwargs))
        if function in _CONVOLUTIONS:
            return self._convolution(function, *args, **kwargs)
        if function is F.linear:
            return self._linear(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:  # calls inside it must be seen too
                return _attention(*args, **kwargs)
        if function is F.batch_norm and _uses_batch_statistics(*args, **kwargs) and self.samples > 1:
            raise Unknown("BatchNorm without running statistics mixes the samples of a batch")
        if function in _DECISIONS and self.samples > 1:
            raise Unknown(f"the network reads values of a whole batch ({function.__name__})")
        return function(*args, **kwargs)

    def _convolution(self, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not self._is_ours(input, weight, bias):
            return function(input, weight, bias, stride, padding, dilation, groups)
        dims = weight.dim() - 2
        strided = padding == "same" and stride not in (1, (1,) * dims)
        if isinstance(padding, str) and (strided or padding not in ("same", "valid")):
            return function(input, weight, bias, stride, padding, dilation, groups)  # an error, in its own words
        stride, dilation = _each(stride, dims), _each(dilation, dims)
        if isinstance(padding, str):
            input, padding = _numeric_padding(input, weight, padding, dilation)
        geometry = Convolution(weight.shape, stride, _each(padding, dims), dilation, groups)
        use = Use(self, self.names[id(weight)], geometry, weight.detach(), bias)
        return _Pending(use, input) if self.fold else use(input)

    def _linear(self, input, weight, bias=None):
        if not self._is_ours(input, weight, bias) or input.dim() < 2:
            return F.linear(input, weight, bias)
        return Use(self, self.names[id(weight)], Linear(weight.shape), weight.detach(), bias)(input)

    def _is_ours(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the weight is wanted, and nothing else that is wanted would be lost from autograd's sight."""
        batched = weight.dim() == 2 or input.dim() == weight.dim()
        return id(weight) in self.names and batched and (bias is None or not bias.requires_grad)

    def note(self, use: Use, x: Tensor) -> None:
        """Count a use, and see whether the first dimension of its input is plainly the batch."""
        if not torch.is_grad_enabled():
            return
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise Unknown("what autograd saves is changed or computed again, as by checkpointing")
        number = self.calls.total()
        self.calls[use.name] += 1
        plain = len(x) == self.samples and (x.dim() == 2 or isinstance(use.layer, Convolution))
        # What neither is the images nor comes from a layer may be a table that happens to be as long as the batch.
        sure = plain and (x is self.images or x.requires_grad)
        if number in self.watched or (self.samples > 1 and not sure):
            self.unplaced[number] = use, x
        elif isinstance(use.layer, Linear):
            use.split = lambda t: t.reshape(self.samples, -1, t.shape[-1])
        elif not plain:  # one sample that was cut into several
            use.split = lambda t: t[None]

    def place(self, alone: Sweep) -> None:
        """Find the batch in every input where it is not plain, from a sweep of the last sample alone."""
        for number, (use, x) in self.unplaced.items():
            other, x_alone = alone.unplaced.get(number, (None, None))
            if other is None or other.name != use.name or alone.calls != self.calls:
                raise Unknown("the network takes another course for one sample than for a batch")
            split = _split(x, x_alone, self.samples, isinstance(use.layer, Convolution))
            if not (isinstance(use.layer, Convolution) and len(x) == self.samples and len(x_alone) == 1):
                use.split = split  # otherwise the batch is at the front
        self.unplaced.clear()

    # Collecting in the backward pass

    def collect(self, use: Use, x: Tensor, g: Tensor) -> None:
        """Reduce a call's weight gradient to row sums, or add it up for a parameter that is used several times."""
        if not self.collecting:
            raise OwnGradients("the network takes gradients on its way")
        if use.split is not None:
            x, g = use.split(x), use.split(g)
        in_parts = isinstance(use.layer, Convolution) and use.split is not None
        if self.calls[use.name] == 1 and not in_parts:
            sums = use.layer.row_sums(x, g, self.signed).to(self.token.dtype)
            if use.scale is not None:
                sums *= use.scale if self.signed else use.scale.abs()
            self.sums[use.name] = sums
            return
        for xs, gs in zip(x.unbind(1), g.unbind(1), strict=True) if in_parts else [(x, g)]:
            gradient = use.layer.gradients(xs, gs).to(self.token.dtype)
            if use.scale is not None:
                gradient *= use.scale.reshape(-1, *[1] * (gradient.dim() - 2))
            total = self.gradients.get(use.name)
            self.gradients[use.name] = gradient if total is None else total.add_(gradient)

    def row_means(self, losses: Tensor) -> dict[str, Tensor]:
        """Run the backward pass.

        Returns
        -------
        dict of str to Tensor
            Mean (absolute) gradient of every row of the wanted parameters, ``(B, O)``, without those that were (also)
            used in a way that the fast path does not know.
        """
        reached = [None] * len(self.wanted)
        if losses.requires_grad:
            self.collecting = True
            inputs = [self.token, *self.wanted.values()]
            reached = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)[1:]
        unseen = [name for name, g in zip(self.wanted, reached, strict=True) if g is not None]
        means = {}
        for name, parameter in self.wanted.items():
            if name in self.gradients:
                gradient = self.gradients.pop(name)
                self.sums[name] = (gradient if self.signed else gradient.abs_()).flatten(2).sum(2)
            sums = self.sums.get(name)
            row = parameter[0].numel()
            means[name] = parameter.new_zeros(self.samples, len(parameter)) if sums is None else sums / row
        return {name: m for name, m in means.items() if name not in unseen}


class _Pending(Tensor):
    """The output of a convolution not yet computed, so that a BatchNorm that asks for it can be folded in.

    Anything but a BatchNorm gets the plain output, computed when first asked for. If both ask, the weight is used
    twice, and its gradients are added up like those of any weight that is used twice.
    """

    @staticmethod
    def __new__(cls, use: Use, x: Tensor):
        shape = use.layer.output_shape(x.shape)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)

    def __init__(self, use: Use, x: Tensor):
        self._use, self._x, self._version_of_x, self._value = use, x, x._version, None
        self._with_grad = torch.is_grad_enabled()

    def value(self) -> Tensor:
        """The plain output, as it would be had it been computed at once."""
        if self._value is None:
            with torch.set_grad_enabled(self._with_grad):
                self._value = self._use(self.input())
        return self._value

    def input(self) -> Tensor:
        if self._x._version != self._version_of_x:
            raise Unknown("the input of a convolution was modified in place before its output was used")
        return self._x

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _METADATA:
            return super().__torch_function__(function, kinds, args, kwargs)
        args, kwargs = tree_map_only(_Pending, _Pending.value, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        raise Unknown(f"{function} asked for the output of a convolution behind PyTorch's function overrides")


def _fold(
    sweep: Sweep,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
) -> Tensor | None:
    """BatchNorm over a pending convolution, as one convolution: None where that cannot be, or does not pay.

    With a = γ/√(σ²+ε), BN(W*x + b) = (aW)*x + (b − μ)a + β, and the gradient to W is a times that to aW.
    """
    own = [t for t in (weight, bias) if t is not None]
    if not isinstance(input, _Pending) or training or running_mean is None or any(t.requires_grad for t in own):
        return None
    use = input._use
    as_called = input._value is None and input._with_grad == torch.is_grad_enabled()
    if not as_called or use.weight.numel() > input.shape.numel():
        return None
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean if use.bias is None else use.bias - running_mean
    shift = shift * scale if bias is None else shift * scale + bias
    folded = use.weight * scale.reshape(-1, *[1] * (use.weight.dim() - 1))
    return Use(sweep, use.name, use.layer, folded, shift, scale)(input.input())


def _uses_batch_statistics(input, running_mean, running_var, weight=None, bias=None, training=False, *_, **__) -> bool:
    return training or running_mean is None


def _split(x: Tensor, alone: Tensor, samples: int, convolution: bool) -> Callable[[Tensor], Tensor]:
    """Find where the batch is in an input, given the input that the last sample alone had."""
    same_rank = x.dim() == alone.dim()
    where = [d for d in range(x.dim()) if x.shape[d] != alone.shape[d]] if same_rank else []
    dim = where[0] if where else -1
    last = 0 if convolution else x.dim() - 2
    if len(where) != 1 or dim > last or x.shape[dim] != samples * alone.shape[dim]:
        raise Unknown(
            f"a layer's input has shape {tuple(x.shape)} for {samples} samples and {tuple(alone.shape)} for one"
        )
    parts = alone.shape[dim]

    def outer(t: Tensor) -> Tensor:  # samples one after the other, each in its parts
        return t.unflatten(dim, (samples, parts)).movedim(dim, 0)

    def inner(t: Tensor) -> Tensor:  # parts one after the other, each of all samples
        return t.unflatten(dim, (parts, samples)).movedim(dim + 1, 0)

    tolerance = 1e-2 * alone.abs().max()
    fits = [f for f in (outer, inner) if ((f(x)[-1] - alone).abs().max() <= tolerance)]
    if not fits or (len(fits) > 1 and parts > 1):
        raise Unknown(f"cannot tell the samples apart in a layer's input of shape {tuple(x.shape)}")
    split = fits[0]
    return split if convolution else lambda t: split(t).reshape(samples, -1, t.shape[-1])


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
_METADATA = {
    Tensor.dim,
    Tensor.size,
    *(getattr(Tensor, k).__get__ for k in ("shape", "ndim", "dtype", "device")),
}
_DECISIONS = {Tensor.item, Tensor.tolist, Tensor.numpy, torch.equal, torch.allclose, torch.is_nonzero}
_DECISIONS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
# The same function, blind to overrides: it would otherwise hand itself to the mode instead of calling what is inside.
_BLIND = {name: lambda *_: False for name in vars(F) if name.startswith("has_torch_function")}
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), **_BLIND},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
