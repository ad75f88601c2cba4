"""Statistics that hold: properties of the tail fits over generated samples, and calibration by simulation.

`test_evt.py` compares with SciPy, brute force and hand-made cases; here are the properties that every sample must have,
and the means over images with their intervals.
A test by simulation states its rate of false alarms, and its seed is fixed, so it passes or fails for good.
"""

import math
from itertools import pairwise

import mpmath
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_evt import sample

import pss
from pss import evt, statistics
from pss.reference import Reference
from pss.statistics import fdr_significant
from pss.storage.store import blocks

slow = [HealthCheck.too_slow]  # a busy machine is no fault
steady = settings(derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=slow)

seeds = st.integers(0, 2**32 - 1)
shapes = st.one_of(st.floats(-0.45, 2.0), st.floats(-1e-6, 1e-6), st.just(0.0))
exponents = st.floats(-9, 9)
FIELDS = ("mean", "std", "threshold", "quantiles", "mean_excess", "scale", "se_scale")  # with the unit of the data
PLAIN = ("xi", "se_xi", "fitted", "n_excess")  # without


# --- equivariance -----------------------------------------------------------------------------------------------------


@steady
@given(seed=seeds, xi=shapes, n=st.integers(15, 400), exponent=exponents)
def test_fit_is_equivariant_in_scale_order_and_padding(seed, xi, n, exponent):
    """Times c: scale and its error times c, shape and its error as they are; order and padding are nothing to it."""
    rng, c = np.random.default_rng(seed), 10.0**exponent
    x = sample(xi, n, seed)
    padded = rng.permutation(np.concatenate([c * x, rng.choice([np.nan, 0.0, -1.0], rng.integers(0, n))]))
    plain, other = evt.fit_gpd(x), evt.fit_gpd(padded)
    assert plain.reason == other.reason and plain.n == other.n == n
    if plain.fitted:
        wide = 1e-6 * (1 + abs(float(plain.xi)))  # where the likelihood is flat the maximum is known less well
        assert abs(other.xi - plain.xi) < wide
        assert abs(other.scale / c / plain.scale - 1) < wide
        if plain.se_xi.isfinite() and plain.xi > -0.49:
            assert abs(other.se_xi / plain.se_xi - 1) < 1e-3 and abs(other.se_scale / c / plain.se_scale - 1) < 1e-3


