"""The built-in model, how it was trained, and helpers for anyone's model.

The network is torchvision's ResNet-18 with its width as a parameter: 64 is torchvision's own (and the papers'), 16 is
the shipped one, which has the same layers and names, 0.7 M parameters and 1,200 filters. Train one with

    python -m pss train --out my.safetensors --seed 0 --width 16 --epochs 12

and see how it does on the built-in sets with ``python -m pss evaluate my.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import pss
from pss import data
from pss.data.vision import torchvision
from pss.engine.process import thread_count
from pss.engine.state import preserved
from pss.saliency import check_labels
from pss.storage import places
from pss.storage.fingerprints import fingerprint as fingerprint
from pss.storage.fingerprints import hash_state
from pss.storage.tensors import load_tensors, pack, unpack
from pss.storage.whole import write_whole

WIDTH = 16
EPOCHS = 12
_BATCH = 100
_LEARNING_RATE = 0.05
_RECIPE = 1  # counts changes of the training that change the result, so that older cached weights are not used
_PREFIXES = ("module.", "model.", "state_dict.")
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")  # torchvision's files still have norm.1


class _ScaledResNet18(torchvision.models.ResNet):
    """torchvision's ResNet-18 with ``width`` channels where the original has 64.

    torchvision writes 64, 128, 256 and 512 into its constructor; only this is replaced, not how a stage is built, nor
    the forward pass.
    """

    def __init__(self, width: int, classes: int):
        nn.Module.__init__(self)
        self._norm_layer, self.groups, self.base_width, self.dilation = nn.BatchNorm2d, 1, 64, 1
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        block = torchvision.models.resnet.BasicBlock
        self.layer1 = self._make_layer(block, width, 2)
        self.layer2 = self._make_layer(block, width * 2, 2, stride=2)
        self.layer3 = self._make_layer(block, width * 4, 2, stride=2)
        self.layer4 = self._make_layer(block, width * 8, 2, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width * 8, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet18(width: int = WIDTH, classes: int = 10, seed: int = 0) -> nn.Module:
    """Build an untrained ResNet-18 of any width.

    Parameters
    ----------
    width : int
        Channels of the first stage: 64 is torchvision's ResNet-18, 16 a quarter of it.
    classes : int
        Number of outputs.
    seed : int
        Seed of the initial weights; torch's global generator is left as it was.

    Returns
    -------
    nn.Module
        In training mode; names and shapes as torchvision's, as ``layer1.0.conv1.weight``.

    Raises
    ------
    ValueError
        If width or classes is not positive.
    """
    if width < 1 or classes < 1:
        raise ValueError(f"width {width} and classes {classes} must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _ScaledResNet18(width, classes)


def digits(seed: int = 0, width: int = WIDTH) -> nn.Module:
    """The model of the notebooks: ResNet-18 at width 16, trained on 4,000 MNIST digits.

    Parameters
    ----------
    seed : int
        0 is the committed model, so that every reader sees the same mistakes. Any other seed is trained on first use
        (under a minute) and kept in `pss.data.cache_folder`.
    width : int
        Any other than 16 is trained on first use too; 64, the papers' ResNet-18, takes many minutes.

    Returns
    -------
    nn.Module
        In eval mode, on the CPU, float32; takes images (B, 3, 32, 32) of `pss.data`, gives logits (B, 10).

    Raises
    ------
    FileNotFoundError
        If the committed weights are not there, because PSS was not installed from a checkout.
    ValueError
        If the committed weights are damaged.
    """
    if seed == 0 and width == WIDTH:
        path = _committed()
    else:
        path = places.cache_folder() / f"resnet18-w{width}-mnist-seed{seed}-{_RECIPE}.safetensors"
        model = _cached_model(path, width)
        if model is not None:
            return model
        model, record = train(seed=seed, width=width)
        try:
            save_weights(model, path, record)
        except OSError as error:
            warnings.warn(f"could not write {path} ({error}): going on without a cache", stacklevel=2)
        return model
    return load_weights(resnet18(), path).eval()


def _committed() -> Path:
    name = f"resnet18-w{WIDTH}-mnist-seed0.safetensors"
    folder = places.checkout_data()
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the shipped weights data/{name} are not beside this installation of pss ({Path(__file__).parent}): they "
            "come with the checkout, so install it there with `pip install -e .`, or train a model of your own with "
            "`python -m pss train --out PATH` and load it with pss.models.load_weights"
        )
    return path


def _cached_model(path: Path, width: int) -> nn.Module | None:
    if not path.exists():
        return None
    try:
        return load_weights(resnet18(width), path).eval()
    except (OSError, ValueError) as error:
        warnings.warn(f"the cached weights {path} are damaged ({error}): training again", stacklevel=3)
        return None


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    seed: int = 0,
    width: int = WIDTH,
    epochs: int = EPOCHS,
    train_set: data.ImageSet | None = None,
    validation_set: data.ImageSet | None = None,
    threads: int = 1,
) -> tuple[nn.Module, dict[str, str]]:
    """Train a ResNet-18 on digits: SGD with momentum, one learning-rate cycle, no augmentation.

    The same seed gives the same weights, bit for bit, on the same kind of processor with the same library versions.
    Other numbers of threads take sums in another order and so give other weights, each as good.

    Parameters
    ----------
    seed : int
        Seed of the initial weights and of the order of the images.
    width, epochs : int
    train_set, validation_set : ImageSet, optional
        By default the 4,000 and 1,000 digits of `pss.data.mnist`.
    threads : int
        For torch, while this runs; worth raising at width 64.

    Returns
    -------
    model : nn.Module
        In eval mode.
    record : dict of str
        What was done and how well it does, kept with the weights.
    """
    train_set = data.mnist("train") if train_set is None else train_set
    validation_set = data.mnist("validation") if validation_set is None else validation_set
    images, labels = train_set.tensors
    model = resnet18(width, len(train_set.classes), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = -(-len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=batches * epochs)
    order = torch.Generator().manual_seed(seed)
    progress = tqdm(range(epochs), desc=f"training, seed {seed}", unit="epoch", disable=None)
    with thread_count(threads):
        for _ in progress:
            for batch in torch.randperm(len(images), generator=order).split(_BATCH):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress.set_postfix(loss=f"{loss.item():.4f}")
    model.eval().zero_grad()
    record = {
        "seed": seed,
        "width": width,
        "epochs": epochs,
        "threads": threads,
        "recipe": _RECIPE,
        "torch": torch.__version__,
        "train_set": train_set.fingerprint,
        "train_accuracy": f"{accuracy(model, train_set):.4f}",
        "validation_accuracy": f"{accuracy(model, validation_set):.4f}",
    }
    return model, {key: str(value) for key, value in record.items()}


# --- weights ----------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, path: str | os.PathLike, record: Mapping[str, str] | None = None) -> None:
    """Write a model's weights as safetensors, whole or not at all, with its `fingerprint` and a record beside them."""
    record = {"pss": pss.__version__, **(record or {}), "sha256": fingerprint(model)}
    write_whole(Path(path), pack(model.state_dict(), "record", record))


