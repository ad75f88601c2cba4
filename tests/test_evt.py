"""Tail fits, tail probabilities and diagnostics against SciPy, mpmath, brute force and simulation."""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pss import evt, statistics
from pss.engine import likelihood


def sample(xi, shape, seed=0, scale=1.0):
    """GPD samples by inversion of uniform numbers, apart from the module under test."""
    y = np.random.default_rng(seed).exponential(size=shape)
    return scale * (y if xi == 0 else np.expm1(xi * y) / xi)


def scipy_fit(x):
    """SciPy's fit of one row, of mean 1: shape, log-likelihood per excess of x itself."""
    mean = x.mean()
    c, _, scale = scipy.stats.genpareto.fit(x / mean, floc=0)
    return c, scipy.stats.genpareto.logpdf(x / mean, c, scale=scale).mean() - math.log(mean)


def grid_maximum(x):
    """Highest interior maximum of the profile likelihood per excess on a dense grid (NaN where there is none)."""
    x = x / x.mean()
    n, top = len(x), x.max()
    v = np.concatenate([np.linspace(-1.5 * math.log(n) - 8, -0.01, 1500), np.linspace(0.01, math.log(top) + 35, 1500)])
    theta = np.expm1(v) / top
    xi = np.array([np.log1p(t * x).mean() for t in theta])
    loglik = -np.log(xi / theta) - xi - 1
    peak = np.flatnonzero((loglik[1:-1] > loglik[:-2]) & (loglik[1:-1] >= loglik[2:]) & (xi[1:-1] > -0.98)) + 1
    return loglik[peak].max() if len(peak) else np.nan


# --- maximum likelihood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, rows", [(20, 6), (50, 4), (101, 3), (1000, 2), (5000, 1)])
@pytest.mark.parametrize("xi", [-0.4, -0.2, 0.0, 0.1, 0.5, 1.0, 1.5])
def test_never_worse_than_scipy(xi, n, rows):
    x = np.stack([sample(xi, n, seed, scale=10.0**e) for seed, e in enumerate(np.linspace(-9, 9, rows))])
    fit = evt.fit_gpd(x)
    for row, got, fitted, shape in zip(x, fit.log_likelihood / n, fit.fitted, fit.xi, strict=True):
        c, expected = scipy_fit(row)
        if c <= -0.98:  # SciPy ran towards the unbounded end: that is no maximum
            continue
        assert fitted
        assert got >= expected - 1e-6
        if abs(got - expected) < 1e-9:
            assert abs(shape - c) < 2e-3


def test_reported_log_likelihood_is_the_density_of_the_fit():
    x = sample(0.3, (4, 200), scale=1e-9)
    fit = evt.fit_gpd(x)
    expected = [
        scipy.stats.genpareto.logpdf(row, c, scale=s).sum()
        for row, c, s in zip(x, fit.xi.numpy(), fit.scale.numpy(), strict=True)
    ]
    np.testing.assert_allclose(fit.log_likelihood, expected, rtol=1e-12)
    ours = evt.gpd_logpdf(x, fit.xi[:, None], fit.scale[:, None]).sum(1)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e290])
def test_scales_beyond_scipy(scale):
    x = sample(0.2, (3, 400))
    plain, scaled = evt.fit_gpd(x), evt.fit_gpd(x * scale)
    assert scaled.fitted.all()
    torch.testing.assert_close(scaled.xi, plain.xi, rtol=0, atol=1e-8)
    torch.testing.assert_close(scaled.scale / scale, plain.scale, rtol=1e-8, atol=0)


