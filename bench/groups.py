"""Is one filter broken at all? What gain and output say of groups of images where nothing is, and where one filter is.

    python -m bench.groups [--networks 0 1 2] [--out data/experiments/groups.csv]

A row is a group of 24 images: read right; natural mistakes on four shifted sets; mistakes by a shortcut, a white corner
that only images of one class had in training; and images that a planted fault spoils, 3 to 24 (see `planted_faults`).
Its numbers are the highest mean score over all filters, by some of the rankings of `planted_faults`, with references of
the group's own network, healthy, on ``mnist/reference``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import pss
from bench import tables
from bench.planted_faults import IMAGES, KINDS, Network

OUT = tables.EXPERIMENTS / "groups.csv"
NETWORKS, SETS, EACH, MARKED, CORNER, EPOCHS = (0, 1, 2), ("digits", "svhn_like", "mnist_m", "noise"), 6, 7, 4, 3
ASKED = ("gain, root", "output, |z|", "output, in layer", "activation, |z|", "activation, in layer")

Group = tuple[str, Network, nn.Module, Tensor, Tensor]  # its sort, its references, who reads it, images and labels


def whole(places: Tensor) -> list[Tensor]:
    """The places of some groups of as many images."""
    return [at for at in places.split(IMAGES)[:EACH] if len(at) == IMAGES]


def healthy(network: Network) -> Iterator[Group]:
    """Images that are read right, and natural mistakes."""
    test = network.test
    for at in whole(network.right.nonzero()[:, 0]):
        yield "read right", network, network.model, test.images[at], test.labels[at]
    for name in SETS:
        data = pss.data.load(name, "test")
        wrong = pss.models.misclassified(network.model, data).index.to_numpy()
        for at in whole(torch.from_numpy(wrong.copy())):
            yield f"mistakes, {name}", network, network.model, data.images[at], data.labels[at]


def broken(network: Network) -> Iterator[Group]:
    """Images that a planted fault spoils: one of every kind in each of the three stages in the middle."""
    for kind in KINDS:
        for stage in (1, 2, 3):
            for unit, at in network.faults(kind, stage, 1):
                model = network.broken(kind, unit)
                yield f"broken, {kind}", network, model, network.test.images[at], network.test.labels[at]


def marked(images: Tensor) -> Tensor:
    """The images with a white corner."""
    images = images.clone()
    images[:, :, :CORNER, :CORNER] = 1.0
    return images


def by_shortcut(network: Network) -> Iterator[Group]:
    """Images of other classes with the corner, which a network with the shortcut reads as the marked class."""
    train, test = pss.data.mnist("train"), network.test
    images = torch.where((train.labels == MARKED)[:, None, None, None], marked(train.images), train.images)
    train = pss.data.ImageSet(images, train.labels, name="mnist, marked", split="train", classes=train.classes)
    model, _ = pss.models.train(network.seed, epochs=EPOCHS, train_set=train)
    own, images = Network(network.seed, model), marked(test.images)
    wrong = (pss.models.predict(model, images).argmax(1) == MARKED) & (test.labels != MARKED)
    for at in whole(wrong.nonzero()[:, 0]):
        yield "mistakes, shortcut", own, model, images[at], test.labels[at]


SORTS = {"healthy": healthy, "broken": broken, "shortcut": by_shortcut}


def look(seed: int, sort: str, name: str, network: Network, model: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """A row: how far the filter that stands out most does so."""
    row = {"network": seed, "sort": sort, "group": name, "images": len(labels)}
    of = network.quantities(model, images, labels)
    for asked in ASKED:
        first = network.together(asked, of).iloc[0]
        row |= {f"{asked}: filter": int(first["unit"]), f"{asked}: score": round(first["score"], 3)}
    return row


def run(out: Path, networks: tuple[int, ...]) -> pd.DataFrame:
    """All rows; those of a network and a sort of groups are written together."""
    there = tables.begin(out, "python -m bench.groups")
    done = tables.done(there, ["network", "sort"])
    for seed in networks:
        network = Network(seed)
        for sort, groups in SORTS.items():
            if (seed, sort) not in done:
                for row in [look(seed, sort, *group) for group in groups(network)]:
                    tables.add(out, row)
            print(f"network {seed}, {sort}: done", flush=True)
    return tables.read(out)


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, networks=NETWORKS)
