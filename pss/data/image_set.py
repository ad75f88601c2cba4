"""Images and labels in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import TensorDataset

from pss.storage.digests import digest

MEAN = STD = (0.5, 0.5, 0.5)


class ImageSet(TensorDataset):
    """Images and labels in memory: a map-style data set of ``(image, label)``.

    Parameters
    ----------
    images : Tensor
        Normalized images, shape (N, C, H, W).
    labels : Tensor
        Class numbers, shape (N,), int64.
    name, split : str
        What the set is called.
    classes : sequence of str
        Name of every class.
    ids : sequence of str, optional
        A name for every image that stays the same between runs; by default its position.
    sources : sequence of int, optional
        Number of the source image that each image was made from; by default its position. Images with the same
        source are not independent.
    mean, std : sequence of float
        The normalization, by channel: ``images = (pixels - mean) / std`` with pixels in 0..1.

    Raises
    ------
    ValueError
        If the lengths disagree or a label is not the number of a class.
    """

    def __init__(self, images, labels, *, name, split, classes, ids=None, sources=None, mean=MEAN, std=STD):
        labels = torch.as_tensor(labels)
        if labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype}: expected class numbers, ints")
        labels = labels.to(torch.int64)
        if images.ndim != 4 or len(images) != len(labels):
            given = f"{tuple(images.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"expected images (N, C, H, W) and N labels, got {given}")
        if len(wrong := labels[(labels < 0) | (labels >= len(classes))]):
            outside = f"label {int(wrong[0])} is outside 0..{len(classes) - 1}"
            raise ValueError(f"{outside}: give one name in classes per class")
        super().__init__(images, labels)
        self.name, self.split, self.classes = name, split, tuple(classes)
        self.ids = np.asarray([str(i) for i in (range(len(labels)) if ids is None else ids)])
        self.sources = np.arange(len(labels)) if sources is None else np.asarray(sources)
        self.mean, self.std = tuple(mean), tuple(std)
        if not len(self.ids) == len(self.sources) == len(labels):
            raise ValueError(f"{len(labels)} images, but {len(self.ids)} ids and {len(self.sources)} sources")

    @property
    def images(self) -> torch.Tensor:
        """Normalized images, shape (N, C, H, W)."""
        return self.tensors[0]

    @property
    def labels(self) -> torch.Tensor:
        """Class numbers, shape (N,)."""
        return self.tensors[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels: names the exact set in the record of a run."""
        return hash_arrays(self.images.numpy(), self.labels.numpy())

    def subset(self, indices) -> ImageSet:
        """The images at these positions, as a set of their own."""
        at = np.asarray(indices)
        same = {key: getattr(self, key) for key in ("name", "split", "classes", "mean", "std")}
        return ImageSet(self.images[at], self.labels[at], ids=self.ids[at], sources=self.sources[at], **same)

    def to_image(self, image: torch.Tensor) -> np.ndarray:
        """Undo the normalization for display: ``(…, C, H, W)`` floats to ``(…, H, W, C)`` uint8."""
        return to_pixels(denormalize(image, self.mean, self.std))

    def __repr__(self) -> str:
        return f"ImageSet({self.name}/{self.split}: {len(self)} images of shape {tuple(self.images.shape[1:])})"


def denormalize(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo a normalization by channel for display: ``(…, C, H, W)`` to ``(…, H, W, C)`` in 0..1."""
    mean, std = (torch.tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
    return (image.detach().cpu() * std + mean).clamp(0, 1).movedim(-3, -1).numpy()


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Floats in 0..1, the nearest of these where they are not, to uint8."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def hash_arrays(*arrays: np.ndarray) -> str:
    """Hash of types, shapes and bytes."""
    return digest(*(part for a in arrays for part in (f"{a.dtype.str} {a.shape}", np.ascontiguousarray(a))))
