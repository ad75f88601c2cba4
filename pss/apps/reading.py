"""How well a network reads the images at hand, and what is usual for it on those that it reads.

A misread image, and the image to be explained, are no part of what is usual: what is wrong on them would hide itself.
Where a network reads hardly more than chance would, its labels or its preprocessing are wrong, and nothing is ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from pss import models
from pss.apps.pages import joined, sentence
from pss.models import misclassified
from pss.models.predictions import ids_of
from pss.reference import MIN_IMAGES, Reference
from pss.saliency import profile
from pss.statistics import fdr_significant, wilson
from pss.storage.fingerprints import name_of
from pss.units import Units

SAVED = (".safetensors", ".pth", ".pt")
_MOST = 500  # images of a large folder that the accuracy is measured on
_SHOWN = 500  # profiles of misread images that are kept in memory
_FEW = 5  # images of a class, below which it says little that none is read right
_TRIED = 50  # images that are read right, to try the reference on
_READ: WeakKeyDictionary = WeakKeyDictionary()  # pictures that were read, by the preprocessing that they went through
_SAME = {"rtol": 1e-3, "atol": 1e-6}  # the same image profiled in another batch


@dataclass(frozen=True)
class Reading:
    """How many of some images a network reads right, of how many; ``classes`` is how many it has to choose from.

    ``damaged`` names the files that were left out, because they cannot be read; ``never`` the classes of five images or
    more of which none is read right, if others are; ``in_order`` are the first ``names`` of the classes, sorted, and
    the ``share`` that would be right in that order, where it is clearly larger. ``dealt`` is the share that the same
    answers would have right on other images of such classes, see `dealt_at_random`. ``folders`` says for
    which class each folder was taken, where they do not have the names of classes.
    """

    name: str
    n: int
    right: int
    classes: int
    damaged: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    in_order: dict[str, Any] = field(default_factory=dict)
    dealt: float = 0.0
    folders: tuple[str, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, at 95%."""
        return wilson(self.right, self.n)

    @property
    def share(self) -> float:
        """The accuracy."""
        return self.right / self.n

    @property
    def guessed(self) -> bool:
        """Whether guessing one of the classes at random lies within the interval, or above it."""
        return self.interval[0] <= 1 / self.classes

    @property
    def near_chance(self) -> bool:
        """Whether guessing would do, or the network's own answers would, whatever images they were given to."""
        return self.guessed or self.share <= self.dealt

    def told(self) -> tuple[str, str]:
        """A sentence in English, and in Japanese."""
        low, high = self.interval
        numbers = {"name": self.name, "n": self.n, "right": self.right, "share": self.share}
        numbers |= {"low": low, "high": high, "chance": 1 / self.classes, "classes": self.classes, "dealt": self.dealt}
        kind = "near chance" if self.guessed else "one answer" if self.near_chance else "accuracy"
        told = [sentence(kind, **numbers)]
        for name, names in (("folders", self.folders), ("damaged", self.damaged), ("never right", self.never)):
            told += [sentence(name, n=len(names), names=listed(names))] if names else []
        return joined([*told, *([sentence("other order", **self.in_order)] if self.in_order else [])])

    def summary(self) -> dict[str, object]:
        """For ``summary.json``."""
        low, high = self.interval
        return {"images": self.n, "accuracy": self.share, "accuracy_low": low, "accuracy_high": high}

    def check(self, network: models.Network, allow_chance: bool) -> Reading:
        """Refuse to go on where the network reads no better than chance, unless that is allowed; returns itself.

        Raises
        ------
        ValueError
            Saying how the pictures were prepared.
        """
        if self.near_chance and not allow_chance:
            raise ValueError(
                f"{self.told()[0]} Nothing is ranked, because the labels or the preprocessing are wrong, or the images "
                f"too few, or too many of one class, to tell. The pictures went in so: {prepared(network)}; classes: "
                f"{listed(network.classes)}. Say under preprocessing and classes in the network's YAML file what it "
                "was trained with, give more images of each class, or set allow_chance"
            )
        return self


def dealt_at_random(labels: np.ndarray, answers: np.ndarray, classes: int) -> float:
    """Share of the answers that would be right, at most (97.5%), were they dealt to the images at random.

    That of the best constant answer is no measure: a network that is right on most images of each class may lie below
    it. One that knows nothing of the images is right as often as its answers dealt to any of them (Cohen 1960; the
    variance over all ways to deal them is that of Fleiss, Cohen and Everitt 1969), and a constant answer just as often.
    Zero where fewer than five images are of other classes than the most frequent: these could not tell.
    """
    n, (p, q) = len(labels), (np.bincount(of, minlength=classes) / len(labels) for of in (labels, answers))
    if n * (1 - p.max()) < _FEW - 0.5:
        return 0.0
    mean = p @ q
    return float(mean + 1.96 * np.sqrt(max(0.0, mean + mean**2 - (p * q) @ (p + q)) / (n - 1)))


