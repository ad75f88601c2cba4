"""Reference statistics against NumPy, SciPy and each other; saving, loading, refusing."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import nn

import pss
from pss.reference import Reference
from pss.storage.fingerprints import fingerprint
from pss.storage.tensors import pack
from pss.units import Units

U = 7
TAIL = ("threshold", "xi", "scale", "fitted", "n_excess", "mean_excess", "quantiles")


@pytest.fixture(scope="module")
def profiles() -> torch.Tensor:
    """300 images, 7 units: heavy and light tails, many zeros, a dead unit, a nearly dead one."""
    rng = np.random.default_rng(1)
    values = rng.lognormal(size=(300, U)) * 10.0 ** np.arange(-9, -2)
    values[:, 2] = stats.genpareto.rvs(0.6, scale=1e-3, size=300, random_state=rng)
    values[:, 3] = rng.beta(1, 3, size=300)
    values[rng.uniform(size=300) < 0.6, 4] = 0
    values[:, 5] = 0
    values[:, 6] = 0
    values[7, 6] = 1.0
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def reference(profiles) -> Reference:
    return Reference.fit(profiles)


def test_mean_deviation_threshold_are_those_of_numpy(profiles, reference):
    values = profiles.numpy()
    np.testing.assert_allclose(reference.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(reference.std, values.std(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(reference.threshold, np.quantile(values, 0.9, axis=0), rtol=1e-12)
    assert reference.n == 300 and reference.n_excess[:5].tolist() == [30] * 5
    assert reference.dead.tolist() == [False] * 5 + [True, False]
    assert reference.fitted.tolist() == [True] * 5 + [False, False]


def test_tail_fit_is_as_likely_as_that_of_scipy(profiles, reference):
    for unit in range(5):
        values = profiles[:, unit].numpy()
        excess = values[values > reference.threshold[unit].item()] - reference.threshold[unit].item()
        shape, _, scale = stats.genpareto.fit(excess / excess.mean(), floc=0)
        theirs = stats.genpareto.logpdf(excess, shape, scale=scale * excess.mean()).sum()
        ours = stats.genpareto.logpdf(excess, reference.xi[unit].item(), scale=reference.scale[unit].item()).sum()
        assert ours >= theirs - 1e-6 * len(excess)


def test_tail_probability_above_and_below_the_threshold(profiles, reference):
    log_p = reference.log_tail_probability(profiles)
    for unit in range(4):
        values, u = profiles[:, unit].numpy(), reference.threshold[unit].item()
        above = values > u
        tail = stats.genpareto(reference.xi[unit].item(), loc=u, scale=reference.scale[unit].item())
        np.testing.assert_allclose(log_p[above, unit], np.log(0.1) + tail.logsf(values[above]), rtol=1e-9)
        share = np.array([(values >= v).mean() for v in values[~above]])  # empirical P(S >= s)
        np.testing.assert_allclose(log_p[~above, unit].exp(), share, atol=0.012)


def test_mass_of_the_tail_is_the_share_above_not_one_less_the_level():
    values = np.random.default_rng(2).exponential(size=(22, 3))  # three of 22 lie above the 90th percentile: 0.136
    u = np.quantile(values, 0.9, axis=0)
    over = values > u
    new = u + np.array([[1e-9], [0.7], [3.0]])
    p = over.sum(axis=0) / 22 * np.exp(-(new - u) / np.where(over, values - u, 0).sum(axis=0) * over.sum(axis=0))
    assert over.sum(axis=0).tolist() == [3, 3, 3]  # too few for more than an exponential tail
    np.testing.assert_allclose(Reference.fit(values).log_tail_probability(torch.from_numpy(new)).exp(), p, rtol=1e-8)


def test_values_at_the_threshold_are_no_excesses():
    values = np.random.default_rng(3).geometric(0.4, size=(201, 40)).astype(float)  # whole numbers: many at it
    u = np.quantile(values, 0.9, axis=0)
    reference, over = Reference.fit(values), values > u
    assert ((values == u).sum(axis=0) >= 5).all() and len(set(over.sum(axis=0))) > 3
    assert reference.n_excess.tolist() == over.sum(axis=0).tolist()
    mean = [(values[o, unit] - u[unit]).mean() for unit, o in enumerate(over.T)]
    np.testing.assert_allclose(reference.mean_excess, mean, rtol=1e-12)


def test_where_nothing_lies_above_the_threshold_the_tail_is_as_wide_as_the_deviation():
    values = np.repeat([1.0, 2.0, 3.0, 4.0], 10)[:, None]
    reference = Reference.fit(values)
    assert reference.threshold.item() == 4 and reference.n_excess.item() == reference.mean_excess.item() == 0
    p = reference.log_tail_probability(torch.tensor([[5.5]])).exp().item()
    assert p == pytest.approx(1 / 40 * np.exp(-1.5 / values.std(ddof=1)), rel=1e-9)


@pytest.mark.parametrize(("n", "level"), [(300, 0.9), (47, 0.6), (20, 0.99)])
def test_below_the_threshold_probability_is_linear_between_quantiles(n, level):
    values = np.random.default_rng(4).lognormal(size=(n, 5))
    reference, levels = Reference.fit(values, level), np.linspace(0, level, 101)
    quantiles = np.quantile(values, levels, axis=0)
    np.testing.assert_allclose(reference.quantiles, quantiles.T, rtol=1e-12)
    for new, at in (
        (quantiles[1:], levels[1:]),
        ((quantiles[1:] + quantiles[:-1]) / 2, (levels[1:] + levels[:-1]) / 2),
    ):
        p = reference.log_tail_probability(torch.from_numpy(new)).exp()
        share = (values > quantiles[-1]).mean(axis=0)  # above the threshold, which no value below is rarer than
        np.testing.assert_allclose(p, np.maximum(1 - at[:, None], share), rtol=1e-9)
    smallest = torch.from_numpy(np.stack([values.min(axis=0), values.min(axis=0) / 2]))
    assert (reference.log_tail_probability(smallest) == 0).all()


def test_zero_saliency_is_never_unusual(profiles, reference):
    zero = reference.log_tail_probability(torch.zeros(1, U))
    assert (zero == 0).all()


def test_tail_probability_is_monotone_and_continuous_at_the_threshold(reference):
    grid = torch.linspace(0, 3, 4001, dtype=torch.float64)[:, None] * reference.threshold
    for tail in ("gpd", "exponential"):
        steps = reference.tail_score(grid, tail).diff(dim=0)
        assert (steps >= -1e-12).all()
        assert steps[:, :3].max() < 0.06


@pytest.mark.parametrize(("n", "level"), [(22, 0.9), (199, 0.9), (20, 0.99), (300, 0.999)])
def test_scores_rise_across_the_threshold_for_any_number_of_images(n, level):
    values = np.random.default_rng(2).exponential(size=(n, 3))  # the share above is more than 1 - level
    reference = Reference.fit(values, level=level)
    near = torch.linspace(-0.02, 0.02, 401, dtype=torch.float64)[:, None]
    grid = reference.threshold * (1 + near)
    for tail in ("gpd", "exponential"):
        assert (reference.tail_score(grid, tail).diff(dim=0) >= -1e-12).all()
        assert (reference.log_tail_probability(grid, tail).diff(dim=0) <= 1e-12).all()


def test_beyond_the_end_of_a_bounded_tail_the_order_goes_on(reference):
    assert reference.xi[3] < 0  # Beta(1, 3): the tail ends at 1
    end = reference.threshold[3] - reference.scale[3] / reference.xi[3]
    x = torch.zeros(3, U, dtype=torch.float64)
    x[:, 3] = torch.stack([0.999 * end, 1.5 * end, 2 * end])
    log_p, score = reference.log_tail_probability(x)[:, 3], reference.tail_score(x)[:, 3]
    assert log_p[0].isfinite() and log_p[1:].isneginf().all()
    assert score[0] == -log_p[0] and score[0] < score[1] < score[2] < torch.inf


def test_zscores(profiles, reference):
    z = reference.zscore(profiles)
    expected = stats.zscore(profiles[:, :5].numpy(), ddof=1, axis=0)
    np.testing.assert_allclose(z[:, :5], expected, rtol=1e-9, atol=1e-12)
    assert (z[:, 5] == 0).all()
    assert torch.equal(reference.abs_zscore(profiles), z.abs())
    np.testing.assert_allclose(reference.ratio(profiles)[:, :5].mean(dim=0), 1, rtol=1e-9)
    assert (reference.ratio(profiles + 1)[:, 5] == 0).all()  # its mean is zero
    ones = Reference(torch.ones(2).double(), torch.ones(2).double())
    assert ones.ratio(torch.tensor([[3.0, 0.5]])).tolist() == [[3.0, 0.5]]


def test_results_keep_the_dtype_and_leave_the_argument_alone(profiles, reference):
    given = profiles[:2].float()
    before = given.clone()
    assert reference.zscore(given).dtype == reference.ratio(given).dtype == torch.float32
    reference.log_tail_probability(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize("chunks", [None, (50, 3)])
@pytest.mark.parametrize("max_bytes", [1, 300 * 8 * 2, 1 << 30])
@pytest.mark.parametrize("scale_free", [False, True])
def test_blocks_give_the_whole(profiles, max_bytes, scale_free, chunks):
    array = (
        pytest.importorskip("dask.array").from_array(profiles.numpy(), chunks=chunks) if chunks else profiles.numpy()
    )
    whole = Reference.fit(profiles, scale_free=scale_free)
    parts = Reference.fit(array, scale_free=scale_free, max_bytes=max_bytes)
    for name in ("mean", "std", "threshold", "quantiles", "xi", "scale", "n_excess"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=0, equal_nan=True)


def test_scale_free_reference_ignores_the_size_of_a_profile(profiles):
    reference = Reference.fit(profiles, scale_free=True)
    z = reference.zscore(profiles[:5])
    torch.testing.assert_close(reference.zscore(1e4 * profiles[:5]), z, rtol=1e-9, atol=1e-9)
    shares = profiles / profiles.mean(dim=1, keepdim=True)
    torch.testing.assert_close(reference.mean, shares.mean(dim=0))
    some = profiles.clone()
    some[3] = 0  # an image whose gradient vanishes has no size: it stays zero
    shares[3] = 0
    torch.testing.assert_close(Reference.fit(some, scale_free=True).mean, shares.mean(dim=0))
    nothing = torch.zeros(1, U, dtype=torch.float64)
    assert torch.equal(reference.ratio(nothing), nothing)
    with pytest.raises(ValueError, match="negative for some image"):
        reference.zscore(-profiles[:1])


def test_save_and_load(tmp_path, profiles, reference):
    class Store(np.ndarray):
        provenance = {"model": "abc", "loss": "logit"}  # noqa: RUF012

    reference = Reference.fit(profiles.numpy().view(Store), provenance={"loss": "mine"})
    assert reference.provenance == {"model": "abc", "loss": "mine"}
    reference = Reference.fit(profiles, provenance={"model": "abc"})
    reference.save(tmp_path / "sub" / "ref.safetensors")
    loaded = Reference.load(tmp_path / "sub" / "ref.safetensors")
    assert loaded.provenance == {"model": "abc"} and loaded.n == 300 and loaded.level == 0.9
    assert torch.equal(loaded.log_tail_probability(profiles), reference.log_tail_probability(profiles))
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["ref.safetensors"]


def test_published_statistics(peer_data):
    counts = {"resnet50": (26560, 280), "vgg19": (5504, 0), "densenet121": (10240, 5), "inception_v3": (18112, 903)}
    for name, (units, dead) in counts.items():
        reference = Reference.load(peer_data / f"ImageNet_val_saliency_stat_{name}_filter_wise.pth")
        assert len(reference) == units and int(reference.dead.sum()) == dead
        with pytest.raises(ValueError, match="no tail"):
            reference.log_tail_probability(torch.rand(1, units))


def test_statistics_as_they_are_published(tmp_path):
    path = tmp_path / "stat.pth"
    held = {"mean": torch.rand(6), "std": torch.rand(6).double(), "more": 1}
    torch.save(held, path)
    read = Reference.load(path)
    assert torch.equal(read.mean, held["mean"].double()) and torch.equal(read.std, held["std"])
    assert read.provenance == {"source": "stat.pth", "of": "gradient"}
    assert read.n == 0 and read.level == 0.9 and not read.scale_free
    assert read.threshold is None and "mean and deviation only, 0 dead" in repr(read)
    assert torch.equal(read.zscore(held["mean"][None]), torch.zeros(1, 6))
    for wrong in ({"mean": held["mean"]}, [held["mean"], held["std"]], "mean std"):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="expected a dict with 'mean' and 'std'"):
            Reference.load(path)


def test_says_what_it_is(reference):
    assert repr(reference) == "Reference(7 units, 300 images, level 0.9, 2 tails not fitted, 1 dead)"
    one = dataclasses.replace(reference, fitted=torch.arange(7) > 0)
    assert "1 tail not fitted" in repr(one)


@pytest.mark.parametrize("key", ["model", "loss", "signed", "pss"])
def test_use_for_something_else_is_refused_by_what_differs(profiles, key):
    model = nn.Conv2d(1, U, 3)
    units = Units.of(model)
    use = {"model": model, "loss": "logit", "signed": False}
    whole = use | {"model": fingerprint(model), "pss": pss.__version__}
    assert Reference.fit(profiles, provenance=whole).check(units, **use)
    assert Reference.fit(profiles, provenance={}).check(units, **use)  # nothing is recorded
    other = Reference.fit(profiles, provenance=whole | {key: "another"})
    with pytest.raises(ValueError, match=rf"something else \({key}: reference another, given [^;]*\): fit one"):
        other.check(units, **use)


def test_refuses_another_models_units(tmp_path):
    for name in ("stat.pth", "stat.pt"):
        torch.save({"mean": torch.rand(10), "std": torch.rand(10).double()}, tmp_path / name)
        assert len(Reference.load(tmp_path / name, Units.of(nn.Conv2d(1, 10, 3)))) == 10
    with pytest.raises(ValueError, match=r"source: reference stat\.pth, given other"):
        Reference.load(tmp_path / "stat.pth", Units.of(nn.Conv2d(1, 10, 3)), source="other")
    other = Reference(torch.ones(8), torch.ones(8), provenance={"units": "0000", "loss": "logit", "pss": "0.0.1"})
    differ = r"units: reference 0000.*pss: reference 0.0.1.*loss: reference logit, given cross_entropy"
    with pytest.raises(ValueError, match=differ):
        other.check(Units.of(nn.Conv2d(1, 8, 3)), loss="cross_entropy")


def test_check_compares_records_as_text():
    reference = Reference(torch.ones(8), torch.ones(8), provenance={"seed": 3})
    assert reference.check(Units.of(nn.Conv2d(1, 8, 3)), seed=3, unrecorded="anything") is reference


# tensors and plain values of a file, changed, and what is said of it
BAD = [
    ({"mean": None}, {}, "argument: 'mean'"),
    ({"xi": None}, {}, r"lacks \['xi'\]"),
    ({"other": torch.ones(7)}, {}, "argument 'other'"),
    ({"std": torch.ones(4)}, {}, r"'std' is \(4,\), expected one number for each unit"),
    ({"mean": torch.ones(7, 1)}, {}, r"'mean' is \(7, 1\)"),
    ({"mean": torch.tensor(1.0)}, {}, r"'mean' is \(\)"),
    ({"mean": torch.full((7,), torch.nan)}, {}, "'mean' is not finite for 7 units"),
    ({"fitted": torch.ones(7)}, {}, "'fitted' is torch.float32"),
    ({}, {"n": 0}, "n = 0; expected"),
    ({}, {"n": "many"}, "no reference that can be used"),
    ({}, {"provenance": None}, "expected n, level, scale_free, provenance in its header"),
    ({}, {"more": 1}, "expected n, level, scale_free, provenance in its header"),
    ({}, "[1]", "expected n, level, scale_free, provenance in its header"),
    ({}, "{", "damaged"),
]


@pytest.mark.parametrize(("change", "plain", "message"), BAD)
def test_refuses_files_that_are_no_references(tmp_path, reference, change, plain, message):
    tensors = {name: getattr(reference, name).contiguous() for name in ("mean", "std", *TAIL)} | change
    header = {"n": 300, "level": 0.9, "scale_free": False, "provenance": {}}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if isinstance(plain, dict):
        (tmp_path / "r.safetensors").write_bytes(pack(tensors, "pss", header | plain))
    else:
        save_file(tensors, tmp_path / "r.safetensors", {"pss": plain})
    with pytest.raises(ValueError, match=message):
        Reference.load(tmp_path / "r.safetensors")


def test_refuses_damaged_published_statistics(tmp_path):
    path = tmp_path / "stat.pth"
    torch.save({"mean": [1.0], "std": [1.0]}, path)
    with pytest.raises(ValueError, match=r"stat.pth holds no reference that can be used: 'mean' is list"):
        Reference.load(path)
    torch.save({"mean": torch.rand(900), "std": torch.rand(900)}, path)
    whole = path.read_bytes()
    for kept in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="is damaged"):
            Reference.load(path)
