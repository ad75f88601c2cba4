r"""Nearest neighbours in saliency space: which mistakes were made by the same units.

Two images are close when the same units stand out on both: the cosine between their standardized profiles,

.. math:: \cos(x, x') = \frac{\hat s(x) \cdot \hat s(x')}{\lVert \hat s(x) \rVert\,\lVert \hat s(x') \rVert}

(Levin et al. 2022, section 3). A profile is made with the image's true label, so it knows of the mistake as such: that
neighbours share true and predicted class has to be seen beside what those two alone would give.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pss.reference import Reference
from pss.units import Units

METHODS = ("zscore", "log_tail", "raw")
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
    method : {"zscore", "log_tail", "raw"}
        The standardization: z-score (Levin et al. 2022); negative log tail probability, not beyond that of 1e-6
        (the scale of Wang and Sato 2023); none.
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
    own = _check_exclude(exclude, len(profiles), len(among)).to(profiles.device)
    candidates = len(among) - int((own >= 0).any())
    if not 1 <= k <= candidates:
        raise ValueError(f"k = {k} is outside 1..{candidates}, the number of candidates for each query")
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


def agreement(
    labels: np.ndarray | Tensor,
    predicted: np.ndarray | Tensor,
    neighbors: np.ndarray | Tensor,
    among_labels: np.ndarray | Tensor | None = None,
    among_predicted: np.ndarray | Tensor | None = None,
    exclude: np.ndarray | Tensor | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""How often a neighbour shares the query's true class, its predicted class, and both, against chance.

    Chance is exact: the share that a candidate drawn at random would have, :math:`(n_c - 1) / (N - 1)` for a query of
    a class with :math:`n_c` members among N when it is one of them itself, averaged over the queries.

    Parameters
    ----------
    labels, predicted : (Q,) int
        True and predicted class of the queries.
    neighbors : (Q, k) int
        Ids from `nearest`.
    among_labels, among_predicted : (N,) int, optional
        Classes of the candidates; by default the queries themselves, each without itself.
    exclude : (Q,) int, optional
        As in `nearest`.
    level, resamples, seed
        Of the percentile bootstrap over queries (neighbours of one query are not independent of each other).

    Returns
    -------
    DataFrame
        Index ``true``, ``wrong``, ``pair``; ``share`` of the neighbours, ``low``, ``high``, and ``chance``.

    Raises
    ------
    ValueError
        If lengths do not fit or an id is outside the candidates.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    queries = _classes(labels, predicted)  # (2, Q)
    if (among_labels is None) != (among_predicted is None):
        raise ValueError("give both among_labels and among_predicted, or neither")
    if among_labels is None:
        exclude = np.arange(queries.shape[1]) if exclude is None else exclude
        others = queries
    else:
        others = _classes(among_labels, among_predicted)  # (2, N)
    neighbors = _array(neighbors)
    count, total = queries.shape[1], others.shape[1]
    if neighbors.ndim != 2 or len(neighbors) != count or not neighbors.size:
        raise ValueError(f"neighbors of shape {neighbors.shape} do not fit {count} queries: expected (Q, k)")
    if neighbors.min() < 0 or neighbors.max() >= total:
        raise ValueError(f"neighbor ids must be 0..{total - 1}, positions among the candidates")
    inside = _check_exclude(exclude, count, total).numpy() >= 0
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    rows = {}
    for name, which in (("true", [0]), ("wrong", [1]), ("pair", [0, 1])):
        same = (others[which][:, neighbors] == queries[which][:, :, None]).all(axis=0)  # (Q, k)
        each = same.mean(axis=1)
        everywhere = (others[which][:, None, :] == queries[which][:, :, None]).all(axis=0).sum(axis=1)  # (Q,)
        low, high = np.quantile(each[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
        chance = ((everywhere - inside) / (total - inside)).mean()  # the query itself is of its own class
        rows[name] = {"share": each.mean(), "low": low, "high": high, "chance": chance}
    return pd.DataFrame.from_dict(rows, orient="index")


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    """On the CPU, wherever a tensor is."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _classes(labels: np.ndarray | Tensor, predicted: np.ndarray | Tensor) -> np.ndarray:
    """True and predicted classes, (2, N)."""
    labels, predicted = _array(labels), _array(predicted)
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise ValueError(f"labels of shape {labels.shape} and predicted of shape {predicted.shape}: expected (N,) both")
    return np.stack([labels, predicted])


def _directions(profiles: Tensor, reference: Reference | None, method: str, columns: Tensor | slice) -> Tensor:
    """Standardized profiles of length 1, or 0 where there is nothing to scale."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if method != "raw" and reference is None:
        raise ValueError(f"method {method!r} needs a reference: pss.Reference.fit(profiles of a validation set)")
    if not profiles.isfinite().all():
        bad = (~profiles.isfinite().all(dim=1)).nonzero()[:10, 0].tolist()
        raise ValueError(f"profiles {bad} are not finite: leave them out or mend them")
    if method == "zscore":
        values = reference.zscore(profiles.double())  # of a nearly dead unit it can be more than float32 holds
    elif method == "log_tail":
        floor = math.log(LEAST_PROBABILITY)
        values = -reference.log_tail_probability(profiles).clamp(min=floor).to(profiles.dtype)
    else:
        values = profiles
    values = values[:, columns]
    largest = values.abs().amax(dim=1, keepdim=True)  # scaled by it first: squares of 1e-25 are zero in float32
    scaled = (values / torch.where(largest > 0, largest, 1)).to(profiles.dtype)
    length = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1)


def _columns(units: Units | None, stage: str | None, count: int) -> Tensor | slice:
    """Which units are compared."""
    if stage is None:
        return slice(None)
    if units is None or len(units) != count:
        raise ValueError(f"stage= needs units=, the {count} units that the profiles were made with")
    if stage not in units.stages:
        raise ValueError(f"unknown stage {stage!r}: this model has {', '.join(units.stages)}")
    return torch.from_numpy(np.flatnonzero(units.stage_ids == units.stages.index(stage)))


def _check_exclude(exclude: Tensor | np.ndarray | None, queries: int, count: int) -> Tensor:
    """(Q,) ids in 0..N-1, or -1."""
    own = torch.full((queries,), -1) if exclude is None else torch.as_tensor(exclude).cpu()
    if own.shape != (queries,) or own.is_floating_point() or ((own < -1) | (own >= count)).any():
        raise ValueError(
            f"exclude must hold one id for each of the {queries} queries, in 0..{count - 1} or -1 for none"
        )
    return own.long()