def listed(names: Sequence[str]) -> str:
    """The first five of them."""
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def prepared(network: models.Network) -> str:
    """How the pictures of a network are prepared, in a few words."""
    steps = network.preprocess
    if not isinstance(steps, models.Preprocessing):
        return str(name_of(steps))
    told = [f"{name} {getattr(steps, name) or 'none'}" for name in ("resize", "crop")]
    told += [f"{name} {', '.join(f'{v:.4g}' for v in getattr(steps, name))}" for name in ("mean", "std")]
    return "; ".join(told + ["grey"] * steps.grey)


def units_of(network: models.Network, kind: str) -> Units:
    """Units of a kind, see `pss.Units.of`; ``auto`` are filters where most layers are convolutions, otherwise all."""
    if kind != "auto":
        return Units.of(network.model, kind)
    every = Units.of(network.model, "all")
    convolutions = sum(len(layer.shape) > 2 for layer in every.layers)
    return Units.of(network.model, "filters") if 2 * convolutions >= len(every.layers) else every


def ranked(network: models.Network, units: Units) -> tuple[str, str]:
    """How much of the network the units are: a sentence in English, and in Japanese."""
    parts = zip(units.starts, units.layers, strict=False)
    weights = sum(layer.count * units.view(network.model, first).numel() for first, layer in parts)
    share = weights / sum(parameter.numel() for parameter in network.model.parameters())
    told = sentence("ranked", units=len(units), layers=len(units.layers), share=share)
    return joined([told, sentence("ranked few")]) if share < 0.5 and units.kind != "all" else told


def measure(network: models.Network, images: Dataset, seed: int = 0) -> Reading:
    """Read the images, or 500 of them drawn at random; those whose label is the network's own answer are left out."""
    rows = np.random.default_rng(seed).permutation(_labelled(images))[:_MOST]
    return reading_of(network, images, misclassified(network.model, Subset(images, rows.tolist())), rows)


def _labelled(images: Dataset) -> np.ndarray:
    """Rows of the images whose label is none of the network's own answers."""
    return np.flatnonzero(~getattr(images, "own_answer", np.zeros(len(images), bool)))


def reading_of(
    network: models.Network, images: Dataset, wrong: pd.DataFrame, rows: np.ndarray | None = None
) -> Reading:
    """How the images are read, or those rows of them, of which ``wrong``, as `misclassified` has them, are misread."""
    every = images.labels if hasattr(images, "labels") else [images[i][1] for i in range(len(images))]
    labels, classes = np.asarray(every)[slice(None) if rows is None else rows], network.classes
    answers = labels.copy()
    answers[wrong.index] = wrong["predicted"]
    right, n = labels == answers, len(labels)
    known = Reading(str(getattr(images, "name", "images")), n, int(right.sum()), len(classes))
    more = {
        "folders": getattr(images, "taken_for", ()),
        "damaged": getattr(images, "damaged", ()),
        "dealt": dealt_at_random(labels, answers, len(classes)),
    }
    missed = lambda i: right.any() and (labels == i).sum() >= _FEW and not right[labels == i].any()  # noqa: E731
    never = tuple(name for i, name in enumerate(classes) if missed(i))
    sorted_so = np.argsort(classes)  # torchvision's ImageFolder numbers classes so: 0, 1, 10, 2
    moved = int((np.argsort(sorted_so)[labels] == answers).sum())
    other = {"names": listed([classes[i] for i in sorted_so]), "share": moved / n}
    return replace(known, never=never, in_order=other if wilson(moved, n)[0] > known.interval[1] else {}, **more)


def pictures(
    network: models.Network,
    source: str,
    count: int | None = None,
    seed: int = 0,
    missing: str = "a folder with folders",
) -> Dataset:
    """At most ``count`` images of a tree, or built-in ones: as `pss.models.reference_set`, which refuses too many.

    Files are read once, and those that cannot be are left out and named in ``damaged``. Where none are named and none
    built in fit, a ValueError says what is missing. ``undrawn`` is how many are left; more crops of the photographs are
    none, since they are no new scenes.
    """
    if not source and not has_built_in(network):
        raise ValueError(f"no built-in images fit {network.name}: give {missing} of pictures per class")
    draw = partial(models.reference_set, network, source)
    every = draw() if source or network.name == "digits" else draw(count, seed)
    few = every if count is None or (source and count >= len(every)) else draw(count, seed)
    few.undrawn = len(every) - len(few)
    return few.readable(_READ.setdefault(network.preprocess, {})) if source else few


