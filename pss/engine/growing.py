r"""One forward pass that carries every edited variant of a network.

Variant :math:`k` of image :math:`i` is the network with the first :math:`k` of the image's edits. It differs
from variant :math:`k - 1` only from the layer of edit :math:`k` on, so before that layer both share one row of
the batch. The batch grows where it must: a layer with edits splits the rows, and adds to each edited output
channel what the change of its filter gives, which by linearity is the convolution with the change. All
other layers run once, on the rows that there are.

Each tensor remembers which rows it has: sorted keys ``image * variants + k``. A row stands for its own k and
those after it, up to the next key. Where tensors with different rows meet (a skip connection), both
are expanded to the union.

The same pass gives the gradient of each image to its own filters: let the changes be zeros that require one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary


class NotCarried(RuntimeError):
    """The model does something with its edited parameters or its batch that the growing batch cannot follow."""


class Unseen(NotCarried):
    """Edited parameters that no torch function was seen to use: idle, or used out of sight."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__(f"{len(parameters)} of the edited parameters were not seen in the forward pass")
        self.parameters = parameters


@dataclass(frozen=True)
class Change:
    """Change of some filters of one weight, in the variants of one image from ``k`` on.

    ``step`` is added to ``weight[start : start + len(step)]``.
    """

    image: int
    k: int
    start: int
    step: Tensor


def forward(model: nn.Module, images: Tensor, changes: dict[nn.Parameter, list[Change]], variants: int) -> Tensor:
    """Outputs of every variant of every image, shape (B, variants, C).

    Raises
    ------
    NotCarried
        If an edited parameter is used by anything but a convolution or linear call, or the rows of the batch are
        rearranged before an edited layer.
    Unseen
        If an edited parameter is not used by any torch function.
    """
    with _Carry(len(images), changes, variants) as carry:
        outputs = model(carry.start(images))
    if not isinstance(outputs, Tensor) or carry.rows_of(outputs) is None:
        raise NotCarried("the model's output is not a tensor made from its input by torch functions")
    if unseen := [parameter for parameter in changes if id(parameter) not in carry.seen]:
        raise Unseen(unseen)
    every = np.arange(len(images) * variants)
    return carry.expand(outputs, every).unflatten(0, (len(images), variants))


