r"""Input-space saliency: which pixels drive the parameters that are to blame.

The first paper (Levin et al. 2022, section 2.2) asks how the image would have to change for its most salient units to
stand out even more. With :math:`\hat s(x)` the standardized saliency profile of the image, and :math:`\hat s'` the same
profile with its :math:`k` most salient units boosted by a factor, the map is

.. math:: M = |\nabla_x \cos(\hat s(x), \hat s')|.

The profile is itself made of gradients, so this differentiates twice: once to the weights, then back to the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pss.engine.checks import as_batch, check_count, check_known, check_positive, ids_of_each
from pss.engine.strategies import gradients_to
from pss.engine.twice import gradients_of_one, twice_differentiable
from pss.ranking import RANKINGS, rank, score
from pss.reference import Reference
from pss.saliency import Loss, check_inputs, get_loss, profile
from pss.units import Units

ORDERS = ("absolute_first", "published", "gradient")
Similarity = Callable[[Tensor, Tensor], Tensor]


def cosine(profiles: Tensor, boosted: Tensor) -> Tensor:
    """Cosine similarity of rows, (B, U) and (B, U) to (B,), of whatever size: raw saliencies may be 1e-12."""
    scaled = [
        rows / rows.detach().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        for rows in (profiles, boosted)
    ]
    return F.cosine_similarity(*scaled, dim=1)


def input_saliency(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | int,
    units: Units,
    reference: Reference | None = None,
    k: int = 10,
    boost: float = 100.0,
    method: str = "zscore",
    *,
    ids: Tensor | None = None,
    random: bool = False,
    noise_iters: int = 1,
    noise_share: float = 0.0,
    generator: torch.Generator | int = 0,
    signed: bool = False,
    loss: str | Loss = "cross_entropy",
    order: str = "absolute_first",
    similarity: Similarity = cosine,
) -> Tensor:
    r"""Map of the pixels that drive the most salient units of an image.

    .. math:: M_{hw} = \max_c |\partial \cos(\hat s(x), \hat s') / \partial x_{chw}|

    where :math:`\hat s'` is a constant, as in the first paper's program: the profile of this very image, detached, with
    the boosted units multiplied. Only :math:`\hat s(x)` is differentiated. At a boost of 1 the map is zero.

    Parameters
    ----------
    model : nn.Module
    images : Tensor, shape (B, C, H, W) or (C, H, W)
    labels : Tensor of int, shape (B,); for one image also an int
        The true classes.
    units : Units
    reference : Reference, optional
        Made with the same units, loss and sign. Only ``method="raw"`` goes without.
    k : int
        Number of units to boost.
    boost : float
        Factor that they are multiplied by; the paper takes 10 and 100.
    method : str
        How the profile is standardized, and which units are the most salient: any ``differentiable`` one of
        `pss.RANKINGS`, as ``zscore``, ``abs_zscore``, ``pot``, ``exponential``, ``raw``. With ``pot`` and
        ``exponential`` :math:`-\log P(\bar S_k \ge \bar s_k)` is differentiated: above the threshold its slope is
        :math:`1/(\beta + \xi(\bar s - u))`, below it that of the line between two reference quantiles, over the
        probability. A bounded tail (:math:`\xi < 0`) has no finite value beyond its end and is taken as exponential.
    ids : Tensor of int, shape (k,) or (B, k), optional
        Boost these units instead of the k most salient.
    random : bool
        Boost k random units instead (the first paper's ``compare_random``); dead units come last.
    noise_iters, noise_share : int, float
        Average the gradient over this many copies :math:`(1 - a) x + a \epsilon` with :math:`a` the share and standard
        normal :math:`\epsilon`; each copy has its own profile and its own most salient units.
    generator : torch.Generator or int
        Source of the noise and of the random units, or its seed.
    signed : bool
        Profile of mean gradients instead of mean absolute gradients; the reference must be of such profiles.
    loss : str or callable
        Of the parameter saliency, as in `pss.profile`.
    order : {"absolute_first", "published", "gradient"}
        Absolute value, then maximum over channels; or the first paper's program, the other way round, whose map is
        another one when the similarity is negated; or the gradient itself, with its channels. See `channel_map`.
    similarity : callable
        ``(profiles (1, U), boosted (1, U)) -> (1,)``; by default the cosine.

    Returns
    -------
    Tensor, shape (B, H, W) or (H, W); with ``order="gradient"`` that of the images
        The raw map. `pss.plots.render_map` prepares it for display.

    Raises
    ------
    ValueError
        If an option, the images, labels, units or the reference are not what is described here, or if the map is not
        finite.
    RuntimeError
        From PyTorch, if an operation of the model cannot be differentiated twice.

    References
    ----------
    Levin et al. 2022, arXiv 2108.01335, section 2.2. The tail probability: Wang and Sato 2023, arXiv 2310.17951.
    """
    images, labels, single = as_batch(images, labels)
    check_known("method", method, [name for name, entry in RANKINGS.items() if entry.differentiable])
    check_known("order", order, ORDERS)
    check_positive(boost=boost)
    if noise_iters < 1 or not 0 <= noise_share <= 1:
        given = f"noise_iters = {noise_iters}, noise_share = {noise_share}"
        raise ValueError(f"{given}: expected at least 1, and a share in 0..1")
    if ids is not None and random:
        raise ValueError("ids= and random=True both say which units to boost: give one of them")
    ids = None if ids is None else ids_of_each(ids, len(images), len(units))
    check_inputs(model, images, labels, units)
    if reference is not None:
        reference.check(units, model=model, loss=loss, signed=signed, of="gradient")
    generator = generator if isinstance(generator, torch.Generator) else torch.Generator().manual_seed(generator)
    loss, total, chosen_by = get_loss(loss), 0.0, "random" if random else method
    with twice_differentiable(model, units.parameters, images):
        labels = labels.clone()
        for _ in range(noise_iters):
            noisy = _with_noise(images, noise_share, generator)
            profiles = profile(model, noisy, labels, units, loss, signed)  # also checks what it is given
            top = ids if ids is not None else rank(profiles, reference, chosen_by, k, generator=generator)
            gradients = []
            for image, label, of_image in zip(noisy.split(1), labels.split(1), top, strict=True):
                image = image.clone().requires_grad_()
                standard = standardize(_profile(model, image, label, units, loss, signed), reference, method)
                boosted = standard.detach().clone()
                boosted[:, of_image] *= boost
                gradients += gradients_to([image], similarity(standard, boosted).sum())
            total = total + torch.cat(gradients)
    maps = channel_map(total / noise_iters, order)
    if not torch.isfinite(maps).all():
        raise ValueError(f"a map is not finite: second derivatives overflow {maps.dtype}; try model.double()")
    return maps[0] if single else maps


def gain_map(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | int,
    units: Units,
    k: int = 10,
    *,
    ids: Tensor | None = None,
    loss: str | Loss = "logit_difference",
) -> Tensor:
    r"""Map of the pixels behind the units that contribute most to a mistake.

    .. math:: M_{hw} = \Bigl|\sum_c x_{chw} \frac{\partial}{\partial x_{chw}} \sum_{u \in T} c_u\Bigr|,
        \qquad c_u = \sum_{i \in u} \theta_i \, \partial L / \partial \theta_i

    with :math:`c_u` the gain saliency of a unit, by default of the margin by which the image is misread: pruning the
    unit lowers the margin by about as much. :math:`T` are the k units with the largest. Image by image, with one more
    backward pass; what is zero in the image is zero in the map.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W) or (C, H, W)
    labels : Tensor of int, shape (B,); for one image also an int
        The true classes.
    ids : Tensor of int, shape (k,) or (B, k), optional
        These units instead.

    Returns
    -------
    Tensor, shape (B, H, W) or (H, W)

    Raises
    ------
    ValueError, RuntimeError
        As `input_saliency`.
    """
    images, labels, single = as_batch(images, labels)
    ids = None if ids is None else ids_of_each(ids, len(images), len(units))
    check_inputs(model, images, labels, units)
    check_count("k", k, len(units), "the number of units")
    maps = []
    with twice_differentiable(model, units.parameters, images):
        for i, (image, label) in enumerate(zip(images.split(1), labels.clone().split(1), strict=True)):
            image = image.detach().clone().requires_grad_()
            gains = _profile(model, image, label, units, get_loss(loss), signed=True, gain=True)
            top = gains.detach().topk(k).indices if ids is None else ids[i : i + 1]
            (slope,) = gradients_to([image], gains.gather(1, top).sum())
            maps.append((image * slope).sum(dim=1).abs().detach())
    found = torch.cat(maps)
    return found[0] if single else found


def channel_map(gradient: Tensor, order: str = "absolute_first") -> Tensor:
    """One number a pixel from the gradient to its channels, (B, C, H, W) to (B, H, W).

    ``absolute_first``: the largest absolute value, which does not depend on the sign of what was differentiated;
    ``published``: the absolute value of the largest, which does; ``gradient``: as it is, (B, C, H, W).
    """
    check_known("order", order, ORDERS)
    if order == "gradient":
        return gradient
    return gradient.abs().amax(dim=1) if order == "absolute_first" else gradient.amax(dim=1).abs()


def standardize(profiles: Tensor, reference: Reference | None, method: str = "zscore") -> Tensor:
    """Standardized profiles that can be differentiated, float64 (B, U); see `input_saliency` for the methods."""
    if reference is not None and RANKINGS[method].tail and reference.fitted is not None:
        reference = replace(reference, fitted=reference.fitted & (reference.xi >= 0))
    return score(profiles, reference, method)


def _profile(
    model: nn.Module, image: Tensor, label: Tensor, units: Units, loss: Loss, signed: bool, gain: bool = False
) -> Tensor:
    """Profile of one image, or what its units contribute, (1, U), as a function that can be differentiated."""
    gradients = gradients_of_one(model, units.parameters, image, label, loss)
    if gain:
        terms = units.reduce({name: gradient * model.get_parameter(name) for name, gradient in gradients.items()})
        return terms * torch.as_tensor(units.sizes, dtype=terms.dtype, device=terms.device)
    return units.reduce(gradients if signed else {name: gradient.abs() for name, gradient in gradients.items()})


def _with_noise(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Copies of the images with some noise, (1 - share) x + share * noise."""
    if share == 0:
        return images.detach().clone()
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=generator.device)
    return (1 - share) * images.detach() + share * noise.to(images.device)