def read_record(path: str | os.PathLike) -> dict[str, str]:
    """What `save_weights` noted beside the weights: version, seed, width, epochs, accuracies, sha256; may be empty.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    return _read_weights(Path(path))[1]


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a safetensors file, and the record beside them: strangers have none, the shipped file has lines."""
    state, record = unpack(path, "record", lambda text: json.loads(text) if text.startswith("{") else text)
    if not isinstance(record, dict):
        record = dict(line.partition("=")[::2] for line in (record or "").splitlines())
        if record.get("sha256", "") not in ("", hash_state(state)):
            raise ValueError(f"{path} is damaged: its weights do not have the checksum that was noted in it")
    return state, record


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a checkpoint into a model; code in the file is never run.

    Parameters
    ----------
    model : nn.Module
        Changed in place, and only if everything fits.
    path : path
        safetensors, or what ``torch.save`` wrote and ``torch.load(weights_only=True)`` reads: a state dict, or a dict
        that holds one as ``state_dict`` or ``model``. The prefixes ``module.``, ``model.`` and ``state_dict.`` are
        taken off where every name has them and the model's names have not.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, holds anything but tensors, or does not fit the model; the message names what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    state = _unprefixed(_read_state(path), set(model.state_dict()))
    _check_fits(model, state, path)
    model.load_state_dict(state)
    return model


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return _read_weights(path)[0]
    content = load_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or these under state_dict or model")
    return dict(content)


