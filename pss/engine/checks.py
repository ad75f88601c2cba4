"""Checks of arguments that several modules make: each says what was wrong, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def shape_of(value: Any) -> Any:
    """Shape of a tensor, or what else it is, for a message."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def check_model(model: nn.Module) -> None:
    """Refuse what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")


def check_known(what: str, value: Any, known: Collection[str]) -> None:
    """Refuse a name that is none of those known."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")


def check_count(name: str, value: Any, most: int, of: str, least: int = 1) -> None:
    """Refuse a number that is no integer in ``least..most``; ``of`` says what they are the number of."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} = {value} is a {type(value).__name__}: expected an int")
    if not least <= value <= most:
        raise ValueError(f"{name} = {value} is outside {least}..{most}, {of}")


def check_positive(**values: float | None) -> None:
    """Refuse numbers that are not positive and finite; None is left out."""
    for name, value in values.items():
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, not {value}")


def check_share(name: str, value: float, meaning: str) -> None:
    """Refuse a share that is not inside (0, 1); ``meaning`` ends the sentence."""
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value} is outside (0, 1): it is {meaning}")


def check_finite(profiles: Tensor) -> None:
    """Refuse profiles, (B, U), of which some are NaN or infinite: they would come first in every ranking."""
    if not profiles.isfinite().all():
        bad = (~profiles.isfinite().all(dim=1)).nonzero()[:10, 0].tolist()
        raise ValueError(f"profiles {bad} are not finite: leave them out or mend them")


def check_ids(ids: Sequence | np.ndarray | Tensor, count: int, dims: int = 2, least: int = 1) -> np.ndarray:
    """Unit ids as int64: (K,), or a row an image (B, K); at least ``least`` of ``count`` units, none twice in a row."""
    ids = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if ids.ndim != dims:
        raise ValueError(f"ids have shape {ids.shape}: expected {'(K,)' if dims == 1 else '(B, K), a row per image'}")
    if ids.shape[-1] < least:
        raise ValueError("no unit to edit: give at least one id")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids are {ids.dtype}: expected integers")
    ids = ids.astype(np.int64)
    if len(outside := ids[(ids < 0) | (ids >= count)]):
        raise ValueError(f"unit {outside[0]} is outside 0..{count - 1}, the units of this model")
    ordered = np.sort(ids, axis=-1)
    if len(twice := ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]):
        raise ValueError(f"unit {twice[0]} is given twice in one ranking: each is edited once")
    return ids


def ids_of_each(ids: Sequence | np.ndarray | Tensor, images: int, count: int) -> Tensor:
    """Unit ids, a row an image (B, K): those that are given, (K,) for all images or (B, K)."""
    ids = torch.as_tensor(ids)
    ids = torch.from_numpy(check_ids(ids.expand(images, -1) if ids.dim() == 1 else ids, count))
    if len(ids) != images:
        raise ValueError(f"ids have {len(ids)} rows for {images} images: give (k,) for all, or a row for each")
    return ids


def check_exclude(exclude: Tensor | np.ndarray | None, queries: int, count: int) -> Tensor:
    """Ids of the queries among the candidates, (Q,), or -1: integers in -1..N-1, or refused."""
    own = torch.full((queries,), -1) if exclude is None else torch.as_tensor(exclude).cpu()
    if own.shape != (queries,) or own.is_floating_point() or ((own < -1) | (own >= count)).any():
        raise ValueError(f"exclude must hold one id for each of the {queries} queries, in 0..{count - 1} or -1")
    return own.long()


def as_batch(images: Tensor, labels: Tensor | int) -> tuple[Tensor, Tensor, bool]:
    """A batch as it is, one image and its label as a batch of one; and whether it was one image."""
    if not isinstance(images, Tensor) or images.dim() not in (3, 4):
        raise ValueError(f"images are {shape_of(images)}: expected a tensor (B, C, H, W), or one image (C, H, W)")
    labels = torch.as_tensor(labels, device=images.device)
    return (images, labels, False) if images.dim() == 4 else (images[None], labels.reshape(-1), True)


def check_images(model: nn.Module, images: Tensor, labels: Tensor, what: str = "images") -> None:
    """Refuse a batch that a model cannot take, or that would give no numbers.

    Raises
    ------
    ValueError
        If images or labels are no tensors of one length on the model's device and of its type, or an image is not
        finite.
    """
    if not isinstance(images, Tensor) or images.dim() < 2 or images.numel() == 0:
        expected = "a tensor of shape (B, ...) with B >= 1, as (B, 3, 224, 224)"
        raise ValueError(f"{what} are {shape_of(images)}: expected {expected}")
    if not isinstance(labels, Tensor) or labels.dim() < 1 or len(labels) != len(images):
        expected = "a tensor with one label per image (of one image images[None])"
        raise ValueError(f"labels are {shape_of(labels)} for {what} {tuple(images.shape)}: expected {expected}")
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


def check_labels(labels: Tensor, outputs: Tensor) -> None:
    """Refuse outputs that are no logits (B, C), and labels that are no classes of them."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        made = "have them made by pss.models.logits_of(model, select)"
        raise ValueError(
            f"outputs are {shape_of(outputs)}: expected logits (B, C) with C >= 2; {made}, or for a profile give a "
            "loss (outputs, labels) -> (B,)"
        )
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"labels are {labels.dtype} of shape {shape_of(labels)}: expected class numbers, int64 (B,)")
    classes = outputs.shape[1]
    if len(outside := labels[(labels < 0) | (labels >= classes)]):
        raise ValueError(f"label {int(outside[0])} is outside 0..{classes - 1} of this model")
