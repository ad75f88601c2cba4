r"""Parameter saliency of each sample, and its reduction to units.

The parameter saliency of sample :math:`(x, y)` is :math:`s(x, y)_i = |\partial L / \partial \theta_i|`; the saliency of
unit :math:`k` is its mean over the parameters :math:`\alpha_k` of the unit (Levin et al. 2022, section 2.1). Both are
taken for every sample of a batch on its own: absolute values of per-sample gradients, never of their sum.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pss.engine.interception import OwnGradients, Sweep, Unknown
from pss.engine.state import preserved
from pss.units import UnitGroup, Units, check_model

log = logging.getLogger(__name__)
GRADIENT_BYTES = 2**28  # what the general path holds of whole gradients at once

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of each sample, shape (B,), whose gradient is exact also on confident samples.

    Written as :math:`\log(1 + e^{v})` with :math:`v = \log\sum_{j \ne y} e^{z_j} - z_y`, so that autograd forms the
    gradient to the true class as :math:`-\sum_{j \ne y} p_j`. The usual :math:`p_y - 1` rounds: in float32
    at a loss of 1e-6 it is off by 10%.
    """
    others = torch.logsumexp(logits.scatter(1, labels[:, None], -torch.inf), dim=1)
    return -F.logsigmoid(_true_logit(logits, labels) - others)


def logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class, shape (B,)."""
    return _true_logit(logits, labels)


def logit_difference(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of the other classes less the logit of the true class, shape (B,): positive on mistakes."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - _true_logit(logits, labels)


def _true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "logit": logit,
    "logit_difference": logit_difference,
}


def get_loss(loss: str | Loss) -> Loss:
    """Loss by name, or the callable ``(outputs, labels) -> (B,)`` as it is."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: expected one of {sorted(LOSSES)} or a callable (outputs, labels)")
    return LOSSES[loss]


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
    loss, names = get_loss(loss), [name for name, _ in model.named_parameters()]
    check_inputs(model, images, labels)
    with _ready(model, images):
        parts = list(_gradients(model, _laid_out(images), labels, names, loss))
    whole = {name: torch.cat([part[name] for part in parts]) for name in names}  # a copy: abs_ may write into it
    return whole if signed else {name: g.abs_() for name, g in whole.items()}


def profile(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units | None = None,
    loss: str | Loss = "cross_entropy",
    signed: bool = False,
    strategy: str = "auto",
    fold: bool = True,
    precision: str = "fp32",
) -> Tensor:
    r"""Saliency profile of each sample: mean absolute gradient of every unit.

    .. math:: \bar s(x, y)_k = \frac{1}{|\alpha_k|} \sum_{i \in \alpha_k} |\partial L(x, y; \theta) / \partial \theta_i|

    A row is what the sample would have alone. The model is put into evaluation mode, and left as it was found. It must
    treat the samples of a batch apart, as networks in evaluation mode do; for one that does not, ask for ``vmap``.

    Parameters
    ----------
    model : nn.Module
    images : Tensor, shape (B, ...)
        On the model's device, of its dtype.
    labels : Tensor of int, shape (B,)
    units : Units, optional
        Units of this model; by default the filters of its convolutions.
    loss : str or callable
        One of `LOSSES`, or a callable ``(outputs, labels) -> (B,)``.
    signed : bool
        Mean gradient, instead of mean absolute gradient.
    strategy : {"auto", "fast", "vmap", "loop"}
        ``fast``: one forward and backward pass over the batch, an error where that cannot be; ``vmap``: gradients of
        whole samples, vectorized over a few; ``loop``: one sample at a time. ``auto``: fast where it can be,
        otherwise vmap, otherwise loop, with a log line at INFO.
    fold : bool
        On the fast path, compute BatchNorm within the convolution before it, where it directly follows one. Exact.
    precision : {"fp32", "bf16"}
        ``bf16``: the backward pass of the fast path in bfloat16 products (the forward pass never).

    Returns
    -------
    Tensor, shape (B, U)
        Of the model's dtype. Units that the loss does not depend on have zero.

    Raises
    ------
    ValueError
        If images, labels, units, outputs or losses are not what is described here.

    References
    ----------
    Levin et al. 2022, arXiv 2108.01335, section 2.1.
    """
    parts = _profiles(model, images, labels, units, loss, signed, strategy, fold, precision)
    return torch.cat([rows for rows, *_ in parts])