class _Carry(TorchFunctionMode):
    """Sees every torch function that the model calls, and keeps count of the rows."""

    def __init__(self, images: int, changes: dict[nn.Parameter, list[Change]], variants: int):
        super().__init__()
        self.images, self.variants = images, variants
        self.changes = {id(parameter): found for parameter, found in changes.items()}
        self.seen: set[int] = set()
        self.rows = WeakTensorKeyDictionary()  # keys of the rows of every tensor that has any

    def start(self, images: Tensor) -> Tensor:
        """The images as rows of variant 0, without marking the caller's tensor."""
        return self._mark(images.detach().view_as(images), np.arange(self.images) * self.variants)

    def rows_of(self, tensor: Tensor) -> np.ndarray | None:
        """Keys of the rows of a tensor, None if it has none (a parameter, a constant)."""
        return self.rows.get(tensor)

    def _mark(self, tensor: Tensor, rows: np.ndarray) -> Tensor:
        self.rows[tensor] = rows
        return tensor

    def expand(self, tensor: Tensor, rows: np.ndarray) -> Tensor:
        """Repeat rows of the tensor so that it has all of ``rows``."""
        have = self.rows_of(tensor)
        if tensor.dim() == 0 or tensor.shape[0] != len(have):
            raise NotCarried("the first dimension is no longer the batch: the model keeps or changes its size")
        if len(have) == len(rows):
            return tensor
        source = np.searchsorted(have, rows, side="right") - 1
        return self._mark(tensor.index_select(0, torch.as_tensor(source, device=tensor.device)), rows)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        in_place = _in_place(func, kwargs)
        rows = _union([r for r in map(self.rows_of, inputs) if r is not None])
        if rows is not None and func in _DECISIONS and len(rows) > 1:
            raise NotCarried(f"the model reads values of a whole batch ({func.__name__})")
        if rows is not None and any(r is not None and len(r) < len(rows) for r in map(self.rows_of, inputs)):
            if in_place:
                self._grow(args[0], rows, func)
            args, kwargs = tree_map_only(Tensor, lambda t: self._follow(t, rows), (args, kwargs))
        if rows is not None and func in _VIEWS:
            args = self._resized(args, len(rows))
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(args[0] if in_place else result) if isinstance(t, Tensor)]
        if not outputs:  # a look at a shape, a dtype, …
            return result
        if edited := [id(t) for t in inputs if id(t) in self.changes]:
            return self._edit(func, args, kwargs, result, edited)
        if rows is not None:
            for output in outputs:
                self._mark(output, rows)
        return result

    def _resized(self, args: tuple, count: int) -> tuple:
        """A view for the rows that there are now, where the model names the size that its batch had at first."""
        tensor, *shape = args
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = list(shape[0])
        if count == self.images or not shape or shape[0] != self.images or self.rows_of(tensor) is None:
            return args
        return (tensor, (count, *shape[1:]))

    def _follow(self, tensor: Tensor, rows: np.ndarray) -> Tensor:
        """Expand an argument unless it is a parameter or constant, or has the rows already."""
        have = self.rows_of(tensor)
        return tensor if have is None or len(have) == len(rows) else self.expand(tensor, rows)

    def _grow(self, tensor: Tensor, rows: np.ndarray, func: Any) -> None:
        """Give the tensor itself more rows, because an in-place function is about to write into it."""
        if self.rows_of(tensor) is None:
            raise NotCarried(f"{getattr(func, '__name__', func)} writes into a tensor without rows")
        tensor.data = self.expand(tensor, rows)
        self._mark(tensor, rows)

    def _edit(self, func: Any, args: tuple, kwargs: dict, output: Tensor, edited: list[int]) -> Tensor:
        """Split the rows of the layer's output, and add to the edited channels what the changes give."""
        if func not in _LAYERS or len(edited) > 1:
            raise NotCarried(f"{getattr(func, '__name__', func)} uses an edited parameter")
        x, weight, options = _LAYERS[func](*args, **kwargs)
        have = self.rows_of(x)
        if id(weight) != edited[0] or have is None or x.shape[0] != len(have):
            raise NotCarried("an edited layer whose weight is computed, or whose input is no batch")
        self.seen.add(edited[0])
        changes = self.changes[edited[0]]
        if changes[0].step.requires_grad and not torch.is_grad_enabled():
            raise NotCarried("an edited layer inside an autograd function of the model's own")
        starts = [c.image * self.variants + c.k for c in changes]
        rows = np.union1d(have, starts)
        output = self.expand(self._mark(output, have), rows)

        parts, places, done = [], [], 0
        for image in sorted({c.image for c in changes}):
            own = [c for c in changes if c.image == image]
            keys = [image * self.variants, (image + 1) * self.variants]
            first, last = np.searchsorted(have, keys)
            filters = np.concatenate([np.arange(c.start, c.start + len(c.step)) for c in own])
            # The changes are zero in the gradient pass, and so is their part of the gradient to x: spare it.
            x_own, steps = x[first:last].detach(), torch.cat([c.step for c in own])
            parts.append(_channels(func, x_own, weight, steps, filters, options).flatten(0, 1))

            since = np.repeat([keys[0] + c.k for c in own], [len(c.step) for c in own])
            r = np.arange(*np.searchsorted(rows, keys))
            row, which = np.nonzero(rows[r][:, None] >= since)  # row r[row] has the change of filters[which]
            source = np.searchsorted(have, rows[r[row]], side="right") - 1 - first
            places.append([r[row], filters[which], done + source * len(filters) + which])
            done += len(parts[-1])
        row, channel, part = torch.as_tensor(np.concatenate(places, axis=1), device=output.device)
        channels_first = output.movedim(-1, 1) if func is F.linear else output  # a view
        channels_first.index_put_((row, channel), torch.cat(parts)[part], accumulate=True)
        return self._mark(output, rows)


def _channels(func: Any, x: Tensor, weight: Tensor, steps: Tensor, filters: np.ndarray, options: dict) -> Tensor:
    """The layer's output for these filters alone, without bias, shape (rows, filters, …)."""
    if func is F.linear:
        return F.linear(x, steps).movedim(-1, 1)
    groups = options["groups"]
    if groups > 1:  # give each filter the input channels of its own group
        group = filters // (weight.shape[0] // groups)
        inputs = group[:, None] * weight.shape[1] + np.arange(weight.shape[1])
        x, groups = x[:, torch.as_tensor(inputs.ravel(), device=x.device)], len(filters)
    return func(x, steps, None, **{**options, "groups": groups})


def _convolution(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return input, weight, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def _linear(input, weight, bias=None):
    return input, weight, {}


_DECISIONS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
_VIEWS = {Tensor.view, Tensor.reshape, torch.reshape}
_LAYERS = {F.conv1d: _convolution, F.conv2d: _convolution, F.conv3d: _convolution, F.linear: _linear}


def _in_place(func: Any, kwargs: dict) -> bool:
    """Whether a torch function writes into its first argument (``a += b`` arrives as ``add_``)."""
    if kwargs.get("out") is not None:
        raise NotCarried("a function writes into out=")
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _union(rows: Sequence[np.ndarray]) -> np.ndarray | None:
    if not rows:
        return None
    largest = max(rows, key=len)
    if all(r is largest for r in rows):
        return largest
    union = np.unique(np.concatenate(rows))
    return largest if len(union) == len(largest) else union
