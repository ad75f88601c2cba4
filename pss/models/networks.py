"""A network with what its pictures must go through, and what its outputs are called or hold."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from pss import data
from pss.data.image_set import denormalize
from pss.data.vision import torchvision
from pss.engine.checks import check_known

t = torchvision.transforms


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the input of a network; built of torchvision's transforms. What is not said is not done.

    Attributes
    ----------
    resize : int or (int, int), optional
        Length of the shorter side, or height and width.
    crop : int or (int, int), optional
        Size of the square, or (height, width), that is cut from the middle.
    mean, std : tuple of float, optional
        By channel, of pixels in 0..1: ``(pixels - mean) / std``; 0 and 1 by default, which leaves pixels in 0..1.
    interpolation : str
        As ``bilinear``, ``bicubic``, ``nearest``.
    grey : bool
        One channel instead of three.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"
    grey: bool = False

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean {self.mean} and std {self.std}: give both, or neither for pixels in 0..1")
        channels = 1 if self.grey else 3
        defaults = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        for name in ("resize", "crop", "mean", "std"):
            value = defaults.get(name) if getattr(self, name) is None else getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)  # YAML has lists
        told = f"mean {self.mean} and std {self.std}: expected"
        if not all(isinstance(v, tuple) and len(v) == channels for v in (self.mean, self.std)) or min(self.std) <= 0:
            raise ValueError(f"{told} {channels} numbers each, as {[0.5] * channels}, and std above 0")
        if max(self.mean) > 1:
            raise ValueError(f"{told} those of pixels in 0..1; divide those of pixels in 0..255 by 255")
        check_known("interpolation", self.interpolation, [mode.value for mode in t.InterpolationMode])
        for name, value in {"resize": self.resize, "crop": self.crop}.items():
            sides = [1] if value is None else np.ravel(value)
            if len(sides) > 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in sides):
                raise ValueError(f"{name} is {value!r}: expected a number of pixels, or (height, width)")

    def __call__(self, picture: Image.Image) -> Tensor:
        """Give the input of the network, (3, H, W) or with ``grey`` (1, H, W), float32."""
        steps = [t.Grayscale()] if self.grey else []
        if self.resize is not None:
            steps.append(t.Resize(self.resize, t.InterpolationMode(self.interpolation)))
        if self.crop is not None:
            steps.append(t.CenterCrop(self.crop))
        return t.Compose([*steps, t.ToTensor(), t.Normalize(self.mean, self.std)])(picture)


@dataclass(frozen=True)
class Network:
    """A network with what belongs to it.

    Attributes
    ----------
    name : str
        As asked for.
    model : nn.Module
        In eval mode, on the CPU, float32.
    preprocess : callable
        From a picture (PIL, RGB) to the input (3, H, W); has ``mean`` and ``std``.
    classes : tuple of str
        Names in the order of the outputs.
    weights : str
        Which they are: ``IMAGENET1K_V2``, ``random (seed 0)``, or a file's name and the start of its SHA-256.
    loaded_by : str
        The call that loads it, as a line to paste.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    classes: tuple[str, ...]
    weights: str
    loaded_by: str = ""

    def read(self, path: str | os.PathLike) -> Tensor:
        """Read a picture file into an input of the network, (3, H, W); raises as `pss.data.read_image`."""
        return self.preprocess(data.read_image(path))

    def to_image(self, x: Tensor) -> np.ndarray:
        """Undo the normalization for display: input (3, H, W) to (H, W, 3) in 0..1."""
        mean, std = getattr(self.preprocess, "mean", (0.0,) * 3), getattr(self.preprocess, "std", (1.0,) * 3)
        return denormalize(x.float().expand(3, -1, -1), mean, std)

    def label(self, name_or_id: str | int) -> int:
        """Number of a class, given its name or its number.

        Raises
        ------
        ValueError
            If there is no such class (with names that are near), or the name belongs to several.
        """
        text, count = str(name_or_id).strip(), len(self.classes)
        number = int(text) if text.lstrip("-").isdecimal() else None
        if isinstance(name_or_id, bool) or not text:
            raise ValueError(f"label {name_or_id!r}: expected a class name or a number in 0..{count - 1}")
        named = [i for i, name in enumerate(self.classes) if name.lower() == text.lower()]
        if isinstance(name_or_id, str) and number is not None and named not in ([], [number]):
            raise ValueError(f"label {text!r} is ambiguous: the name of class {named}, and a number: give an int")
        if number is not None:
            if not 0 <= number < count:
                raise ValueError(f"label {number} is outside 0..{count - 1} of {self.name}")
            return number
        if len(named) > 1:
            raise ValueError(f"label {text!r} is the name of several classes: give one of the numbers {named}")
        if not named:
            near = [name for name in self.classes if text.lower() in name.lower()][:5]
            raise ValueError(f"{self.name} has no class {text!r}: {near_to(text, self.classes, near)}")
        return named[0]


def near_to(text: str, known: Sequence[str], also: Sequence[str] = ()) -> str:
    """Which of the known names may have been meant, as the end of a message."""
    lower = {name.lower(): name for name in known}
    near = dict.fromkeys([lower[name] for name in difflib.get_close_matches(text.lower(), lower, n=3)] + list(also))
    if near:
        return f"did you mean {', '.join(map(repr, near))}?"
    return f"expected one of {', '.join(known[:10])}" + f", … ({len(known):,} in all)" * (len(known) > 10)


def logits_of(model: nn.Module, select: Callable[[Any], Tensor] = attrgetter("logits")) -> nn.Module:
    """The same network with class scores as its output, for every function here that takes a model.

    A network of Hugging Face gives an object with the logits in it, one of segmentation a map for every class. What
    edits, corrects or counts mistakes needs one score for each class, and a loss gets what the network gives::

        model = pss.models.logits_of(network)                                # network(images).logits
        model = pss.models.logits_of(network, lambda out: out["out"].mean((2, 3)))

    Parameters
    ----------
    model : nn.Module
        Left as it was: its own output stays what it is.
    select : callable
        From the output to the logits (B, C); by default its attribute ``logits``.

    Returns
    -------
    nn.Module
        Of the same class, and made of the very layers and parameters of ``model``, by the same names: units, references
        and patches of one are those of the other, and an edit of one edits the other.
    """
    same = copy.copy(model)
    same._forward_hooks = model._forward_hooks.copy()  # otherwise the hook would be the model's too
    same.register_forward_hook(lambda module, inputs, output: select(output))
    return same
