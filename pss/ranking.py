"""Rank the units of each image by how unusual their saliency is.

All methods rank the same population, every unit of the model, so that their tops can be compared. Dead units
(constant over the reference set) come last whatever the method.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np
import pandas as pd
import torch
from scipy.stats import false_discovery_control
from torch import Tensor

from pss.reference import Reference
from pss.units import Units

METHODS = (
    "zscore",
    "abs_zscore",
    "pot",
    "exponential",
    "ratio",
    "raw",
    "fisher",
    "random_last_stage",
    "random",
    "layer_matched_random",
    "lowest_zscore",
)
_NEEDS_UNITS = ("random_last_stage", "layer_matched_random")


def rank(
    profiles: Tensor,
    reference: Reference | None = None,
    method: str = "pot",
    k: int | None = None,
    units: Units | None = None,
    generator: torch.Generator | int = 0,
    match: str = "pot",
    stage: str | None = None,
    gains: Tensor | None = None,
) -> Tensor:
    """Ids of the k most anomalous units of every image, most anomalous first.

    Parameters
    ----------
    profiles : Tensor, shape (B, U)
    reference : Reference, optional
        Needed by every method but ``raw``, ``fisher``, ``random`` and ``random_last_stage``; where given, dead units
        come last.
    method : str
        ``zscore`` (Levin et al. 2022), ``abs_zscore`` (the explainer's), ``pot`` (Wang and Sato 2023), ``exponential``
        (POT with the shape held at zero), ``ratio`` (to the reference mean), ``raw`` (saliency itself), ``fisher``
        (gain over cost: ``gains``), ``random_last_stage`` (the papers' conv5 heuristic: random units of the last
        stage), ``random``, ``layer_matched_random`` (random units with as many in each layer as the top k by
        ``match``), ``lowest_zscore`` (the lowest z-scores first).
    k : int, optional
        How many; all units by default.
    units : Units, optional
        Needed by ``random_last_stage`` and ``layer_matched_random``.
    generator : torch.Generator or int
        Source of randomness, or its seed.
    match : str
        Method whose layers ``layer_matched_random`` copies.
    stage : str, optional
        Stage that ``random_last_stage`` draws from; the last by default.
    gains : Tensor, shape (B, U), optional
        Needed by ``fisher``: `pss.fisher_scores` of the same images. They are of gradients, and no profile has them.

    Returns
    -------
    Tensor of int64, shape (B, k)

    Raises
    ------
    ValueError
        For an unknown method, a k outside 1..U, a missing reference, units or gains, or a profile that is not finite.
    """
    if not isinstance(profiles, Tensor):
        raise TypeError(f"profiles are a {type(profiles).__name__}: expected a tensor (B, U), as pss.profile gives it")
    if profiles.ndim != 2:
        raise ValueError(f"profiles of shape {tuple(profiles.shape)}: expected (B, U); of one image profile[None]")
    count = profiles.shape[1]
    if reference is not None and len(reference) != count:
        raise ValueError(f"profiles have {count} units, the reference {len(reference)}: they are of different models")
    k = count if k is None else k
    if not isinstance(k, Integral):
        raise TypeError(f"k = {k} is a {type(k).__name__}: expected an int")
    if not 1 <= k <= count:
        raise ValueError(f"k = {k} is outside 1..{count}, the number of units")
    if method in _NEEDS_UNITS and units is None:
        raise ValueError(f"method {method!r} needs units=: pass the Units that the profiles were made with")
    if units is not None and len(units) != count:
        raise ValueError(f"profiles have {count} units, units= has {len(units)}: they are of different models")
    if method == "random_last_stage":
        return _random_in_stage(profiles, k, units, stage or units.stages[-1], _generator(generator), reference)
    if method == "layer_matched_random":
        base = rank(profiles, reference, match, k, units, gains=gains)
        return _layer_matched(base, units, _generator(generator), reference)
    scores = score(profiles, reference, method, generator, gains)
    if reference is not None:
        scores = scores.masked_fill(reference.dead.to(scores.device), -torch.inf)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def score(
    profiles: Tensor,
    reference: Reference | None,
    method: str,
    generator: torch.Generator | int = 0,
    gains: Tensor | None = None,
) -> Tensor:
    """Number that a method ranks by, float64 (B, U): larger is more anomalous.

    For ``pot`` and ``exponential`` the negative log tail probability, and beyond the end of a bounded tail, where the
    probability is zero, by how far beyond. A profile that is not finite is refused: it would come first.
    """
    if not profiles.isfinite().all():
        bad = (~profiles.isfinite().all(dim=1)).nonzero()[:10, 0].tolist()
        raise ValueError(f"profiles {bad} are not finite: leave them out or mend them")
    if method == "raw":
        return profiles.double()
    if method == "fisher":
        return _gains(profiles, gains)
    if method == "random":
        draws = torch.rand(profiles.shape, generator=_generator(generator), dtype=torch.float64)
        return draws.to(profiles.device)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if reference is None:
        raise ValueError(f"method {method!r} needs a reference: pss.Reference.fit(profiles of a validation set)")
    profiles = profiles.double()
    if method in ("pot", "exponential"):
        tail = "gpd" if method == "pot" else "exponential"
        return reference.tail_score(profiles, tail)
    if method == "lowest_zscore":
        return -reference.zscore(profiles)
    return getattr(reference, method)(profiles)


def _gains(profiles: Tensor, gains: Tensor | None) -> Tensor:
    if gains is None:
        raise ValueError(
            "method 'fisher' needs gains=: pss.fisher_scores(model, images, labels, units, reference), of a reference "
            "with fisher=pss.fisher_diagonal(…), or of that diagonal"
        )
    if gains.shape != profiles.shape or not gains.isfinite().all():
        raise ValueError(f"gains of shape {tuple(gains.shape)}: expected {tuple(profiles.shape)}, as profiles, finite")
    return gains.double()


def _generator(source: torch.Generator | int) -> torch.Generator:
    return source if isinstance(source, torch.Generator) else torch.Generator().manual_seed(source)


def _dead(reference: Reference | None, units: Units) -> Tensor:
    return torch.zeros(len(units), dtype=torch.bool) if reference is None else reference.dead.cpu()


def _random_in_stage(
    profiles: Tensor, k: int, units: Units, stage: str, generator: torch.Generator, reference: Reference | None
) -> Tensor:
    if stage not in units.stages:
        raise ValueError(f"unknown stage {stage!r}: this model has {', '.join(units.stages)}")
    members = torch.from_numpy(np.flatnonzero(units.stage_ids == units.stages.index(stage)))
    if k > len(members):
        raise ValueError(f"k = {k} is more than the {len(members)} units of stage {stage}")
    draws = torch.rand(len(profiles), len(members), generator=generator)
    order = draws.masked_fill(_dead(reference, units)[members], torch.inf).argsort(dim=1)[:, :k]
    return members[order].to(profiles.device)


def _layer_matched(base: Tensor, units: Units, generator: torch.Generator, reference: Reference | None) -> Tensor:
    """Replace every unit by a random one of its layer, without repeats within an image, dead ones last."""
    dead = _dead(reference, units)
    layers = torch.from_numpy(units.layer_ids)[base.cpu()]
    drawn = torch.empty_like(base, device="cpu")
    for row, row_layers in enumerate(layers):
        for layer in row_layers.unique():
            at = (row_layers == layer).nonzero()[:, 0]
            span = units.span(int(layer))
            ids = span.start + torch.randperm(span.stop - span.start, generator=generator)
            drawn[row, at] = ids[dead[ids].to(torch.uint8).argsort(stable=True)][: len(at)]
    return drawn.to(base.device)


def fdr_significant(log_p: Tensor, q: float = 0.05, dependent: bool = False) -> Tensor:
    """Units whose tail probability is significant at false-discovery rate q; bool, (B, U).

    Benjamini and Hochberg (1995) over the units of each image; ``dependent`` takes Benjamini and Yekutieli (2001),
    valid under any dependence between units, which do share their image's gradient size.
    """
    if not 0 < q < 1:
        raise ValueError(f"q = {q} is outside (0, 1): it is the share of false discoveries allowed, as 0.05")
    if log_p.isnan().any():
        raise ValueError("log_p has NaN entries: leave the images out whose profiles are not finite")
    if (log_p > 0).any():
        raise ValueError(
            "log_p has positive entries: expected logarithms, as Reference.log_tail_probability gives them"
        )
    p = log_p.double().exp().clamp(max=1).cpu().numpy()
    adjusted = false_discovery_control(p, axis=1, method="by" if dependent else "bh")
    return torch.from_numpy(adjusted <= q).to(log_p.device)


def stage_shares(ids: Tensor, units: Units) -> pd.DataFrame:
    """Share of each stage among the top units, beside the share of all units that it holds (the prior).

    Parameters
    ----------
    ids : Tensor of int, shape (B, k)
    units : Units

    Returns
    -------
    DataFrame
        Index stage; ``share`` (mean over images, 0..1), ``error`` (its standard error over images), ``prior``.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}: expected (B, k), as pss.rank gives them")
    outside = ids[(ids < 0) | (ids >= len(units))]
    if len(outside):
        raise ValueError(f"unit {int(outside[0])} is outside 0..{len(units) - 1}")
    stages = torch.from_numpy(units.stage_ids)[ids.cpu()]
    each = torch.stack([(stages == i).double().mean(dim=1) for i in range(len(units.stages))], dim=1)  # (B, stages)
    error = each.std(dim=0) / len(each) ** 0.5 if len(each) > 1 else torch.full((each.shape[1],), torch.nan)
    prior = np.bincount(units.stage_ids, minlength=len(units.stages)) / len(units)
    return pd.DataFrame(
        {"share": each.mean(dim=0).numpy(), "error": error.numpy(), "prior": prior},
        index=pd.Index(units.stages, name="stage"),
    )
