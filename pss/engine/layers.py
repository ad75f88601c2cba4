"""Which layers a network has, where their weights are, and what stage its architecture's names put them in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pss.engine.attention import is_conv1d

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_REMOVALS = {  # an attribute that a computed weight leaves on its module, and the function that makes it a parameter
    "parametrizations": "parametrize.remove_parametrizations(module, 'weight')",
    "weight_g": "remove_weight_norm(module)",
    "weight_mask": "prune.remove(module, 'weight')",
    "weight_orig": "remove_spectral_norm(module)",
}
_CONTAINER = r"_?(?:features|encoder|layers?|blocks?|h|model|module|backbone|transformer|trunk|stages|net)"
_NUMBERED = re.compile(rf"(?:.*?\.)??{_CONTAINER}\.\d+(?=\.)")
_RESNET = re.compile(r"(?:^|\.)layer(\d+)\.")
_NAMED_STAGE = re.compile(  # of DenseNet, Inception and torchvision's transformers
    r"features\.(denseblock\d+|transition\d+|conv0|norm\d+)|(?:^|\.)(Conv2d_\d|Mixed_\d|AuxLogits|encoder_layer_\d+)"
)


def is_convolution(module: nn.Module) -> bool:
    """Transposed ones too."""
    return isinstance(module, _CONVOLUTIONS + _TRANSPOSED)


def is_linear(module: nn.Module) -> bool:
    """GPT-2's too, which are named convolutions."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weights_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name of the weight, module and weight of every wanted module."""
    for prefix, module in model.named_modules():
        if not wanted(module):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        weight = dict(module.named_parameters(recurse=False)).get("weight")  # module.weight may compute, and change it
        if weight is None:
            how = next((how for mark, how in _REMOVALS.items() if hasattr(module, mark)), "")
            advice = f"make it one by torch.nn.utils.{how} on a copy in evaluation mode, or " if how else ""
            raise ValueError(f"{name} is no parameter, it is computed from others: {advice}give units of your own")
        if not (weight.is_floating_point() or weight.is_complex()):
            raise ValueError(f"{name} is quantized to {weight.dtype}: give the model as it was before, with floats")
        yield name, module, weight


def refuse_hidden_weights(model: nn.Module) -> None:
    """Refuse a model whose layers hold their weights where neither gradients nor edits come."""
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise ValueError(f"{name} is scripted or traced: give the model as it was before torch.jit")
        if "quantized" in type(module).__module__.split(".") and callable(getattr(module, "weight", None)):
            raise ValueError(f"{name} is quantized, and has no gradients: give the model as it was before")


def stage_names(model: nn.Module) -> Callable[[str], str]:
    """Give the function from a parameter's name to its stage.

    ResNets have the papers' names (``conv1``, ``conv2_x`` … ``conv5_x``), from the names of their parameters and never
    from constants; DenseNet, Inception, transformers and EfficientNet-Lite their blocks; VGG's convolutions are
    numbered by the pooling layers before them. Anything else: up to the first number in a container, as
    ``encoder.layer.3``, or the first component of the name that is not a mere container.
    """
    pools: dict[str, int] = {}
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential) and any(isinstance(m, _POOLS) for m in features):
        passed = 1
        for number, module in features.named_children():
            passed += isinstance(module, _POOLS)
            pools[f"features.{number}"] = passed
    is_resnet = any(_RESNET.search(name) for name, _ in model.named_parameters())

    def stage(parameter: str) -> str:
        if is_resnet:
            found = _RESNET.search(parameter)
            return f"conv{int(found[1]) + 1}_x" if found else parameter.split(".")[-2 if "." in parameter else 0]
        if found := _NAMED_STAGE.search(parameter):
            return found[1] or found[2]
        parts = parameter.split(".")
        if (prefix := ".".join(parts[:2])) in pools:
            return f"conv{pools[prefix]}"
        if numbered := _NUMBERED.match(parameter):
            return numbered[0].lstrip("_")  # a plot would leave out what begins with one
        for depth, part in enumerate(parts[:-1]):
            if not re.fullmatch(_CONTAINER, part):
                return ".".join(parts[: depth + 1]).lstrip("_")
        return parts[0]

    return stage
