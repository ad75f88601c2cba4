"""Gradients to parameters that can be differentiated once more, back to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pss.engine.folding import ExplicitNormalization
from pss.engine.state import preserved


@contextmanager
def twice_differentiable(model: nn.Module, parameters: Iterable[str], images: Tensor) -> Iterator[None]:
    """Gradients on, to these parameters only; the model is left preserved.

    Fused attention kernels can be differentiated once only, PyTorch's plain one as often as wanted.
    """
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), preserved(model):
        model.requires_grad_(False)
        for name in parameters:
            model.get_parameter(name).requires_grad_(True)
        with torch.autocast(images.device.type, enabled=False):
            yield


def gradients_of_one(
    model: nn.Module, parameters: Iterable[str], image: Tensor, label: Tensor, loss: Callable[[Any, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Gradients ``{name: (1, *shape)}`` of the loss of one image, as functions that can be differentiated."""
    wanted = {name: model.get_parameter(name) for name in parameters}
    with _TwiceDifferentiable(), ExplicitNormalization():
        value = loss(model(image), label).sum()
    found = torch.autograd.grad(value, list(wanted.values()), create_graph=True, materialize_grads=True)
    return {name: gradient[None] for name, gradient in zip(wanted, found, strict=True)}


class _TwiceDifferentiable(TorchFunctionMode):
    """Hard sigmoids, as MobileNetV3 has them, by ReLU6: PyTorch's own can be differentiated once only."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        return (_hardsigmoid if function is F.hardsigmoid else function)(*args, **(kwargs or {}))


def _hardsigmoid(input, inplace=False):
    found = F.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found