@pytest.mark.parametrize("n", [10, 20, 300])
@pytest.mark.parametrize("kind", ["mixture", "outliers", "lognormal", "beta", "uniform", "one outlier"])
def test_global_interior_maximum_of_awkward_samples(kind, n):
    rng = np.random.default_rng(n)
    e = rng.exponential(size=(12, n))
    x = {
        "mixture": e * np.where(rng.random(e.shape) < 0.5, 1, 1e3),
        "outliers": e * np.where(rng.random(e.shape) < 0.03, 1e4, 1),
        "lognormal": np.exp(rng.normal(size=e.shape) * 4),
        "beta": rng.beta(0.2, 0.9, e.shape) + 1e-12,
        "uniform": rng.random(e.shape),
        "one outlier": np.concatenate([e[:, 1:], np.full((12, 1), 1e9)], 1),
    }[kind]
    fit = evt.fit_gpd(x)
    got = (fit.log_likelihood / n).numpy() + np.log(x.mean(1))
    for row, loglik, xi in zip(x, got, fit.xi.numpy(), strict=True):
        expected = grid_maximum(row)
        if np.isnan(expected):
            assert np.isnan(loglik) or xi < -0.97
        else:
            assert loglik > expected - 1e-9


@pytest.mark.parametrize("start", [-50.0, -9.0, 0.0, 5.0, 84.0])
def test_long_rows_do_not_depend_on_the_start(start, monkeypatch):
    x = np.stack([sample(xi, 500, seed=2) for xi in (-0.4, 0.0, 0.5, 1.5)])
    expected = evt.fit_gpd(x)
    monkeypatch.setattr(likelihood, "_start", lambda x, n, top: torch.full_like(n, start))
    got = evt.fit_gpd(x)
    torch.testing.assert_close(got.xi, expected.xi, rtol=0, atol=1e-7)


def test_slope_vanishes_at_the_fit():
    """Autograd of the density as a second source: both partial derivatives are zero."""
    x = torch.from_numpy(np.stack([sample(xi, 700, seed=3) for xi in (-0.3, 0.0, 1e-4, 0.4, 2.0)]))
    fit = evt.fit_gpd(x)
    xi, log_scale = fit.xi.clone().requires_grad_(), fit.scale.log().requires_grad_()
    z = x / log_scale.exp()[:, None]
    loglik = (-log_scale[:, None] - (1 + 1 / xi[:, None]) * torch.log1p(xi[:, None] * z)).mean(1)
    for gradient in torch.autograd.grad(loglik.sum(), (xi, log_scale)):
        assert gradient.abs().max() < 1e-6


def test_padding_does_not_bias():
    """Ragged rows, padded by NaN, zeros or negative numbers in any place, equal each row alone."""
    rng = np.random.default_rng(5)
    rows = [sample(xi, n, seed=n) for xi, n in ((0.3, 12), (0.1, 100), (-0.2, 333), (0.8, 600), (0.0, 9))]
    wide = np.stack([np.concatenate([r, rng.choice([np.nan, 0.0, -1.0], 700 - len(r))]) for r in rows])
    wide = rng.permuted(wide, axis=1)
    fit = evt.fit_gpd(wide)
    assert fit.n.tolist() == [len(r) for r in rows]
    for i, row in enumerate(rows):
        alone = evt.fit_gpd(row)
        assert alone.xi.shape == ()
        torch.testing.assert_close(fit.xi[i], alone.xi, rtol=0, atol=1e-8, equal_nan=True)
        torch.testing.assert_close(fit.log_likelihood[i], alone.log_likelihood, rtol=1e-10, atol=0, equal_nan=True)
        assert fit.reason[i] == alone.reason


def test_padding_does_not_bias_when_most_is_padding():
    row = sample(0.3, 60, seed=1)
    wide = np.full((2, 4000), np.nan)
    wide[0, 5::67] = row
    alone = evt.fit_gpd(row)
    fit = evt.fit_gpd(wide)
    torch.testing.assert_close(fit.xi[0], alone.xi, rtol=0, atol=1e-9)
    assert fit.n.tolist() == [60, 0] and fit.reason.tolist() == [0, 1]


def test_rows_in_many_chunks_equal_rows_alone():
    x = torch.from_numpy(sample(0.2, (400, 3000), seed=7))  # more than one chunk
    whole = evt.fit_gpd(x)
    for i in (0, 173, 174, 175, 399):
        torch.testing.assert_close(whole.xi[i], evt.fit_gpd(x[i]).xi, rtol=0, atol=1e-10)


