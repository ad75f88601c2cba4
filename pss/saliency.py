r"""Parameter saliency of each sample, and its reduction to units.

The parameter saliency of sample :math:`(x, y)` is :math:`s(x, y)_i = |\partial L / \partial \theta_i|`; the saliency of
unit :math:`k` is its mean over the parameters :math:`\alpha_k` of the unit (Levin et al. 2022, section 2.1). Both are
taken for every sample of a batch on its own: absolute values of per-sample gradients, never of their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pss.engine.checks import check_images, check_labels, shape_of
from pss.engine.parts import compute_in_parts, task_of
from pss.engine.recorder import Options
from pss.engine.state import laid_out, savable
from pss.engine.strategies import Part, Task, ready, whole_gradients
from pss.storage.fingerprints import name_of
from pss.units import Units, check_units

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of each sample, shape (B,), whose gradient is exact also on confident samples.

    Written as :math:`\log(1 + e^{v})` with :math:`v = \log\sum_{j \ne y} e^{z_j} - z_y`, so that autograd forms the
    gradient to the true class as :math:`-\sum_{j \ne y} p_j`. The usual :math:`p_y - 1` rounds: in float32
    at a loss of 1e-6 it is off by 10%.
    """
    others = torch.logsumexp(logits.scatter(1, labels[:, None], -torch.inf), dim=1)
    return -F.logsigmoid(logit(logits, labels) - others)


def logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class, shape (B,)."""
    return logits.gather(1, labels[:, None])[:, 0]


def logit_difference(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of the other classes less the logit of the true class, shape (B,): positive on mistakes."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - logit(logits, labels)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "logit": logit, "logit_difference": logit_difference}


def get_loss(loss: str | Loss) -> Loss:
    """Loss by name, or the callable ``(outputs, labels) -> (B,)`` as it is."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: expected one of {sorted(LOSSES)} or a callable (outputs, labels)")
    return LOSSES[loss]


def loss_name(loss: str | Loss) -> str:
    """What records call a loss: one of `LOSSES` by its short name, also if the function itself is given."""
    return next((name for name, function in LOSSES.items() if function is loss), None) or name_of(loss)


def parameter_saliency(
    model: nn.Module, images: Tensor, labels: Tensor, loss: str | Loss = "cross_entropy", signed: bool = False
) -> dict[str, Tensor]:
    r"""Saliency of every parameter for each sample: B times the model in memory, for small models and for teaching.

    .. math:: s(x, y)_i = |\partial L(x, y; \theta) / \partial \theta_i|

    Parameters
    ----------
    model : nn.Module
    images : Tensor, shape (B, ...)
    labels : Tensor, shape (B,)
    loss : str or callable
        One of `LOSSES`, or a callable ``(outputs, labels) -> (B,)``.
    signed : bool
        Keep the sign of the gradient.

    Returns
    -------
    dict of str to Tensor
        ``{parameter name: (B, *shape)}``; zero for parameters that the loss does not depend on.

    Raises
    ------
    ValueError
        If images, labels, outputs or losses are not what is described here.

    References
    ----------
    Levin et al. 2022, arXiv 2108.01335, section 2.1.
    """
    check_inputs(model, images, labels)
    loss, names = get_loss(loss), tuple(name for name, _ in model.named_parameters())
    task = Task(model, loss, partial(_check_outputs, loss), (), names)
    with ready(model, images):
        parts = laid_out(model, savable(images.detach()), lambda x: whole_gradients(task, x, labels))
    whole = {name: torch.cat([part[name] for part in parts]) for name in names}  # a copy: abs_ may write into it
    return whole if signed else {name: g.abs() if g.is_complex() else g.abs_() for name, g in whole.items()}


