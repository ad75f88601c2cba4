r"""Extreme-value statistics of many rows at once: generalized Pareto fits and tail probabilities.

A *row* is one sample of positive excesses over a threshold (in this project: one unit's saliencies over many images),
but nothing here knows of networks. Every function takes tensors or NumPy arrays, computes in float64 on the input's
device and returns tensors. The generalized Pareto distribution (GPD) with shape ``xi`` and scale ``scale`` has

.. math:: P(X > x) = (1 + \xi x / \beta)^{-1/\xi}, \qquad P(X > x) = e^{-x/\beta} \text{ at } \xi = 0,

which is ``scipy.stats.genpareto(c=xi, scale=scale)``. (Wang and Sato's text swaps the names of the two parameters.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pss.engine.likelihood import chunk_elements, fit_rows

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
    size = max(1, chunk_elements(x.device) // x.shape[-1])
    parts = [fit_rows(rows, min_excesses) for rows in torch.atleast_2d(x).split(size)]
    columns = [torch.cat(values) for values in zip(*parts, strict=True)]
    return GPDFit(*(columns if x.ndim == 2 else [values[0] for values in columns]))


def float64(a) -> Tensor:
    """Tensor of a tensor or array, in float64."""
    return _as_tensor(a).to(torch.float64)


def _as_tensor(a) -> Tensor:
    # torch warns of read-only arrays (memory maps are), so these are copied
    return a if isinstance(a, Tensor) else torch.as_tensor(np.require(a, requirements="W"))
