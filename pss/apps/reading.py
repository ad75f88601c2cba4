"""How well a network reads the images at hand, and what is usual for it on those that it reads.

A misread image, and the image to be explained, are no part of what is usual: what is wrong on them would hide itself.
Where a network reads hardly more than chance would, its labels or its preprocessing are wrong, and nothing is ranked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy import stats
from torch import Tensor
from torch.utils.data import Dataset, Subset

from pss import data, models
from pss.apps.pages import joined, sentence
from pss.models import misclassified
from pss.reference import MIN_IMAGES, Reference
from pss.storage.fingerprints import name_of
from pss.storage.store import ProfileStore
from pss.units import Units

SAVED = (".safetensors", ".pth", ".pt")
_MOST = 500  # images of a large folder that the accuracy is measured on
_SHOWN = 500  # profiles of misread images that are kept in memory
_SAME = {"rtol": 1e-3, "atol": 1e-6}  # the same image profiled in another batch


@dataclass(frozen=True)
class Reading:
    """How many of some images a network reads right, of how many; ``classes`` is how many it has to choose from.

    ``damaged`` names the files that were left out, because they cannot be read.
    """

    name: str
    n: int
    right: int
    classes: int
    damaged: tuple[str, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, at 95% (Wilson 1927)."""
        found = stats.binomtest(self.right, self.n).proportion_ci(0.95, "wilson")
        return float(found.low), float(found.high)

    @property
    def near_chance(self) -> bool:
        """Whether guessing one of the classes at random lies within the interval, or above it."""
        return self.interval[0] <= 1 / self.classes

    def told(self) -> tuple[str, str]:
        """A sentence in English, and in Japanese."""
        low, high = self.interval
        numbers = {"name": self.name, "n": self.n, "right": self.right, "share": self.right / self.n}
        numbers |= {"low": low, "high": high, "chance": 1 / self.classes, "classes": self.classes}
        told = [sentence("near chance" if self.near_chance else "accuracy", **numbers)]
        if self.damaged:
            names = ", ".join(self.damaged[:5]) + ", …" * (len(self.damaged) > 5)
            told.append(sentence("damaged", n=len(self.damaged), names=names))
        return joined(told)

    def summary(self) -> dict[str, object]:
        """For ``summary.json``."""
        low, high = self.interval
        return {"images": self.n, "accuracy": self.right / self.n, "accuracy_low": low, "accuracy_high": high}

    def check(self, network: models.Network, allow_chance: bool) -> Reading:
        """Refuse to go on where the network reads no better than chance, unless that is allowed; returns itself.

        Raises
        ------
        ValueError
            Saying how the pictures were prepared.
        """
        if self.near_chance and not allow_chance:
            names = ", ".join(network.classes[:5]) + ", …" * (len(network.classes) > 5)
            raise ValueError(
                f"{self.told()[0]} Nothing is ranked, because the labels or the preprocessing are wrong. The pictures "
                f"went in so: {prepared(network)}; classes: {names}. Say under "
                "preprocessing and classes in the network's YAML file what it was trained with, or set allow_chance"
            )
        return self


def prepared(network: models.Network) -> str:
    """How the pictures of a network are prepared, in a few words."""
    steps = network.preprocess
    if not isinstance(steps, models.Preprocessing):
        return str(name_of(steps))
    told = [f"{name} {getattr(steps, name) or 'none'}" for name in ("resize", "crop")]
    told += [f"{name} {', '.join(f'{v:.4g}' for v in getattr(steps, name))}" for name in ("mean", "std")]
    return "; ".join(told + ["grey"] * steps.grey)


def measure(network: models.Network, images: Dataset, seed: int = 0) -> Reading:
    """Read the images, or 500 of them drawn at random; those whose label is the network's own answer are left out."""
    own = getattr(images, "own_answer", np.zeros(len(images), bool))
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(~own))[:_MOST]
    wrong = misclassified(network.model, Subset(images, rows.tolist()))
    right, name = len(rows) - len(wrong), str(getattr(images, "name", "images"))
    return Reading(name, len(rows), right, len(network.classes), damaged_of(images))


def pictures(
    network: models.Network,
    source: str,
    count: int | None = None,
    seed: int = 0,
    missing: str = "a folder with folders",
) -> Dataset:
    """At most ``count`` images of a tree, or built-in ones: as `pss.models.reference_set`, which refuses too many.

    Files that cannot be read are left out, see `damaged_of`. Where none are named and none built in fit, a ValueError
    says what is missing.
    """
    if not source:
        if not has_built_in(network):
            raise ValueError(f"no built-in images fit {network.name}: give {missing} of pictures per class")
        return models.reference_set(network, "", count, seed)
    every = models.reference_set(network, source)
    few = every if count is None or count >= len(every) else models.reference_set(network, source, count, seed)
    reasons = Parallel(n_jobs=-1, prefer="threads")(delayed(_damage)(path) for path, _ in few.samples)
    if not any(reasons):
        return few
    whole = few.subset([i for i, reason in enumerate(reasons) if not reason])
    whole.damaged = tuple(str(few.ids[i]) for i, reason in enumerate(reasons) if reason)
    return whole


