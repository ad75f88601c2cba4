"""Reference statistics against NumPy, SciPy and each other; saving, loading, refusing."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import nn

from pss.reference import Reference
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


def test_results_keep_the_dtype_and_leave_the_argument_alone(profiles, reference):
    given = profiles[:2].float()
    before = given.clone()
    assert reference.zscore(given).dtype == torch.float32
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


def test_save_and_load(tmp_path, profiles, reference):
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


def test_refuses_another_models_units(tmp_path):
    torch.save({"mean": torch.rand(10), "std": torch.rand(10).double()}, tmp_path / "stat.pth")
    with pytest.raises(ValueError, match="10 units, the model 8"):
        Reference.load(tmp_path / "stat.pth", Units.of(nn.Conv2d(1, 8, 3)))
    other = Reference(torch.ones(8), torch.ones(8), provenance={"units": "0000", "loss": "logit", "pss": "0.0.1"})
    differ = r"units: reference 0000.*pss: reference 0.0.1.*loss: reference logit, given cross_entropy"
    with pytest.raises(ValueError, match=differ):
        other.check(Units.of(nn.Conv2d(1, 8, 3)), loss="cross_entropy")


def test_check_compares_records_as_text():
    reference = Reference(torch.ones(8), torch.ones(8), provenance={"seed": 3})
    assert reference.check(Units.of(nn.Conv2d(1, 8, 3)), seed=3, unrecorded="anything") is reference


@pytest.mark.parametrize(
    ("change", "plain", "message"),
    [
        ({"mean": None}, {}, "argument: 'mean'"),
        ({"xi": None}, {}, r"lacks \['xi'\]"),
        ({"other": torch.ones(7)}, {}, "argument 'other'"),
        ({"xi": torch.ones(3)}, {}, r"'xi' is \(3,\), expected one number for each unit"),
        ({"mean": torch.full((7,), torch.nan)}, {}, "'mean' is not finite for 7 units"),
        ({"fitted": torch.ones(7)}, {}, "'fitted' is torch.float32"),
        ({}, {"n": 0}, "n = 0; expected"),
        ({}, {"provenance": None}, "expected n, level, scale_free, provenance in its header"),
        ({}, {"more": 1}, "expected n, level, scale_free, provenance in its header"),
        ({}, "[1]", "expected n, level, scale_free, provenance in its header"),
        ({}, "{", "damaged"),
    ],
)
def test_refuses_files_that_are_no_references(tmp_path, reference, change, plain, message):
    names = ("mean", "std", *TAIL)
    tensors = {name: getattr(reference, name).contiguous() for name in names} | change
    header = {"n": 300, "level": 0.9, "scale_free": False, "provenance": {}}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if isinstance(plain, dict):
        (tmp_path / "r.safetensors").write_bytes(pack(tensors, "pss", header | plain))
    else:
        save_file(tensors, tmp_path / "r.safetensors", {"pss": plain})
    with pytest.raises(ValueError, match=message):
        Reference.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("published", [False, True])
def test_refuses_truncated_files(tmp_path, reference, kept, published):
    path = tmp_path / ("r.pth" if published else "r.safetensors")
    if published:
        torch.save({"mean": torch.rand(900), "std": torch.rand(900)}, path)
    else:
        reference.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="is damaged"):
        Reference.load(path)
    with pytest.raises(FileNotFoundError, match="no reference at"):
        Reference.load(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.ones(5), torch.ones(4), r"'std' is \(4,\)"),
        (torch.ones(5, 1), torch.ones(5, 1), r"'mean' is \(5, 1\)"),
        (torch.tensor(1.0), torch.tensor(1.0), "'mean' is"),
        ([1.0], [1.0], "'mean' is list"),
        (torch.full((5,), torch.nan), torch.ones(5), "'mean' is not finite for 5 units"),
    ],
)
def test_refuses_published_statistics_of_wrong_shapes(tmp_path, mean, std, message):
    torch.save({"mean": mean, "std": std}, tmp_path / "stat.pth")
    with pytest.raises(ValueError, match=message):
        Reference.load(tmp_path / "stat.pth")
