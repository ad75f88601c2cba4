"""Planted faults: break one filter of a trained network, and see which ranking finds it.

    python -m bench.planted_faults [--networks 0 1 2 …] [--per-stage 8] [--out data/experiments/planted_faults.csv]

Seven kinds of fault in filters of every stage, drawn at random: the first eight of at most 40 that spoil three images.
A spoiled image was read right by the healthy network and is read wrong by the broken one. References are of the healthy
network and of ``mnist/reference``, spoiled images of ``mnist/test``, which share no digit. A row is one fault: of its
first 24 spoiled images, or as many as there are, for each ranking in how many the broken filter is in their own first
ten, and its place in the ranking of all together. The table is written as it goes: stopped, it goes on where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import pss
from bench import tables

OUT = tables.EXPERIMENTS / "planted_faults.csv"
NETWORKS = (0, 1, 2)  # seeds; on 3 to 5 the comparison within the layer and the root of the gain were chosen
PER_STAGE, TRIES, IMAGES, FEWEST, TOP = 8, 40, 24, 3, 10
LEVELS = (0.85, 0.90, 0.95)

_FIRST = (0, 4, 5, 6, 7)  # which of the network's children is the first of each stage

# What is done to a filter's weights w of deviation s, or to its place r in the normalization n behind it.
KINDS: dict[str, Callable[[Tensor, nn.Module, int, Tensor, torch.Generator], object]] = {
    "weights x10": lambda w, n, r, s, g: w.mul_(10),
    "noise": lambda w, n, r, s, g: w.copy_(10 * s * torch.randn(w.shape, generator=g)),
    "one weight": lambda w, n, r, s, g: w.view(-1)[int(torch.randint(w.numel(), (), generator=g))].add_(30 * s),
    "gain x20": lambda w, n, r, s, g: n.weight[r].mul_(20),
    "sign": lambda w, n, r, s, g: w.neg_(),
    "zeroed": lambda w, n, r, s, g: w.zero_(),
    "shift": lambda w, n, r, s, g: n.bias[r].add_(10),
}


def norms_of(model: nn.Module, units: pss.Units) -> list[str]:
    """Names of the normalizations behind the layers of the units."""
    names = [name for name, _ in model.named_modules()]
    return [names[names.index(layer.name) + 1] for layer in units.layers]


@torch.no_grad()
def mean_activation(model: nn.Module, norms: list[str], images: Tensor) -> Tensor:
    """Mean over positions of what is left of each normalization's output behind a ReLU; (B, U)."""
    found: dict[str, Tensor] = {}
    keep = lambda name: lambda module, inputs, out: found.update({name: out.relu().mean((2, 3))})  # noqa: E731
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in norms]
    model(images)
    for handle in handles:
        handle.remove()
    return torch.cat([found[name] for name in norms], dim=1)


