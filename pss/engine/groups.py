"""Equal slices of one parameter, as the filters of a convolution, and where a network's layers have them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import nn

from pss.engine.attention import count_heads, heads_of, is_conv1d
from pss.engine.layers import is_convolution, is_linear, refuse_hidden_weights, weights_of

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
    def in_rows(self) -> bool:
        """Whether the units are whole slices along the first dimension, as rows of a matrix are."""
        return self.dim == 0 and self.groups == 1

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
        """Mean over the parameters of each unit, ``(B, count)``, of ``(B, *shape)`` or columns' means ``(B, 1, O)``."""
        if self.groups > 1:
            grouped = values.reshape(len(values), self.groups, -1, self.shape[1], values.shape[3:].numel())
            return grouped.mean(dim=(2, 4)).flatten(1)
        units = values.movedim(self.dim + 1, 1)[:, self.offset :].unfold(1, self.rows, self.stride)
        return units[:, : self.count].flatten(2).mean(dim=2)


def refuse_overlap(layers: Sequence[UnitGroup]) -> None:
    """Two units that share parameters would be edited twice."""
    taken: dict[str, tuple[int, set[int]]] = {}
    for layer in layers:
        own = set(layer.slices.flat)
        dim, others = taken.setdefault(layer.parameter, (layer.dim, set()))
        if dim != layer.dim or others & own or len(own) < layer.count * layer.rows:
            raise ValueError(f"units overlap: {layer.parameter} is listed twice for the same slices")
        others |= own


def groups_of(model: nn.Module, kind: str) -> list[UnitGroup]:
    """Groups of a model, of one of `KINDS`; weights that cannot be edited are refused."""
    refuse_hidden_weights(model)
    once = {name for name, _ in model.named_parameters()}  # a weight of several names has only the first here
    return [group for group in KINDS[kind](model) if group.parameter in once]


def _filters(model: nn.Module) -> Iterable[UnitGroup]:
    for name, module, weight in weights_of(model, is_convolution):
        shape, groups = tuple(weight.shape), module.groups
        if module.transposed:  # weight: (in, out / groups, …)
            yield UnitGroup(name, shape, shape[1] * groups, dim=1, groups=groups)
        else:
            yield UnitGroup(name, shape, shape[0])


def _rows(model: nn.Module, beside: Iterable[UnitGroup] = ()) -> Iterable[UnitGroup]:
    """Rows, and what lies beside them, in the order of the parameters."""
    layers = list(beside)
    for name, module, weight in weights_of(model, is_linear):
        dim = int(is_conv1d(module))
        layers.append(UnitGroup(name, tuple(weight.shape), weight.shape[dim], dim=dim, label="row"))
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # whose queries, keys and values have no layers of their own
            for name, weight in module.named_parameters(prefix, recurse=False):
                if weight.ndim == 2:
                    layers.append(UnitGroup(name, tuple(weight.shape), len(weight), label="row"))
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(layers, key=lambda layer: order[layer.parameter])


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


def _all(model: nn.Module) -> Iterable[UnitGroup]:
    return _rows(model, _filters(model))


KINDS = {"filters": _filters, "rows": _rows, "heads": _heads, "all": _all}
