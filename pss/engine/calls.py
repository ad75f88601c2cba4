"""One call of a convolution or a linear layer, whose weight autograd does not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from pss.engine.kernels import Convolution, Linear, Table

if TYPE_CHECKING:
    from pss.engine.locating import BatchDimension
    from pss.engine.recorder import GradientRecorder


class Unsupported(RuntimeError):
    """It cannot be said whose gradient is whose in this network: use another strategy."""


class OwnGradients(Unsupported):
    """The network runs a backward pass within its forward pass."""


@dataclass(eq=False)
class LayerCall:
    """One call of a layer: which parameter, how, and what to multiply its gradient by."""

    recorder: GradientRecorder
    name: str
    layer: Convolution | Linear | Table
    weight: Tensor
    bias: Tensor | None
    made: Tensor | None = None  # the weight, with its graph, where it is made of parameters
    parameters: tuple[str, ...] = ()  # of which it is made
    scale: Tensor | None = None  # per row, where BatchNorm was folded into the weight
    late: Tensor | None = None  # the same, where it is folded into the output, because the weight is larger
    batch: BatchDimension | None = None  # None: the first dimension
    recorded: bool = False
    changed: bool = False  # the output was changed in place
    passed: Tensor | None = None  # the gradient that came by way of the computed output
    kept: Tensor | None = None  # the output, where it is asked for, and its version when it was as it is
    version: int = 0
    used: bool = False  # by something through which a gradient comes where values are cut off afterwards
    added: tuple[Tensor, int] | None = None  # what was added to it in place, and its version then

    def __call__(self, x: Tensor) -> Tensor:
        """Output of the layer."""
        self.recorder.record(self, x)
        return _Output.apply(x, self.recorder.token, self)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters whose gradient this call has a part in."""
        return self.parameters or (self.name,)

    @property
    def is_normalized(self) -> bool:
        """Whether BatchNorm is in its output."""
        return self.scale is not None or self.late is not None

    def rows(self, x: Tensor) -> Tensor:
        """The weight, with a row of its own for each of an input that it meets element by element."""
        self.recorder.record(self, x)
        return _Rows.apply(self.recorder.token, self, x)

    def deferred(self, x: Tensor) -> DeferredConvolution:
        """Output of the layer, computed when it is asked for."""
        return _DeferredOutput.apply(x, self.recorder.token, self)

    def compute(self, x: Tensor) -> Tensor:
        """Values of the output."""
        if self.late is None:
            output = self.layer.forward(x, self.weight, self.bias)
        else:
            output = affine(self.layer.forward(x, self.weight, None), self.late, self.bias)
        if self.recorder.kept is not None:
            self.recorder.kept.keep(self, output)
        return output

    def products(self, x: Tensor, g: Tensor) -> Tensor:
        """The output without its bias, times its gradient: over positions, the sum of weight times gradient.

        Of a convolution it is summed over positions here, of a linear layer where its positions are known.

        An output that was written into is computed again, unless by a function that only cuts off values: where it did
        the gradient is zero; or by the addition of something that is still there.
        """
        added, version = self.added or (None, 0)
        if self.kept is None or self.kept._version != self.version or (self.added and added._version != version):
            sums = self.layer.sums_with(self.layer.forward(x, self.weight, None), None, g)
            return sums if self.late is None else sums.mul_(self.late)
        bias = None if self.bias is None else self.bias.detach()
        sums = self.layer.sums_with(self.kept, bias, g)
        return sums if added is None else sums.sub_(self.layer.sums_with(added, None, g))