def test_continuous_through_zero():
    """Bend an exponential sample gently through xi = 0: the estimate moves as smoothly, and crosses zero."""
    y = np.random.default_rng(0).exponential(size=2000)
    bends = np.linspace(-0.08, 0.08, 801)
    x = np.stack([np.expm1(b * y) / b if b else y for b in bends])
    xi = evt.fit_gpd(x).xi.numpy()
    assert xi[0] < 0 < xi[-1]
    assert np.abs(np.diff(xi)).max() < 2 * 0.0002
    assert np.abs(np.diff(xi, 2)).max() < 1e-6  # no kink, least of all at zero
    np.testing.assert_allclose(np.diff(xi), np.diff(bends).mean(), rtol=0.05)


def test_profile_through_zero_against_mpmath():
    """The series and the direct formula, at both sides of their border and at zero itself."""
    x = sample(0.0, 40, seed=2)
    x /= x.mean()
    n, top = torch.tensor([40.0], dtype=torch.float64), torch.tensor([x.max()])
    v = torch.tensor([[-0.05, -0.0203, -0.0201, -1e-5, 0.0, 1e-9, 0.0197, 0.0199, 0.05]], dtype=torch.float64)
    theta, s, s1, *_, l1, _ = (
        p[0].numpy() for p in likelihood.profile_likelihood(torch.from_numpy(x)[None], n, top, v)
    )
    with mpmath.workdps(60):

        def scale(t):
            return sum(mpmath.log1p(t * mpmath.mpf(a)) for a in x) / (40 * t) if t else mpmath.mpf(float(x.mean()))

        def loglik(t):
            return -mpmath.log(scale(t)) - t * scale(t) - 1

        for i, t in enumerate(theta):
            assert abs(s[i] - scale(mpmath.mpf(t))) < 1e-13
            h = mpmath.mpf(10) ** -20
            around = [mpmath.mpf(t) + sign * h for sign in (1, -1)]
            assert abs(s1[i] - (scale(around[0]) - scale(around[1])) / (2 * h)) < 1e-9
            assert abs(l1[i] - (loglik(around[0]) - loglik(around[1])) / (2 * h)) < 1e-9


NOT_FITTED = {
    "few": (sample(0.2, 9), "too few excesses"),
    "none": (np.full(30, np.nan), "too few excesses"),
    "zero": (np.zeros(50), "too few excesses"),
    "negative": (-sample(0.2, 50), "too few excesses"),
    "constant": (np.full(50, 0.3), "tied excesses"),
    "tied": (np.repeat([1.0, 2.0, 5.0], 40), "tied excesses"),
    "infinite": (np.append(sample(0.2, 50), np.inf), "infinite excesses"),
    "far apart": (10.0 ** np.linspace(-30, 0, 20), "more than 16 decades"),
    "many far apart": (10.0 ** np.linspace(-200, 100, 500), "more than 16 decades"),
    "rising density": (np.sqrt(np.linspace(0.01, 1, 100)), "no interior maximum"),
}


@pytest.mark.parametrize("case", NOT_FITTED)
def test_not_fitted(case):
    x, reason = NOT_FITTED[case]
    good = np.resize(sample(0.2, 60), len(x)) if len(x) >= 20 else np.append(sample(0.2, 60), np.nan)
    width = max(len(x), len(good))
    both = np.stack([np.pad(y, (0, width - len(y)), constant_values=np.nan) for y in (x, good)])
    fit = evt.fit_gpd(both)
    assert evt.REASONS[fit.reason[0]] == reason
    assert fit.fitted.tolist() == [False, True]
    for name in ("xi", "scale", "log_likelihood", "se_xi", "se_scale", "covariance"):
        assert getattr(fit, name)[0].isnan() and not getattr(fit, name)[1].isnan(), name


