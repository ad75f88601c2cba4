r"""Generalized Pareto fits of many rows at once by maximum likelihood: the arithmetic of `pss.evt.fit_gpd`.

With :math:`\theta = \xi/\beta` the best scale at given theta is the mean of :math:`\log(1 + \theta x)/\theta`, and what
remains is one-dimensional (Grimshaw, Technometrics 35, 1993, section 2): the log-likelihood per excess is

.. math:: l(\theta) = -\log s - \theta s - 1, \qquad s(\theta) = \tfrac1n\textstyle\sum_i \log(1 + \theta x_i)/\theta.

It is unbounded as theta falls to -1/max(x) (there xi < -1), so the estimate is the highest *interior* maximum, with
xi > -1. At xi = -1 and for large theta l falls as theta grows, hence an interior maximum exists exactly where l rises
somewhere in between. The search is over v = log(1 + theta max(x)): every real v is allowed, and of the variables tried
(theta, log(theta + 1/mean), log(theta + 1/median)) Newton's method needs the fewest steps in this one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SERIES = 0.02  # below |theta| max(x) = SERIES the profile is a power series: no cancellation as xi -> 0
V_MAX = 85.0  # products of eight factors 1 + theta x <= exp(V_MAX) stay finite
SAMPLE = 128  # longer rows are started from a sample of this size, shorter ones searched on a grid


def chunk_elements(device: torch.device) -> int:
    """Return how many float64 values to work on at once: what stays in a processor's cache, or fills a GPU."""
    return (1 << 26) if device.type == "cuda" else (1 << 20)


def fit_rows(raw: Tensor, min_excesses: int) -> tuple[Tensor, ...]:
    """Fit every row, (r, n) as `pss.evt.fit_gpd` takes them: the fields of `pss.evt.GPDFit`."""
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
    return xi, scale, loglik, n.long(), var_xi.sqrt(), var_scale.sqrt() * mean, cov * mean, reason


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


def count(x: Tensor) -> Tensor:
    """Number of entries that are not zero, as float64 (log and sqrt of an int64 tensor would be float32)."""
    return x.count_nonzero(1).to(x.dtype)


def maximize(x: Tensor, n: Tensor, top: Tensor) -> Tensor:
    """Find the highest interior maximum of every row: theta, s, s', s'', shape (4, r), NaN where there is none.

    Rows x (r, m), m a multiple of 8, have mean 1 over their n excesses, the largest being ``top``; zeros are padding.
    """
    found = torch.full((4, len(x)), torch.nan, dtype=x.dtype, device=x.device)
    if x.shape[1] > SAMPLE:
        found = _newton(x, n, top, _start(x, n, top))
    # Short rows, and rows in doubt (not converged, worse than the exponential, close to xi = -1): look everywhere.
    theta, s = found[:2]
    sure = (-s.log() - theta * s >= -1e-9) & (theta * s > -0.9)
    (rows,) = (~sure).nonzero(as_tuple=True)
    if len(rows):
        found[:, rows] = torch.nan
        v, low, high, _ = _scan(x[rows], n[rows], top[rows], points=96)
        some = ~v.isnan()
        rows = rows[some]
        found[:, rows] = _newton(x[rows], n[rows], top[rows], v[some], low[some], high[some], steps=100)
    return found


