"""Images and references by which to measure what is usual for a network."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pss import data
from pss.data.folders import folders_of
from pss.engine.checks import check_count, check_positive
from pss.models.loading import imagenet, names
from pss.models.networks import Network
from pss.models.predictions import predict
from pss.profiles import profile_dataset
from pss.reference import Reference
from pss.storage.digests import digest
from pss.storage.fingerprints import name_of
from pss.storage.places import cache_folder
from pss.storage.store import ProfileStore
from pss.units import Units

_CROPS = 300


def reference_set(network: Network, root: str | os.PathLike = "", count: int | None = None, seed: int = 0) -> Dataset:
    """Give images with labels, by which to measure what is usual for a network.

    Parameters
    ----------
    network : Network
    root : path
        A tree with a folder of pictures per class, named by the class or its number; or, as ImageNet's validation set
        has it, as many folders as there are classes, in the order of the classes.
        Without it the built-in images: of ``digits`` MNIST's validation digits; of a network with ImageNet's classes
        crops of the photographs of `pss.data.photographs`, see `PhotographCrops`. These are enough to show how things
        work, and too few and too alike to trust.
    count : int, optional
        Take this many, at random; of crops make this many (300).
    seed : int
        Of these choices.

    Returns
    -------
    Dataset
        Map-style, of ``(image, label)``; with ``ids``, ``labels``, ``classes``, ``name`` and ``fingerprint``.

    Raises
    ------
    FileNotFoundError
        If the tree is not there or has no pictures.
    ValueError
        If a folder is no class of the network, there are fewer images than asked for, or no built-in images fit it.
    """
    if os.fspath(root):
        return _drawn(_tree(network, Path(root)), count, seed)
    if network.name == "digits":
        return _drawn(data.mnist("validation"), count, seed)
    if network.classes == imagenet():
        return PhotographCrops(network, _CROPS if count is None else count, seed)
    raise ValueError(f"no built-in images fit {network.name}: give root, a tree with a folder of pictures per class")


def reference(
    network: Network,
    units: Units,
    source: str | os.PathLike = "",
    count: int | None = None,
    level: float = 0.90,
    scale_free: bool = False,
    seed: int = 0,
    progress: bool = True,
    **how: Any,
) -> Reference:
    """Give the reference of a network: read it, or profile images and fit it.

    Parameters
    ----------
    network : Network
    units : Units
    source : path
        A reference that was saved (``.safetensors``), published statistics (``.pth``: mean and deviation only, so
        z-scores only), or images, as ``root`` of `reference_set`.
    count, seed
        As in `reference_set`.
    level, scale_free
        As in `pss.Reference.fit`.
    progress : bool
        Show a progress bar.
    **how
        Passed on to `pss.profile_dataset`, which keeps the profiles, and resumes a pass that was cut off.

    Returns
    -------
    Reference

    Raises
    ------
    FileNotFoundError
        If the source is not there.
    ValueError
        If the source is of another network, other units or another loss, or its images are not fit for the network.
    """
    path = Path(source)
    if path.suffix in (".safetensors", ".pth", ".pt"):
        plain = {"loss": "cross_entropy", "signed": False, "of": "gradient"}
        made_of = {key: how.get(key, value) for key, value in plain.items()}
        found = Reference.load(path, units).check(units, model=network.model, **made_of)
        if path.suffix != ".safetensors" and network.weights != "IMAGENET1K_V1":
            warnings.warn(
                f"{path.name} was published for torchvision's IMAGENET1K_V1 weights, {network.name} has "
                f"{network.weights}: its z-scores mean little; load('…', weights='IMAGENET1K_V1') has those",
                stacklevel=2,
            )
        return found
    store = profiles_of(network, units, reference_set(network, source, count, seed), progress=progress, **how)
    return Reference.fit(store, level=level, scale_free=scale_free)


def profiles_of(network: Network, units: Units, images: Dataset, **how: Any) -> ProfileStore:
    """`pss.profile_dataset` of images that the network prepared; of the users' own networks in the users' cache."""
    how.setdefault("cache", cache_of(network))
    return profile_dataset(network.model, images, units, preprocessing=preprocessing_of(network, images), **how)


def preprocessing_of(network: Network, images: Dataset) -> str:
    """Text that names how a data set's pictures are prepared; empty for images in memory, which are as they are."""
    return "" if hasattr(images, "images") else str(name_of(network.preprocess))


