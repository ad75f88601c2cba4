"""Where the batch is in the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    return x.shape == shifted.shape and close(where.first(shifted), where.first(x).roll(1, 0))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which depends on the size of a batch."""
    return a.shape == b.shape and bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max())