def test_ties_are_counted_over_the_whole_row():
    x = np.concatenate([np.full(5000, 1.0), 1 + np.arange(1, 12) * 0.5])  # 12 distinct values, hidden at the end
    assert evt.fit_gpd(x[:5008]).reason == 2  # 9 distinct values
    assert evt.fit_gpd(x).reason != 2


def test_small_samples_often_have_no_maximum():
    """A known fact: with 10 exponential excesses a good part of likelihoods has no interior maximum, with 50 none."""
    assert 0.6 < evt.fit_gpd(sample(0.0, (400, 10))).fitted.double().mean() < 0.95
    assert evt.fit_gpd(sample(0.0, (400, 50))).fitted.all()


@pytest.mark.parametrize("xi, n, low", [(0.25, 100, 0.90), (0.25, 600, 0.935), (1.0, 600, 0.935), (-0.2, 600, 0.925)])
def test_standard_errors_cover(xi, n, low):
    """95% intervals cover 95% of 3,000 samples (binomial error 0.4%), less what the bias of small samples takes."""
    fit = evt.fit_gpd(sample(xi, (3000, n), seed=11, scale=3e-5))
    for estimate, error, truth in ((fit.xi, fit.se_xi, xi), (fit.scale, fit.se_scale, 3e-5)):
        assert low < ((estimate - truth).abs() < 1.96 * error).double().mean() < 0.965
    correlation = (fit.covariance / fit.se_xi / fit.se_scale).mean()
    assert abs(correlation - np.corrcoef(fit.xi, fit.scale)[0, 1]) < 0.03


def test_covariance_is_the_inverse_hessian():
    """Autograd of the density as a second source."""
    for xi in (-0.3, 0.2, 1.2):
        x = torch.from_numpy(sample(xi, 300, seed=5, scale=0.01))
        fit = evt.fit_gpd(x)

        def loglik(p, x=x):
            return (-p[1].log() - (1 + 1 / p[0]) * torch.log1p(p[0] * x / p[1])).sum()

        hessian = torch.autograd.functional.hessian(loglik, torch.stack([fit.xi, fit.scale]))
        expected = torch.linalg.inv(-hessian)
        got = torch.stack([fit.se_xi**2, fit.covariance, fit.se_scale**2])
        torch.testing.assert_close(got, expected[[0, 0, 1], [0, 1, 1]], rtol=1e-4, atol=0)


def test_standard_errors_are_missing_where_they_do_not_exist():
    fit = evt.fit_gpd(sample(-0.7, (20, 300)))
    low = fit.fitted & (fit.xi <= -0.5)
    assert low.any() and fit.se_xi[low].isnan().all() and fit.se_scale[low].isnan().all()


def test_the_callers_array_is_left_alone():
    for dtype in (np.float64, np.float32):
        x = sample(0.2, (3, 40)).astype(dtype)
        x[0, :3] = np.nan, 0, -1
        before = x.copy()
        x.flags.writeable = False  # as a memory map opened for reading
        evt.fit_gpd(x)
        np.testing.assert_array_equal(x, before)
    assert evt.fit_gpd(torch.from_numpy(before)).xi.dtype == torch.float64


# --- the distribution -------------------------------------------------------------------------------------------------

SHAPES = [-2.0, -0.5, -1e-3, -1e-8, -1e-15, 0.0, 1e-300, 1e-15, 1e-8, 1e-3, 0.3, 1.0, 5.0]


