"""Means over images with their intervals: of edit curves, of their differences, of what neighbours share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit
from torch import Tensor

from pss.engine.checks import check_exclude, check_share

_LEVEL = "the share of intervals that hold the truth, as 0.95"


def bootstrap(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    r"""Percentile bootstrap interval of the mean over images, by `scipy.stats.bootstrap`.

    Each of the resamples draws as many images as there are, with replacement,

    .. math:: m^*_r = \frac1n \sum_{i=1}^n v_{I_{ri}}, \qquad I_{ri} \sim \mathrm{U}\{1, \dots, n\},

    so that its spread is that of a mean over n images. (Drawing fewer makes bands too wide, drawing more too narrow.)

    Parameters
    ----------
    values : ndarray, shape (N, K)
        One row an image. The same seed draws the same images for every column, and for every table of N images.

    Returns
    -------
    low, high : ndarray, shape (K,)
        NaN for a single image, whose mean is as uncertain as can be.
    """
    check_share("level", level, _LEVEL)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if len(values) < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    drawn = {"n_resamples": resamples, "batch": max(1, 2**22 // values.size), "rng": np.random.default_rng(seed)}
    found = stats.bootstrap((values,), np.mean, confidence_level=level, method="percentile", **drawn)
    return found.confidence_interval.low, found.confidence_interval.high


def interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Mean of a few independent values, as one number a network, with Student's interval.

    .. math:: \bar v \pm t_{n-1}\, s / \sqrt n

    The unit that would be drawn anew is what counts: images of one network are no substitute for networks. The
    `bootstrap` over eight values holds the mean in 85 to 90% of cases instead of 95%.

    Parameters
    ----------
    values : ndarray, shape (N,) or (N, K)

    Returns
    -------
    mean, low, high : ndarray, shape () or (K,)
        The ends NaN for a single value.
    """
    check_share("level", level, _LEVEL)
    values = np.asarray(values, dtype=float)
    mean = values.mean(axis=0)
    if len(values) < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values, axis=0)
    return mean, mean - half, mean + half


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Where a share of which ``hits`` of n were seen lies (Wilson 1927)."""
    found = stats.binomtest(hits, n).proportion_ci(level, "wilson")
    return float(found.low), float(found.high)


def summarize(
    curves: pd.DataFrame, by: str | Sequence[str] = "method", level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Means over images at each number of edits, with confidence intervals.

    Parameters
    ----------
    curves : DataFrame
        From `pss.edit_curves`; those of several methods put together, with their names in a column.
    by : str or list of str
        Column or columns that tell the methods apart. ``"method"`` may be missing: then there is one.
    level, resamples, seed
        Of the intervals: the `bootstrap` over images for the changes in confidence; Wilson's for the share corrected,
        because resampling none of n, or all, shows no spread.

    Returns
    -------
    DataFrame
        One row per method and k: ``n`` images; mean ``change_wrong`` and ``change_true`` of the confidence
        against k = 0, and the share ``corrected``, each with ``…_low`` and ``…_high`` (NaN for the changes of a
        single image).
    """
    check_share("level", level, _LEVEL)
    by = [by] if isinstance(by, str) else list(by)
    by = [] if by == ["method"] and "method" not in curves else by
    _check_curves(curves, by, ["confidence_wrong", "confidence_true", "corrected"])
    tables = [pd.DataFrame(columns=[*by, "k"])] if curves.empty else []
    for names, own in curves.groupby(by, sort=False, observed=True) if by else [((), curves)]:
        wide = {name: _wide(own, name) for name in ("confidence_wrong", "confidence_true", "corrected")}
        columns: dict[str, Any] = dict(zip(by, names, strict=True)) | {"k": wide["corrected"].columns}
        columns["n"] = len(own["image"].unique())
        for name in ("wrong", "true"):
            table = wide[f"confidence_{name}"]
            if 0 not in table:
                raise ValueError("the curves have no row k = 0: keep the row before any edit")
            change = table.sub(table[0], axis=0).to_numpy()
            columns[f"change_{name}"] = change.mean(axis=0)
            columns[f"change_{name}_low"], columns[f"change_{name}_high"] = bootstrap(change, level, resamples, seed)
        right = wide["corrected"]
        ends = [wilson(int(hits), len(right), level) for hits in right.sum()]
        columns |= {"corrected": right.mean().to_numpy()}
        columns["corrected_low"], columns["corrected_high"] = zip(*ends, strict=True)
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def paired_difference(
    curves: pd.DataFrame,
    a: Any,
    b: Any,
    value: str = "confidence_true",
    by: str = "method",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Method a less method b on the same images, at each number of edits.

    The interval is the `bootstrap` over images, with the same draws for every k.

    Parameters
    ----------
    curves : DataFrame
        From `pss.edit_curves`, with the method in column ``by``.
    a, b
        Two values of that column.
    value : str
        Column to compare: ``confidence_true``, ``confidence_wrong``, ``corrected``, ``loss``.

    Returns
    -------
    DataFrame
        One row per k: ``k``, ``n`` images, ``mean`` difference, ``low``, ``high``.

    Raises
    ------
    ValueError
        If a method is not there, or the two do not have the same images and numbers of edits.
    """
    _check_curves(curves, [by], [value])
    tables = []
    for method in (a, b):
        own = curves[curves[by] == method]
        if own.empty:
            raise ValueError(f"no rows with {by} = {method!r}: there are {sorted(map(str, curves[by].unique()))}")
        tables.append(_wide(own, value))
    first, second = tables
    if not first.index.equals(second.index):
        only = first.index.symmetric_difference(second.index)
        raise ValueError(f"{a!r} and {b!r} are not on the same images: {len(only)} in one only, as {list(only[:5])}")
    if not first.columns.equals(second.columns):
        different = f"{len(first.columns)}, {len(second.columns)}"
        raise ValueError(f"{a!r} and {b!r} have different numbers of edits: {different}")
    difference = (first - second).to_numpy()
    low, high = bootstrap(difference, level, resamples, seed)
    mean = difference.mean(axis=0)
    return pd.DataFrame({"k": first.columns, "n": len(first), "mean": mean, "low": low, "high": high})


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
        Ids from `pss.nearest`.
    among_labels, among_predicted : (N,) int, optional
        Classes of the candidates; by default the queries themselves, each without itself.
    exclude : (Q,) int, optional
        As in `pss.nearest`.
    level, resamples, seed
        Of the `bootstrap` over queries (neighbours of one query are not independent of each other).

    Returns
    -------
    DataFrame
        Index ``true``, ``wrong``, ``pair``; ``share`` of the neighbours, ``low``, ``high``, and ``chance``.

    Raises
    ------
    ValueError
        If lengths do not fit or an id is outside the candidates.
    """
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
    inside = check_exclude(exclude, count, total).numpy() >= 0
    rows = {}
    for name, which in (("true", [0]), ("wrong", [1]), ("pair", [0, 1])):
        same = (others[which][:, neighbors] == queries[which][:, :, None]).all(axis=0)  # (Q, k)
        each = same.mean(axis=1)
        everywhere = (others[which][:, None, :] == queries[which][:, :, None]).all(axis=0).sum(axis=1)  # (Q,)
        (low,), (high,) = bootstrap(each[:, None], level, resamples, seed)
        chance = ((everywhere - inside) / (total - inside)).mean()  # the query itself is of its own class
        rows[name] = {"share": each.mean(), "low": low, "high": high, "chance": chance}
    return pd.DataFrame.from_dict(rows, orient="index")


def share_interval(
    shares: np.ndarray, count: int | np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Mean share of a few networks, with an interval of their log-odds, which holds near 0 and 1 too.

    .. math:: \ell_i = \log\frac{n s_i + 1/2}{n (1 - s_i) + 1/2}, \qquad
        v_i = \frac{1}{n s_i + 1/2} + \frac{1}{n (1 - s_i) + 1/2}

    Student's `interval` of the :math:`\ell_i`, or the normal one by their binomial variances :math:`v_i` where that is
    wider, as where few networks agree by chance.

    Parameters
    ----------
    shares : ndarray, shape (N,) or (N, K)
        In 0..1.
    count : int or ndarray, shape (N,)
        Of how many.

    Returns
    -------
    mean, low, high : ndarray, shape () or (K,)
    """
    shares = np.asarray(shares, dtype=float)
    n = np.broadcast_to(np.asarray(count, dtype=float), len(shares)).reshape(-1, *[1] * (shares.ndim - 1))
    hits, misses = n * shares + 0.5, n * (1 - shares) + 0.5
    middle, low, _ = interval(np.log(hits / misses), level)
    binomial = stats.norm.ppf((1 + level) / 2) * np.sqrt((1 / hits + 1 / misses).sum(axis=0)) / len(shares)
    half = np.fmax(middle - low, binomial)
    return shares.mean(axis=0), expit(middle - half), expit(middle + half)


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    """On the CPU, wherever a tensor is."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _classes(labels: np.ndarray | Tensor, predicted: np.ndarray | Tensor) -> np.ndarray:
    """True and predicted classes, (2, N)."""
    labels, predicted = _array(labels), _array(predicted)
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise ValueError(f"labels of shape {labels.shape} and predicted of shape {predicted.shape}: expected (N,) both")
    return np.stack([labels, predicted])


def _check_curves(curves: pd.DataFrame, by: list[str], values: list[str]) -> None:
    """Refuse a table without these columns, or with two rows for one curve and number of edits."""
    if missing := [name for name in [*by, "image", "k", *values] if name not in curves]:
        raise ValueError(f"the curves have no column {missing[0]!r}: they have {list(curves.columns)}")
    if (twice := curves.duplicated([*by, "image", "k"])).any():
        row = curves.loc[twice.idxmax(), [*by, "image", "k"]].to_dict()
        raise ValueError(f"two rows for {row}: name what tells them apart (by=) or drop one")


def _wide(curves: pd.DataFrame, value: str) -> pd.DataFrame:
    """A value with a row an image and a column a number of edits, all of them there."""
    table = curves.pivot(index="image", columns="k", values=value).astype(float)  # noqa: PD010
    if table.isna().to_numpy().any():
        raise ValueError(f"{value} is missing for some image and k: give whole curves")
    return table
