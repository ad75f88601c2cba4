r"""Extreme-value statistics of many rows at once: generalized Pareto fits and tail probabilities.

A *row* is one sample of positive excesses over a threshold (in this project: one unit's saliencies over many images),
but nothing here knows of networks. Every function takes tensors or NumPy arrays, computes in float64 on the input's
device and returns tensors. The generalized Pareto distribution (GPD) with shape ``xi`` and scale ``scale`` has

.. math:: P(X > x) = (1 + \xi x / \beta)^{-1/\xi}, \qquad P(X > x) = e^{-x/\beta} \text{ at } \xi = 0,

which is ``scipy.stats.genpareto(c=xi, scale=scale)``. (Wang and Sato's text swaps the names of the two parameters.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pss.engine.likelihood import chunk_elements, count, covariance, maximize

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
    excess, xi, scale = (float64(a) for a in (excess, xi, scale))
    z = excess.clamp(min=0) / scale
    t = xi * z
    # log1p(t)/t is accurate but for denormal t, so that xi -> 0 needs no series; for large t the plain form serves.
    # No division by zero in the part that is not taken either: its derivative would be NaN.
    tiny, large = t.abs() < 1e-20, t.abs() >= 1
    near = -z * torch.where(tiny, 1.0, torch.log1p(t) / torch.where(tiny, 1.0, t))
    log_s = torch.where(large, -torch.log1p(t) / torch.where(large, xi, 1.0), near)
    return torch.where((t <= -1) | (excess == torch.inf), -torch.inf, log_s)


def gpd_logpdf(excess, xi, scale) -> Tensor:
    """Log density of the GPD at ``excess >= 0``; ``-inf`` beyond the support. Arguments broadcast."""
    excess, xi, scale = (float64(a) for a in (excess, xi, scale))
    log_s = gpd_log_survival(excess, xi, scale)
    return torch.where(log_s == -torch.inf, log_s, log_s - torch.log1p(xi * excess / scale) - scale.log())


def gpd_quantile(log_survival, xi, scale) -> Tensor:
    r"""Excess that is exceeded with log probability -y, :math:`\beta\,(e^{\xi y}-1)/\xi`. Arguments broadcast."""
    y, xi, scale = -float64(log_survival), float64(xi), float64(scale)
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
    return float64(tail_mass).log() + gpd_log_survival(excess, xi, scale)


def tail_score(excess, xi, scale, tail_mass) -> Tensor:
    """Score that is finite and rises with ``excess``: ``-log p`` on the support, beyond it by how far beyond.

    Beyond the support every ``log p`` is ``-inf``, which cannot be ranked; there the score is ``1e30`` times
    ``excess / endpoint``, so that it stays above any score on the support. NaN where the fit is NaN.
    """
    log_p = log_tail_probability(excess, xi, scale, tail_mass)
    beyond = -float64(xi) * (float64(excess) / float64(scale))  # excess / endpoint
    return torch.where(beyond >= 1, _BEYOND * beyond, -log_p.clamp(min=-_BEYOND))


# --- maximum likelihood -----------------------------------------------------------------------------------------------


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


def float64(a) -> Tensor:
    """Tensor of a tensor or array, in float64."""
    return _as_tensor(a).to(torch.float64)


def _as_tensor(a) -> Tensor:
    # torch warns of read-only arrays (memory maps are), so these are copied
    return a if isinstance(a, Tensor) else torch.as_tensor(np.require(a, requirements="W"))