def _unprefixed(state: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    while state and not names & set(state):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    renamed = {_OLD_DENSENET.sub(r"\1", name): tensor for name, tensor in state.items()}
    return renamed if set(renamed) <= names else state


def _check_fits(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    counted = ".num_batches_tracked"  # of batch norm, which files from before torch 0.4.1 do not have
    wrong = [f"{name} is missing" for name in own if name not in state and not name.endswith(counted)]
    wrong += [f"{name} is not in the model" for name in state if name not in own]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, in the model {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(wrong[:5])}{more}")


# --- what a model says ------------------------------------------------------------------------------------------------


def predict(model: nn.Module, images: torch.Tensor | Dataset, batch_size: int = 256) -> torch.Tensor:
    """Logits of a model in eval mode, without gradients.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    images : Tensor or Dataset
        Images (N, C, H, W), or a map-style data set of (image, label).
    batch_size : int

    Returns
    -------
    Tensor
        Logits, shape (N, classes), on the model's device.

    Raises
    ------
    ValueError
        If there are no images.
    """
    return _outputs(model, images, batch_size)[0]


def _outputs(model: nn.Module, images: torch.Tensor | Dataset, batch_size: int):
    """Logits, and the labels if a data set was given, from one pass over it."""
    if len(images) == 0:
        raise ValueError("no images to predict: expected at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if isinstance(images, torch.Tensor):
        batches = ((batch, None) for batch in images.split(batch_size))
    else:  # with a generator of its own the loader leaves torch's global one alone
        batches = DataLoader(images, batch_size=batch_size, generator=torch.Generator())
    like = next(model.parameters(), torch.empty(0))
    logits, labels = [], []
    with preserved(model), torch.no_grad():
        for batch, label in batches:
            logits.append(model(batch.to(like.device, like.dtype)))
            if not isinstance(logits[-1], torch.Tensor):
                raise ValueError(f"outputs are {type(logits[-1]).__name__}: expected logits (N, classes)")
            labels.append(label)
    return torch.cat(logits), None if isinstance(images, torch.Tensor) else torch.cat(labels)


def misclassified(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> pd.DataFrame:
    """The images that a model gets wrong.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    dataset : Dataset
        A map-style data set of (image, label); its ``ids`` are used if it has them.
    batch_size : int

    Returns
    -------
    DataFrame
        One row per mistake: its index is the position in the data set; ``id``, ``label``, ``predicted``,
        ``confidence`` (the probability of the predicted class) and ``label_confidence`` (that of the label).

    Raises
    ------
    ValueError
        If a label is not the number of a class of the model, or the model gives something else than logits.
    """
    logits, labels = (tensor.cpu() for tensor in _outputs(model, dataset, batch_size))
    check_labels(labels, logits)
    if (bad := logits.isnan().any(dim=1)).any():
        raise ValueError(f"the outputs are NaN for images {bad.nonzero()[:10, 0].tolist()}: no class is predicted")
    probabilities = logits.double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero()[:, 0].numpy()
    ids = getattr(dataset, "ids", range(len(labels)))
    return pd.DataFrame(
        {
            "id": [str(ids[i]) for i in wrong],
            "label": labels[wrong].numpy(),
            "predicted": predicted[wrong].numpy(),
            "confidence": confidence[wrong].numpy(),
            "label_confidence": probabilities[wrong, labels[wrong]].numpy(),
        },
        index=wrong,
    )


def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Share of a data set's images that the model gets right."""
    return 1 - len(misclassified(model, dataset)) / len(dataset)


def evaluate(model: nn.Module) -> pd.DataFrame:
    """Accuracy of a model of the built-in digits on every built-in set and split."""
    rows = []
    for name, splits in data.SPLITS.items():
        for split in splits:
            dataset = data.load(name, split)
            wrong = misclassified(model, dataset)
            rows.append((name, split, len(dataset), len(wrong), 1 - len(wrong) / len(dataset)))
    return pd.DataFrame(rows, columns=["set", "split", "images", "misclassified", "accuracy"])
