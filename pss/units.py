"""What a unit is: a convolution filter, a row of a linear layer, an attention head.

Ranking, editing and plots all go through one registry, which maps

    unit id  <->  slice of a parameter  <->  layer  <->  stage

so that what is ranked is what is edited. Ids count up in the order in which the parameters were registered, the
order of the published statistics.

A unit is made of weights only, as in both papers: biases, and the scales and shifts of normalizations, belong to none.
A pruned head of values, for one, still adds its bias.
"""

from __future__ import annotations

import logging
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import nn

from pss.engine.attention import count_heads, heads_of, is_conv1d
from pss.engine.layers import is_convolution, is_linear, refuse_hidden_weights, stage_names, weights_of
from pss.storage.digests import digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnitGroup:
    """Some units of equal shape in one parameter: unit ``j`` is ``rows`` slices of it from ``offset + j * stride`` on.

    Attributes
    ----------
    parameter : str
        Name in ``model.named_parameters()``.
    shape : tuple of int
        Shape of the whole parameter.
    count : int
        Number of units.
    dim : int
        Dimension along which the units lie: 0, or for transposed convolutions the output channels.
    rows : int
        Slices per unit: 1 for filters and linear rows, the head size for heads.
    offset : int
        First slice of the first unit.
    stride : int
        Slices from one unit to the next: by default ``rows``, more where other units lie between.
    label : str
        What the units are, as ``filter``, ``row``, ``q``, ``k``, ``v``.
    groups : int
        Groups of a transposed convolution (its output channels repeat in every group), otherwise 1.
    """

    parameter: str
    shape: tuple[int, ...]
    count: int
    dim: int = 0
    rows: int = 1
    offset: int = 0
    stride: int = 0
    label: str = "filter"
    groups: int = 1

    def __post_init__(self):
        object.__setattr__(self, "stride", self.stride or self.rows)
        there = self.shape[1] * self.groups if self.groups > 1 else self.shape[self.dim]
        if self.offset < 0 or self.slices.max(initial=0) >= there:
            listed = f"{self.count} units of {self.rows} slices from {self.offset} on"
            raise ValueError(
                f"{self.parameter!r} is listed with {listed}, but has {there} slices along dimension {self.dim}"
            )

    @property
    def name(self) -> str:
        """Name of the module that owns the parameter, with q, k or v for heads."""
        module = self.parameter.rpartition(".")[0] or self.parameter
        return f"{module}.{self.label}" if self.label in ("q", "k", "v") else module

    @property
    def size(self) -> int:
        """Parameters per unit."""
        return int(np.prod(self.shape)) // self.groups // (self.shape[self.dim]) * self.rows

    def index(self, j: int) -> tuple[slice, ...]:
        """Index of unit ``j`` into the parameter: ``parameter[layer.index(j)]`` is a view of it."""
        whole = [slice(None)] * len(self.shape)
        if self.groups > 1:  # output channel j of a grouped transposed convolution: input channels of its group
            per_group, inputs = self.shape[1], self.shape[0] // self.groups
            group, channel = divmod(j, per_group)
            whole[0] = slice(group * inputs, (group + 1) * inputs)
            whole[1] = slice(channel, channel + 1)
        else:
            whole[self.dim] = slice(self.first(j), self.first(j) + self.rows)
        return tuple(whole)

    def first(self, j: int) -> int:
        """First slice of unit ``j`` along ``dim``."""
        return self.offset + j * self.stride

    @property
    def slices(self) -> np.ndarray:
        """Slices of every unit along ``dim``, shape (count, rows)."""
        return self.first(np.arange(self.count))[:, None] + np.arange(self.rows)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the parameters of each unit: ``(B, *shape)`` to ``(B, count)``."""
        if self.groups > 1:
            batch, (inputs, outputs) = len(values), self.shape[:2]
            grouped = values.reshape(batch, self.groups, inputs // self.groups, outputs, -1)
            return grouped.mean(dim=(2, 4)).reshape(batch, self.count)
        units = values.movedim(self.dim + 1, 1)[:, self.offset :].unfold(1, self.rows, self.stride)
        return units[:, : self.count].flatten(2).mean(dim=2)


class Units:
    """The units of a model, in one numbering.

    Use `Units.of`. Ids are ``0 .. len(units) - 1``.
    """

    def __init__(self, layers: Sequence[UnitGroup], stages: Sequence[str], kind: str = "own"):
        if not layers:
            raise ValueError("no units: give at least one layer (a model without convolutions has kind='rows')")
        if len(layers) != len(stages):
            raise ValueError(f"{len(layers)} layers but {len(stages)} stages: give one stage per layer")
        _refuse_overlap(layers)
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
            ``rows``: rows (output features) of every linear layer; ``heads``: the q, k and v heads of every attention
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
        elif kind in _KINDS:
            refuse_hidden_weights(model)
            once = {name for name, _ in model.named_parameters()}  # a weight of several names has only the first here
            layers = [layer for layer in _KINDS[kind](model) if layer.parameter in once]
        else:
            raise ValueError(f"unknown kind of unit {kind!r}: expected one of {sorted(_KINDS)} or a callable")
        if not layers:
            raise ValueError(f"{type(model).__name__} has no unit of kind {kind!r}: try another of {sorted(_KINDS)}")
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


def check_model(model: nn.Module) -> None:
    """Refuse what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")


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


