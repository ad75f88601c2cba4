r"""Extreme-value statistics of many rows at once: generalized Pareto fits, tail probabilities, tail diagnostics.

A *row* is one sample of positive excesses over a threshold (in this project: one unit's saliencies over many images),
but nothing here knows of networks. Every function takes tensors or NumPy arrays, computes in float64 on the input's
device and returns tensors. The generalized Pareto distribution (GPD) with shape ``xi`` and scale ``scale`` has

.. math:: P(X > x) = (1 + \xi x / \beta)^{-1/\xi}, \qquad P(X > x) = e^{-x/\beta} \text{ at } \xi = 0,

which is ``scipy.stats.genpareto(c=xi, scale=scale)``. (Wang and Sato's text swaps the names of the two parameters.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor

from pss.engine.likelihood import chunk_elements, count, covariance, maximize

__all__ = [
    "REASONS",
    "AndersonDarling",
    "ExponentialFit",
    "GPDFit",
    "MeanExcess",
    "ThresholdStability",
    "anderson_darling",
    "calibration",
    "fit_exponential",
    "fit_gpd",
    "gpd_log_survival",
    "gpd_logpdf",
    "gpd_quantile",
    "hill",
    "likelihood_ratio",
    "log_tail_probability",
    "mean_excess",
    "qq",
    "tail_score",
    "threshold_stability",
]

REASONS = (
    "fitted",
    "too few excesses",
    "tied excesses",
    "no interior maximum",
    "infinite excesses",
    "more than 16 decades",  # between the smallest and the largest excess: the search ends before
)

_BEYOND = 1e30  # where the scores of values beyond the support begin; float32 can hold them too


@dataclass(frozen=True)
class GPDFit:
    """Generalized Pareto fits, one entry per row; floats are NaN where a row was not fitted.

    Attributes
    ----------
    xi, scale : Tensor
        Shape (no unit) and scale (unit of the excesses), float64.
    log_likelihood : Tensor
        Sum over the row's excesses of the log density, at the maximum.
    n : Tensor
        Number of excesses, int64.
    se_xi, se_scale, covariance : Tensor
        Standard errors and covariance of the two, from the observed information; NaN where ``xi <= -0.5``, where
        maximum likelihood is not regular (Smith 1984). With 100 excesses and fewer they are somewhat small.
    reason : Tensor
        uint8 index into `REASONS`: 0 where fitted, else why not.
    """

    xi: Tensor
    scale: Tensor
    log_likelihood: Tensor
    n: Tensor
    se_xi: Tensor
    se_scale: Tensor
    covariance: Tensor
    reason: Tensor

    @property
    def fitted(self) -> Tensor:
        """True where the row was fitted."""
        return self.reason == 0

    @classmethod
    def cat(cls, fits: list[GPDFit]) -> GPDFit:
        """Join the fits of successive blocks of rows."""
        return cls(**{f.name: torch.cat([getattr(fit, f.name) for fit in fits]) for f in fields(cls)})


# --- the distribution -------------------------------------------------------------------------------------------------


def gpd_log_survival(excess, xi, scale) -> Tensor:
    r"""Log tail probability :math:`\log P(X>x) = -\log(1+\xi x/\beta)/\xi`, continuous through ``xi = 0``.

    Arguments broadcast. It is 0 for ``excess <= 0`` and ``-inf`` beyond the support (``xi < 0``, ``x >= -scale/xi``).
    """
    excess, xi, scale = (_float64(a) for a in (excess, xi, scale))
    z = excess.clamp(min=0) / scale
    t = xi * z
    # log1p(t)/t is accurate but for denormal t, so that xi -> 0 needs no series; for large t the plain form serves
    log_s = torch.where(t.abs() < 1, -z * torch.where(t.abs() < 1e-20, 1.0, torch.log1p(t) / t), -torch.log1p(t) / xi)
    return torch.where((t <= -1) | (excess == torch.inf), -torch.inf, log_s)


def gpd_logpdf(excess, xi, scale) -> Tensor:
    """Log density of the GPD at ``excess >= 0``; ``-inf`` beyond the support. Arguments broadcast."""
    excess, xi, scale = (_float64(a) for a in (excess, xi, scale))
    log_s = gpd_log_survival(excess, xi, scale)
    return torch.where(log_s == -torch.inf, log_s, log_s - torch.log1p(xi * excess / scale) - scale.log())


def gpd_quantile(log_survival, xi, scale) -> Tensor:
    r"""Excess that is exceeded with log probability -y, :math:`\beta\,(e^{\xi y}-1)/\xi`. Arguments broadcast."""
    y, xi, scale = -_float64(log_survival), _float64(xi), _float64(scale)
    t = xi * y
    return scale * torch.where(
        t.abs() < 1, y * torch.where(t.abs() < 1e-20, 1.0, torch.expm1(t) / t), torch.expm1(t) / xi
    )


def log_tail_probability(excess, xi, scale, tail_mass) -> Tensor:
    r"""Peaks-over-threshold log probability :math:`\log P(S>s) = \log P(S>u) + \log P(X>s-u)`.

    Parameters
    ----------
    excess : Tensor
        :math:`s-u`, at least 0: below the threshold the GPD says nothing (use the empirical tail there).
    xi, scale : Tensor
        The fit; arguments broadcast.
    tail_mass : float or Tensor
        :math:`P(S>u)`, the share of the reference above the threshold (0.1 for the 90th percentile).

    References
    ----------
    Wang and Sato, arXiv 2310.17951 (peaks over threshold).
    """
    return _float64(tail_mass).log() + gpd_log_survival(excess, xi, scale)


def tail_score(excess, xi, scale, tail_mass) -> Tensor:
    """Score that is finite and rises with ``excess``: ``-log p`` on the support, beyond it by how far beyond.

    Beyond the support every ``log p`` is ``-inf``, which cannot be ranked; there the score is ``1e30`` times
    ``excess / endpoint``, so that it stays above any score on the support. NaN where the fit is NaN.
    """
    log_p = log_tail_probability(excess, xi, scale, tail_mass)
    beyond = -_float64(xi) * (_float64(excess) / _float64(scale))  # excess / endpoint
    return torch.where(beyond >= 1, _BEYOND * beyond, -log_p.clamp(min=-_BEYOND))


# --- maximum likelihood -------------------------------------------------------------------------------------------


def fit_gpd(excesses, min_excesses: int = 10) -> GPDFit:
    r"""Fit a generalized Pareto distribution to every row by maximum likelihood.

    Parameters
    ----------
    excesses : Tensor or array, shape (U, n) or (n,)
        One row of excesses for each unit, of any scale. An excess is positive: entries that are NaN, zero or negative
        are padding, wherever they stand (quickest with little of it).
    min_excesses : int
        Rows with fewer excesses, or with fewer distinct values, are not fitted.

    Returns
    -------
    GPDFit
        Fields of shape (U,), or () for one row. ``reason`` says which rows were not fitted, and why.

    Notes
    -----
    Maximizes :math:`-n\log\beta-(1+1/\xi)\sum_i\log(1+\xi x_i/\beta)` over its interior, :math:`\xi>-1` (below, it is
    unbounded); `pss.engine.likelihood` says how. A maximum within 0.01 of -1 can be missed, and is then reported
    as none. Rows whose excesses lie more than 16 decades apart may have one that is out of reach, and say so.

    References
    ----------
    Grimshaw, Technometrics 35 (1993), section 2 (profile likelihood); Smith, in "Statistical Extremes and
    Applications" (1984) (standard errors). Used as in Wang and Sato, arXiv 2310.17951.
    """
    if min_excesses < 3:
        raise ValueError(f"min_excesses is {min_excesses}; a two-parameter fit needs at least 3")
    x = _as_tensor(excesses)
    if x.ndim not in (1, 2) or x.numel() == 0:
        raise ValueError(f"excesses have shape {tuple(x.shape)}; expected (rows, excesses) or (excesses,), not empty")
    if x.ndim == 1:
        fit = fit_gpd(x[None], min_excesses)
        return GPDFit(**{f.name: getattr(fit, f.name)[0] for f in fields(fit)})
    rows = max(1, chunk_elements(x.device) // x.shape[1])
    return GPDFit.cat([_fit_chunk(chunk, min_excesses) for chunk in x.split(rows)])


def _fit_chunk(raw: Tensor, min_excesses: int) -> GPDFit:
    x, n = _pack(raw)
    mean, top = x.sum(1) / n.clamp(min=1), x.amax(1)
    reason = torch.zeros_like(n, dtype=torch.uint8)
    reason[_distinct(x, min_excesses) < min_excesses] = 2
    reason[n < min_excesses] = 1
    reason[~mean.isfinite()] = 4
    xi, scale, loglik, var_xi, var_scale, cov = (torch.full_like(mean, torch.nan) for _ in range(6))
    (rows,) = (reason == 0).nonzero(as_tuple=True)
    if len(rows):
        good = slice(None) if len(rows) == len(x) else rows  # a slice does not copy
        found = maximize(x.div_(mean[:, None])[good], n[good], top[good] / mean[good])
        theta, s = found[:2]  # of excesses / mean
        xi[rows], scale[rows] = theta * s, s * mean[rows]
        loglik[rows] = -n[rows] * (scale[rows].log() + theta * s + 1)
        found = torch.where(theta * s > -0.5, found, torch.nan)
        var_xi[rows], var_scale[rows], cov[rows] = covariance(found[0], found[1], found[2], found[3], n[rows])
        reason[rows[theta.isnan()]] = 3
        (none,) = (reason == 3).nonzero(as_tuple=True)
        smallest = torch.where(x[none] > 0, x[none], torch.inf).amin(1)
        reason[none[x[none].amax(1) > 1e16 * smallest]] = 5
    return GPDFit(xi, scale, loglik, n.long(), var_xi.sqrt(), var_scale.sqrt() * mean, cov * mean, reason)


def _pack(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Excesses as float64 with zeros for padding (log(1 + theta 0) = 0), a multiple of 8 wide, and their number."""
    x = raw.to(torch.float64).nan_to_num(0.0, posinf=torch.inf).clamp_(min=0)
    if x.amin() > 0:  # the usual case; counting is slower than fitting is
        n = torch.full_like(x[:, 0], x.shape[1])
    else:
        n = count(x)
        if n.max() < x.shape[1] // 2:
            x = x.topk(max(1, int(n.max())), dim=1).values
    if x.shape[1] % 8:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    return x, n


