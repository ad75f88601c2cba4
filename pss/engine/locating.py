"""Where the batch is in the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pss.engine.calls import LayerCall, Unsupported
from pss.engine.kernels import Linear

if TYPE_CHECKING:
    from pss.engine.recorder import GradientRecorder


@dataclass(frozen=True)
class BatchDimension:
    """Where the samples are in an input whose first dimension is not simply the batch.

    Along ``dim`` lie ``samples`` times ``parts`` slices: the parts of one sample after the other, or, with
    ``parts_first``, part by part those of all samples.
    """

    dim: int
    samples: int
    parts: int
    parts_first: bool = False

    def first(self, t: Tensor) -> Tensor:
        """Bring the samples to the front, and their parts after them, of an input or its gradient."""
        sizes = (self.parts, self.samples) if self.parts_first else (self.samples, self.parts)
        return t.unflatten(self.dim, sizes).movedim(self.dim + self.parts_first, 0)


def locate_batch(x: Tensor, alone: Tensor, samples: int, dims: int) -> BatchDimension | str:
    """The dimension that grows with the batch, and the order of its slices; or why that is not known.

    Parameters
    ----------
    x, alone : Tensor
        Input of a layer for a batch, and for its last sample alone.
    samples : int
        Size of the batch.
    dims : int
        The batch is in one of the first so many dimensions.
    """
    same_rank = x.dim() == alone.dim()
    where = [d for d in range(x.dim()) if x.shape[d] != alone.shape[d]] if same_rank else []
    if len(where) != 1 or where[0] >= dims or x.shape[where[0]] != samples * alone.shape[where[0]]:
        return f"a layer's input has shape {tuple(x.shape)} for {samples} samples and {tuple(alone.shape)} for one"
    dim, parts = where[0], alone.shape[where[0]]
    orders = [BatchDimension(dim, samples, parts, order) for order in ((False, True) if parts > 1 else (False,))]
    fits = [order for order in orders if close(order.first(x)[-1], alone)]
    return fits[0] if len(fits) == 1 else f"cannot tell the samples apart in a layer's input of shape {tuple(x.shape)}"


def keeps_order(where: BatchDimension, x: Tensor, shifted: Tensor) -> bool:
    """Whether an input's samples move on by one place where those of the batch do."""
    if x.shape != shifted.shape:
        return False
    rows, moved = where.first(x), where.first(shifted)
    return close(moved[1:], rows[:-1]) and close(moved[:1], rows[-1:])  # no copy of them all


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which depends on the size of a batch."""
    eps = torch.finfo(b.dtype).eps
    if b.is_cuda and b.dtype == torch.float32:
        eps = 2**-10  # of TensorFloat-32, in which torch computes convolutions on a GPU unless it is told not to
    return a.shape == b.shape and bool(_largest(a - b) <= eps**0.5 * _largest(b))


def _largest(x: Tensor) -> Tensor:
    return torch.stack(torch.aminmax(x)).abs().max()  # in one pass; a norm takes ten times as long


class Locator:
    """Finds the batch in the inputs of recorded calls, from two more forward passes.

    The last sample alone shows which dimension grows with the batch, and what its rows must be; the batch with its
    samples moved on by one place shows that rows follow samples. What fails either is no batch: a table as long as
    one, or samples that the network has sorted.
    """

    def __init__(self, recorder: GradientRecorder):
        self.calls, self.samples = list(recorder.calls), recorder.samples
        self.found: list[BatchDimension | str] = []
        self.moved = 0

    def alone(self, number: int, call: LayerCall, x: Tensor) -> None:
        """Visit a call of the last sample alone."""
        dims = x.dim() - 1 if isinstance(call.layer, Linear) else 1
        self.found.append(locate_batch(self._same(number, call), x, self.samples, dims))

    def shifted(self, number: int, call: LayerCall, x: Tensor) -> None:
        """Visit a call of the batch whose samples were moved on by one place."""
        of_batch, where = self._same(number, call), self.found[number]
        self.moved += 1
        if not isinstance(where, str) and not keeps_order(where, of_batch, x):
            self.found[number] = "a layer's input does not keep the order of the samples"

    def batches(self) -> list[BatchDimension | str | None]:
        """Where the batch is in each call: None where it is the first dimension, a reason where it is not known."""
        if not len(self.found) == self.moved == len(self.calls):
            raise Unsupported(_OTHER_COURSE)
        plain = BatchDimension(0, self.samples, 1)
        return [None if where == plain else where for where in self.found]

    def _same(self, number: int, call: LayerCall) -> Tensor:
        if number >= len(self.calls) or self.calls[number][0].name != call.name:
            raise Unsupported(_OTHER_COURSE)
        return self.calls[number][1]


_OTHER_COURSE = "the network takes another course for one sample than for a batch, or for samples in another order"
