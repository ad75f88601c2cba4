"""Images on the user's disk: folders by class, the full MNIST and SVHN."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from PIL import Image

from pss.data.builtin import SIZE, built_in_set, load, normalize, resize
from pss.data.image_set import MEAN, STD, ImageSet, hash_arrays
from pss.data.pictures import is_picture, read_image
from pss.data.vision import torchvision
from pss.engine.checks import check_known

_KEPT = 2**28  # bytes of pictures that are kept in memory once they are read


def preprocess(image: Image.Image) -> torch.Tensor:
    """Prepare a picture as the built-in sets are: RGB, 32×32, ``(x - 0.5) / 0.5``; gives (3, 32, 32), float32."""
    square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return normalize(np.asarray(square)).contiguous()


def torchvision_set(name: str, root: str | os.PathLike, split: str = "test") -> ImageSet:
    """Read the full MNIST or SVHN from disk, with the preprocessing of the built-in sets. Nothing is downloaded.

    Parameters
    ----------
    name : {"MNIST", "SVHN"}
    root : path
        The folder to give to ``torchvision.datasets.MNIST`` or ``SVHN``.
    split : str
        ``train`` or ``test``, of SVHN also ``extra``.

    Returns
    -------
    ImageSet
        Images of shape (N, 3, 32, 32); ids hold each image's position in the full set. All of MNIST's 60,000 need
        0.7 GB: `open_set` takes some at random.

    Raises
    ------
    FileNotFoundError
        If the files are not there, or not whole.
    ValueError
        If there is no such set or split.
    """
    splits = {"MNIST": ("train", "test"), "SVHN": ("train", "test", "extra")}
    check_known("set", name, splits)
    check_known(f"split of {name}", split, splits[name])
    dataset = getattr(torchvision.datasets, name)
    which = {"train": split == "train"} if name == "MNIST" else {"split": split}
    try:
        full = dataset(os.fspath(root), download=False, **which)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name}'s {split} files are not in {os.fspath(root)!r}, or not whole ({error}). Put them there yourself: "
            f"PSS downloads nothing; torchvision.datasets.{name}(root, download=True) fetches them once"
        ) from error
    pixels = resize(full.data.numpy()) if name == "MNIST" else full.data.transpose(0, 2, 3, 1)
    labels = np.asarray(full.targets if name == "MNIST" else full.labels)
    return built_in_set(pixels, labels, name, split, np.arange(len(full)))


def _now(path):
    """A file as it is now."""
    return path, os.stat(path).st_mtime_ns


class _Folder(torchvision.datasets.ImageFolder):
    def __init__(self, root, transform, classes):
        self._wanted = classes
        super().__init__(root, transform, loader=read_image, is_valid_file=is_picture, allow_empty=True)
        if not self.samples:
            folders = ", ".join(list(self.class_to_idx)[:5])
            raise FileNotFoundError(f"{root} holds no pictures in its folders by class, {folders}: expected some")
        self.labels = torch.tensor(self.targets, dtype=torch.int64)
        self.ids = np.asarray([Path(path).relative_to(root).as_posix() for path, _ in self.samples])
        self.sources = np.arange(len(self))
        self.name, self.split = Path(root).name, "all"
        self.damaged, self._kept = (), {}

    def __getitem__(self, index):
        kept = self._kept.get(_now(self.samples[index][0]))
        return super().__getitem__(index) if kept is None else (kept, self.targets[index])

    def readable(self, kept: dict) -> _Folder:
        """Read every picture: those that can be read, ``damaged`` names the others.

        They are kept in memory as far as 256 MB go, for other folders of the same transform that are given ``kept``.
        """
        jobs = (delayed(self._read)(path, kept) for path, _ in self.samples)
        rows, room = [], _KEPT - sum(image.nbytes for image in kept.values())
        for row, image in enumerate(Parallel(n_jobs=-1, prefer="threads", return_as="generator")(jobs)):
            if image is None:
                continue
            rows.append(row)
            if (now := _now(self.samples[row][0])) not in kept and (room := room - image.nbytes) >= 0:
                kept[now] = image
        if not rows:
            names = ", ".join(self.ids[:3])
            raise ValueError(f"none of the {len(self)} files of {self.name} can be read as a picture, as {names}")
        whole = self.subset(rows)
        whole.damaged = tuple(str(name) for name in np.delete(self.ids, rows))
        whole._kept = kept
        return whole

    def _read(self, path, kept):
        if (image := kept.get(_now(path))) is not None:
            return image
        try:
            image = read_image(path)
        except ValueError:
            return None
        return self.transform(image)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and labels; hashing the bytes of a large set would take minutes."""
        sizes = np.asarray([os.stat(path).st_size for path, _ in self.samples])
        return hash_arrays(self.ids, sizes, self.labels.numpy())

    def subset(self, indices) -> _Folder:
        """The pictures at these positions, as a set of their own."""
        chosen = copy.copy(self)
        vars(chosen).pop("fingerprint", None)
        at = np.asarray(indices)
        chosen.samples = chosen.imgs = [self.samples[i] for i in at]
        chosen.targets = [self.targets[i] for i in at]
        chosen.labels, chosen.ids, chosen.sources = self.labels[at], self.ids[at], self.sources[at]
        return chosen

    def find_classes(self, directory):
        names = folders_of(directory)
        if not names:
            raise FileNotFoundError(f"{directory} holds no folders: expected one for each class, with its pictures")
        wanted = names if self._wanted is None else self._wanted
        if unknown := sorted(set(names) - set(wanted)):
            raise ValueError(f"{directory} has folders that are not in classes: {', '.join(unknown)}")
        return wanted, {name: wanted.index(name) for name in names}