def _distinct(x: Tensor, enough: int) -> Tensor:
    """Count the distinct excesses of each row; a row that shows `enough` of them in a sample is not counted out."""

    def distinct_of(y: Tensor) -> Tensor:
        y = y.sort(1).values
        return (y[:, 1:] > y[:, :-1]).sum(1) + (y[:, 0] > 0)

    distinct = distinct_of(x[:, :: max(1, x.shape[1] // 32)])
    (few,) = (distinct < enough).nonzero(as_tuple=True)
    distinct[few] = distinct_of(x[few])
    return distinct


class ExponentialFit(NamedTuple):
    """Exponential fits, one entry per row; NaN where a row has no excess."""

    scale: Tensor
    log_likelihood: Tensor
    n: Tensor


def fit_exponential(excesses) -> ExponentialFit:
    r"""Fit an exponential distribution to every row: scale = mean, log-likelihood :math:`-n(\log\beta+1)`.

    Shapes and padding as in `fit_gpd`.
    """
    x = _positive(excesses)
    n, scale = (~x.isnan()).sum(-1), x.nanmean(-1)
    return ExponentialFit(scale, -n * (scale.log() + 1), n)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def likelihood_ratio(excesses, fit: GPDFit | None = None) -> tuple[Tensor, Tensor]:
    """Test the exponential (xi = 0) against the GPD on every row: twice the log ratio, and its chi-squared(1) p-value.

    ``fit`` is `fit_gpd` of the same excesses, if it is at hand. NaN where no GPD was fitted.
    """
    fit = fit_gpd(excesses) if fit is None else fit
    statistic = (2 * (fit.log_likelihood - fit_exponential(excesses).log_likelihood)).clamp(min=0)
    return statistic, torch.erfc((statistic / 2).sqrt())


def hill(values, k: int | None = None) -> Tensor:
    r"""Hill estimates of xi > 0, :math:`H_k=\frac1k\sum_{i\le k}\log X_{(i)}-\log X_{(k+1)}`, for every k (or one).

    Values (..., n) give (..., n - 1), k = 1 .. n - 1 along the last axis; NaN where :math:`X_{(k+1)}` is missing or
    not positive. ``k`` picks one: (...). (Hill, Annals of Statistics 3, 1975.)
    """
    logs = _positive(values).log()
    logs = logs.nan_to_num(-torch.inf).sort(-1, descending=True).values
    ks = torch.arange(1, logs.shape[-1], device=logs.device)
    estimates = (logs[..., :-1].cumsum(-1) / ks - logs[..., 1:]).nan_to_num(torch.nan, posinf=torch.nan)
    if k is None:
        return estimates
    if not 1 <= k < logs.shape[-1]:
        raise ValueError(f"k is {k}; expected 1..{logs.shape[-1] - 1} for {logs.shape[-1]} values")
    return estimates[..., k - 1]


class MeanExcess(NamedTuple):
    """Mean of ``value - threshold`` above each threshold, its standard error, and how many values are above."""

    mean: Tensor
    error: Tensor
    n: Tensor


def mean_excess(values, thresholds) -> MeanExcess:
    """Mean excess of values (..., n) over each of T thresholds: fields (..., T).

    For a GPD it is the line ``(scale + xi u) / (1 - xi)``: rising for heavy tails, level for the exponential.
    """
    x = _float64(values)
    excesses = [_positive(x - u) for u in _float64(thresholds)]
    n = torch.stack([(~e.isnan()).sum(-1) for e in excesses], -1)
    mean = torch.stack([e.nanmean(-1) for e in excesses], -1)
    variance = torch.stack([(e - e.nanmean(-1, keepdim=True)).square().nansum(-1) for e in excesses], -1) / (n - 1)
    return MeanExcess(mean, (variance / n).sqrt(), n)


class ThresholdStability(NamedTuple):
    """GPD fits over a range of thresholds: above a good threshold xi and the modified scale stay level."""

    threshold: Tensor
    n: Tensor
    xi: Tensor
    se_xi: Tensor
    modified_scale: Tensor
    se_modified_scale: Tensor


def threshold_stability(values, levels) -> ThresholdStability:
    r"""Fit the GPD above the quantile of values (..., n) at each of L levels in (0, 1): fields (..., L).

    Where the GPD holds, xi and the modified scale :math:`\beta-\xi u` do not depend on the threshold u; its standard
    error is by the delta method. (Coles, An Introduction to Statistical Modeling of Extreme Values, section 4.3.4.)
    """
    x = _float64(values)
    columns = []
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"level {level} is outside (0, 1)")
        u = _float64(np.quantile(x.cpu().numpy(), level, axis=-1)).to(x.device)
        fit = fit_gpd(x - u[..., None])
        variance = fit.se_scale**2 + u**2 * fit.se_xi**2 - 2 * u * fit.covariance
        columns.append((u, fit.n, fit.xi, fit.se_xi, fit.scale - fit.xi * u, variance.sqrt()))
    return ThresholdStability(*(torch.stack(c, -1) for c in zip(*columns, strict=True)))


def qq(values, dist: str = "gpd") -> tuple[Tensor, Tensor]:
    """Quantiles of the fitted ``dist`` at (i - 1/2)/n, and the sorted values: two tensors like values (..., n).

    ``dist`` is "normal" (of the values), "exponential" or "gpd" (of excesses, all positive); no padding.
    """
    x = _float64(values).sort(-1).values
    a, b = (p[..., None] for p in _parameters(x, dist))
    p = (torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) + 0.5) / x.shape[-1]
    return (a + b * torch.special.ndtri(p) if dist == "normal" else gpd_quantile(torch.log1p(-p), a, b)), x


class AndersonDarling(NamedTuple):
    """Anderson-Darling statistic A^2 and its p-value."""

    statistic: Tensor
    p_value: Tensor


def anderson_darling(values, dist: str = "gpd", simulations: int = 1000, seed: int = 0) -> AndersonDarling:
    r"""Test every row of values (..., n) against the fitted ``dist``: "normal", "exponential" or "gpd".

    :math:`A^2=-n-\frac1n\sum_i[(2i-1)\log F(x_{(i)})+(2n-2i+1)\log(1-F(x_{(i)}))]`, with estimated
    parameters ("gpd" and "exponential" from the positive entries; NaN is padding). Its null distribution is simulated,
    estimation included, with the rows' median n (at most 1,000: beyond, it hardly changes). For the GPD it depends on
    xi: simulations at steps of 0.25 are interpolated at each row's estimate. NaN where no GPD was fitted.

    References
    ----------
    Stephens, JASA 69 (1974); Choulakian and Stephens, Technometrics 43 (2001) (the GPD, whose tables stop at 0.001).
    """
    x = _float64(values) if dist == "normal" else _positive(values)
    statistic, xi = _a_squared(x, dist)
    known = ~statistic.isnan()
    p_value = torch.zeros_like(statistic).masked_fill(~known, torch.nan)
    if not known.any():
        return AndersonDarling(statistic, p_value)
    n = min(1000, int((~x.isnan()).sum(-1)[known].median()))
    place = (torch.zeros_like(xi) if dist == "normal" else xi.clamp(-0.5, 4)) / 0.25
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.cat([place[known].floor(), place[known].floor() + 1]).unique() if dist == "gpd" else torch.zeros(1)
    for node in nodes.tolist():
        y = torch.empty(simulations, n, dtype=x.dtype)
        if dist == "normal":
            y.normal_(generator=generator)
        else:
            y = gpd_quantile(-y.exponential_(generator=generator), 0.25 * node, 1.0)
        null = _a_squared(y, dist)[0]
        null = null[~null.isnan()].sort().values.to(x.device)
        above = len(null) - torch.searchsorted(null, statistic.nan_to_num().contiguous())
        p_value += (1 - (place - node).abs()).clamp(min=0) * (1 + above) / (1 + len(null))
    return AndersonDarling(statistic, p_value)


def _a_squared(x: Tensor, dist: str) -> tuple[Tensor, Tensor]:
    """A^2 of every row, and the first fitted parameter (xi for the GPD)."""
    a, b = (p[..., None] for p in _parameters(x, dist))
    x = x.sort(-1).values  # NaN last
    if dist == "normal":
        log_f, log_s = torch.special.log_ndtr((x - a) / b), torch.special.log_ndtr((a - x) / b)
    else:
        log_s = gpd_log_survival(x, a, b)
        log_f = torch.log(-torch.expm1(log_s))
    n = (~x.isnan()).sum(-1, keepdim=True)
    odd = 2 * torch.arange(x.shape[-1], device=x.device) + 1  # 2i - 1
    terms = torch.where(x.isnan(), 0.0, odd * log_f + (2 * n - odd) * log_s)
    return (-n - terms.sum(-1, keepdim=True) / n)[..., 0], a[..., 0]


def _parameters(x: Tensor, dist: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation for the normal; xi and scale otherwise."""
    mean = x.nanmean(-1)
    if dist == "normal":
        return mean, ((x - mean[..., None]).square().nansum(-1) / ((~x.isnan()).sum(-1) - 1)).sqrt()
    if dist == "exponential":
        return torch.zeros_like(mean), mean
    if dist == "gpd":
        fit = fit_gpd(x)
        return fit.xi, fit.scale
    raise ValueError(f"dist is {dist!r}; expected 'normal', 'exponential' or 'gpd'")


def calibration(log_p, rates=(0.1, 0.01, 0.001), confidence: float = 0.95) -> pd.DataFrame:
    """How often held-out log tail probabilities fall to each nominal rate or below, with Wilson intervals.

    ``log_p`` may have any shape; NaN entries are left out. A calibrated model has ``low <= nominal <= high``, as far as
    the entries are independent: those of one image are not, and the intervals are then too narrow.
    """
    log_p = _float64(log_p)
    log_p = log_p[~log_p.isnan()]
    if not len(log_p):
        raise ValueError("log_p has no entry that is not NaN; expected log tail probabilities of held-out data")
    table = []
    for rate in rates:
        hits = int((log_p <= math.log(rate)).sum())
        interval = binomtest(hits, len(log_p)).proportion_ci(confidence, method="wilson")
        table.append((rate, len(log_p), hits, hits / len(log_p), interval.low, interval.high))
    return pd.DataFrame(table, columns=["nominal", "n", "hits", "observed", "low", "high"])


def _positive(a) -> Tensor:
    """The excesses among the entries, NaN for the rest."""
    a = _float64(a)
    return torch.where(a > 0, a, torch.nan)


def _float64(a) -> Tensor:
    return _as_tensor(a).to(torch.float64)


def _as_tensor(a) -> Tensor:
    # torch warns of read-only arrays (memory maps are), so these are copied
    return a if isinstance(a, Tensor) else torch.as_tensor(np.require(a, requirements="W"))
