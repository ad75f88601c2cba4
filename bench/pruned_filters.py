"""Pruning: which ranking repairs a mistake with the fewest filters, and what that breaks elsewhere.

    python -m bench.pruned_filters [--networks 0 1 2] [--images 30] [--out data/experiments/pruned_filters.csv]

Mistakes of the healthy networks on three shifted sets, each with its own ranking, of which the first 25 filters are set
to zero one after the other. References are of ``mnist/reference``, which shares no digit with the generated sets. A row
is one network, set and ranking: the share of mistakes that are read right with exactly 1 and 10 filters pruned and with
any number up to 2, 5, 10 and 25, and the share of other images of that set, read right before, that still are when the
first filter is pruned, and when as many are as it takes to repair the mistake (of those that were repaired).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import pss
from bench import tables
from bench.planted_faults import mean_activation, norms_of

OUT = tables.EXPERIMENTS / "pruned_filters.csv"
NETWORKS, DOMAINS, IMAGES, RETAIN, EDITS = (0, 1, 2), ("digits", "svhn_like", "mnist_m"), 30, 100, 25
WITHIN = (2, 5, 10)
Labelled = tuple[Tensor, Tensor]  # images and labels
MARGIN = {"of": "gain", "signed": True, "loss": "logit_difference"}


class Network:
    """A healthy network, what is usual in it, and its rankings."""

    def __init__(self, seed: int):
        self.seed, self.model = seed, pss.models.digits(seed)
        self.units = pss.Units.of(self.model)
        usual = pss.data.mnist("reference")
        profile = lambda **how: pss.profile(self.model, usual.images, usual.labels, self.units, **how)  # noqa: E731
        gradient = profile()
        self.plain, self.free = (pss.Reference.fit(gradient, scale_free=free) for free in (False, True))
        self.output = pss.Reference.fit(profile(of="output", signed=True))
        self.norms = norms_of(self.model, self.units)
        self.active = pss.Reference.fit(mean_activation(self.model, self.norms, usual.images))
        self.spread = pss.Reference.fit(profile(**MARGIN)).std

    def mistakes(self, domain: str, count: int) -> tuple[Labelled, Labelled]:
        """Misread images of a set with their labels, and images that are read right."""
        data, rng = pss.data.load(domain, "test"), np.random.default_rng(self.seed)
        right = (pss.models.predict(self.model, data.images).argmax(1) == data.labels).numpy()
        wrong, retain = rng.permutation(np.flatnonzero(~right))[:count], rng.permutation(np.flatnonzero(right))[:RETAIN]
        return (data.images[wrong], data.labels[wrong]), (data.images[retain], data.labels[retain])

    def rankings(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The first filters of each image by every ranking, (B, EDITS) ids each."""
        g = pss.profile(self.model, images, labels, self.units)
        c = pss.profile(self.model, images, labels, self.units, **MARGIN)
        o = pss.profile(self.model, images, labels, self.units, of="output", signed=True)
        a = mean_activation(self.model, self.norms, images)
        asked = {
            "margin gain": (c, None, "raw"),
            "per deviation": (c / self.spread.where(self.spread > 0, torch.inf), None, "raw"),
            "raw": (g, None, "raw"),
            "zscore": (g, self.plain, "zscore"),
            "pot": (g, self.plain, "pot"),
            "scale_free_zscore": (g, self.free, "scale_free_zscore"),
            "output, |z|": (o, self.output, "abs_zscore"),
            "activation, |z|": (a, self.active, "abs_zscore"),
            "random": (g, None, "random"),
        }
        generator = torch.Generator().manual_seed(self.seed)
        return {name: pss.rank(*question, EDITS, generator=generator) for name, question in asked.items()}


def look(
    network: Network, ids: Tensor, wrong: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """What pruning these filters does to the mistakes, and to the images that are to stay right."""
    model, units = network.model, network.units
    curves = pss.edit_curves(model, *wrong, ids, units, "prune", progress=False)
    corrected = curves.pivot_table(index="image", columns="k", values="corrected").to_numpy().astype(bool)[:, 1:]
    first = np.where(corrected.any(axis=1), corrected.argmax(axis=1) + 1, 0)  # how many it takes; 0 for never
    kept = {1: pss.side_effects(model, units, ids[:, :1], *retain, progress=False)["still_right"].to_numpy()}
    needed = [kept[1][first == 1]]
    for k in np.unique(first[first > 1]):
        chosen = ids[torch.from_numpy(first == k), : int(k)]
        effects = pss.side_effects(model, units, chosen, *retain, progress=False)
        needed.append(effects["still_right"].to_numpy())
    needed = np.concatenate(needed)
    row = {"images": len(ids), "k = 1": corrected[:, 0].mean(), "k = 10": corrected[:, 9].mean()}
    row |= {f"within {k}": corrected[:, :k].any(axis=1).mean() for k in WITHIN}
    row |= {"any k": corrected.any(axis=1).mean(), "right at 1": kept[1].mean()}
    row |= {"right when repaired": needed.mean() if len(needed) else np.nan}
    return {name: round(value, 4) for name, value in row.items()}


def run(out: Path, networks: tuple[int, ...], images: int) -> pd.DataFrame:
    """All rows, those that are missing made and written one by one."""
    there = tables.begin(out, "python -m bench.pruned_filters", images=images, edits=EDITS)
    done = tables.done(there, ["network", "domain", "ranking"])
    for seed in networks:
        network = Network(seed)
        for domain in DOMAINS:
            wrong, retain = network.mistakes(domain, images)
            for name, ids in network.rankings(*wrong).items():
                if (seed, domain, name) not in done:
                    about = {"network": seed, "domain": domain, "ranking": name}
                    tables.add(out, about | look(network, ids, wrong, retain))
            print(f"network {seed}, {domain}: done", flush=True)
    return tables.read(out)


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, networks=NETWORKS, images=IMAGES)