def profile_and_outputs(
    model: nn.Module, images: Tensor, labels: Tensor, units: Units, loss: str | Loss, **options: Any
) -> tuple[Tensor, Any, Tensor]:
    """`profile`, with the model's outputs and the losses ``(B,)``: from the same forward pass where that can be.

    Parameters and errors are those of `profile`. Outputs are what the model returns for the batch, without gradients.
    """
    parts = _profiles(model, images, labels, units, loss, **options)
    rows, outputs, losses = zip(*parts, strict=True)
    if all(isinstance(part, Tensor) for part in outputs):
        return torch.cat(rows), torch.cat(outputs), torch.cat(losses)
    with _ready(model, images), torch.no_grad():
        whole = model(_laid_out(images))
        return torch.cat(rows), whole, get_loss(loss)(whole, labels)


def _profiles(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units | None,
    loss: str | Loss,
    signed: bool = False,
    strategy: str = "auto",
    fold: bool = True,
    precision: str = "fp32",
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Profiles, outputs and losses, a part of the batch each: the last two only of the fast path, and if tensors."""
    for value, known in ((strategy, ("auto", "fast", "vmap", "loop")), (precision, ("fp32", "bf16"))):
        if value not in known:
            raise ValueError(f"unknown option {value!r}: expected one of {known}")
    loss, units = get_loss(loss), Units.of(model) if units is None else units
    check_inputs(model, images, labels, units)
    size = _images_at_once(images)
    with _ready(model, images):
        labels = labels.clone() if labels.is_inference() else labels  # otherwise autograd may not save them
        chunks = zip(_laid_out(images).split(size), labels.split(size), strict=True)
        return [_profile(model, *chunk, units, loss, signed, strategy, fold, precision) for chunk in chunks]


def _profile(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units,
    loss: Loss,
    signed: bool,
    strategy: str,
    fold: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Profile of as many images as are taken at once: the fast path, and the general path for what it leaves."""
    names = _canonical_names(model)
    rest = dict.fromkeys(names[layer.parameter] for layer in units.layers)
    vectorized = strategy != "loop"
    means: dict[str, Tensor] = {}  # of the rows of the parameters that the fast path did
    outputs, losses = None, None
    if strategy in ("auto", "fast"):
        in_rows = [name for name in rest if all(_in_rows(y) for y in units.layers if names[y.parameter] == name)]
        try:
            means, outputs, losses = _row_means(model, images, labels, in_rows, loss, signed, fold, precision == "bf16")
            reason = "used in a way that the fast path does not know"
        except RuntimeError as error:  # Unknown, or what an operation says that cannot be intercepted
            if strategy == "fast" or _is_of_the_machine(error):
                raise
            reason = str(error)
            vectorized = not isinstance(error, OwnGradients)  # vmap would take them wrongly, without a word
        rest = [name for name in rest if name not in means]
    if rest and strategy == "fast":
        raise Unknown(f"strategy='fast' cannot do {', '.join(rest)}: {reason}; use strategy='auto'")
    if rest and strategy == "auto":
        log.info("general path for %d parameters (%s …), fast for %d: %s", len(rest), rest[0], len(means), reason)
    slow: dict[int, Tensor] = {}
    if rest:
        numbers = [i for i, layer in enumerate(units.layers) if names[layer.parameter] in rest]
        parts = []
        for gradients in _gradients(model, images, labels, list(rest), loss, vectorized=vectorized):
            whole = gradients if signed else {name: g.abs() for name, g in gradients.items()}
            parts.append([units.layers[i].reduce(whole[names[units.layers[i].parameter]]) for i in numbers])
        slow = {i: torch.cat(columns) for i, columns in zip(numbers, zip(*parts, strict=True), strict=True)}
    columns = [
        slow[i] if i in slow else layer.reduce(means[names[layer.parameter]]) for i, layer in enumerate(units.layers)
    ]
    return torch.cat(columns, dim=1), outputs, losses


def _row_means(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    names: list[str],
    loss: Loss,
    signed: bool,
    fold: bool,
    bf16: bool,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Fast path: mean (absolute) gradient of every row of the named parameters, where it knows their use.

    With the outputs and losses of its forward pass, if the outputs are a tensor.
    """
    wanted = {name: model.get_parameter(name) for name in names}
    if not wanted:
        return {}, None, None
    _require_gradients(model, wanted)
    try:
        sweep = Sweep(wanted, len(images), signed, fold, bf16)
        outputs = sweep.outputs(model, images)
        _check_outputs(outputs, labels, loss, len(images))
        losses = loss(outputs, labels)
        _check_losses(losses, labels)
        if sweep.unplaced:
            alone = Sweep(wanted, 1, signed, fold, bf16)
            alone.watched = set(sweep.unplaced)
            _refuse_company(outputs, alone.outputs(model, images[-1:]))
            sweep.place(alone)
        means = sweep.row_means(losses)
        return means, outputs.detach() if isinstance(outputs, Tensor) else None, losses.detach()
    except Unknown:
        if not fold:
            raise
        return _row_means(model, images, labels, names, loss, signed, False, bf16)


def _refuse_company(outputs: Tensor, alone: Tensor) -> None:
    """Raise where the last image's outputs in the batch are not those that it has alone."""
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        slack = torch.finfo(outputs.dtype).eps ** 0.5 * alone.abs().max()
        if (outputs[-1:] - alone).abs().max() > slack:
            raise Unknown("the outputs of an image depend on the others of its batch")


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, names: list[str], loss: Loss, vectorized: bool = True
) -> Iterator[dict[str, Tensor]]:
    """General path: gradients of whole samples, ``{name: (b, *shape)}`` for a few samples after the other."""
    parameters = {name: model.get_parameter(name) for name in names}
    numbers = sum(p.numel() for p in parameters.values())
    at_once = max(1, min(len(images), GRADIENT_BYTES // (numbers * images.element_size())))
    _check_outputs(model(images[:1]), labels, loss, 1)
    for chunk in zip(images.split(at_once), labels.split(at_once), strict=True):
        if vectorized:
            try:
                yield _vectorized(model, *chunk, parameters, loss)
                continue
            except (RuntimeError, NotImplementedError) as error:
                if _is_of_the_machine(error):
                    raise
                vectorized = False
                log.info("one sample at a time, as torch.func.vmap cannot run this model: %s", error)
        rows = [_of_one(model, image, label, parameters, loss) for image, label in _pairs(*chunk)]
        yield {name: torch.stack(row) for name, row in zip(parameters, zip(*rows, strict=True), strict=True)}


def _vectorized(
    model: nn.Module, images: Tensor, labels: Tensor, parameters: dict[str, Tensor], loss: Loss
) -> dict[str, Tensor]:
    def total(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss(torch.func.functional_call(model, parameters, (image[None],)), label[None])
        _check_losses(losses, label[None], values=False)
        return losses.sum(), losses

    _require_gradients(model, parameters)
    detached = {name: p.detach() for name, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(total, has_aux=True), in_dims=(None, 0, 0))
    with warnings.catch_warnings():  # of operations that vmap runs one after the other: slow is what this path is
        warnings.filterwarnings("ignore", "There is a performance drop")
        gradients, losses = per_sample(detached, images, labels)
    if losses.requires_grad:  # by the parameters themselves, not those that were put in their place
        raise RuntimeError("the model also holds a parameter outside of its modules' parameters")
    _check_losses(losses[:, 0], labels)
    return gradients


def _of_one(
    model: nn.Module, image: Tensor, label: Tensor, parameters: dict[str, Tensor], loss: Loss
) -> tuple[Tensor, ...]:
    _require_gradients(model, parameters)
    losses = loss(model(image), label)
    _check_losses(losses, label)
    inputs = tuple(parameters.values())
    if not losses.requires_grad:
        return tuple(torch.zeros_like(p) for p in inputs)
    gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, inputs, strict=True))


def _pairs(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(1), labels.split(1), strict=True)


def _is_of_the_machine(error: Exception) -> bool:
    """Out of memory, or a loader's worker that died: no reason to take a slower path."""
    words = ("DataLoader worker", "allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def _require_gradients(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Of the wanted parameters, and of no other."""
    ids = {id(p) for p in wanted.values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in ids)


def _in_rows(layer: UnitGroup) -> bool:
    """Whether the units are made of whole rows of a matrix, of which means are enough."""
    return layer.dim == 0 and layer.groups == 1 and len(layer.shape) > 1


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """First name of every parameter, by each of its names: shared parameters have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _images_at_once(images: Tensor) -> int:
    """Larger batches are slower on a CPU: about 8 images at 224 pixels; a GPU wants more."""
    numbers = (64 if images.is_cuda else 8) * 3 * 224 * 224
    return max(1, min(256, numbers // images[0].numel()))


def _laid_out(images: Tensor) -> Tensor:
    """Channels last where it pays: on a CPU. A copy if autograd may not save the images."""
    images = images.detach()
    images = images.clone() if images.is_inference() else images
    channels_last = images.dim() == 4 and not images.is_cuda
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


@contextmanager
def _ready(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Gradients on, whatever the caller has set, and the model preserved."""
    without_autocast = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), without_autocast, preserved(model):
        yield


def check_inputs(
    model: nn.Module, images: Tensor, labels: Tensor, units: Units | None = None, what: str = "images"
) -> None:
    """Refuse what would fail late, or not at all: for every function that takes a model and a batch.

    Raises
    ------
    TypeError
        If the model is no module, or the units are no `Units`.
    ValueError
        If images or labels are no tensors of one length on the model's device and of its type, an image is not finite,
        or the units are of another model.
    """
    check_units(model, units)
    if not isinstance(images, Tensor) or images.dim() < 2 or images.numel() == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{what} are {shape}: expected a tensor of shape (B, ...) with B >= 1, as (B, 3, 224, 224)")
    if not isinstance(labels, Tensor) or labels.dim() < 1 or len(labels) != len(images):
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"labels are {shape} for {what} {tuple(images.shape)}: expected a tensor with one label per image "
            "(of one image images[None])"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"{type(model).__name__} has no parameters")
    for which, tensor in ((what, images), ("labels", labels)):
        if tensor.device != parameter.device:
            raise ValueError(f"{which} are on {tensor.device}, the model on {parameter.device}: move one to the other")
    if images.is_floating_point() or images.dtype in (torch.uint8, torch.bool):  # other integers may be tokens
        if images.dtype != parameter.dtype:
            raise ValueError(f"{what} are {images.dtype}, the model {parameter.dtype}: convert one to the other")
        finite = torch.isfinite(images).flatten(1).all(dim=1)
        if not finite.all():
            raise ValueError(f"{what} {(~finite).nonzero()[:, 0].tolist()} hold NaN or infinite values")


def check_units(model: nn.Module, units: Units | None) -> None:
    """Refuse what is no model, no units, or units of another model."""
    check_model(model)
    if units is None:
        return
    if not isinstance(units, Units):
        raise TypeError(f"units are a {type(units).__name__}: expected Units, as Units.of(model) makes them")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for layer in units.layers:
        if shapes.get(layer.parameter) != layer.shape:
            raise ValueError(
                f"the units are not of this model: they have {layer.parameter!r} of shape {layer.shape}, "
                f"the model has {shapes.get(layer.parameter)}; make them with Units.of(model)"
            )


def check_labels(labels: Tensor, outputs: Tensor) -> None:
    """Refuse outputs that are no logits (B, C), and labels that are no classes of them."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"outputs are {shape}: expected logits (B, C) with C >= 2, or give a loss (outputs, labels) -> (B,)"
        )
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: expected class numbers, int64 (B,)"
        )
    classes = outputs.shape[1]
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"label {int(outside[0])} is outside 0..{classes - 1} of this model")


def _check_outputs(outputs: Tensor, labels: Tensor, loss: Loss, rows: int) -> None:
    """Whether the losses of this module can take the outputs; own losses take what they like."""
    if loss not in LOSSES.values():
        return
    check_labels(labels, outputs)
    if len(outputs) != rows:
        raise ValueError(f"outputs are {tuple(outputs.shape)} for {rows} images: expected one row each")


def _check_losses(losses: Tensor, labels: Tensor, values: bool = True) -> None:
    """Whether there is one finite loss per sample; ``values=False`` looks at the shape alone, as under vmap."""
    if not isinstance(losses, Tensor) or losses.shape != (len(labels),):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"the loss returned {shape} for {len(labels)} samples: expected ({len(labels)},), one value each"
        )
    if values and not torch.isfinite(losses).all():
        bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        raise ValueError(f"the loss is not finite for samples {bad} of the batch")