def profile(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    units: Units | None = None,
    loss: str | Loss = "cross_entropy",
    signed: bool = False,
    strategy: str = "auto",
    fold: bool = True,
    precision: str = "fp32",
    verify: bool = True,
    of: str | tuple[str, ...] = "gradient",
) -> Tensor | tuple[Tensor, ...]:
    r"""Saliency profile of each sample: mean absolute gradient of every unit, or what the unit contributes to the loss.

    .. math:: \bar s(x, y)_k = \frac{1}{|\alpha_k|} \sum_{i \in \alpha_k} |\partial L(x, y; \theta) / \partial \theta_i|
    .. math:: c(x, y)_k = \sum_{i \in \alpha_k} \theta_i \, \partial L / \partial \theta_i
        = \left. \frac{\partial L}{\partial a_k} \right|_{a_k = 1}
        = \sum_p \frac{\partial L}{\partial o_{pk}} (o_{pk} - b_k)

    .. math:: o(x)_k = \frac{1}{P} \sum_p o_{pk}

    The second, gain saliency, is the derivative of the loss to a gain :math:`a_k` on the unit's weights: pruning the
    unit changes the loss by about :math:`-c_k`. It comes from the unit's output :math:`o` alone, at less than the cost
    of a gradient, and does not change when a row is scaled before a BatchNorm. The third is what the unit says,
    whatever comes of it: its output after the normalization that directly follows, if one does; labels play no part.

    A row is what the sample would have alone. The model is put into evaluation mode, and left as it was found.

    PyTorch's own gradient is wrong for a single image where a BatchNorm gets a gradient that is transposed in memory
    (on a CPU, seen in 2.13), as in the three lines below. So BatchNorm is computed as the affine map that it is, by
    every strategy, which may differ from plain autograd for that reason.

    >>> x, w = torch.randn(1, 5, 3, 4, requires_grad=True), torch.randn(1, 12, 5)
    >>> y = torch.nn.BatchNorm2d(5, eps=0).eval()(x).flatten(2).transpose(1, 2)
    >>> wrong = torch.autograd.grad((y * w).sum(), x)[0] - w.mT.reshape(x.shape)  # expected: zeros

    Parameters
    ----------
    model : nn.Module
    images : Tensor, shape (B, ...)
        On the model's device, of its dtype.
    labels : Tensor of int, shape (B,), optional
        What units say needs none, and without them the model's output may be any tensor with a row for each image.
    units : Units, optional
        Units of this model; by default the filters of its convolutions.
    loss : str or callable
        One of `LOSSES`, or a callable ``(outputs, labels) -> (B,)``.
    signed : bool
        Mean gradient instead of mean absolute gradient; :math:`c` instead of :math:`|c|`, :math:`o` of :math:`|o|`.
    strategy : {"auto", "fast", "vmap", "loop"}
        ``fast``: one forward and backward pass over the batch, an error where that cannot be; ``vmap``: gradients of
        whole samples, vectorized over a few, otherwise as ``loop``; ``loop``: plain autograd, one sample at a time.
        ``auto``: fast where it can be. Otherwise, on a CPU, one sample at a time in the same way, which is no slower
        than the loop, and on a GPU vmap for the parameters concerned; otherwise the loop. A log line at INFO says so.
        What units say needs no gradient: there ``vmap`` and ``loop`` are one image at a time.
    fold : bool
        Compute BatchNorm within the convolution before it, where it directly follows one. Exact.
    precision : {"fp32", "bf16"}
        ``bf16``: the backward pass of the fast strategy in bfloat16 products (the forward pass never).
    verify : bool
        The first time that a model is profiled on images of a shape, with these units and options, compare one of them
        with plain autograd of it alone. Where more differs than rounding and the ReLUs that it switches explain
        (`pss.engine.verification` says how that is decided), the loop is taken instead, with a warning in the log.
    of : {"gradient", "gain", "output"} or ("gradient", "gain")
        Which of the three; of the first two together a tuple of profiles, from one pass.

    Returns
    -------
    Tensor, shape (B, U)
        Of the model's dtype. Units that the loss does not depend on have zero.

    Raises
    ------
    ValueError
        If images, labels, units, outputs or losses are not what is described here.
    RuntimeError
        If the strategy cannot do it; or if the loop too, taken for what was found wrong, does not give what one of the
        images has alone, as where a network draws random numbers.

    References
    ----------
    Levin et al. 2022, arXiv 2108.01335, section 2.1; Molchanov et al. 2017, arXiv 1611.06440.
    """
    options = Options(signed, strategy, fold, precision, tuple(of) if isinstance(of, tuple | list) else (of,))
    found = _profiles(model, images, labels, units, loss, options, verify)[0].chunk(len(options.of), dim=1)
    return found if isinstance(of, tuple | list) else found[0]


def profile_and_outputs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units,
    loss: str | Loss,
    verify: bool = True,
    verify_again: bool = False,
    **options: Any,
) -> tuple[Tensor, Any, Tensor]:
    """`profile`, with the model's outputs and the losses ``(B,)``: from the same forward pass where that can be.

    Parameters and errors are those of `profile`; ``verify_again`` verifies this batch also where another has been.
    Outputs are what the model returns for the batch, without gradients.
    """
    profiles, whole = _profiles(model, images, labels, units, loss, Options(**options), verify, verify_again)
    if whole.outputs is not None:
        return profiles, whole.outputs, whole.losses
    with ready(model, images), torch.no_grad():
        outputs = laid_out(model, savable(images.detach()), model)
        return profiles, outputs, get_loss(loss)(outputs, labels)


def _sums(outputs: Any, labels: Tensor) -> Tensor:
    """In the place of a loss where none is asked for: it shows autograd the weights that the outputs are made of."""
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != labels.shape:
        raise ValueError(f"outputs are {shape_of(outputs)}: expected a row for each image, or give labels and a loss")
    return outputs.reshape(len(labels), -1).sum(dim=1)


def _profiles(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    units: Units | None,
    loss: str | Loss,
    options: Options,
    verify: bool,
    verify_again: bool = False,
) -> tuple[Tensor, Part]:
    """Profiles of all quantities side by side; and outputs and losses, where the passes had them."""
    units, loss = Units.of(model) if units is None else units, get_loss(loss)
    if labels is None and options.of == ("output",) and isinstance(images, Tensor):
        labels, loss = torch.zeros(len(images), dtype=torch.int64, device=images.device), _sums
    check_inputs(model, images, labels, units)
    kind = (units.fingerprint, getattr(loss, "__qualname__", type(loss).__qualname__))
    task = task_of(model, units.layers, loss, partial(_check_outputs, loss), options, kind)
    return compute_in_parts(task, images, labels, verify, verify_again)


def check_inputs(
    model: nn.Module, images: Tensor, labels: Tensor, units: Units | None = None, what: str = "images"
) -> None:
    """Refuse what would fail late, or not at all: for every function that takes a model, its units and a batch."""
    check_units(model, units)
    check_images(model, images, labels, what)


def _check_outputs(loss: Loss, outputs: Tensor, labels: Tensor, rows: int) -> None:
    """Whether the losses of this module can take the outputs; own losses take what they like."""
    if loss not in LOSSES.values():
        return
    check_labels(labels, outputs)
    if len(outputs) != rows:
        raise ValueError(f"outputs are {tuple(outputs.shape)} for {rows} images: expected one row each")