class _Output(torch.autograd.Function):
    """The output of a call. Its backward pass hands the call's input and gradient to the recorder."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, call: LayerCall) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return call.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple:
        (x,), call, ctx.call = ctx.saved_tensors, ctx.call, None  # the graph outlives this, its weight need not
        if call.changed and (call.passed is None or call.passed.data_ptr() != g.data_ptr()):
            raise Unsupported("an output was changed in place, and then used behind PyTorch's function overrides")
        weight, call.passed = call.weight, None
        call.recorder.collect_products(call, x, g)
        if call.late is not None:
            g = affine(g, call.late)
        if call.recorder.bf16 and call.layer.groups == 1:  # depthwise convolutions are slower in bfloat16
            x, g, weight = x.bfloat16(), g.bfloat16(), weight.bfloat16()
        call.recorder.collect(call, x, g)
        return call.layer.input_gradient(x, g, weight) if ctx.needs_input_grad[0] else None, None, None


def affine(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Values scaled and shifted, each channel by its own."""
    shape = (-1, *[1] * (x.dim() - 2))
    scale = scale.reshape(shape)
    output = (x * scale if shift is None else torch.addcmul(shift.reshape(shape), x, scale)).to(x.dtype)
    if x.dim() > 2 and x.shape[2:].numel() == 1:  # no memory format: the next convolution copies no weights
        return torch.ops.aten._unsafe_view(output.flatten(1), x.shape)
    return output


class _Rows(torch.autograd.Function):
    """The rows of a table, whose gradient tells the samples apart."""

    @staticmethod
    def forward(ctx, token: Tensor, call: LayerCall, x: Tensor) -> Tensor:
        ctx.call = call
        return call.layer.forward(x, call.weight, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple:
        ctx.call.recorder.collect(ctx.call, g, g)
        return None, None, None


class _DeferredOutput(_Output):
    """The same, of an output that is computed later: whoever uses it, the gradient comes here."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, call: LayerCall) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return DeferredConvolution(call, x)


class _Computed(torch.autograd.Function):
    """The values of a deferred output, behind it in the graph."""

    @staticmethod
    def forward(ctx, deferred: DeferredConvolution, call: LayerCall, x: Tensor) -> Tensor:
        ctx.call = call
        return call.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple:
        ctx.call.passed, ctx.call = g, None
        return g, None, None


class DeferredConvolution(Tensor):
    """The output of a convolution not yet computed, so that a BatchNorm that asks for it can be folded in.

    Anything but a BatchNorm gets the plain output, computed when first asked for. If both ask, the weight is used
    twice, and its gradients are added up like those of any weight that is used twice. It has its place in autograd's
    graph: what PyTorch's overrides do not show, as an own autograd function, finds its way back too.
    """

    @staticmethod
    def __new__(cls, call: LayerCall, x: Tensor):
        """Make a tensor that has a shape, and no values yet."""
        shape = call.layer.output_shape(x.shape)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)

    def __init__(self, call: LayerCall, x: Tensor):
        self._call, self._x, self._version_of_x, self._value = call, x, x._version, None

    def input(self) -> Tensor:
        """Input of the call, as it was."""
        if self._x._version != self._version_of_x:
            raise Unsupported("the input of a convolution was modified in place before its output was used")
        return self._x

    def value(self) -> Tensor:
        """The plain output, as it would be had it been computed at once."""
        if self._value is None:
            with torch.enable_grad():
                self._call.recorder.record(self._call, self.input())
                self._value = _Computed.apply(self, self._call, self._x.detach())
        self._call.changed |= self._value._version > 0
        return self._value

    @property
    def unused_call(self) -> LayerCall | None:
        """The call, unless its output has been computed."""
        return self._call if self._value is None else None

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in METADATA:
            return super().__torch_function__(function, kinds, args, kwargs)
        args, kwargs = computed((args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        raise Unsupported(f"{function} asked for the output of a convolution behind PyTorch's function overrides")


def computed(tree):
    """The same arguments or outputs, with plain tensors for deferred ones."""
    return tree_map_only(DeferredConvolution, DeferredConvolution.value, tree)


METADATA = {  # what a deferred output answers without being computed
    Tensor.dim,
    Tensor.size,
    *(getattr(Tensor, k).__get__ for k in ("shape", "ndim", "dtype", "device")),
}