class Network:
    """A healthy network, what is usual in it, and what breaking one of its filters spoils."""

    def __init__(self, seed: int = 0, model: nn.Module | None = None):
        self.seed, self.model = seed, pss.models.digits(seed) if model is None else model
        self.units = pss.Units.of(self.model)
        self.norms = norms_of(self.model, self.units)
        self.test, usual = pss.data.mnist("test"), pss.data.mnist("reference")
        self.right = pss.models.predict(self.model, self.test.images).argmax(1) == self.test.labels
        heads = [nn.Sequential(*list(self.model.children())[:first]) for first in _FIRST]
        self.entering = [
            pss.models.predict(head, self.test.images) if len(head) else self.test.images for head in heads
        ]
        of = self.quantities(self.model, usual.images, usual.labels)
        self.references = {(name, level): pss.Reference.fit(s, level) for name, s in of.items() for level in LEVELS}
        for name in ("gradient", "gain", "root gain"):
            self.references[name, "free"] = pss.Reference.fit(of[name], scale_free=True)
        self.sizes = pss.Reference.fit(self.references["output", 0.90].abs_zscore(of["output"]))

    def quantities(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Profiles (B, U) of everything that is ranked by.

        The root of the gain has a light tail: there a filter that contributes nothing is unusual too.
        """
        g, c = pss.profile(model, images, labels, self.units, of=("gradient", "gain"), verify=False)
        o = pss.profile(model, images, labels, self.units, of="output", signed=True, verify=False)
        a = mean_activation(model, self.norms, images)
        return {"gradient": g, "gain": c, "root gain": c.sqrt(), "output": o, "activation": a}

    def tails(self, of: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output and gain in one: minus the log of the smaller of their tail probabilities, or of their product."""
        c = pss.ranking.score(of["gain"], self.references["gain", "free"], "scale_free_pot")
        sizes = self.references["output", 0.90].abs_zscore(of["output"])
        o = pss.ranking.score(sizes, self.sizes, "pot")
        return {"smaller p": torch.maximum(c, o), "product of p": c + o}

    def together(self, ranking: str, of: dict[str, Tensor]) -> pd.DataFrame:
        """All filters in the order of one of `RANKINGS`, for a group of images."""
        asked, method = RANKINGS[ranking]
        usual = [self.references.get(question) for question in asked]
        return pss.rank_together([of[quantity] for quantity, _ in asked], usual, method, TOP, self.units)

    def broken(self, kind: str, unit: int) -> nn.Module:
        """A copy with this fault in this filter; the same one each time."""
        model, (number, row) = copy.deepcopy(self.model), self.units.locate(unit)
        w, norm = self.units.view(model, unit), model.get_submodule(self.norms[number])
        generator = torch.Generator().manual_seed(100_000 * self.seed + unit)
        with torch.no_grad():
            deviation = model.get_parameter(self.units.layers[number].parameter).std()
            KINDS[kind](w, norm, row, deviation, generator)
        return model

    def spoiled(self, kind: str, unit: int) -> Tensor:
        """Places in the test set of the first images that were read right and are read wrong with this fault."""
        stage, broken = self.units.stage_ids[unit], self.broken(kind, unit)
        *tail, last = list(broken.children())[_FIRST[stage] :]  # what is before it is as it was
        outputs = pss.models.predict(nn.Sequential(*tail, nn.Flatten(), last), self.entering[stage])
        return (self.right & (outputs.argmax(1) != self.test.labels)).nonzero()[:IMAGES, 0]

    def faults(self, kind: str, stage: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """Filters of a stage in which this fault spoils images, and which images."""
        ids = np.random.default_rng([self.seed, stage]).permutation(np.flatnonzero(self.units.stage_ids == stage))
        tried = ((int(unit), self.spoiled(kind, int(unit))) for unit in ids[:TRIES])
        return islice(((unit, at) for unit, at in tried if len(at) >= FEWEST), count)


# What every ranking looks at: quantities, each with its reference (a level, or scale-free), and the method.
ONE = {"raw": (None, "raw"), "z": (0.90, "zscore"), "free z": ("free", "zscore"), "free POT": ("free", "pot")}
ONE |= {f"POT {level:.2f}": (level, "pot") for level in LEVELS}
RANKINGS: dict[str, tuple[list[tuple[str, float | str | None]], str | tuple[str, ...]]] = {
    f"{of}, {how}": ([(of, usual)], method) for of in ("gradient", "gain") for how, (usual, method) in ONE.items()
}
IN_LAYER = "layer_relative_zscore"
RANKINGS |= {
    "gain, root": ([("root gain", "free")], "abs_zscore"),
    "gain, in layer": ([("root gain", "free")], IN_LAYER),
    "output, |z|": ([("output", 0.90)], "abs_zscore"),
    "output, in layer": ([("output", 0.90)], IN_LAYER),
    "activation, z": ([("activation", 0.90)], "zscore"),
    "activation, |z|": ([("activation", 0.90)], "abs_zscore"),
    "activation, in layer": ([("activation", 0.90)], IN_LAYER),
    "output and gain, in turns": ([("output", 0.90), ("root gain", "free")], (IN_LAYER, "abs_zscore")),
    "output and gain, smaller p": ([("smaller p", None)], "raw"),
    "output and gain, product of p": ([("product of p", None)], "raw"),
}


def look(network: Network, kind: str, unit: int, at: Tensor) -> dict[str, object]:
    """A row: what every ranking makes of the images at these places, which this fault spoils."""
    of = network.quantities(network.broken(kind, unit), network.test.images[at], network.test.labels[at])
    of |= network.tails(of)
    row = {"network": network.seed, "kind": kind, "stage": network.units.stages[network.units.stage_ids[unit]]}
    row |= {"unit": unit, "images": len(at)}
    for name in RANKINGS:
        table = network.together(name, of)
        place = int(table.index[table["unit"] == unit][0])
        row[f"{name}: place"] = place + 1
        row[f"{name}: images"] = round(table["images"][place] * len(at))
    return row


def run(out: Path, networks: tuple[int, ...], per_stage: int) -> pd.DataFrame:
    """All rows, those that are missing made and written one by one."""
    there = tables.begin(out, "python -m bench.planted_faults", per_stage=per_stage, tries=TRIES)
    done = tables.done(there, ["network", "kind", "unit"])
    for seed in networks:
        network = Network(seed)
        for kind in KINDS:
            for stage in range(len(network.units.stages)):
                for unit, at in network.faults(kind, stage, per_stage):
                    if (seed, kind, unit) not in done:
                        tables.add(out, look(network, kind, unit, at))
            print(f"network {seed}, {kind}: done", flush=True)
    return tables.read(out)


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, networks=NETWORKS, per_stage=PER_STAGE)
