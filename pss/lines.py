"""Lines through weight space: a direction restricted to some units, points on it, and the first that corrects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pss.editing import restored
from pss.engine import growing as _variants
from pss.fisher import Weights
from pss.units import Units

GRID = 25  # step sizes tried first, over six decades


@dataclass(frozen=True)
class Line:
    """A direction, as long as the weights that it changes: parameter name to change, and that length."""

    delta: dict[str, Tensor]
    length: float


def line_of(
    model: nn.Module, gradients: Weights, b: int, mask: dict[str, Tensor], curvature: Weights | None
) -> Line | None:
    """The line of image b through the masked parameters, None where the gradient is zero, or whole layers are.

    Its length is that of the weights; where all of these are zero (pruned units), that of as many usual ones.
    """
    delta, weight, size = {}, 0.0, 0.0
    for name, chosen in mask.items():
        g = gradients[name][b].double()
        g = g if curvature is None else g / curvature[name].to(g.device)
        delta[name] = -torch.where(chosen, g, 0)
        weight += float(model.get_parameter(name).detach()[chosen].double().square().sum())
        size += float(delta[name].square().sum())
    if not weight > 0:
        whole = {name: model.get_parameter(name).detach().double().square().mean() for name in mask}
        weight = sum(float(whole[name] * chosen.sum()) for name, chosen in mask.items())
    if not (size > 0 and weight > 0):
        return None
    scale = (weight / size) ** 0.5
    like = model.get_parameter(next(iter(mask))).dtype
    return Line({name: (d * scale).to(like) for name, d in delta.items()}, weight**0.5)


def unit_mask(model: nn.Module, units: Units, ids: Sequence[int]) -> dict[str, Tensor]:
    """Where the units lie in their parameters."""
    mask: dict[str, Tensor] = {}
    for unit in ids:
        number, j = units.locate(unit)
        layer = units.layers[number]
        if layer.parameter not in mask:
            mask[layer.parameter] = torch.zeros_like(model.get_parameter(layer.parameter), dtype=torch.bool)
        mask[layer.parameter][layer.index(j)] = True
    return mask


def smallest(
    corrected: Callable[[Tensor], Tensor],
    count: int,
    max_relative_step: float,
    tolerance: float = 0.05,
    decades: int = 6,
) -> list[float]:
    """First size at which each image is corrected, to a relative tolerance from above; inf where there is none.

    ``corrected`` takes sizes (count, S), ascending, and says for each whether it corrects.
    """
    low, high = torch.zeros(count, dtype=torch.float64), torch.full((count,), torch.inf, dtype=torch.float64)
    sizes = max_relative_step * torch.logspace(-decades, 0, GRID, dtype=torch.float64).expand(count, -1)
    for _ in range(8):  # the grid, the finer ones, and what lies below the grid
        ends = torch.zeros(count, 1, dtype=torch.bool)
        hits = torch.cat([ends, corrected(sizes).cpu(), ~ends], dim=1)
        known = torch.cat([low[:, None], sizes, high[:, None]], dim=1)
        first = hits.int().argmax(dim=1, keepdim=True)  # the first of equal ones
        low, high = known.gather(1, first - 1)[:, 0], known.gather(1, first)[:, 0]
        found = high.isfinite()
        if not (found & (high > low * (1 + tolerance))).any():
            break
        top = torch.where(found, high, max_relative_step)
        bottom = torch.where(found & (low > 0), low, top * 10.0**-decades)
        points = torch.arange(1, 12, dtype=torch.float64) / 12
        sizes = bottom[:, None] * (top / bottom)[:, None] ** points
    return high.tolist()


@contextmanager
def shifted(model: nn.Module, delta: Weights, size: float = 1.0) -> Iterator[nn.Module]:
    """Add ``size`` times the changes to the named parameters; bit-identical afterwards."""
    with torch.no_grad(), restored([model.get_parameter(name).data for name in delta]) as weights:
        for weight, change in zip(weights, delta.values(), strict=True):
            weight.add_(change, alpha=size)
        yield model


def runs(delta: Tensor) -> list[tuple[int, Tensor]]:
    """Neighbouring rows that change, with the first of each run."""
    if delta.dim() < 2:
        raise _variants.NotCarried("a bias or a gain is edited")
    rows = np.flatnonzero((delta != 0).flatten(1).any(dim=1).cpu().numpy())
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
    return [(int(run[0]), delta[int(run[0]) : int(run[-1]) + 1]) for run in runs]


def predicts(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is predicted, over the last dimension; never where a number overflowed."""
    return (logits.argmax(dim=-1) == labels) & logits.isfinite().all(dim=-1)