@pytest.mark.parametrize("xi", SHAPES)
def test_tail_functions_against_mpmath(xi):
    scale = 2.5e-7
    for z in (1e-12, 1e-5, 0.1, 0.49, 1.0, 3.7, 40.0, 900.0, 1e6):
        x = z * scale
        with mpmath.workdps(50):
            t = mpmath.mpf(xi) * mpmath.mpf(x) / mpmath.mpf(scale)
            log_s = -mpmath.mpf(x) / mpmath.mpf(scale) if xi == 0 else -mpmath.log1p(t) / xi if t > -1 else None
            got = evt.gpd_log_survival(x, xi, scale).item()
            if log_s is None:
                assert got == -math.inf
                assert evt.gpd_logpdf(x, xi, scale) == -math.inf
                continue
            assert abs(got / log_s - 1) < 1e-10
            density = log_s - mpmath.log1p(t) - mpmath.log(scale)
            assert abs(evt.gpd_logpdf(x, xi, scale).item() - density) < 1e-10 * (1 + abs(density))
            excess = mpmath.expm1(xi * z) / xi if xi else mpmath.mpf(z)  # z now as -log p
            if excess < 1e300:
                assert abs(evt.gpd_quantile(-z, xi, scale).item() / (excess * mpmath.mpf(scale)) - 1) < 1e-10


def test_tail_limits():
    inf, nan = math.inf, math.nan
    assert evt.gpd_log_survival(torch.tensor([-1.0, 0.0]), 0.3, 1.0).tolist() == [0, 0]
    assert evt.gpd_log_survival([2.0, 1.9999, 2.1, inf], -0.5, 1.0)[[0, 2, 3]].tolist() == [-inf] * 3
    assert evt.gpd_log_survival(inf, [0.0, 0.5], 1.0).tolist() == [-inf, -inf]
    assert evt.gpd_log_survival([1.0, nan], [nan, 0.1], 1.0).isnan().all()


