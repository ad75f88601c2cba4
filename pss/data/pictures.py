"""Picture files, and the photographs that lie in installed packages."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**26  # of a picture file: 8,192 by 8,192
_RATIO = 100  # of its sides: a line of one pixel, scaled to 256 pixels across, would fill the memory
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that runs another program, as EPS does
_SKLEARN = ("china.jpg", "flower.jpg")  # the others are scikit-image's


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a file, by its name, is a picture that `read_image` reads, and none that a system has hidden there."""
    Image.init()  # otherwise Pillow knows a few endings only
    path = Path(path)
    return not path.name.startswith(".") and Image.EXTENSION.get(path.suffix.lower()) in _FORMATS


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
        if max(width, height) > _RATIO * min(width, height):
            raise ValueError(f"{path} has {width} x {height} pixels: at most {_RATIO} times as long as wide is read")
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
        return shipped(self.file)

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


def of_extra(name: str, needing: str = "the built-in data need", extra: str = "notebooks") -> ModuleType:
    """Import a package of an extra; a network and pictures of one's own need none of them."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        what = f"{needing} {error.name}: pip install 'pss[{extra}]'"
        raise ModuleNotFoundError(what, name=error.name) from error


def shipped(name: str) -> Path:
    """Path of a picture that lies in an installed wheel: nothing here can start a download."""
    package = of_extra("sklearn" if name in _SKLEARN else "skimage")
    path = Path(package.__file__).parent.joinpath(*(("datasets", "images") if name in _SKLEARN else ("data",)), name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: this version of {package.__name__} does not ship it; "
            "install the versions of constraints.txt"
        )
    return path