def in_memory(images: Dataset, rows: Sequence[int] | np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Some of the images, or all, (N, C, H, W), and their labels, (N,); one that cannot be read is named."""
    rows, found, labels = range(len(images)) if rows is None else rows, [], []
    for row, name in zip(rows, ids_of(images, rows), strict=True):
        try:
            image, label = images[int(row)][:2]
        except Exception as error:
            error.add_note(f"this happened while reading image {name} of the data set")
            raise
        found.append(image)
        labels.append(int(label))
    return torch.stack(found) if found else images[0][0][None][:0], torch.tensor(labels, dtype=torch.int64)


def has_built_in(network: models.Network) -> bool:
    """Whether there are images of the package that it can read."""
    return network.name == "digits" or network.classes == models.imagenet()


@dataclass(frozen=True)
class Usual:
    """What is usual for a network.

    Attributes
    ----------
    reference : Reference
    told : (str, str)
        What it was made of and why, in English and in Japanese.
    reading : Reading or None
        Of the images that it was made of; None for a saved one, which does not say.
    mistakes : Tensor, shape (M, U)
        Profiles of other images than the explained one that were misread: of its folder at most 50, or where the
        reference is made of that, of the images of the reference at most 500.
    own : Reading or None
        Of the folder that the explained image comes from, where the reference is made of something else.
    right : Tensor, shape (R, U)
        Profiles of images of that folder that are read right; at most 50.
    undrawn : int
        How many more images there are where the reference is from.
    """

    reference: Reference
    told: tuple[str, str]
    reading: Reading | None
    mistakes: Tensor
    own: Reading | None = None
    right: Tensor = field(default_factory=lambda: torch.empty(0))
    undrawn: int = 0

    @property
    def at_hand(self) -> Reading | None:
        """Of the images that come with the explained one, as far as there are any."""
        return self.own or self.reading

    def alarms(self, q: float = 0.05) -> int:
        """How many of the images `right` have units that are significant at false-discovery rate q."""
        if self.reference.threshold is None or not len(self.right):
            return 0
        log_p = self.reference.log_tail_probability(self.right)
        return int(fdr_significant(log_p, self.reference.n, q).any(dim=1).sum())

    def calibrated(self, q: float = 0.05) -> bool:
        """Whether not many more than a share q of the images `right` have significant units; nothing is wrong on them.

        Where no unit is at fault, each discovery is a false one, and a rate of q allows one in a share q of the images.
        """
        return not len(self.right) or wilson(self.alarms(q), len(self.right))[0] <= q

    def sentences(self, network: models.Network, units: Units) -> list[tuple[str, str]]:
        """What is ranked, what the pictures went through, how well they are read, what is usual; in both languages."""
        read = [reading.told() for reading in (self.reading, self.own) if reading] or [sentence("accuracy unknown")]
        return [ranked(network, units), sentence("prepared", how=prepared(network)), *read, self.told, *kept(network)]


def usual(
    network: models.Network,
    units: Units,
    reference: str = "",
    tree: str = "",
    explained: tuple[Tensor, int] | None = None,
    count: int | None = None,
    allow_chance: bool = False,
    **how: Any,
) -> Usual:
    """What is usual: a saved reference, or one fitted to the images that the network reads right.

    Parameters
    ----------
    reference : path
        A saved reference, published statistics, or a folder of pictures per class, best of images like the explained
        one that took no part in training: see `Usual.calibrated`. By default the images of ``tree``, or where there is
        none the built-in ones.
    tree : path
        Where the explained image comes from.
    explained : (Tensor, shape (1, U); int)
        Profile and label of that image, which is left out wherever it turns up.
    count : int, optional
        Draw at most so many images.
    allow_chance : bool
        Go on where the network reads no better than chance; where it only guesses, the misread images stay in.
    **how
        ``loss`` and ``signed`` of `pss.profile`.

    Raises
    ------
    ValueError
        If there are no images, too few are read right, the network reads no better than chance, or a file is of
        something else; the message says what to give.
    """
    reference, tree = (str(Path(place).expanduser().absolute()) if place else "" for place in (reference, tree))
    source = reference or tree
    if Path(source).suffix in SAVED:
        advice = "-p reference FOLDER in its place, a folder of pictures per class, has one made for this network"
        found = read_saved(network, units, source, advice, **how)
        told = sentence("usual saved", name=Path(source).name, n=found.n or "?")
        return _tried(Usual(found, told, None, torch.empty(0)), network, units, tree, explained, **how)
    kind = "named" if reference else "tree" if tree else "built in"
    images = pictures(network, source, count, missing="reference or data_root, a folder with folders")
    known = fit_usual(network, units, images, kind, explained, allow_chance, **how)
    return known if source == tree else _tried(known, network, units, tree, explained, **how)


def _tried(
    known: Usual, network: models.Network, units: Units, tree: str, explained: tuple[Tensor, int] | None, **how: Any
) -> Usual:
    """What is usual, with `right` and `mistakes` of the folder, the explained image left out."""
    if not tree:
        return known
    some = pictures(network, tree, _MOST)
    misread = misclassified(network.model, some)
    wrong, own = np.isin(np.arange(len(some)), misread.index), reading_of(network, some, misread)
    found = {}
    for name, which in (("right", ~wrong), ("mistakes", wrong)):
        rows = np.random.default_rng(0).permutation(np.flatnonzero(which))[: _TRIED + 1]
        if len(rows):
            images, labels = in_memory(some, rows)
            s = profile(network.model, images, labels, units, **how)
            found[name] = s[np.delete(np.arange(len(s)), _rows_of(s.numpy(), labels.numpy(), explained))][:_TRIED]
    return replace(known, own=own, **{"mistakes": torch.empty(0)} | found)


def fit_usual(
    network: models.Network,
    units: Units,
    images: Dataset,
    kind: str,
    explained: tuple[Tensor, int] | None = None,
    allow_chance: bool = False,
    misread: bool = False,
    level: float = 0.90,
    scale_free: bool = False,
    parameter: str = "reference",
    **how: Any,
) -> Usual:
    """What is usual on images, of which the misread ones and the explained one are left out.

    Parameters
    ----------
    kind : {"named", "tree", "built in"}
        Why these images.
    explained, allow_chance
        As in `usual`.
    misread : bool
        Keep the misread images, as both papers do.
    level, scale_free
        As in `pss.Reference.fit`.
    parameter : str
        What takes such images, for messages.
    **how
        Passed on to `pss.profile_dataset`.

    Raises
    ------
    ValueError
        If too few images are left, or the network reads no better than chance.
    """
    store = models.profiles_of(network, units, images, **{"progress": False} | how)
    wrong, itself = store.misclassified, _rows_of(store.profiles, store.labels, explained)
    rows = _labelled(images)
    at = np.flatnonzero(np.isin(rows, wrong))
    misread_as = pd.DataFrame({"predicted": store.predictions[rows[at]]}, index=at)
    reading = reading_of(network, images, misread_as, rows).check(network, allow_chance)
    out = np.union1d([] if misread or reading.guessed else wrong, itself).astype(int)
    others, undrawn = np.setdiff1d(wrong, itself), getattr(images, "undrawn", 0)
    numbers = {"name": reading.name, "n": len(store), "wrong": len(others), "left": len(store) - len(out)}
    without = {"itself": len(itself), "misread": len(out) - len(itself)}
    who = " and ".join(name for name, count in without.items() if count)
    said = [sentence(f"left out {who}", n=len(store), **without)] if who else []
    if numbers["left"] < MIN_IMAGES:
        more = ", or a larger reference_count" * (undrawn > 0)
        raise ValueError(
            f"to say what is usual {MIN_IMAGES} images are needed, of {reading.name} there would be {numbers['left']}. "
            f"{joined(said)[0]} Give {parameter}, a folder with more of them{more}"
        )
    made_of = {"left_out": str(len(out)), "misread": "kept" if misread else "left out"}
    found = Reference.fit(store.without(out), level, scale_free, provenance=made_of)
    told = joined([sentence("usual chance" if reading.guessed else f"usual {kind}", **numbers), *said])
    return Usual(found, told, reading, torch.from_numpy(store.profiles[others[:_SHOWN]]), undrawn=undrawn)


def read_saved(
    network: models.Network,
    units: Units,
    file: str | Path,
    advice: str,
    loss: Any = "cross_entropy",
    signed: bool = False,
    **made_of: Any,
) -> Reference:
    """Read a saved reference; where it is of something else, advise how the right one is made."""
    try:
        return models.reference(network, units, file, loss=loss, signed=signed).check(units, **made_of)
    except ValueError as error:
        raise ValueError(f"reference {file}: {error}: {advice}") from error


def _rows_of(profiles: np.ndarray, labels: np.ndarray, explained: tuple[Tensor, int] | None) -> np.ndarray:
    """Rows that are the explained image, by whatever name: those with its label and its profile."""
    if explained is None or not (own := explained[0][0].numpy()).any():
        return np.empty(0, int)
    rows, unit = np.flatnonzero(labels == explained[1]), int(np.abs(own).argmax())
    rows = rows[np.isclose(profiles[rows, unit], own[unit], **_SAME)]  # a column first: few are left
    close = np.abs(profiles[rows] - own).max(axis=1, initial=0) <= _SAME["rtol"] * np.abs(own).max()
    return rows[close]


def kept(network: models.Network) -> list[tuple[str, str]]:
    """Where what is made of a user's own network is kept, and how large that is by now; nothing for another one."""
    folder = models.cache_of(network)
    if not models.is_own(network) or not folder.is_dir():
        return []
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [sentence("cached", folder=str(folder).replace(str(Path.home()), "~", 1), size=size / 1e6)]
