r"""Fisher information: what a change of a parameter costs on usual images, and gain over cost of every unit.

A step :math:`\delta` with gain :math:`-g^\top\delta` in an image's loss changes what the model says of usual images by
:math:`\mathrm{KL} \approx \tfrac12 \delta^\top F \delta`, with :math:`F` the Fisher information. With its diagonal
:math:`F_i`, the mean squared gradient over usual images, the best use of a given KL is the step
:math:`-g_i / (F_i + \lambda)`, and what a unit :math:`u` can contribute is its gain over cost

.. math:: \sum_{i \in u} \frac{g_i^2}{F_i + \lambda}.

A z-score divides saliency by what is usual too; raw saliency does not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import pss
from pss.saliency import Loss, parameter_saliency
from pss.storage.fingerprints import fingerprint, name_of
from pss.storage.tensors import bytes_of, pack, unpack
from pss.storage.whole import write_whole
from pss.units import Units

if TYPE_CHECKING:
    from pss.reference import Reference

DAMPING = 0.01  # of the Fisher information, as a multiple of its mean
_GRADIENTS = 2**24  # numbers in the gradients that are held at once

Weights = Mapping[str, Tensor]


def fisher_diagonal(
    model: nn.Module,
    dataset: Dataset | tuple[Tensor, Tensor],
    units: Units | None = None,
    loss: str | Loss = "cross_entropy",
    path: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information: the mean squared gradient of every parameter over a reference set.

    .. math:: F_i = \frac1N \sum_n \Bigl(\frac{\partial L(x_n, y_n; \theta)}{\partial \theta_i}\Bigr)^2

    (the empirical one, with the labels of the set). One backward pass for each image, for small models.

    Parameters
    ----------
    model : nn.Module
    dataset : ImageSet or (images, labels)
        With tensors ``images`` and ``labels``, on the model's device.
    units : Units, optional
        Keep only the parameters that have units; every parameter by default.
    path : path, optional
        A safetensors file to read it from, or if it is not there, to write it to.

    Returns
    -------
    dict of str to Tensor
        By parameter name, of the parameter's shape, float32.

    Raises
    ------
    ValueError
        If there is no image, or the file at ``path`` was made with another model, images or loss.
    """
    images, labels = dataset if isinstance(dataset, tuple) else (dataset.images, dataset.labels)
    if not len(images):
        raise ValueError("no images: the Fisher information is a mean over at least one")
    names = list(dict.fromkeys(layer.parameter for layer in units.layers)) if units else None
    about = {"pss": pss.__version__, "model": fingerprint(model), "n": len(images), "loss": name_of(loss)}
    about |= {"images": digest(images), "labels": digest(labels), "parameters": names or "all"}
    if path is not None and Path(path).exists():
        return _read_fisher(Path(path), about)
    total: dict[str, Tensor] = {}
    with tqdm(total=len(images), unit="image", delay=2, disable=not progress) as bar:
        for part, gradients in gradients_of(model, images, labels, loss):
            for name in names or gradients:
                total[name] = total.get(name, 0) + gradients[name].double().square().sum(dim=0)
            bar.update(len(images[part]))
    diagonal = {name: (sums / len(images)).float().contiguous() for name, sums in total.items()}
    if path is not None:
        content = pack(diagonal, "fisher", about)
        write_whole(Path(path), content)
    return diagonal


def _read_fisher(path: Path, about: dict) -> dict[str, Tensor]:
    try:
        diagonal, found = unpack(path, "fisher")
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged, or no Fisher information: delete it to make it anew") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no Fisher information of this version: delete it to make it anew")
    if other := [key for key in about if found.get(key) != about[key]]:
        raise ValueError(f"{path.name} was made with another {', '.join(other)}: delete it, or give another path")
    return diagonal


def fisher_scores(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units,
    fisher: Weights | Reference,
    damping: float = DAMPING,
    loss: str | Loss = "cross_entropy",
) -> Tensor:
    r"""Gain over cost of every unit for each image, to rank by: larger is better; float64, (B, U).

    .. math:: \sum_{i \in u} \frac{g_i^2}{F_i + \lambda}

    With :math:`\lambda` = ``damping`` times the mean of :math:`F` over the parameters of all units. Its square root
    is comparable with a z-score. ``pss.rank(profiles, reference, "fisher", gains=fisher_scores(…))`` ranks by it.

    Parameters
    ----------
    fisher : mapping of str to Tensor, or Reference
        From `fisher_diagonal`, or a reference fitted with it.

    Raises
    ------
    ValueError
        If the Fisher information lacks a parameter of the units, the reference has none, or ``damping`` is negative.
    """
    cost = damped(fisher, [layer.parameter for layer in units.layers], damping)
    sizes = torch.as_tensor(units.sizes, dtype=torch.float64)
    rows = []
    for _, gradients in gradients_of(model, images, labels, loss):
        gain = {name: gradients[name].double().square() / cost[name].to(images.device) for name in cost}
        rows.append(units.reduce(gain) * sizes.to(images.device))  # the sum over each unit, from its mean
    return torch.cat(rows)


def gradients_of(
    model: nn.Module, images: Tensor, labels: Tensor, loss: str | Loss
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Signed gradients of each image, (b, *shape) by parameter name, for a few images after the other."""
    size = max(1, _GRADIENTS // sum(p.numel() for p in model.parameters()))
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield part, parameter_saliency(model, images[part], labels[part], loss, signed=True)


def damped(fisher: Weights | Reference, names: Sequence[str], damping: float) -> dict[str, Tensor]:
    """Fisher information plus damping, float64; of a reference that which it was fitted with."""
    fisher = fisher if isinstance(fisher, Mapping) else fisher.fisher
    if fisher is None:
        raise ValueError(
            "this reference has no Fisher information: fit it with fisher=pss.fisher_diagonal(model, images, units)"
        )
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be zero or positive, not {damping}")
    names = list(dict.fromkeys(names))
    if missing := [name for name in names if name not in fisher]:
        raise ValueError(f"the Fisher information lacks {missing[0]!r}: make it with fisher_diagonal for these units")
    mean = sum(float(fisher[n].double().sum()) for n in names) / sum(fisher[n].numel() for n in names)
    least = damping * mean + torch.finfo(torch.float64).tiny  # 0 / 0 would be NaN
    return {name: fisher[name].double() + least for name in names}


def digest(values: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(bytes_of(values)).hexdigest()