def cache_of(network: Network) -> Path:
    """Folder where what is made of this network is kept; see `pss.data.cache_folder`."""
    return cache_folder(own=is_own(network))


def is_own(network: Network) -> bool:
    """Whether it is a user's own, and not one of `names`."""
    return network.name not in names()


class PhotographCrops(Dataset):
    """Crops of the photographs that packages ship: a map-style data set of ``(image, label)``.

    Each crop covers 20 to 100% of its photograph, at an aspect ratio of 3/4 to 4/3, and every other one is mirrored;
    then it goes through the network's own preprocessing. The photographs take turns, and every crop has a random stream
    of its own. A photograph that shows no class of ImageNet takes as its label what the network says of the whole of
    it: for that one the reference measures how the network holds on to its own answer, not to a true one
    (``own_answer``). The clock is left out: it is the example to be explained.

    Parameters
    ----------
    network : Network
        With ImageNet's 1,000 classes.
    count : int
        Number of crops.
    seed : int
        Of their places.
    """

    def __init__(self, network: Network, count: int, seed: int = 0):
        check_positive(count=count)
        self.name, self.split, self.classes = "photographs", "crops", network.classes
        self._photographs = [photo for photo in data.photographs() if photo.name != "clock"]
        self._pictures = [photo.image for photo in self._photographs]
        whole = torch.stack([network.preprocess(picture) for picture in self._pictures])
        answers = predict(network.model, whole).argmax(dim=1).tolist()
        self._preprocess, self._seed = network.preprocess, seed
        turn = np.arange(count) % len(self._photographs)
        labels = [answers[i] if photo.label is None else photo.label for i, photo in enumerate(self._photographs)]
        self.labels = torch.tensor(labels)[turn]
        self.own_answer = np.asarray([photo.label is None for photo in self._photographs])[turn]
        self.sources = turn
        self.ids = np.asarray([f"{self._photographs[i].name}/{n}" for n, i in enumerate(turn)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._preprocess(self.picture(index)), int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        """Give the crop as a picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"crop {index} is outside 0..{len(self) - 1}")
        picture = self._pictures[self.sources[index]]
        rng = np.random.default_rng([self._seed, index])
        area, ratio = rng.uniform(0.2, 1) * picture.width * picture.height, np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        width = min(picture.width, round(np.sqrt(area * ratio)))
        height = min(picture.height, round(np.sqrt(area / ratio)))
        left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        crop = picture.crop((int(left), int(top), int(left + width), int(top + height)))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if index % 2 else crop

    @property
    def fingerprint(self) -> str:
        """Hash of the photographs' pixels, and of what makes the crops and the labels."""
        pixels = (picture.tobytes() for picture in self._pictures)
        return digest(f"1 {self._seed} {name_of(self._preprocess)}", *pixels, self.labels.numpy())


def _tree(network: Network, root: Path) -> Dataset:
    """A tree of pictures by class; folders are named by class names or numbers, or there is one for every class."""
    folders = folders_of(root) if root.is_dir() else []
    wanted = [f"{i} {name}" for i, name in enumerate(network.classes)]  # no folder has such a name
    exact = set(folders) <= set(network.classes)  # "10" may be the name of class 2, and of class 10 the number
    try:
        for name in folders:
            by_name = exact and network.classes.count(name) == 1
            wanted[network.classes.index(name) if by_name else network.label(name)] = name
    except ValueError as error:
        if len(folders) != len(network.classes):
            raise ValueError(
                f"{root}: {error}. Expected folders named by classes of {network.name} or by their numbers, or "
                f"{len(network.classes)} folders in the order of the classes; there are {len(folders)}"
            ) from error
        wanted = folders
    tree = data.folder(root, network.preprocess, wanted)
    tree.classes = list(network.classes)
    pairs = zip(folders, network.classes, strict=True) if wanted is folders else ()
    tree.taken_for = [f"{folder} = {name}" for folder, name in pairs]
    return tree


def _drawn(dataset: Any, count: int | None, seed: int) -> Dataset:
    if count is None:
        return dataset
    check_count("count", count, len(dataset), "the number of images")
    return dataset.subset(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count]))