def test_log_tail_probability():
    got = evt.log_tail_probability([0.0, 1.0, 9.0], 0.5, 2.0, tail_mass=0.1)
    np.testing.assert_allclose(got.exp(), 0.1 * scipy.stats.genpareto.sf([0, 1, 9], 0.5, scale=2.0), rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(xi=st.floats(-2, 3), exponent=st.floats(-9, 9), seed=st.integers(0, 1000))
def test_tail_probability_is_monotone_and_the_score_finite(xi, exponent, seed):
    scale = 10**exponent
    x = np.sort(np.random.default_rng(seed).exponential(size=200)) * scale * 10
    if xi < -1e-290:  # values about the endpoint and beyond
        x = np.sort(np.append(x, -scale / xi * (1 + np.linspace(-1e-12, 1e-12, 9))))
    log_p, score = (f(x, xi, scale, 0.1).numpy() for f in (evt.log_tail_probability, evt.tail_score))
    assert (log_p <= math.log(0.1)).all() and (log_p[1:] <= log_p[:-1]).all()
    assert np.isfinite(score).all() and (np.diff(score) >= 0).all()
    beyond = log_p == -math.inf
    assert ((np.diff(score[beyond]) > 0) == (np.diff(x[beyond]) > 0)).all()
    np.testing.assert_array_equal(score[~beyond], np.minimum(-log_p[~beyond], 1e30))
    assert not beyond.any() or beyond.all() or score[beyond].min() >= score[~beyond].max()


def test_tail_score_of_missing_and_infinite():
    assert evt.tail_score(1.0, math.nan, 1.0, 0.1).isnan()
    assert evt.tail_score(math.inf, [-0.5, 0.0, 0.5], 1.0, 0.1).tolist() == [math.inf, 1e30, 1e30]


# --- diagnostics ------------------------------------------------------------------------------------------------------


def test_hill_by_hand():
    x = np.array([4.0, 1.0, 2.0, 8.0])  # logs base 2, sorted: 3 2 1 0
    np.testing.assert_allclose(statistics.hill(x) / math.log(2), [1, 1.5, 2])
    assert statistics.hill(x, k=2) == statistics.hill(x)[1]
    batch = statistics.hill(np.stack([x, [np.nan, 0.0, 2.0, 8.0]]))
    np.testing.assert_allclose(batch[1], [math.log(4), np.nan, np.nan])


def test_mean_excess_by_hand_and_in_theory():
    got = statistics.mean_excess(np.array([[1.0, 2.0, 4.0, 9.0], [0.0, 0.0, 0.0, 5.0]]), [0.0, 3.0])
    np.testing.assert_allclose(got.mean, [[4.0, 3.5], [5.0, 2.0]])
    np.testing.assert_allclose(got.error[0], [np.std([1, 2, 4, 9], ddof=1) / 2, np.std([1, 6], ddof=1) / math.sqrt(2)])
    assert got.n.tolist() == [[4, 2], [1, 1]] and got.error[1].isnan().all()
    rounded = np.random.default_rng(1).integers(0, 6, size=(3, 50))  # values at a threshold do not lie above it
    got, over = statistics.mean_excess(rounded, [2.0, 4.0]), rounded[:, None] > np.array([[2], [4]])
    assert got.n.tolist() == over.sum(axis=2).tolist()
    np.testing.assert_allclose(got.mean[:, 1], 1.0)
    u = torch.tensor([0.0, 1.0, 3.0])
    line = statistics.mean_excess(sample(0.2, 200_000), u)
    assert ((line.mean - (1 + 0.2 * u) / 0.8).abs() < 4 * line.error).all()


def test_threshold_stability():
    x = sample(0.3, (2, 40_000), seed=4, scale=2.0)
    got = statistics.threshold_stability(x, [0.5, 0.8, 0.95])
    assert got.xi.shape == (2, 3)
    np.testing.assert_allclose(got.threshold, np.quantile(x, [0.5, 0.8, 0.95], axis=1).T)
    assert got.n[0].tolist() == [20_000, 8_000, 2_000]
    assert ((got.xi - 0.3).abs() < 3 * got.se_xi).all()
    assert ((got.modified_scale - 2.0).abs() < 3 * got.se_modified_scale).all()
    rounded = np.round(10 * x[:, :500])
    at = np.quantile(rounded, [0.5, 0.8], axis=1).T
    assert (rounded[:, None] == at[..., None]).any()
    over = (rounded[:, None] > at[..., None]).sum(2)
    assert statistics.threshold_stability(rounded, [0.5, 0.8]).n.tolist() == over.tolist()


def test_modified_scale_error_by_simulation():
    got = statistics.threshold_stability(sample(0.2, (500, 1000), seed=6), [0.7])
    assert abs(got.modified_scale.std() / got.se_modified_scale.mean() - 1) < 0.12


def test_qq():
    x = np.random.default_rng(0).normal(5, 2, size=99)
    theory, empirical = statistics.qq(x, "normal")
    p = (np.arange(99) + 0.5) / 99
    np.testing.assert_allclose(theory, scipy.stats.norm.ppf(p, x.mean(), x.std(ddof=1)))
    np.testing.assert_array_equal(empirical, np.sort(x))
    x = sample(0.4, (2, 80))
    np.testing.assert_allclose(
        statistics.qq(x, "exponential")[0][1], scipy.stats.expon.ppf((np.arange(80) + 0.5) / 80) * x[1].mean()
    )
    fit = evt.fit_gpd(x)
    expected = scipy.stats.genpareto.ppf((np.arange(80) + 0.5) / 80, fit.xi[0], scale=fit.scale[0])
    np.testing.assert_allclose(statistics.qq(x, "gpd")[0][0], expected, rtol=1e-9)


@pytest.mark.parametrize("dist, law", [("normal", "norm"), ("exponential", "expon"), ("gpd", "genpareto")])
def test_anderson_darling_statistic_against_scipy(dist, law):
    """SciPy's statistic, of the probability integral transform under the fitted parameters."""
    x = sample(0.2, (2, 60), seed=9)
    got = statistics.anderson_darling(
        np.pad(x, ((0, 0), (0, 5)), constant_values=np.nan), dist, simulations=50
    ).statistic
    for row, value in zip(x, got, strict=True):
        fit = evt.fit_gpd(row)
        kept = {
            "normal": {"loc": row.mean(), "scale": row.std(ddof=1)},
            "exponential": {"loc": 0, "scale": row.mean()},
            "gpd": {"c": fit.xi.item(), "loc": 0, "scale": fit.scale.item()},
        }[dist]
        expected = scipy.stats.goodness_of_fit(
            getattr(scipy.stats, law), row, known_params=kept, statistic="ad", n_mc_samples=1, rng=0
        ).statistic
        assert abs(value - expected) < 1e-8 * expected


def uniformity(p):
    return scipy.stats.kstest(p.numpy(), "uniform").pvalue


@pytest.mark.parametrize(
    "dist, xi", [("normal", None), ("exponential", 0.0), ("gpd", 0.1), ("gpd", -0.3), ("gpd", 0.8)]
)
def test_anderson_darling_p_values_are_calibrated(dist, xi):
    """Uniform under the null: Kolmogorov-Smirnov at a false-alarm rate of 1 in 1,000, with a fixed seed."""
    rng = np.random.default_rng(21)
    x = rng.normal(3, 2, size=(300, 80)) if dist == "normal" else sample(xi, (300, 80), seed=21, scale=1e-6)
    p = statistics.anderson_darling(x, dist, simulations=3000, seed=1).p_value
    assert uniformity(p) > 1e-3


def test_anderson_darling_rejects_the_wrong_model():
    x = sample(0.5, (50, 300), seed=3)
    assert (statistics.anderson_darling(x, "normal").p_value < 0.01).all()
    assert (statistics.anderson_darling(x, "exponential").p_value < 0.05).double().mean() > 0.9
    two = np.where(np.random.default_rng(0).random((50, 300)) < 0.5, 5 + 0.1 * x, x)
    assert (statistics.anderson_darling(two, "gpd").p_value < 0.01).double().mean() > 0.9


@pytest.mark.parametrize("dist", ["normal", "exponential", "gpd"])
def test_anderson_darling_never_gives_a_probability_of_zero(dist):
    """The row itself counts with the simulated ones: p is at least 1 / (1 + 99), and that where none is as far."""
    x = np.where(np.arange(200) % 2 == 0, 1.0, 1e3) + 0.01 * np.random.default_rng(0).random((3, 200))
    p = statistics.anderson_darling(x, dist, simulations=99).p_value
    np.testing.assert_allclose(p, 1 / 100, rtol=1e-9)


def test_anderson_darling_not_fitted_and_seed():
    x = np.stack([sample(0.2, 50), np.ones(50)])
    first, again = statistics.anderson_darling(x, seed=4), statistics.anderson_darling(x, seed=4)
    assert first.p_value.isnan().tolist() == [False, True]
    torch.testing.assert_close(first.p_value, again.p_value, rtol=0, atol=0, equal_nan=True)
    assert statistics.anderson_darling(x[1]).p_value.isnan()
    torch.testing.assert_close(statistics.anderson_darling(x[0], seed=4).p_value, first.p_value[0])


def test_likelihood_ratio():
    x = sample(0.0, (1500, 300), seed=8)
    statistic, p = statistics.likelihood_ratio(x)
    np.testing.assert_allclose(p, scipy.stats.chi2.sf(statistic, 1), rtol=1e-9)
    assert uniformity(p) > 1e-3
    _, loglik = scipy_fit(x[0])
    expected = 2 * (300 * loglik - scipy.stats.expon.logpdf(x[0], scale=x[0].mean()).sum())
    assert abs(statistic[0] - expected) < 1e-5
    assert (statistics.likelihood_ratio(sample(0.6, (50, 300)))[1] < 0.01).double().mean() > 0.9


def test_calibration():
    log_p = np.log(np.concatenate([np.full(3, 0.005), np.full(17, 0.05), np.full(80, 0.5), [np.nan]]))
    table = statistics.calibration(log_p, rates=(0.1, 0.01))
    assert table["observed"].tolist() == [0.2, 0.03] and table["n"].tolist() == [100, 100]
    wilson = scipy.stats.binomtest(20, 100).proportion_ci(method="wilson")
    assert (table["low"][0], table["high"][0]) == (wilson.low, wilson.high)