def covariance(theta: Tensor, s: Tensor, s1: Tensor, s2: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance of xi, variance of the scale and their covariance, from the observed information at the maximum.

    As a function of scale and theta the log-likelihood per excess is -log(scale) - theta s(theta) - s(theta)/scale.
    """
    scale_scale, scale_theta, theta_theta = n / s**2, -n * s1 / s**2, n * (2 * s1 + theta * s2 + s2 / s)
    det = scale_scale * theta_theta - scale_theta**2
    var_scale, var_theta, cov = theta_theta / det, scale_scale / det, -scale_theta / det
    # xi = theta scale
    return s**2 * var_theta + theta**2 * var_scale + 2 * theta * s * cov, var_scale, s * cov + theta * var_scale


def _start(x: Tensor, n: Tensor, top: Tensor) -> Tensor:
    """Guess v for long rows: the maximum of the likelihood of about 128 excesses of each."""
    sample = x[:, :: -(-x.shape[1] // SAMPLE)]
    sample = torch.nn.functional.pad(sample, (0, -sample.shape[1] % 8))
    top_sample = sample.amax(1)
    v, _, _, xi = _scan(sample, count(sample).clamp(min=1), top_sample, points=16)
    # For xi > 0 theta carries over to all data; for xi < 0 the largest of n values has 1 + theta x near n^xi.
    v = torch.where(v > 0, torch.log1p(v.expm1() * top / top_sample), xi * n.log())
    return v.nan_to_num(-2 * SERIES)


def profile_likelihood(x, n, top, v, rows: Tensor | None = None, work: Tensor | None = None) -> tuple[Tensor, ...]:
    """Profile likelihood at K places of each row: theta, s, s', s'', dl/dtheta, d2l/dtheta2, each (r, K).

    The r rows are those of x (m columns), or x[rows] with ``work``, as large as x, for scratch; n, top (r,), v (r, K).
    """
    theta = torch.expm1(v) / top[:, None]
    if rows is None:
        t = (x[:, None] * theta[..., None]).add_(1)
    else:  # memory is used again: fresh pages cost as much as the logarithms
        t = torch.index_select(x, 0, rows, out=work[: len(rows)])[:, None].mul_(theta[..., None]).add_(1)
    # One logarithm of the product of eight factors is an eighth of the logarithms.
    log = t.view(*t.shape[:2], 8, x.shape[1] // 8).prod(2).log_().sum(-1) / n[:, None]
    w = t.reciprocal_()
    padding = (x.shape[1] - n)[:, None]  # each adds one to both sums
    w1 = (w.sum(-1) - padding) / n[:, None]
    w2 = (torch.linalg.vector_norm(w, dim=-1).square() - padding) / n[:, None]
    log1, log2 = (1 - w1) / theta, (2 * w1 - w2 - 1) / theta**2  # derivatives of mean log(1 + theta x)
    s = log / theta
    s1 = (log1 - s) / theta
    s2 = (log2 - 2 * s1) / theta
    row, k = ((theta * top[:, None]).abs() < SERIES).nonzero(as_tuple=True)
    if len(row):
        x_row = x[row if rows is None else rows[row]]
        s[row, k], s1[row, k], s2[row, k] = _series(x_row, n[row], theta[row, k])
    l1 = -s1 / s - s - theta * s1
    l2 = (s1 / s).square() - s2 / s - 2 * s1 - theta * s2
    return theta, s, s1, s2, l1, l2


def _series(x: Tensor, n: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, s', s'' for small theta x from log(1+t)/t = sum (-t)^k / (k+1): exact to rounding through theta = 0."""
    s, s1, s2 = (torch.zeros_like(theta) for _ in range(3))
    power = x
    for k in range(9):
        c = (-1) ** k / (k + 1) * power.sum(1) / n
        s += c * theta**k
        s1 += k * c * theta ** max(k - 1, 0)
        s2 += k * (k - 1) * c * theta ** max(k - 2, 0)
        power = power * x
    return s, s1, s2


def _scan(x: Tensor, n: Tensor, top: Tensor, points: int) -> tuple[Tensor, ...]:
    """Bracket the highest interior maximum on a grid: start, low, high in v, and xi; NaN where l never increases."""
    low = -(3 + 1.2 * n.log())  # xi = -1 lies to the right of it, or nearly so
    smallest = torch.where(x > 0, x, torch.inf).amin(1)
    # No maximum lies above Grimshaw's bound theta = 2 (mean - min) / min^2; nor, in practice, 16 decades up.
    high = (top.log() + math.log(2) - 2 * smallest.log()).clamp(max=top.log() + 37).clamp(1, V_MAX)
    # The grid is finest towards the boundary, where a minimum and a maximum can lie close together.
    fractions = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device) ** 1.5
    v = torch.lerp(low[:, None], high[:, None], fractions)
    v = torch.where(v.abs() < 2 * SERIES, 2 * SERIES, v)
    columns = max(1, chunk_elements(x.device) // x.numel())
    parts = [profile_likelihood(x, n, top, part) for part in v.split(columns, dim=1)]
    theta, s, _, _, l1, _ = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    slope, xi = l1 * v.exp() / top[:, None], theta * s  # slope of l in v
    turns = (slope[:, :-1] > 0) & (slope[:, 1:] <= 0) & (xi[:, :-1] > -1)
    # In a cell where the slope changes sign, take it as linear: where it vanishes, and how high l is there.
    part = slope[:, :-1] / (slope[:, :-1] - slope[:, 1:])
    place, xi_there = (torch.lerp(y[:, :-1], y[:, 1:], part) for y in (v, xi))
    height = -s.log()[:, :-1] - xi[:, :-1] + slope[:, :-1] * (place - v[:, :-1]) / 2
    height, k = torch.where(turns, height, -torch.inf).max(1, keepdim=True)
    best = (place, v[:, :-1], v[:, 1:], xi_there)
    return tuple(torch.where(height > -torch.inf, y.gather(1, k), torch.nan)[:, 0] for y in best)


def _newton(x, n, top, v, low=None, high=None, steps: int = 12) -> Tensor:
    """Safeguarded Newton in v; rows drop out as they converge. As `maximize`, NaN where no maximum was reached."""
    found = torch.full((4, len(v)), torch.nan, dtype=v.dtype, device=v.device)
    low = torch.full_like(v, -torch.inf) if low is None else low
    high = torch.full_like(v, torch.inf) if high is None else high
    rows = torch.arange(len(v), device=v.device)
    work = torch.empty_like(x)
    for _ in range(steps):
        theta, s, s1, s2, l1, l2 = (p[:, 0] for p in profile_likelihood(x, n, top, v[:, None], rows, work))
        a = v.exp() / top  # dtheta/dv
        slope, curvature = l1 * a, (l2 * a + l1) * a
        low, high = torch.where(slope > 0, v, low), torch.where(slope > 0, high, v)
        step = torch.where(curvature < 0, -slope / curvature, slope.sign()).clamp(-2, 2)
        done = (curvature < 0) & (step.abs() < 3e-5)
        # The last step is so short that a Taylor polynomial takes it: no further pass over the data.
        delta = a * torch.expm1(step)
        last = torch.stack([theta + delta, s + delta * (s1 + delta * s2 / 2), s1 + delta * s2, s2])
        found[:, rows[done]] = last[:, done]
        v_next = v + step
        inside = (v_next > low) & (v_next < high)
        v_next = torch.where(inside | ~(low.isfinite() & high.isfinite()), v_next, (low + high) / 2).clamp(max=V_MAX)
        go = ~done & (v_next > -60)
        if not go.all():
            (go,) = go.nonzero(as_tuple=True)
            n, top, low, high, rows, v_next = (y[go] for y in (n, top, low, high, rows, v_next))
        v = v_next
        if not len(v):
            break
    return torch.where(found[0] * found[1] > -1, found, torch.nan)