@steady
@given(seed=seeds, xi=shapes, exponent=exponents)
def test_distribution_is_equivariant_in_scale(seed, xi, exponent):
    """Excess and scale times c: the same probability, a density over c, a quantile times c."""
    x, c = torch.from_numpy(sample(0.5, 50, seed)), 10.0**exponent
    same = {"rtol": 1e-12, "atol": 1e-12}
    # near a bounded end a rounding of x decides, so stay a little away from it
    x = x.clamp(max=0.999 / -xi) if xi < -1e-3 else x
    log_s = evt.gpd_log_survival(x, xi, 1.0)
    torch.testing.assert_close(evt.gpd_log_survival(c * x, xi, c), log_s, rtol=1e-9, atol=1e-12)
    density, scaled = evt.gpd_logpdf(x, xi, 1.0), evt.gpd_logpdf(c * x, xi, c) + math.log(c)
    torch.testing.assert_close(scaled, density, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(evt.gpd_quantile(log_s, xi, c) / c, evt.gpd_quantile(log_s, xi, 1.0), **same)


@steady
@given(seed=seeds, exponent=exponents, level=st.floats(0.5, 0.95))
def test_reference_is_equivariant_in_scale_images_and_units(seed, exponent, level):
    """Units in another order, images in another order, another unit of measurement: the same reference."""
    rng, c = np.random.default_rng(seed), 10.0**exponent
    values = rng.lognormal(sigma=1.5, size=(120, 6))
    units, images = rng.permutation(6), rng.permutation(120)
    plain, other = Reference.fit(values, level), Reference.fit(c * values[images][:, units], level)
    for name in FIELDS + PLAIN:
        unit = c if name in FIELDS else 1.0
        expected = getattr(plain, name)[units] * unit
        loose = (
            {"rtol": 1e-5, "atol": 1e-6 * unit} if name in ("xi", "se_xi", "se_scale") else {"rtol": 1e-6, "atol": 0}
        )
        torch.testing.assert_close(getattr(other, name), expected, equal_nan=True, check_dtype=False, **loose)
    seen = torch.from_numpy(values[:5])
    p, q = plain.log_tail_probability(seen)[:, units], other.log_tail_probability(c * seen[:, units])
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


# --- monotone, continuous, limits -------------------------------------------------------------------------------------


@steady
@given(seed=seeds, exponent=exponents, level=st.floats(0.5, 0.95), scale_free=st.booleans())
def test_probability_never_rises_with_saliency(seed, exponent, level, scale_free):
    """Through zero, the quantiles, the threshold, the tail and beyond its end; the score always goes on."""
    rng = np.random.default_rng(seed)
    shapes = np.array([-0.4, -0.05, 0.0, 0.3, 1.2])
    values = np.stack([sample(xi, 150, rng.integers(2**31)) for xi in shapes], axis=1) * 10.0**exponent
    values[rng.random(values.shape) < 0.1] = 0  # ties at zero, as sparse units have them
    reference = Reference.fit(values, level)
    top = np.geomspace(1e-6, 1e6, 400)[:, None] * reference.threshold.numpy()
    grid = torch.from_numpy(np.concatenate([np.zeros((1, 5)), top]))
    for tail in ("gpd", "exponential"):
        log_p, score = reference.log_tail_probability(grid, tail), reference.tail_score(grid, tail)
        assert (log_p <= 0).all() and (log_p[0] == 0).all()
        assert (log_p[1:] <= log_p[:-1] + 1e-12).all()
        assert score.isfinite().all() and (score.diff(dim=0) >= -1e-12).all()


@steady
@given(
    z=st.floats(1e-6, 60),
    side=st.sampled_from([-1.0, 1.0]),
    decade=st.one_of(st.floats(-12, -5), st.floats(-300, -12)),
    scale=exponents,
)
def test_continuous_through_a_shape_of_zero(z, side, decade, scale):
    """Expansions to the first order in ξ, to within the second: no jump, no series that breaks off."""
    xi, scale = side * 10.0**decade, 10.0**scale
    x, bound = z * scale, xi**2 * (z**3 + z**2) + 1e-13 * (1 + z)
    assert abs(evt.gpd_log_survival(x, xi, scale) + z - xi * z**2 / 2) <= bound
    assert abs(evt.gpd_quantile(-z, xi, scale) / scale - z - xi * z**2 / 2) <= bound
    log_density = -z + xi * z**2 / 2 - xi * z - math.log(scale)
    assert abs(evt.gpd_logpdf(x, xi, scale) - log_density) <= bound + 1e-13 * abs(math.log(scale))


@steady
@given(xi=st.floats(-3, -1e-3), exponent=exponents)
def test_limits_at_and_beyond_a_bounded_end(xi, exponent):
    """At and beyond −β/ξ the probability is zero, and what lies further beyond scores higher; before it, positive."""
    scale = 10.0**exponent
    end = -scale / xi
    x = torch.tensor([0.0, 0.5, 1 - 1e-9, 1 + 1e-9, 2, 1e6], dtype=torch.float64) * end
    log_p, score = evt.log_tail_probability(x, xi, scale, 0.1), evt.tail_score(x, xi, scale, 0.1)
    assert log_p[:3].isfinite().all() and (log_p[3:] == -math.inf).all()
    assert log_p[0] == math.log(0.1) and evt.gpd_log_survival(math.inf, xi, scale) == -math.inf
    assert score.isfinite().all() and (score.diff() > 0).all()
    assert abs(evt.gpd_quantile(-math.inf, xi, scale) / end - 1) < 1e-12


@steady
@given(xi=shapes.filter(lambda xi: abs(xi) > 1e-12), log_s=st.floats(-30, -1e-6), exponent=exponents)
def test_quantile_and_probability_undo_each_other(xi, log_s, exponent):
    """To 1e-8 where the end of a bounded tail is not within rounding of the quantile."""
    scale = 10.0**exponent
    room = math.exp(xi * -log_s) if xi < 0 else 1.0  # 1 + ξx/β at the quantile
    if room > 1e-6:
        x = evt.gpd_quantile(log_s, xi, scale)
        assert abs(evt.gpd_log_survival(x, xi, scale) / log_s - 1) < 1e-8 / room


# --- a second source --------------------------------------------------------------------------------------------------


def test_probabilities_of_a_whole_reference_against_mpmath():
    """(n_u / n) (1 + ξ (s − u) / β)^(−1/ξ) in 50 digits, on a grid over nine decades: to 1e-10 relative."""
    values = np.stack([sample(xi, 400, seed=5) for xi in (-0.3, 0.0, 0.2, 0.9)], axis=1) * np.array([1e-9, 1, 1e3, 1e9])
    reference = Reference.fit(values)
    worst = 0.0
    with mpmath.workdps(50):
        for unit in range(4):
            u, xi, scale = (mpmath.mpf(getattr(reference, n)[unit].item()) for n in ("threshold", "xi", "scale"))
            for z in np.geomspace(1e-6, 1e3, 60):
                s = (u + mpmath.mpf(z) * scale) if xi > 0 else u - scale / xi * (1 - mpmath.exp(-mpmath.mpf(z)))
                s = float(s)
                t = 1 + xi * (mpmath.mpf(s) - u) / scale
                if t < 1e-5:  # there s itself is not known to 1e-10
                    continue
                expected = mpmath.log(mpmath.mpf(int(reference.n_excess[unit])) / 400) - mpmath.log(t) / xi
                row = torch.zeros(1, 4, dtype=torch.float64)
                row[0, unit] = s
                got = reference.log_tail_probability(row)[0, unit].item()
                worst = max(worst, abs(float(got / expected - 1)))
    assert worst < 1e-10


# --- parts equal the whole --------------------------------------------------------------------------------------------


@steady
@given(seed=seeds, max_bytes=st.integers(1, 200_000), scale_free=st.booleans(), wide=st.integers(1, 12))
def test_any_split_into_blocks_equals_the_whole(seed, max_bytes, scale_free, wide):
    """Every unit once, in order; the reference does not depend on how many bytes are held at once."""
    values = np.random.default_rng(seed).lognormal(sigma=2, size=(60, wide)).astype(np.float32)
    parts = list(blocks(values, max_bytes))
    np.testing.assert_array_equal(np.concatenate([block for _, block in parts], axis=1), values)
    whole, split = Reference.fit(values, 0.8, scale_free), Reference.fit(values, 0.8, scale_free, max_bytes=max_bytes)
    for name in FIELDS + PLAIN:
        tight = 1e-6 if "se" in name else 1e-9
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=tight, atol=1e-9, equal_nan=True)


