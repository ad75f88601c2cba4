"""What a unit is: a convolution filter, a row of a linear layer, an attention head.

Ranking, editing and plots all go through one registry, which maps

    unit id  <->  slice of a parameter  <->  layer  <->  stage

so that what is ranked is what is edited. Ids count up in the order in which the parameters were registered, the
order of the published statistics. Units of equal shape in one parameter are a `UnitGroup` (`pss.engine.groups`).

A unit is made of weights only, as in both papers: biases, and the scales and shifts of normalizations, belong to none.
A pruned head of values, for one, still adds its bias.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from pss.engine.checks import check_model
from pss.engine.groups import KINDS, UnitGroup, groups_of, refuse_overlap
from pss.engine.layers import stage_names
from pss.storage.digests import digest


class Units:
    """The units of a model, in one numbering.

    Use `Units.of`. Ids are ``0 .. len(units) - 1``.
    """

    def __init__(self, layers: Sequence[UnitGroup], stages: Sequence[str], kind: str = "own"):
        if not layers:
            raise ValueError("no units: give at least one layer (a model without convolutions has kind='rows')")
        if len(layers) != len(stages):
            raise ValueError(f"{len(layers)} layers but {len(stages)} stages: give one stage per layer")
        refuse_overlap(layers)
        self.layers = tuple(layers)
        self.layer_stages = tuple(stages)
        self.kind = kind
        self.starts = tuple(int(s) for s in np.cumsum([0, *(layer.count for layer in layers)]))

    @classmethod
    def of(cls, model: nn.Module, kind: str | Callable[[nn.Module], Iterable[UnitGroup]] = "filters") -> Units:
        """List the units of a model.

        Parameters
        ----------
        model : nn.Module
        kind : {"filters", "rows", "heads", "all"} or callable
            ``filters``: output channels of every convolution (grouped, depthwise and transposed too);
            ``rows``: rows (output features) of every linear layer, the projections in ``nn.MultiheadAttention`` among
            them; ``heads``: the q, k and v heads of every attention
            layer; ``all``: filters and rows. A callable takes the model and yields `UnitGroup`.

        Returns
        -------
        Units

        Raises
        ------
        ValueError
            If the kind is unknown, the model has no unit of that kind, or weights that cannot be edited: scripted,
            quantized, or computed from other parameters.
        """
        check_model(model)
        if callable(kind):
            layers, kind = list(kind(model)), "own"
        elif kind in KINDS:
            layers = groups_of(model, kind)
        else:
            raise ValueError(f"unknown kind of unit {kind!r}: expected one of {sorted(KINDS)} or a callable")
        if not layers:
            raise ValueError(f"{type(model).__name__} has no unit of kind {kind!r}: try another of {sorted(KINDS)}")
        stage = stage_names(model)
        found = cls(layers, [stage(layer.parameter) for layer in layers], kind)
        check_units(model, found)
        return found

    def __len__(self) -> int:
        return self.starts[-1]

    def __repr__(self) -> str:
        return f"Units({len(self)} {self.kind} in {len(self.layers)} layers, stages {', '.join(self.stages)})"

    def locate(self, unit: int) -> tuple[int, int]:
        """Layer number and index within the layer of a unit id."""
        try:
            unit = operator.index(unit)
        except TypeError:
            raise TypeError(f"unit {unit} is a {type(unit).__name__}: expected an int") from None
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} is outside 0..{len(self) - 1}")
        layer = bisect_right(self.starts, unit) - 1
        return layer, unit - self.starts[layer]

    def view(self, model: nn.Module, unit: int) -> torch.Tensor:
        """The unit's own parameters in the model, as a view: editing it edits the model."""
        number, j = self.locate(unit)
        layer = self.layers[number]
        return model.get_parameter(layer.parameter)[layer.index(j)]

    def span(self, layer: int) -> slice:
        """Ids of the units of a layer (by number), as a slice."""
        return slice(self.starts[layer], self.starts[layer + 1])

    def name(self, unit: int) -> str:
        """Readable name, as ``layer4.1.conv2[7]``."""
        number, j = self.locate(unit)
        return f"{self.layers[number].name}[{j}]"

    @property
    def stages(self) -> tuple[str, ...]:
        """Stage names in order of their first unit."""
        return tuple(dict.fromkeys(self.layer_stages))

    @property
    def stage_ids(self) -> np.ndarray:
        """Index into `stages` of every unit, shape (U,)."""
        numbers = [self.stages.index(s) for s in self.layer_stages]
        return np.repeat(numbers, [layer.count for layer in self.layers])

    @property
    def layer_ids(self) -> np.ndarray:
        """Number of the layer of every unit, shape (U,)."""
        return np.repeat(np.arange(len(self.layers)), [layer.count for layer in self.layers])

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that hold the units."""
        return tuple(dict.fromkeys(layer.parameter for layer in self.layers))

    @property
    def sizes(self) -> np.ndarray:
        """Parameters per unit, shape (U,)."""
        return np.repeat([layer.size for layer in self.layers], [layer.count for layer in self.layers])

    def table(self) -> pd.DataFrame:
        """One row a unit: id, name, layer, index in the layer, stage, kind, parameter, number of parameters."""
        number = self.layer_ids
        at = lambda values: np.asarray(values, dtype=object)[number]  # noqa: E731
        return pd.DataFrame(
            {
                "unit": np.arange(len(self)),
                "name": [self.name(u) for u in range(len(self))],
                "layer": at([layer.name for layer in self.layers]),
                "index": np.arange(len(self)) - np.asarray(self.starts)[number],
                "stage": at(self.layer_stages),
                "label": at([layer.label for layer in self.layers]),
                "parameter": at([layer.parameter for layer in self.layers]),
                "size": self.sizes,
            }
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the units' structure (names, shapes, order): changes when the model's structure does."""
        text = repr([(layer, stage) for layer, stage in zip(self.layers, self.layer_stages, strict=True)])
        return digest(text)[:16]

    def reduce(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over each unit: ``{parameter: (B, *shape)}`` to ``(B, U)``; the caller takes absolute values first."""
        return torch.cat([layer.reduce(gradients[layer.parameter]) for layer in self.layers], dim=1)


def check_units(model: nn.Module, units: Units | None) -> None:
    """Refuse what is no model, no units, or units of another model."""
    check_model(model)
    if units is None:
        return
    if not isinstance(units, Units):
        raise TypeError(f"units are a {type(units).__name__}: expected Units, as Units.of(model) makes them")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for layer in units.layers:
        if shapes.get(layer.parameter) != layer.shape:
            raise ValueError(
                f"the units are not of this model: they have {layer.parameter!r} of shape {layer.shape}, "
                f"the model has {shapes.get(layer.parameter)}; make them with Units.of(model)"
            )