def _damage(path: str) -> str:
    """Why a picture cannot be read; empty if it can."""
    try:
        data.read_image(path)
    except ValueError as error:
        return str(error)
    return ""


def damaged_of(images: Dataset) -> tuple[str, ...]:
    """Names of the files that `pictures` left out."""
    return getattr(images, "damaged", ())


def has_built_in(network: models.Network) -> bool:
    """Whether there are images of the package that it can read."""
    try:
        models.reference_set(network, count=1)
    except ValueError:
        return False
    return True


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
        Profiles of the images among them that were misread, but for the explained one; at most 500.
    """

    reference: Reference
    told: tuple[str, str]
    reading: Reading | None
    mistakes: Tensor

    def sentences(self, network: models.Network, own: Reading | None = None) -> list[tuple[str, str]]:
        """What the pictures went through, how well they are read, and what is usual: in English and in Japanese.

        ``own`` is of the folder that the explained image comes from, where that is another one.
        """
        readings = {reading.name: reading for reading in (self.reading, own) if reading is not None}
        told = [sentence("prepared", how=prepared(network))]
        told += [reading.told() for reading in readings.values()] or [sentence("accuracy unknown")]
        return [*told, self.told, *kept(network)]


def usual(
    network: models.Network,
    units: Units,
    reference: str = "",
    tree: str = "",
    explained: tuple[Tensor, int] | None = None,
    count: int | None = None,
    loss: str = "cross_entropy",
    signed: bool = False,
    allow_chance: bool = False,
) -> Usual:
    """What is usual: a saved reference, or one fitted to the images that the network reads right.

    Parameters
    ----------
    reference : path
        A saved reference, published statistics, or a folder of pictures per class, best of the training images. By
        default the images of ``tree``, or where there is none the built-in ones.
    tree : path
        Where the explained image comes from.
    explained : (Tensor, shape (1, U); int)
        Profile and label of that image, which is left out wherever it turns up.
    count : int, optional
        Draw at most so many images.
    allow_chance : bool
        Go on where the network reads no better than chance; then the misread images stay in.

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
        found = read_saved(network, units, source, advice, loss, signed)
        return Usual(found, sentence("usual saved", name=Path(source).name, n=found.n or "?"), None, torch.empty(0))
    kind = "named" if reference else "tree" if tree else "built in"
    images = pictures(
        network, source, count, missing="reference, best of its training images, or data_root, with folders"
    )
    return fit_usual(network, units, images, kind, explained, allow_chance, loss=loss, signed=signed)


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
    name = str(getattr(images, "name", "images")) if kind != "built in" else "built-in images"
    wrong, itself = store.misclassified, _rows_of(store, explained)
    told = np.flatnonzero(~getattr(images, "own_answer", np.zeros(len(images), bool)))  # labels, not its own answers
    right = len(told) - len(np.intersect1d(wrong, told))
    reading = Reading(name, len(told), right, len(network.classes), damaged_of(images)).check(network, allow_chance)
    out = np.union1d([] if misread or reading.near_chance else wrong, itself).astype(int)
    others = np.setdiff1d(wrong, itself)
    numbers = {
        "name": name,
        "n": len(store),
        "wrong": len(others),
        "itself": len(itself),
        "left": len(store) - len(out),
    }
    if numbers["left"] < MIN_IMAGES:
        raise ValueError(
            f"to say what is usual {MIN_IMAGES} images are needed, and {numbers['left']} of {name} would be left: of "
            f"{len(store)} images {len(others)} more than the explained one (found: {len(itself)}) are misread; give "
            f"{parameter}, a folder with more of them (training images, if you have them), or a larger reference_count"
        )
    made_of = {"left_out": str(len(out)), "misread": "kept" if misread else "left out"}
    found = Reference.fit(store.without(out), level, scale_free, provenance=made_of)
    said = sentence("usual chance" if reading.near_chance else f"usual {kind}", **numbers)
    return Usual(found, said, reading, torch.from_numpy(store.profiles[others[:_SHOWN]]))


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


def _rows_of(store: ProfileStore, explained: tuple[Tensor, int] | None) -> np.ndarray:
    """Rows that are the explained image, by whatever name: those with its label and its profile."""
    if explained is None or not (own := explained[0][0].numpy()).any():
        return np.empty(0, int)
    rows, unit = np.flatnonzero(store.labels == explained[1]), int(np.abs(own).argmax())
    rows = rows[np.isclose(store.profiles[rows, unit], own[unit], **_SAME)]  # a column first: few are left
    close = np.abs(store.profiles[rows] - own).max(axis=1, initial=0) <= _SAME["rtol"] * np.abs(own).max()
    return rows[close]


def kept(network: models.Network) -> list[tuple[str, str]]:
    """Where what is made of a user's own network is kept, and how large that is by now; nothing for another one."""
    folder = models.cache_of(network)
    if not models.is_own(network) or not folder.is_dir():
        return []
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [sentence("cached", folder=str(folder).replace(str(Path.home()), "~", 1), size=size / 1e6)]