def _refuse_overlap(layers: Sequence[UnitGroup]) -> None:
    """Two units that share parameters would be edited twice."""
    taken: dict[str, tuple[int, set[int]]] = {}
    for layer in layers:
        own = set(layer.slices.flat)
        dim, others = taken.setdefault(layer.parameter, (layer.dim, set()))
        if dim != layer.dim or others & own or len(own) < layer.count * layer.rows:
            raise ValueError(f"units overlap: {layer.parameter} is listed twice for the same slices")
        others |= own


def _filters(model: nn.Module) -> Iterable[UnitGroup]:
    for name, module, weight in weights_of(model, is_convolution):
        shape, groups = tuple(weight.shape), module.groups
        if module.transposed:  # weight: (in, out / groups, …)
            yield UnitGroup(name, shape, shape[1] * groups, dim=1, groups=groups)
        else:
            yield UnitGroup(name, shape, shape[0])


def _rows(model: nn.Module) -> Iterable[UnitGroup]:
    for name, module, weight in weights_of(model, is_linear):
        dim = int(is_conv1d(module))
        yield UnitGroup(name, tuple(weight.shape), weight.shape[dim], dim=dim, label="row")


def _all(model: nn.Module) -> Iterable[UnitGroup]:
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted([*_filters(model), *_rows(model)], key=lambda layer: order[layer.parameter])


def _heads(model: nn.Module) -> Iterable[UnitGroup]:
    """Heads of every attention module; the log says which are left out, because their layout is not known."""
    prefixes = {f"{name}." if name else "": module for name, module in model.named_modules()}
    listed, unknown, doubted = {}, {}, []
    for prefix, module in prefixes.items():
        doubts: list[str] = []
        try:
            if layers := [UnitGroup(prefix + name, *place) for name, *place in heads_of(module, doubts)]:
                listed[prefix] = layers
                doubted += [prefix + name for name in doubts]
        except ValueError as error:
            unknown[prefix] = str(error)
    seen = [*listed, *unknown]
    for prefix, module in prefixes.items():
        if count_heads(module) and not any(prefix.startswith(s) or s.startswith(prefix) for s in seen):
            unknown[prefix] = "it has heads, but no queries, keys and values by a name that is known"
    if unknown:
        reasons = [f"{prefix.rstrip('.') or type(model).__name__}: {reason}" for prefix, reason in unknown.items()]
        said = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        if not listed:
            raise ValueError(f"the heads of {type(model).__name__} are not known; {said}")
        log.warning("heads left out of %s; %s", type(model).__name__, said)
    if doubted:
        log.warning(
            "rows of %s in %d layers are taken for queries of all heads, then keys, then values, "
            "which could not be seen: set head_first=False where it is so, True where those of one head lie together",
            doubted[0],
            len(doubted),
        )
    return chain.from_iterable(listed.values())


_KINDS = {"filters": _filters, "rows": _rows, "heads": _heads, "all": _all}
