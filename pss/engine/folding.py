"""BatchNorm as the affine map that it is in evaluation mode: within a convolution, or on its own."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pss.engine.calls import DeferredConvolution, affine


def fold(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """BatchNorm over a deferred convolution, as one convolution: None where that cannot be.

    With a = γ/√(σ²+ε), BN(W*x + b) = (aW)*x + (b − μ)a + β, and the gradient to W is a times that to aW. Where the
    weight is larger than the output, a(W*x) is less work.
    """
    if not isinstance(input, DeferredConvolution) or training or running_mean is None or not torch.is_grad_enabled():
        return None
    call, own = input.unused_call, [t for t in (weight, bias) if t is not None]
    if call is None or any(t.requires_grad for t in own):
        return None
    scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
    shift = shift if call.bias is None else shift + call.bias * scale
    if call.weight.numel() > input.shape.numel():
        return replace(call, bias=shift, late=scale)(input.input())
    folded = call.weight * scale.reshape(-1, *[1] * (call.weight.dim() - 1))
    return replace(call, weight=folded, bias=shift, scale=scale)(input.input())


def scale_and_shift(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    """Scale a = γ/√(σ²+ε) and shift β − μa."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


class ExplicitNormalization(TorchFunctionMode):
    """Computes BatchNorm and InstanceNorm so that their input gradient is right for a single image too.

    PyTorch's own is wrong on a CPU (seen in 2.13) where a batch of one gets a gradient that is transposed in memory:

    >>> x, w = torch.randn(1, 5, 3, 4, requires_grad=True), torch.randn(1, 12, 5)
    >>> y = torch.nn.BatchNorm2d(5, eps=0).eval()(x).flatten(2).transpose(1, 2)
    >>> torch.autograd.grad((y * w).sum(), x)[0] - w.mT.reshape(x.shape)  # zero, were it right
    """

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        return NORMALIZATIONS.get(function, function)(*args, **(kwargs or {}))


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training and running_mean is not None:
        scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
        return affine(input, scale, shift)
    if len(input) == 1 and input.dim() > 2:  # mean and variance of each channel
        return F.group_norm(input, input.shape[1], weight, bias, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def mixes_samples(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> bool:
    """Whether a BatchNorm takes mean and variance over several samples: not of a weight, which is standardized so."""
    return (training or running_mean is None) and len(input) > 1


def _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return F.group_norm(input, input.shape[1], weight, bias, eps)


NORMALIZATIONS = {F.batch_norm: _batch_norm, torch.batch_norm: _torch_batch_norm, F.instance_norm: _instance_norm}
