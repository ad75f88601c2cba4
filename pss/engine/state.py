"""Leaving a model as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

T = TypeVar("T")
_VIEWING: WeakSet[nn.Module] = WeakSet()  # networks that refused channels side by side


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


def laid_out(model: nn.Module, images: Tensor, run: Callable[[Tensor], T]) -> T:
    """``run(images)``, with the channels of images (B, C, H, W) side by side in memory on a CPU.

    Forward passes of the nets of the notebooks take two thirds of the time so. A network that flattens its features by
    ``view`` refuses them: then, and at once the next time, they are laid out as usual.
    """
    if images.dim() != 4 or images.is_cuda:
        return run(images)
    if model not in _VIEWING:
        side_by_side = images.contiguous(memory_format=torch.channels_last)
        try:
            return run(side_by_side)
        except RuntimeError as error:
            if not is_of_the_layout(error, side_by_side):
                raise
            _VIEWING.add(model)
    return run(images.contiguous())


def is_of_the_layout(error: Exception, images: Tensor) -> bool:
    """Whether a network refused images for how they lie in memory: then no other way of computing is the answer."""
    return "view size is not compatible" in str(error) and not images.is_contiguous()
