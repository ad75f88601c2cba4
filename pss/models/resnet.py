"""The built-in network, and how it was trained.

The network is torchvision's ResNet-18 with its width as a parameter: 64 is torchvision's own (and the papers'), 16 is
the shipped one, which has the same layers and names, 0.7 M parameters and 1,200 filters. Train one with

    python -m pss train --out my.safetensors --seed 0 --width 16 --epochs 12

and see how it does on the built-in sets with ``python -m pss evaluate my.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from pss import data
from pss.data.vision import torchvision
from pss.engine.checks import check_positive
from pss.engine.process import thread_count
from pss.models.predictions import accuracy
from pss.models.weights import load_weights, record_of
from pss.storage import places
from pss.storage.cache import cached

WIDTH = 16
EPOCHS = 12
_BATCH = 100
_LEARNING_RATE = 0.05
_RECIPE = 1  # counts changes of the training that change the result, so that older cached weights are not used


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
    check_positive(width=width, classes=classes)
    return seeded(lambda: _ScaledResNet18(width, classes), seed)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build with a seed of its own: torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


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
        return load_weights(resnet18(), committed()).eval()

    def trained():
        model, record = train(seed=seed, width=width)
        return model.state_dict(), record_of(model, record)

    model = resnet18(width)
    model.load_state_dict(cached(f"resnet18-w{width}-mnist-seed{seed}-{_RECIPE}.safetensors", trained))
    return model.eval()


def committed() -> Path:
    """Where the shipped weights lie."""
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
    record: dict[str, object] = {"seed": seed, "width": width, "epochs": epochs, "threads": threads, "recipe": _RECIPE}
    record |= {"torch": torch.__version__, "train_set": train_set.fingerprint}
    for name, dataset in {"train": train_set, "validation": validation_set}.items():
        record[f"{name}_accuracy"] = f"{accuracy(model, dataset):.4f}"
    return model, {key: str(value) for key, value in record.items()}
