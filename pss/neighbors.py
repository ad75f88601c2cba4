r"""Nearest neighbours in saliency space: which mistakes were made by the same units.

Two images are close when the same units stand out on both: the cosine between their standardized profiles,

.. math:: \cos(x, x') = \frac{\hat s(x) \cdot \hat s(x')}{\lVert \hat s(x) \rVert\,\lVert \hat s(x') \rVert}

(Levin et al. 2022, section 3). A profile is made with the image's true label, so it knows of the mistake as such: that
neighbours share true and predicted class has to be seen beside what those two alone would give
(`pss.statistics.agreement`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pss.engine.checks import check_count, check_exclude, check_known
from pss.ranking import RANKINGS, score
from pss.reference import Reference
from pss.units import Units

LEAST_PROBABILITY = 1e-6  # what a fitted tail says below is a guess, and beyond a bounded tail it says zero
_BLOCK = 2**24  # similarities in memory at a time


def nearest(
    profiles: Tensor,
    among: Tensor | None = None,
    reference: Reference | None = None,
    method: str = "zscore",
    units: Units | None = None,
    stage: str | None = None,
    k: int = 10,
    exclude: Tensor | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids of the k profiles closest in direction to each query, closest first, and their cosine similarity.

    A profile of length zero has no direction: its similarity to all others is 0. Of equal similarities the smaller id
    comes first.

    Parameters
    ----------
    profiles : Tensor, shape (Q, U)
        The queries.
    among : Tensor, shape (N, U), optional
        Where to look. By default among the queries themselves, each without itself.
    reference : Reference, optional
        Needed by every method but ``raw``. Fitted with ``scale_free=True`` it takes each image's overall gradient
        size out first.
    method : str
        The standardization, any ranking that is one (``differentiable`` in `pss.RANKINGS`): the z-score (Levin et al.
        2022); ``pot``, the negative log tail probability, not beyond that of 1e-6 (the scale of Wang and Sato 2023);
        ``raw``, none.
    units : Units, optional
        Needed by ``stage``.
    stage : str, optional
        Compare the units of this stage only.
    k : int
        How many neighbours.
    exclude : (Q,) int, optional
        Id in ``among`` of each query itself, which is no neighbour; -1 where it is not there.

    Returns
    -------
    ids : Tensor of int64, shape (Q, k)
        Rows of ``among``.
    similarity : Tensor, shape (Q, k)
        In -1..1.

    Raises
    ------
    ValueError
        For an unknown method or stage, a missing reference or units, shapes that do not fit, a profile that is not
        finite, or fewer than k candidates.
    """
    if among is None:
        among = profiles
        exclude = torch.arange(len(profiles)) if exclude is None else exclude
    if profiles.ndim != 2 or among.ndim != 2 or profiles.shape[1] != among.shape[1]:
        raise ValueError(
            f"profiles {tuple(profiles.shape)} and among {tuple(among.shape)} do not fit: expected (Q, U) and (N, U)"
        )
    check_known("method", method, [name for name, entry in RANKINGS.items() if entry.differentiable])
    own = check_exclude(exclude, len(profiles), len(among)).to(profiles.device)
    check_count("k", k, len(among) - int((own >= 0).any()), "the number of candidates for each query")
    columns = _columns(units, stage, profiles.shape[1])
    queries = _directions(profiles, reference, method, columns)
    others = queries if among is profiles else _directions(among, reference, method, columns)
    ids, similarity = [], []
    for part in torch.arange(len(queries), device=own.device).split(max(1, _BLOCK // len(others))):
        cosine = (queries[part] @ others.T).clamp(-1, 1)  # (q, N)
        found = (own[part] >= 0).nonzero()[:, 0]
        cosine[found, own[part][found]] = -torch.inf
        values, order = cosine.sort(dim=1, descending=True, stable=True)
        ids.append(order[:, :k])
        similarity.append(values[:, :k])
    return torch.cat(ids), torch.cat(similarity)


def _directions(profiles: Tensor, reference: Reference | None, method: str, columns: Tensor | slice) -> Tensor:
    """Standardized profiles of length 1, or 0 where there is nothing to scale."""
    values = score(profiles, reference, method)  # float64: of a nearly dead unit it can be more than float32 holds
    if RANKINGS[method].tail:
        values = values.clamp(max=-math.log(LEAST_PROBABILITY))
    values = values[:, columns]
    # By the largest value first: squares of 1e-25 are zero in float32.
    scaled = F.normalize(values, torch.inf, eps=torch.finfo(values.dtype).tiny).to(profiles.dtype)
    return F.normalize(scaled)


def _columns(units: Units | None, stage: str | None, count: int) -> Tensor | slice:
    """Which units are compared."""
    if stage is None:
        return slice(None)
    if units is None or len(units) != count:
        raise ValueError(f"stage= needs units=, the {count} units that the profiles were made with")
    check_known("stage", stage, units.stages)
    return torch.from_numpy(np.flatnonzero(units.stage_ids == units.stages.index(stage)))
