"""What hangs on the reference: four references that share no image, over thresholds, quantities and networks.

    python -m bench.reference_draws [--networks 0 1 2 …] [--out data/experiments/reference_draws.csv]

The networks are trained on 2,500 digits only, so that four times 500 others are left for references, and ``mnist/test``
for what is held out. A row is a network, a quantity, a kind of reference (of profiles as they are, or divided by their
mean), one of the four references and a level of the threshold. Its numbers:

gpd, exponential, empirical   share of held-out images, rightly read, with a filter significant at q = 5%, by the tail;
                              the empirical probability of s is (1 + number of reference images at or above s) / (n + 1)
wrong         the same by the GPD, of misread images of all sets
lean …        share of the last stage among the first 25 filters of misread images of a set: by POT less by z-score
z …           that share by z-score
same …        part of the first 25 that each of the other three references puts there too: by z-score, POT

The table is written as it goes: stopped, it goes on where it was.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pss
from bench import tables
from pss.storage.cache import cached

OUT = tables.EXPERIMENTS / "reference_draws.csv"
NETWORKS, TRAINED, DRAWS, LEVELS = tuple(range(4)), 2500, 4, (0.90, 0.80, 0.95, 0.97)
SETS, MISTAKES, TOP, Q = ("digits", "svhn_like", "mnist_m", "noise"), 120, 25, 0.05
QUANTITIES, TAILS, RANKED = ("gradient", "gain", "output"), ("gpd", "exponential"), ("zscore", "pot")


class Network:
    """Profiles of four references, of held-out images and of mistakes, for a network trained on half of the digits."""

    def __init__(self, seed: int):
        digits, held_out = pss.data.mnist("train"), pss.data.mnist("test")
        self.model, self.seed = pss.models.resnet18(), seed
        name = f"resnet18-w{pss.models.WIDTH}-mnist{TRAINED}-seed{seed}.safetensors"
        self.model.load_state_dict(cached(name, lambda: self._trained(digits.subset(range(TRAINED)))))
        self.model.eval()
        self.units = pss.Units.of(self.model)
        self.in_last = torch.from_numpy(self.units.stage_ids == len(self.units.stages) - 1)
        rest = np.array_split(range(TRAINED, len(digits)), DRAWS - 1)
        sets = [*(digits.subset(part) for part in rest), pss.data.mnist("reference")]
        self.drawn = [self.profiles(each, range(len(each))) for each in sets]
        self.right = self.profiles(held_out, np.setdiff1d(range(len(held_out)), self._wrong(held_out)))
        self.mistakes = {}
        for name in SETS:
            images = pss.data.load(name, "test")
            order = np.random.default_rng(seed).permutation(self._wrong(images))
            self.mistakes[name] = self.profiles(images, order[:MISTAKES])

    def _trained(self, images: pss.data.ImageSet) -> tuple[dict[str, Tensor], dict[str, str]]:
        model, record = pss.models.train(self.seed, train_set=images)
        return model.state_dict(), record

    def _wrong(self, images: pss.data.ImageSet) -> np.ndarray:
        return np.array(pss.models.misclassified(self.model, images).index)

    def profiles(self, images: pss.data.ImageSet, at: np.ndarray | range) -> dict[str, Tensor]:
        """Every quantity of these images of a set, (B, U) each."""
        x, y = images.images[list(at)], images.labels[list(at)]
        both = pss.profile(self.model, x, y, self.units, of=("gradient", "gain"))
        return dict(zip(QUANTITIES, (*both, pss.profile(self.model, x, y, self.units, of="output")), strict=True))

    def rows(self, quantity: str, scale_free: bool, level: float) -> list[dict]:
        """A row for each of the four references."""
        stored, right = [of[quantity] for of in self.drawn], self.right[quantity]
        references = [pss.Reference.fit(s, level, scale_free) for s in stored]
        wrong = torch.cat([of[quantity] for of in self.mistakes.values()])
        ends = np.cumsum([len(of[quantity]) for of in self.mistakes.values()])[:-1].tolist()
        ranked = RANKED if quantity != "output" else ()
        tops = [{method: pss.rank(wrong, ref, method, TOP) for method in ranked} for ref in references]
        rows = []
        for draw, (ref, own) in enumerate(zip(references, tops, strict=True)):
            of = {"network": self.seed, "quantity": quantity, "scale_free": scale_free}
            of |= {"reference": draw, "level": level}
            of |= {tail: found(ref.log_tail_probability(right, tail), ref.n) for tail in TAILS}
            of["empirical"] = found(empirical(stored[draw], right, scale_free), ref.n)
            of["wrong"] = found(ref.log_tail_probability(wrong), ref.n)
            last = {
                m: [self.in_last[part].double().mean().item() for part in own[m].tensor_split(ends)] for m in ranked
            }
            for number, name in enumerate(SETS):
                of[f"z {name}"] = last["zscore"][number] if ranked else np.nan
                of[f"lean {name}"] = last["pot"][number] - last["zscore"][number] if ranked else np.nan
            for method in RANKED:
                others = (
                    [same(own[method], other[method]) for other in tops if other is not own] if ranked else [np.nan]
                )
                of[f"same {method}"] = float(np.mean(others))
            rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in of.items()})
        return rows


def empirical(stored: Tensor, profiles: Tensor, scale_free: bool) -> Tensor:
    """Log of the probability by rank among the reference images; (B, U)."""
    if scale_free:
        stored, profiles = (s.double() / s.double().mean(dim=1, keepdim=True) for s in (stored, profiles))
    ordered = stored.double().T.contiguous().sort(dim=1).values  # (U, N)
    below = torch.searchsorted(ordered, profiles.double().T.contiguous())  # (U, B): number less than s
    return ((1 + len(stored) - below).double() / (len(stored) + 1)).log().T


def found(log_p: Tensor, n: int) -> float:
    """Share of images with any unit significant."""
    return pss.fdr_significant(log_p, n, Q).any(dim=1).double().mean().item()


def same(first: Tensor, second: Tensor) -> float:
    """Part of two tops (B, k) that they share, mean over images."""
    return (first[:, :, None] == second[:, None, :]).any(dim=2).double().mean().item()


def run(out: Path = OUT, networks: tuple[int, ...] = NETWORKS) -> None:
    """Append the rows that are missing."""
    table = tables.begin(out, "python -m bench.reference_draws", trained=TRAINED, mistakes=MISTAKES, top=TOP, q=Q)
    key = ["network", "quantity", "scale_free", "level", "reference"]
    there = tables.done(table, key)
    for seed in networks:
        network = Network(seed)
        for how in itertools.product(QUANTITIES, (False, True), LEVELS):
            if how[0] == "output" and how[2] != LEVELS[0]:  # nothing is ranked by it here
                continue
            if any((seed, *how, draw) not in there for draw in range(DRAWS)):
                for row in network.rows(*how):
                    if (seed, *how, row["reference"]) not in there:
                        tables.add(out, row)


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, networks=NETWORKS)
