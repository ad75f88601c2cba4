"""Leaving a model as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode, and leave it as it was found, also when the body raises.

    Restores ``training`` of every module, ``requires_grad`` and ``.grad`` of every parameter, and the state of the
    random generators.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = {p.device for p, *_ in states if p.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)):
            model.eval()
            yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd may save of one made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) with their channels side by side in memory, which takes convolutions two thirds of the time.

    On a CPU, forward, in the nets of the notebooks. Other inputs stay as they are.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
