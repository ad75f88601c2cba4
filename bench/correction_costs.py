"""What a correction costs: every ranking and every rival, in three directions, over eight networks.

    python -m bench.correction_costs [--networks 0 1 2 …] [--mistakes 10] [--out data/experiments/correction_costs.csv]

A row is a misread image and a direction. A column is a rival, which says what may move: 25 filters by a ranking or
drawn at random, the last stage, the last layer, all filters, all parameters. Its number is the damage of the smallest
correcting step, as KL divergence in nats over images that were right; no correction, or a dearer one, counts as the
logarithm of the number of classes. Directions:

gradient    against the gradient of the loss
scaled      the same, divided by the diagonal of the Fisher information (labels drawn from the network)
curvature   the step of least damage to second order that closes the margins, by exact curvature: one gain for each
            filter, and each weight of the last layer by itself

References are of ``mnist/reference``, the curvatures of right images of the set's own ``reference`` split, mistakes and
damage of its ``test`` split: no image is in two of these, and those of the first two share no digit with the others.
The table is written as it goes: stopped, it goes on where it was.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import pss
from bench import tables
from pss.correction import (
    DAMPING,
    Curvature,
    changes,
    divergences,
    gain_jacobian,
    logits_of,
    predicts,
    shifted,
    unit_maps,
)
from pss.ranking import RANKINGS

OUT = tables.EXPERIMENTS / "correction_costs.csv"
NETWORKS, SETS, DIRECTIONS = tuple(range(8)), ("digits", "svhn_like", "mnist_m"), ("gradient", "scaled", "curvature")
MISTAKES, USUAL, RETAIN, FILTERS, DRAWS, LABELS = 10, 60, 60, 25, 10, 1
FACTORS = (1, 100)  # of the damping of the exact curvature
SIZES, BETWEEN = np.geomspace(1e-5, 10, 25), 14  # of a step, over the length of what may move; and between two of these
LAST = ("fc.weight", "fc.bias")
OF_A_PROFILE = [m for m in RANKINGS if m not in ("random", "random_last_stage", "layer_relative_zscore")]

Rival = tuple[Tensor, tuple[str, ...]]  # ids of filters, and names of parameters that move as a whole


class Task:
    """A network and a set: its mistakes, images that are right, and what the steps are made from."""

    def __init__(self, seed: int, name: str):
        self.model, self.seed, self.name = pss.models.digits(seed), seed, name
        self.units, self.moved = pss.Units.of(self.model), copy.deepcopy(self.model)
        rng = np.random.default_rng([seed, SETS.index(name)])
        self.test, right = self._read(name, "test")
        usual, usual_right = self._read(name, "reference")
        draw = lambda which, count: rng.permutation(np.flatnonzero(which))[:count]  # noqa: E731
        self.wrong, judge, calm = draw(~right, MISTAKES), draw(right, RETAIN), draw(usual_right, USUAL)
        self.retain, self.usual = self.test.images[judge], usual.images[calm]
        self.owner = unit_maps(self.units)
        self.judged = {"usual": self.usual, "retain": self.retain}
        self.before = {name: logits_of(self.model, images) for name, images in self.judged.items()}
        self.curvatures: dict[bytes, Curvature] = {}

    def _read(self, name: str, split: str) -> tuple[pss.data.ImageSet, np.ndarray]:
        images = pss.data.load(name, split)
        return images, (pss.models.predict(self.model, images.images).argmax(dim=1) == images.labels).numpy()

    # ------------------------------------------------------------------------------------------------- what may move

    @cached_property
    def references(self) -> dict[tuple[str, bool], pss.Reference]:
        """Statistics of both quantities, of profiles as they are and divided by their mean."""
        images = pss.data.load("mnist", "reference")
        both = pss.profile(self.model, images.images, images.labels, self.units, of=("gradient", "gain"))
        of = dict(zip(("gradient", "gain"), both, strict=True))
        return {(q, free): pss.Reference.fit(s, scale_free=free) for q, s in of.items() for free in (False, True)}

    def rivals(self, image: int) -> dict[str, Rival]:
        """What may move to correct an image of the test set, by name."""
        x, y = self.test.images[image : image + 1], self.test.labels[image : image + 1]
        of = dict(
            zip(("gradient", "gain"), pss.profile(self.model, x, y, self.units, of=("gradient", "gain")), strict=True)
        )
        found: dict[str, Rival] = {}
        for q, s in of.items():
            for method in OF_A_PROFILE:
                reference = self.references[q, method.startswith("scale_free")]
                found[f"{q} {method}"] = pss.rank(s, reference, method, FILTERS, self.units, image)[0], ()
        for number in range(DRAWS):
            seed = 1000 * number + image
            found[f"random {number}"] = pss.rank(s, None, "random", FILTERS, self.units, seed)[0], ()
        found["random_last_stage"] = pss.rank(s, None, "random_last_stage", FILTERS, self.units, image)[0], ()
        every, none = torch.arange(len(self.units)), torch.arange(0)
        stage = torch.from_numpy(self.units.stage_ids == len(self.units.stages) - 1)
        whole = {"last stage": (every[stage], ()), "last layer": (none, LAST), "all filters": (every, ())}
        return found | whole | {"all parameters": (every, tuple(n for n, _ in self.model.named_parameters()))}

    # --------------------------------------------------------------------------------------------------- directions

    def derivative(self, images: Tensor, sums: Tensor) -> Tensor:
        """Of sums of logits (B, M, C): to the gains of filters, then to the weights of the last layer; (B, M, D)."""
        features: list[Tensor] = []
        handle = self.model.fc.register_forward_hook(lambda module, inputs, out: features.append(inputs[0]))
        logits_of(self.model, images)
        handle.remove()
        scale = float(self.model.fc.weight.detach().square().mean().sqrt())  # so that a weight's step is relative too
        inputs = F.pad(torch.cat(features), (0, 1), value=1.0).double() * scale  # (B, H + 1), the last of the bias
        of_last = (sums.double()[..., None] * inputs[:, None, None]).flatten(2)
        return torch.cat([gain_jacobian(self.model, images, self.units, sums).double(), of_last], dim=2)

    @cached_property
    def factor(self) -> Tensor:
        """Factor of the exact curvature, over the coordinates of `derivative`."""
        p = logits_of(self.model, self.usual).double().softmax(dim=1)
        sums = p.sqrt()[:, :, None] * (torch.eye(p.shape[1], dtype=p.dtype) - p[:, None])
        return self.derivative(self.usual, sums).flatten(0, 1) / len(p) ** 0.5

    @cached_property
    def information(self) -> dict[str, Tensor]:
        """Diagonal of the Fisher information of every parameter."""
        p = logits_of(self.model, self.usual).softmax(dim=1)
        labels = torch.multinomial(p, LABELS, True, generator=torch.Generator().manual_seed(self.seed))
        total = {name: torch.zeros_like(parameter) for name, parameter in self.model.named_parameters()}
        for x, drawn in zip(self.usual, labels, strict=True):
            for y in drawn:
                for name, g in self.gradient(x[None], y[None]).items():
                    total[name] += g.square() / labels.numel()
        return total

    @torch.enable_grad()
    def gradient(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Of the loss of one image, to every parameter."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(F.cross_entropy(self.model(x), y), parameters), strict=True))

    def masks(self, what: Rival) -> dict[str, Tensor]:
        """Which entries of the parameters may move."""
        found = {name: torch.isin(of, what[0]) for name, of in self.owner.items() if name not in what[1]}
        parameters = {name: self.model.get_parameter(name) for name in (*found, *what[1])}
        found = {name: mask.expand_as(parameters[name]) for name, mask in found.items() if mask.any()}
        return found | {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in what[1]}

    def scaled(self, gradient: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradient over the diagonal of the Fisher information, damped by its mean over what may move."""
        mean = torch.cat([self.information[name][mask] for name, mask in masks.items()]).mean()
        damping = DAMPING * mean + torch.finfo(torch.float32).tiny
        return {name: gradient[name] / (self.information[name] + damping) for name in masks}

    def of_least_damage(self, what: Rival, at: dict) -> Iterator[dict[str, Tensor]]:
        """Changes of the weights by the steps that close the margins with least curvature, for several dampings."""
        count = len(self.units)
        columns = torch.cat([what[0], torch.arange(count, self.factor.shape[1] if what[1] else count)])
        key = columns.numpy().tobytes()
        if key not in self.curvatures:
            self.curvatures[key] = Curvature(self.factor[:, columns])
        curvature, found = self.curvatures[key], torch.zeros(self.factor.shape[1], dtype=torch.double)
        if len(columns) == FILTERS:  # of this image alone
            del self.curvatures[key]
        for factor in FACTORS:
            slopes = at["slopes"][:, columns]
            found[columns] = curvature.correction(slopes, -at["margins"], damping=factor * curvature.damping)
            yield changes(self.model, self.owner, found[:count]) | self.of_last(found[count:])

    def of_last(self, steps: Tensor) -> dict[str, Tensor]:
        """Changes of the last layer by steps in its coordinates of `derivative`."""
        weight = self.model.fc.weight.detach()
        found = steps.reshape(len(weight), -1).float() * weight.square().mean().sqrt()
        return {"fc.weight": found[:, :-1], "fc.bias": found[:, -1]}

    # --------------------------------------------------------------------------------------------------------- rows

    def rows(self, image: int) -> Iterator[dict]:
        """A row for each direction."""
        x, y = self.test.images[image : image + 1], self.test.labels[image : image + 1]
        logits = logits_of(self.model, x).double()
        others = logits.scatter(1, y[:, None], -torch.inf).topk(5, dim=1).indices
        eye = torch.eye(logits.shape[1], dtype=torch.double)
        sums = eye[y][:, None] - eye[others]  # (1, M, C)
        at = {"gradient": self.gradient(x, y), "slopes": self.derivative(x, sums)[0], "margins": (sums @ logits[0])[0]}
        rivals, costs = self.rivals(image), dict[tuple, float]()
        for direction in DIRECTIONS:
            row = {"network": self.seed, "set": self.name, "image": image, "direction": direction}
            for name, (ids, whole) in rivals.items():
                key = direction, frozenset(ids.tolist()), whole
                if key not in costs:  # several rankings may say the same
                    costs[key] = self.cost(x, y, self.lines((ids, whole), direction, at))
                row[name] = costs[key]
            yield row

    def lines(self, what: Rival, direction: str, at: dict) -> Iterator[dict[str, Tensor]]:
        """Changes that are made larger until the image is read right, as long as the weights that may change."""
        masks, length = self.masks(what), lambda tensors: sum(float(t.double().square().sum()) for t in tensors) ** 0.5
        weights = length(self.model.get_parameter(name).detach()[mask] for name, mask in masks.items())
        ways = {
            "gradient": lambda: [at["gradient"]],
            "scaled": lambda: [self.scaled(at["gradient"], masks)],
            "curvature": lambda: self.of_least_damage(what, at),
        }
        sign = 1 if direction == "curvature" else -1
        for steps in ways[direction]():
            line = {name: sign * torch.where(mask, steps[name], 0) for name, mask in masks.items() if name in steps}
            if (size := length(line.values())) > 0:
                yield {name: step * (weights / size) for name, step in line.items()}

    @torch.no_grad()
    def cost(self, x: Tensor, y: Tensor, lines: Iterable[dict[str, Tensor]]) -> float:
        """Damage of the smallest step that corrects the image; of several lines, that of least damage to the usual."""
        worst, found = float(np.log(self.model.fc.out_features)), []
        for line in lines:
            if (size := self.smallest(x, y, line)) is not None:
                found.append((line, size))
        if not found:
            return float(f"{worst:.4g}")
        if len(found) > 1:
            found.sort(key=lambda each: self.damage(*each, "usual"))
        kl = self.damage(*found[0], "retain")
        return float(f"{min(kl, worst) if np.isfinite(kl) else worst:.4g}")

    def damage(self, line: dict[str, Tensor], size: float, which: str) -> float:
        """Mean divergence on these images."""
        with shifted(self.model, line, size):
            after = logits_of(self.model, self.judged[which])
        return float(divergences(self.before[which], after).mean())

    def smallest(self, x: Tensor, y: Tensor, line: dict[str, Tensor]) -> float | None:
        """First size that corrects, to 5%; as `pss.correction.smallest`, with many sizes in one pass."""
        sizes = SIZES
        for _ in range(2):
            right = predicts(self.logits_along(x, line, torch.from_numpy(sizes).float()), y.expand(len(sizes)))
            if not right.any():
                return None
            found = sizes[at := int(right.nonzero()[0])]
            sizes = np.geomspace(sizes[max(0, at - 1)], found, BETWEEN)
        return float(found)

    @torch.no_grad()
    def logits_along(self, x: Tensor, line: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """Logits (S, C) of an image at every size: what a layer gives is linear in its weights."""
        names = {name.rpartition(".")[0] for name in line}
        handles = []
        for name in names:
            change = self.moved.get_submodule(name)
            for leaf, parameter in change.named_parameters():
                parameter.copy_(line.get(f"{name}.{leaf}", torch.zeros(())))
            add = lambda _, inputs, out, change=change: (  # noqa: E731
                out + sizes.reshape(-1, *[1] * (out.dim() - 1)) * change(*inputs)
            )
            handles.append(self.model.get_submodule(name).register_forward_hook(add))
        try:
            return self.model(x.expand(len(sizes), *x.shape[1:]))
        finally:
            for handle in handles:
                handle.remove()


def run(out: Path = OUT, networks: tuple[int, ...] = NETWORKS, mistakes: int = MISTAKES) -> None:
    """Append the rows that are missing, of so many mistakes of each network and set."""
    how = {"usual": USUAL, "retain": RETAIN, "filters": FILTERS, "draws": DRAWS, "damping": DAMPING}
    table = tables.begin(out, "python -m bench.correction_costs", **how)
    key = ["network", "set", "image", "direction"]
    there = tables.done(table, key)
    for seed, name in itertools.product(networks, SETS):
        task = Task(seed, name)
        for image in task.wrong[:mistakes].tolist():
            if any((seed, name, image, direction) not in there for direction in DIRECTIONS):
                for row in task.rows(image):
                    if (seed, name, image, row["direction"]) not in there:
                        tables.add(out, row)


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, networks=NETWORKS, mistakes=MISTAKES)
