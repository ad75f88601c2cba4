r"""Diagnostics of tails, for many rows at once: do the data follow a generalized Pareto distribution, or another.

A row is one sample, as in `pss.evt`; every function takes tensors or arrays and returns float64 tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pss.engine.checks import check_share
from pss.evt import GPDFit, fit_gpd, float64, gpd_log_survival, gpd_quantile
from pss.statistics.curves import wilson


def likelihood_ratio(excesses, fit: GPDFit | None = None) -> tuple[Tensor, Tensor]:
    """Test the exponential (xi = 0) against the GPD on every row: twice the log ratio, and its chi-squared(1) p-value.

    ``fit`` is `fit_gpd` of the same excesses, if it is at hand. NaN where no GPD was fitted.
    """
    fit, x = fit_gpd(excesses) if fit is None else fit, _positive(excesses)
    exponential = -(~x.isnan()).sum(-1) * (x.nanmean(-1).log() + 1)  # its log-likelihood at scale = mean
    statistic = (2 * (fit.log_likelihood - exponential)).clamp(min=0)
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
    x = float64(values)
    excesses = [_positive(x - u) for u in float64(thresholds)]
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
    x = float64(values)
    columns = []
    for level in levels:
        check_share("level", level, "the quantile taken as the threshold")
        u = float64(np.quantile(x.cpu().numpy(), level, axis=-1)).to(x.device)
        fit = fit_gpd(x - u[..., None])
        variance = fit.se_scale**2 + u**2 * fit.se_xi**2 - 2 * u * fit.covariance
        columns.append((u, fit.n, fit.xi, fit.se_xi, fit.scale - fit.xi * u, variance.sqrt()))
    return ThresholdStability(*(torch.stack(c, -1) for c in zip(*columns, strict=True)))


def qq(values, dist: str = "gpd") -> tuple[Tensor, Tensor]:
    """Quantiles of the fitted ``dist`` at (i - 1/2)/n, and the sorted values: two tensors like values (..., n).

    ``dist`` is "normal" (of the values), "exponential" or "gpd" (of excesses, all positive); no padding.
    """
    x = float64(values).sort(-1).values
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
    x = float64(values) if dist == "normal" else _positive(values)
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
    log_p = float64(log_p)
    log_p = log_p[~log_p.isnan()]
    if not len(log_p):
        raise ValueError("log_p has no entry that is not NaN; expected log tail probabilities of held-out data")
    table = []
    for rate in rates:
        hits = int((log_p <= math.log(rate)).sum())
        table.append((rate, len(log_p), hits, hits / len(log_p), *wilson(hits, len(log_p), confidence)))
    return pd.DataFrame(table, columns=["nominal", "n", "hits", "observed", "low", "high"])


def _positive(a) -> Tensor:
    """The excesses among the entries, NaN for the rest."""
    a = float64(a)
    return torch.where(a > 0, a, torch.nan)