def folders_of(directory: str | os.PathLike) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith("."))


def folder(
    root: str | os.PathLike,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    classes: Sequence[str] | None = None,
) -> torchvision.datasets.ImageFolder:
    """Read a tree with one folder of pictures per class, as ``torchvision.datasets.ImageFolder``.

    Parameters
    ----------
    root : path
    transform : callable, optional
        From a PIL image to the model's input; by default `preprocess`.
    classes : sequence of str, optional
        The model's classes in its order, if the tree holds only some of them, or their order is not alphabetical.

    Hidden files and folders (their names begin with a point, as ``.ipynb_checkpoints``) are left out; a folder may be
    empty.

    Returns
    -------
    ImageFolder
        Gives (image, label), read when asked for; with ``labels``, ``ids`` (paths below root), ``classes``, ``name``.

    Raises
    ------
    FileNotFoundError
        If the folder is not there or holds no pictures.
    ValueError
        If a folder's name is not in ``classes``.
    """
    path = Path(root)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: expected one with a folder of pictures per class")
    return _Folder(path, transform or preprocess, None if classes is None else list(classes))


def open_set(
    name: str,
    split: str = "test",
    root: str | os.PathLike = "",
    count: int | None = None,
    seed: int = 0,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """Open a set by name, in memory: a built-in one, or with a root MNIST, SVHN or a tree of folders on disk.

    The splits are those of an experiment on domain shift: ``train`` and ``validation`` of the source, ``reference`` and
    ``test`` of the target.

    Parameters
    ----------
    name : str
        Without a root as in `load`. With one ``"MNIST"`` or ``"SVHN"`` (``train`` and ``reference`` are their training
        images, the other two their test images), or the path of a folder below root, as ``"photo"`` of PACS or
        ``"gaussian_noise/3"`` of ImageNet-C.
    split : {"train", "validation", "reference", "test"}
        Of a folder the folder of this name in it, if there is one. Otherwise its images in a random order: ``train``
        the first 80% and ``validation`` the rest, ``reference`` the first half and ``test`` the other.
    root : path
    count : int, optional
        Take at most this many images, at random; not for the built-in sets.
    seed : int
        Of these random orders.
    transform, classes
        As in `folder`.

    Returns
    -------
    ImageSet

    Raises
    ------
    FileNotFoundError
        If the files are not there.
    ValueError
        If there is no such set or split, or it has no images.
    """
    if not os.fspath(root):
        return load(name, split)
    parts = {"train": (0, 0.8), "validation": (0.8, 1), "reference": (0, 0.5), "test": (0.5, 1)}
    check_known("split", split, parts)
    if name in ("MNIST", "SVHN"):
        whole = torchvision_set(name, root, "train" if split in ("train", "reference") else "test")
        rows = np.random.default_rng(seed).permutation(len(whole))[:count]
        return whole.subset(rows)
    path = Path(root) / name
    own = (path / split).is_dir()
    tree = folder(path / split if own else path, transform, classes)
    rows = np.random.default_rng(seed).permutation(len(tree))
    if not own:
        start, stop = (round(part * len(rows)) for part in parts[split])
        rows = rows[start:stop]
    if not len(rows := rows[:count]):
        raise ValueError(f"{path} has too few pictures ({len(tree)}) for a split {split!r}")
    images, labels = zip(*(tree[int(row)] for row in rows), strict=True)
    told = {"mean": getattr(transform, "mean", MEAN), "std": getattr(transform, "std", STD), "ids": tree.ids[rows]}
    return ImageSet(torch.stack(images), labels, name=name, split=split, classes=tree.classes, **told)