@steady
@given(seed=seeds, rows=st.integers(2, 40), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_split_of_rows_equals_the_whole(seed, rows, cuts):
    """As ranks or blocks share the units: fits of parts, joined, are the fit of all."""
    x = torch.from_numpy(sample(0.4, (rows, 64), seed))
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    whole = evt.fit_gpd(x)
    parts = [vars(evt.fit_gpd(x[a:b])).values() for a, b in pairwise(edges)]
    joined = evt.GPDFit(*(torch.cat(values) for values in zip(*parts, strict=True)))
    assert torch.equal(joined.reason, whole.reason) and torch.equal(joined.n, whole.n)
    torch.testing.assert_close(joined.xi, whole.xi, rtol=0, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(joined.scale, whole.scale, rtol=1e-9, atol=0, equal_nan=True)


# --- simulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xi", [-0.2, 0.0, 0.4, 1.0])
def test_probabilities_of_the_true_model_are_uniform(xi):
    """Data that follow the model, and its true parameters: p is uniform. False alarms: 1 in 10,000; seed fixed."""
    p = evt.gpd_log_survival(sample(xi, 20_000, seed=33, scale=1e-6), xi, 1e-6).exp()
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("xi", [0.0, 0.4])
def test_probabilities_of_a_fitted_reference_are_calibrated(xi):
    """p of new images under a reference of 4,000: at most the nominal rate and what estimating it adds.

    Over 60 units the mean share of new images with p ≤ α is compared with α. Its standard error comes from the 60
    units, so it holds what the estimate of each adds. False alarms: 4 standard errors, 1 in 16,000 for each α.
    """
    train, new = (sample(xi, (4000, 60), seed=seed, scale=1e-5) for seed in (1, 2))
    log_p = Reference.fit(train).log_tail_probability(torch.from_numpy(new))
    for alpha in (0.5, 0.2, 0.05, 0.01):
        share = (log_p <= math.log(alpha)).double().mean(dim=0)
        error = float(share.std() / math.sqrt(60))
        assert abs(float(share.mean()) - alpha) < 4 * error + 0.02 * alpha, alpha  # 2%: the bias of the threshold


@pytest.mark.parametrize("tail", ["gpd", "exponential"])
def test_false_discoveries_are_rare_where_there_is_nothing_to_find(tail):
    """New images like the reference images: `significant` at 5% finds something in 5% of them, or little more.

    400 images of 50 independent units each: 4 binomial standard errors above 5% is 9.4% (1 in 30,000), and as much
    again as 5% for what the estimates of 50 tails add.
    """
    train, new = (sample(0.0, (5000, 50), seed=seed) for seed in (4, 5))
    found = fdr_significant(Reference.fit(train).log_tail_probability(torch.from_numpy(new[:400]), tail), 5000, q=0.05)
    share = found.any(dim=1).double().mean().item()
    assert 0.01 < share < 2 * 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


@pytest.fixture(scope="module")
def ordinary():
    """Profiles of every quantity of 1,000 validation images by the shipped model, and which it reads rightly."""
    model, images = pss.models.digits(), pss.data.mnist("validation")
    units, (x, y) = pss.Units.of(model), images.tensors
    gradient, gain = pss.profile(model, x, y, units, of=("gradient", "gain"))
    output = pss.profile(model, x, y, units, of="output")
    said = pss.profile(model, x, y, units, of="output", signed=True)
    right = pss.models.predict(model, x).argmax(dim=1) == y
    return {"gradient": gradient, "gain": gain, "output": output, "signed output": said, "silence": -said}, right


KINDS = [(q, free) for q in ("gradient", "gain", "output") for free in (False, True)]  # signed ones have no size
KINDS += [("signed output", False), ("silence", False)]


@pytest.mark.parametrize(("quantity", "scale_free"), KINDS)
def test_false_discoveries_on_ordinary_images_held_out(ordinary, quantity, scale_free):
    """The shipped model on validation images that it reads rightly, by fifths: a discovery in at most q of them.

    4 binomial standard errors above 5% of 984 images are 7.8% (1 in 30,000).
    """
    profiles, right = ordinary[0][quantity].double(), ordinary[1]
    fold, found = torch.arange(len(profiles)) % 5, {"gpd": [], "exponential": []}
    for held_out in range(5):
        reference = Reference.fit(profiles[fold != held_out], scale_free=scale_free)
        for tail, of in found.items():
            log_p = reference.log_tail_probability(profiles[(fold == held_out) & right], tail)
            of.append(fdr_significant(log_p, reference.n).any(dim=1))
    for of in found.values():
        share = torch.cat(of).double()
        assert share.mean() < 0.05 + 4 * math.sqrt(0.05 * 0.95 / len(share))


@pytest.mark.faults
@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("xi", [-0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0, 1.5])
def test_coverage_of_the_standard_errors(xi, n):
    """68% and 95% intervals over 6,000 samples: nominal, less what small samples lose (measured: 4.7, 2.5 and 0.7%).

    With 50 excesses and a shape of -0.3 a fifth of the estimates lies below -0.5, where there is no standard error:
    what is left covers more than nominal.
    """
    fit = evt.fit_gpd(sample(xi, (6000, n), seed=17, scale=2e-4))
    known = fit.se_xi.isfinite()
    lost, more = {50: 0.06, 200: 0.035, 1000: 0.015}[n], 0.01 if known.double().mean() > 0.95 else 0.1
    for estimate, error, truth in ((fit.xi, fit.se_xi, xi), (fit.scale, fit.se_scale, 2e-4)):
        for width, nominal in ((1.0, 0.6827), (1.96, 0.95)):
            share = ((estimate - truth).abs() < width * error)[known].double().mean().item()
            noise = 4 * math.sqrt(nominal * (1 - nominal) / int(known.sum()))  # 1 in 16,000
            assert nominal - lost - noise < share < nominal + more + noise, (width, share)


# --- means over images ------------------------------------------------------------------------------------------------


def made_up(methods=("z", "raw"), images=7, edits=3):
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([methods, range(images), range(edits + 1)], names=["method", "image", "k"])
    curves = index.to_frame(index=False)
    for name in ("confidence_wrong", "confidence_true", "loss"):
        curves[name] = rng.random(len(curves))
    curves["corrected"] = rng.random(len(curves)) < 0.4
    return curves.sample(frac=1, random_state=0).reset_index(drop=True)  # the order of rows must not matter


def quantiles_of_means(values, resamples, seed):
    """The bootstrap in one line: as many images as there are, drawn with replacement, the same for every column."""
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return np.quantile(values[draws].mean(axis=1), [0.025, 0.975], axis=0)


def test_interval_of_few_holds_its_mean():
    """Eight networks with effects of their own, 30 images each with skewed costs: 95% intervals of the mean log-ratio.

    4,000 draws: 4 binomial standard errors are 1.4%. The bootstrap over eight falls far short, which is why it is not
    taken for networks.
    """
    rng = np.random.default_rng(0)
    images = rng.gamma(0.5, 2.0, (4000, 8, 30)) - 1  # skewed (2.8), mean 0, deviation 1.4
    networks = 0.5 * rng.gumbel(-np.euler_gamma, 1.0, (4000, 8)) + images.mean(axis=2)
    mean, low, high = statistics.interval(networks.T)
    np.testing.assert_allclose(mean, networks.mean(axis=1))
    covered = ((low < 0) & (high > 0)).mean()
    resampled = [statistics.bootstrap(of[:, None], resamples=200) for of in networks[:500]]
    by_bootstrap = np.mean([low[0] < 0 < high[0] for low, high in resampled])
    assert 0.936 - 0.02 < covered < 0.964
    assert by_bootstrap < covered - 0.03


def test_interval_is_students_and_of_one_value_there_is_none():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)  # the 97.5% quantile at two degrees of freedom
    mean, low, high = statistics.interval(values)
    np.testing.assert_allclose(np.stack([mean, low, high])[:, 0], [7 / 3, 7 / 3 - half, 7 / 3 + half], rtol=1e-6)
    np.testing.assert_allclose(np.stack([mean, low, high])[:, 1], 5)
    assert statistics.interval(values[:1])[0].tolist() == [1, 5] and np.isnan(statistics.interval(values[:1])[1:]).all()
    with pytest.raises(ValueError, match=r"level = 95 is outside"):
        statistics.interval(values, 95)


def test_summary_by_hand():
    curves = made_up()
    table = statistics.summarize(curves, resamples=999, seed=3).set_index(["method", "k"])
    assert len(table) == 8 and (table["n"] == 7).all()
    own = curves[curves["method"] == "raw"].sort_values(["k", "image"])
    wrong = own["confidence_wrong"].to_numpy().reshape(4, 7).T
    change = wrong - wrong[:, :1]
    mine = table.loc["raw"]
    np.testing.assert_allclose(mine["change_wrong"], change.mean(axis=0))
    np.testing.assert_allclose(mine[["change_wrong_low", "change_wrong_high"]].T, quantiles_of_means(change, 999, 3))
    corrected = own["corrected"].to_numpy().reshape(4, 7)[2]
    share, z = corrected.mean(), scipy.stats.norm.ppf(0.975)
    centre = (share + z**2 / 14) / (1 + z**2 / 7)
    margin = z / (1 + z**2 / 7) * np.sqrt(share * (1 - share) / 7 + z**2 / (4 * 49))
    found = mine.loc[2, ["corrected", "corrected_low", "corrected_high"]].astype(float)
    np.testing.assert_allclose(found, [share, centre - margin, centre + margin])
    assert mine.loc[0, ["change_wrong", "change_true", "change_true_low"]].tolist() == [0, 0, 0]


def test_summary_by_other_columns_of_one_method_and_of_one_image():
    curves = made_up(("z",)).drop(columns="method")
    assert statistics.summarize(curves)["k"].tolist() == sorted(curves["k"].unique())
    two = pd.concat([curves.assign(domain="a", edit="x"), curves.assign(domain="b", edit="x")])
    assert len(statistics.summarize(two, by=["domain", "edit"])) == 8
    one = statistics.summarize(curves[curves["image"] == 0])
    assert one["change_wrong"].notna().all() and one["change_wrong_low"].isna().all()
    assert statistics.summarize(curves[:0], by="image").empty


def test_paired_difference_by_hand():
    curves = made_up(images=12)
    table = statistics.paired_difference(curves, "z", "raw", "confidence_wrong", resamples=999, seed=3)
    wide = curves.pivot(index="image", columns=["method", "k"], values="confidence_wrong")  # noqa: PD010
    difference = (wide["z"] - wide["raw"]).to_numpy()
    np.testing.assert_allclose(table["mean"], difference.mean(0))
    np.testing.assert_allclose(table[["low", "high"]].T, quantiles_of_means(difference, 999, 3))
    assert table["n"].tolist() == [12] * 4
    # pairing pays: images that differ much, but equally under both methods, leave no uncertainty
    own = curves[curves["method"] == "z"]
    shifted = pd.concat([own, own.assign(method="b", loss=own["loss"] + 1)])
    exact = statistics.paired_difference(shifted, "b", "z", "loss")
    np.testing.assert_allclose(exact[["mean", "low", "high"]], 1.0)


RAW = made_up()["method"] == "raw"
INCOMPLETE = {  # which rows are kept, and what is said of them
    "another image": (~(RAW & (made_up()["image"] == 3)), "not on the same images: 1 in one only"),
    "fewer edits": (~(RAW & (made_up()["k"] == 3)), "different numbers of edits"),
    "a hole": (~(RAW & (made_up()["k"] == 3) & (made_up()["image"] == 1)), "missing for some image"),
    "one method": (~RAW, "no rows with method = 'raw'"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_paired_difference_needs_the_same_images(case):
    kept, message = INCOMPLETE[case]
    with pytest.raises(ValueError, match=message):
        statistics.paired_difference(made_up()[kept], "z", "raw")


def test_curves_that_cannot_be_told_apart_are_refused():
    curves = made_up()
    for broken, by, message in (
        (curves.drop(columns="method"), "method", "two rows for"),
        (curves[curves["k"] > 0], "method", "no row k = 0"),
        (curves[(curves["k"] > 0) | (curves["image"] > 0)], "method", "missing for some image"),
        (curves, "domain", "no column 'domain'"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.summarize(broken, by=by)
    with pytest.raises(ValueError, match="two rows for"):
        statistics.paired_difference(pd.concat([curves, curves]), "z", "raw")
