r"""Weight gradients of each sample, for one call of a convolution or a linear layer.

Autograd sums the weight gradient over the batch. Here it is formed for each sample from what the call saw, its input
:math:`x`, and what came back, the gradient :math:`g` of its output,

.. math:: \frac{\partial L_b}{\partial W_{of}} = \sum_p g_{bpo} \, c_{bpf},

where :math:`p` runs over the positions of sample :math:`b` and :math:`c_{bp}` is the patch of :math:`x` under position
:math:`p` (a linear layer's patch is its input vector). A saliency profile needs only the sum of absolute values
over each row :math:`o`, so the gradients are made in blocks that stay in the cache, reduced, and overwritten.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a block of weight gradients: 2 MB on a CPU, the second-level cache of one core. A GPU wants long kernels.
CPU_BLOCK, GPU_BLOCK = 2**19, 2**26
SMALL = 2**19  # multiplications of a matrix product that is not worth a call of its own
LARGE = 2**16  # elements of an output of a sample that are worth one
_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Convolution:
    """A convolution's weight shape and geometry, in one, two or three dimensions; transposed if ``grown`` is given."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    grown: tuple[int, ...] | None = None  # its output padding; its weight gradients are not made here

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for an input of this shape."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.shape[2:], strict=True)]
        size = zip(shape[2:], self.padding, spans, self.stride, strict=True)
        return (shape[0], self.shape[0], *((n + 2 * p - span - 1) // s + 1 for n, p, span, s in size))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the convolution."""
        return torch.convolution(x, weight, bias, *self._geometry)

    def input_gradient(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the loss to the input."""
        return torch.ops.aten.convolution_backward(g, x, weight, None, *self._geometry, (True, False, False))[0]

    def sums_with(self, output: Tensor, shift: Tensor | None, g: Tensor) -> Tensor:
        r"""Sum over positions of :math:`g_{bop} (z_{bop} - s_o)`, ``(B, O)``, of values z and a shift of each filter.

        That is the gradient to the gain of a BatchNorm of mean s and variance one, which PyTorch has for a CPU in one
        pass over the memory. It sums over samples too: worth a call for each where they are large.
        """
        shift = g.new_zeros(g.shape[1]) if shift is None else shift
        if g.is_cuda or g.dtype in _LOW or g[0].numel() < LARGE:
            return (output - shift.reshape(-1, *[1] * (g.dim() - 2))).mul_(g).flatten(2).sum(2)
        options = (None, shift, torch.ones_like(shift), None, None, False, 0.0, (False, True, False))
        pairs = zip(g.split(1), output.split(1), strict=True)
        return torch.stack([torch.ops.aten.native_batch_norm_backward(*pair, *options)[1] for pair in pairs])

    def row_sums(self, x: Tensor, g: Tensor, signed: bool) -> Tensor:
        """Sum over each filter of the (absolute) gradient of each sample, ``(B, O)``.

        Whichever is quickest; ``make bench`` shows it by the networks whose time is mostly of one of them:

        ===================  ==============================================  ====================================
        way                  taken where                                     seen in
        ===================  ==============================================  ====================================
        by im2col            kernel 1×1; on a GPU any kernel, of one group;  resnet50; all with --device cuda
                             in low precision; little work
        by PyTorch's kernel  groups; positions > 8 filters                   mobilenet_v2; the stems
        per tap              at most 4 positions                             resnet18 at 32 pixels
        on a shifted grid    the rest                                        resnet18 and vgg19 at 224 pixels
        ===================  ==============================================  ====================================
        """
        positions, pointwise = g[0, 0].numel(), math.prod(self.shape[2:]) == 1
        little = positions * self.shape[0] * self.shape[1] < SMALL
        ways = (
            (self._by_im2col, self.groups == 1 and (x.is_cuda or pointwise)),
            (self._by_whole_gradients, self.groups > 1 or positions > 8 * self.shape[0]),
            (self._per_tap, positions <= 4),
            (self._by_im2col, x.dtype in _LOW or little),
            (self._on_a_shifted_grid, True),
        )
        return next(way for way, taken in ways if taken)(x, g, signed)

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Weight gradient of each sample, ``(B, *weight.shape)``."""
        parts = list(self._gradients(x, g))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gradients(self, x: Tensor, g: Tensor) -> Iterator[Tensor]:
        """Weight gradients, sample by sample, or a few samples at once where each is little work."""
        if self.groups == 1 or g[0, 0].numel() > 64:
            yield from (self._gradient(x[b : b + 1], g[b : b + 1])[None] for b in range(len(x)))
            return
        step = max(1, 2**22 // math.prod(self.shape))  # gradients of 16 MB
        for xs, gs in zip(x.split(step), g.split(step), strict=True):
            n = len(xs)  # samples become groups
            several = replace(self, shape=(n * self.shape[0], *self.shape[1:]), groups=n * self.groups)
            yield several._gradient(xs.flatten(0, 1)[None], gs.flatten(0, 1)[None]).unflatten(0, (n, -1))

    @property
    def _geometry(self) -> tuple:
        grown = self.grown or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.grown is not None, grown, self.groups

    def _gradient(self, x: Tensor, g: Tensor) -> Tensor:
        like = x.new_empty(()).expand(self.shape)  # only its shape is read
        if x.dtype == torch.float32 and x.dim() == 4 and not x.is_contiguous():  # else oneDNN copies it
            like = torch.empty_like(like, memory_format=torch.channels_last)
        mask = (False, True, False)
        return torch.ops.aten.convolution_backward(g, x, like, None, *self._geometry, mask)[1]

    def _by_whole_gradients(self, x: Tensor, g: Tensor, signed: bool) -> Tensor:
        """Sum over filters of gradients that PyTorch's own kernel makes."""
        return torch.cat([sum_rows(gradient, signed) for gradient in self._gradients(x, g)])

    def _by_im2col(self, x: Tensor, g: Tensor, signed: bool) -> Tensor:
        """Sum over filters by matrix products, a few samples at a time: the patches must not fill the memory."""
        g = g.flatten(2).transpose(1, 2)  # (B, P, O)
        row = math.prod(self.shape[1:])
        step = max(1, _block(x) // (g.shape[1] * row))
        parts = zip(x.split(step), g.split(step), strict=True)
        return torch.cat([sums_of_products(self._patches(a), b, signed) for a, b in parts])

    def _per_tap(self, x: Tensor, g: Tensor, signed: bool) -> Tensor:
        """Sum over filters tap by tap, without the positions where a tap meets padding: of few, they are most."""
        sums = g.new_zeros(len(g), self.shape[0])
        for tap in itertools.product(*(range(k) for k in self.shape[2:])):
            offsets = [t * d - p for t, d, p in zip(tap, self.dilation, self.padding, strict=True)]
            outputs, inputs = [slice(None)] * 2, [slice(None)] * 2
            for size, count, offset, s in zip(x.shape[2:], g.shape[2:], offsets, self.stride, strict=True):
                first = max(0, math.ceil(-offset / s))
                stop = min(count, (size - 1 - offset) // s + 1)
                outputs.append(slice(first, max(first, stop)))
                inputs.append(slice(first * s + offset, max(first, stop) * s + offset, s))
            seen = g[tuple(outputs)].flatten(2).mT
            if seen.numel():
                patch = x[tuple(inputs)].flatten(2).mT
                sums += sums_of_products(patch, seen, signed)
        return sums

    def _on_a_shifted_grid(self, x: Tensor, g: Tensor, signed: bool) -> Tensor:
        """Sum over filters tap by tap, without copies of patches.

        Input and output gradient are laid on one grid, the first with its padding, the second with zeros at its ends.
        Counted along the grid, what a tap sees is then the input shifted by a fixed number of places. Of a strided
        convolution the input is as many grids as there are phases.
        """
        reach = [d * (k - 1) // s for d, k, s in zip(self.dilation, self.shape[2:], self.stride, strict=True)]
        grid = [n + r for n, r in zip(g.shape[2:], reach, strict=True)]
        sides = zip(grid, self.stride, self.padding, x.shape[2:], strict=True)
        x = F.pad(x.movedim(1, -1), _pads((p, m * s - p - n) for m, s, p, n in sides))
        for axis, (m, s) in enumerate(zip(grid, self.stride, strict=True)):
            x = x.unflatten(1 + 2 * axis, (m, s)).movedim(2 + 2 * axis, axis)  # phases first: (*S, B, *M, C)
        x = x.flatten(-1 - len(grid), -2)
        g = F.pad(g.movedim(1, -1), _pads((0, r) for r in reach)).flatten(1, -2)
        steps = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        length = g.shape[1] - sum(r * step for r, step in zip(reach, steps, strict=True))
        g, sums = g[:, :length], g.new_zeros(len(g), self.shape[0])
        for tap in itertools.product(*(range(k) for k in self.shape[2:])):
            at = [t * d for t, d in zip(tap, self.dilation, strict=True)]
            phase = tuple(a % s for a, s in zip(at, self.stride, strict=True))
            shift = sum(a // s * step for a, s, step in zip(at, self.stride, steps, strict=True))
            sums += sums_of_products(x[phase][:, shift : shift + length], g, signed)
        return sums

    def _patches(self, x: Tensor) -> Tensor:
        """What each output position sees, ``(B, P, C·K)``: a copy, or for 1×1 a view. The order of C·K is free."""
        dims = len(self.stride)
        channels_last = x.stride(1) == 1
        if any(self.padding):
            x = F.pad(x, _pads((p, p) for p in self.padding)[2:])
        for axis, (k, s, d) in enumerate(zip(self.shape[2:], self.stride, self.dilation, strict=True), start=2):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        # (B, C, *P, *K): keep as the fastest dimension the one that is so in memory
        if channels_last:
            return x.movedim(1, -1).flatten(dims + 1).flatten(1, dims)
        return x.movedim(tuple(range(2, dims + 2)), tuple(range(-dims, 0))).flatten(-dims).flatten(1, -2).mT


@dataclass(frozen=True)
class Linear:
    """A linear layer on ``(B, P, F)``: P positions of each sample share the weight."""

    shape: tuple[int, int]
    groups: int = 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the layer. No view of the product, which nobody else has: only so may it be changed in place."""
        output = F.linear(x, weight, bias)
        return torch.ops.aten._unsafe_view(output, output.shape)

    def input_gradient(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the loss to the input."""
        return g @ weight

    def sums_with(self, output: Tensor, shift: Tensor | None, g: Tensor) -> Tensor:
        """Output without a shift of each row, times gradient; positions are summed over where the batch is known."""
        return output * g if shift is None else (output - shift).mul_(g)

    def row_sums(self, x: Tensor, g: Tensor, signed: bool) -> Tensor:
        """Sum over each row of the (absolute) gradient of each sample, ``(B, O)``."""
        return sums_of_products(x, g, signed)

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Weight gradient of each sample, ``(B, O, F)``."""
        return g.mT @ x


@dataclass(frozen=True)
class Table:
    """A tensor that meets an input element by element: the same for each row, or ``by_row`` another one for each."""

    shape: tuple[int, ...]
    by_row: bool
    groups: int = 1

    def forward(self, x: Tensor, weight: Tensor, bias: None) -> Tensor:
        """A row for each of the input."""
        if weight.dim() < x.dim():
            weight = weight.reshape(*[1] * (x.dim() - weight.dim()), *weight.shape)
        return weight.expand(len(x), *weight.shape[1:])

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of each sample, ``(B, *shape)``, or ``by_row`` those of its rows alone."""
        return g if self.by_row else g.reshape(len(g), -1, *self.shape).sum(1)


def sums_of_products(patches: Tensor, g: Tensor, signed: bool) -> Tensor:
    r"""Sum over f of :math:`|\sum_p g_{bpo} c_{bpf}|`: (B, P, F) and (B, P, O) to (B, O), in blocks."""
    samples, positions, rows, columns = *g.shape, patches.shape[2]
    if signed:  # without absolute values the sums change places
        return (g * patches.sum(2, keepdim=True)).sum(1)
    if positions == 1:  # the gradient is an outer product
        return (g.abs() * patches.abs().sum(2, keepdim=True))[:, 0]
    if samples * rows * columns <= _block(g):
        return torch.bmm(g.mT, patches).abs_().sum(2)
    if columns > 2048 and positions > 64 and not g.is_cuda:  # wide and low blocks are slow to multiply
        return sum(sums_of_products(part, g, signed) for part in patches.split(768, 2))
    many = max(1, _block(g) // (rows * columns))  # whole samples, or else parts of one, of like size
    few = math.ceil(rows / math.ceil(rows * columns / _block(g)))
    block = g.new_empty(min(many, samples), few, columns)
    sums = g.new_empty(samples, rows)
    for left, right, out in zip(g.mT.split(many), patches.split(many), sums.split(many), strict=True):
        for some, of_some in zip(left.split(few, 1), out.split(few, 1), strict=True):
            gradients = block[: len(some), : some.shape[1]]
            torch.bmm(some, right, out=gradients)
            torch.sum(gradients.abs_(), 2, out=of_some)
    return sums


def sum_rows(gradients: Tensor, signed: bool) -> Tensor:
    """Sum over rows of (absolute) gradients, which are written into."""
    gradients = gradients if signed else gradients.abs_()
    return gradients.reshape(*gradients.shape[:2], -1).sum(2)


def _pads(sides: Iterable[tuple[int, int]]) -> list[int]:
    """Padding as `F.pad` wants it, of a tensor whose last dimension is of channels."""
    return [0, 0, *itertools.chain(*reversed(list(sides)))]


def _block(values: Tensor) -> int:
    return GPU_BLOCK if values.is_cuda else CPU_BLOCK
