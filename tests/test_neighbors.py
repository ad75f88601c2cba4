"""Neighbours in saliency space against brute force and scikit-learn; agreement against counting."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.neighbors import NearestNeighbors

import pss
from pss import neighbors
from pss.neighbors import nearest
from pss.statistics import agreement


@pytest.fixture
def reference(generator):
    return pss.Reference.fit(torch.rand(200, 12, generator=generator, dtype=torch.float64).exp())


@pytest.fixture
def profiles(generator):
    return torch.rand(30, 12, generator=generator, dtype=torch.float64).mul(3).exp()


def brute_force(queries, others, k, own):
    """Cosines one pair at a time in NumPy."""
    ids, values = [], []
    for q, x in enumerate(queries.numpy()):
        cosine = [(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -i) for i, y in enumerate(others.numpy())]
        best = sorted((c for c in cosine if -c[1] != own[q]), reverse=True)[:k]
        ids.append([-i for _, i in best])
        values.append([v for v, _ in best])
    return torch.tensor(ids), torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("method", ["zscore", "pot", "raw"])
def test_as_brute_force(profiles, reference, method, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK", 64)  # two queries at a time
    table = {
        "zscore": (profiles - reference.mean) / reference.std,
        "pot": -reference.log_tail_probability(profiles).clamp(min=np.log(1e-6)),
        "raw": profiles,
    }[method]
    ids, similarity = nearest(profiles, reference=reference, method=method, k=5)
    expected, values = brute_force(table, table, 5, range(30))
    assert torch.equal(ids, expected)
    torch.testing.assert_close(similarity, values)


def test_as_scikit_learn_among_others(profiles, reference):
    queries, others = profiles[:7], profiles[7:]
    ids, similarity = nearest(queries, others, reference, k=4)
    z = (profiles - reference.mean) / reference.std
    distance, expected = NearestNeighbors(n_neighbors=4, metric="cosine").fit(z[7:]).kneighbors(z[:7])
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-12)


def test_the_query_itself_is_left_out_by_id(profiles, reference):
    assert torch.equal(nearest(profiles[:3], profiles, reference, k=1)[0][:, 0], torch.arange(3))
    twin = torch.cat([profiles, profiles[:1]])  # an equal profile under another id is a neighbour
    ids, similarity = nearest(twin[:3], twin, reference, k=30, exclude=[0, -1, 2])
    assert ids[0, 0] == 30 and similarity[0, 0] == pytest.approx(1) and 0 not in ids[0]
    assert ids[1, 0] == 1 and 2 not in ids[2]


def test_tail_beyond_a_bounded_tail_stays_finite(reference):
    far = torch.full((2, 12), 50.0, dtype=torch.float64)
    assert reference.log_tail_probability(far).isneginf().any()
    far[1, 6:] = 0
    _, similarity = nearest(far, reference=reference, method="pot", k=1)
    assert similarity[0, 0] == pytest.approx(0.5**0.5)


def test_similarity_is_within_one(generator):
    x = torch.rand(150, 7, generator=generator)
    x = torch.cat([x, x, -x])  # signed profiles may be opposite; rounding would go beyond
    _, similarity = nearest(x, method="raw", k=449)
    assert similarity.max() == 1 and similarity.min() == -1
    assert nearest(x, method="raw")[0].shape == (450, 10)


def test_many_equal_profiles_go_by_id():
    ids, _ = nearest(torch.ones(400, 3), method="raw", k=399)
    assert ids[7].tolist() == [i for i in range(400) if i != 7]


def test_one_stage():
    with torch.random.fork_rng(devices=[]):
        model = pss.models.resnet18(width=2)
    units = pss.Units.of(model)
    profiles = torch.rand(9, len(units), generator=torch.Generator().manual_seed(1))
    own = torch.from_numpy(units.stage_ids == units.stages.index("conv3_x"))
    expected = nearest(profiles[:, own], method="raw", k=3)
    found = nearest(profiles, method="raw", k=3, units=units, stage="conv3_x")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], nearest(profiles, method="raw", k=3)[0])


def test_zero_profiles_are_similar_to_nothing_and_ties_go_by_id():
    profiles = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-30, 0.0], [0.0, 1.0]])
    ids, similarity = nearest(profiles, method="raw", k=3)
    assert similarity[0].tolist() == [0, 0, 0] and ids[0].tolist() == [1, 2, 3]
    assert ids[1].tolist() == [2, 0, 3] and similarity[1].tolist() == [1, 0, 0]  # 1e-30 squared is 0 in float32


def test_many_bounds_of_candidates_are_held(profiles):
    for arguments, message in (
        ({"exclude": [30] * 30}, "exclude must hold one id"),
        ({"exclude": [-2] * 30}, "exclude must hold one id"),
        ({"k": 30, "exclude": [0] + [-1] * 29}, r"outside 1\.\.29"),
        ({"among": profiles[..., None]}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest(profiles, method="raw", **arguments)


def test_agreement_counts_neighbours():
    labels, predicted = np.array([0, 0, 0, 1]), np.array([1, 1, 2, 2])
    found = agreement(labels, predicted, [[1, 2], [0, 3], [1, 3], [2, 0]])
    np.testing.assert_allclose(found["share"], [(2 + 1 + 1 + 0) / 8, (1 + 1 + 1 + 1) / 8, (1 + 1 + 0 + 0) / 8])
    np.testing.assert_allclose(found["chance"], [3 * 2 / 12, 4 / 12, 2 / 12])  # ordered pairs of different images
    assert ((found["low"] <= found["share"]) & (found["share"] <= found["high"])).all()
    assert found.index.tolist() == ["true", "wrong", "pair"]
    with_themselves = agreement(labels, predicted, [[1, 2], [0, 3], [1, 3], [2, 0]], exclude=[-1] * 4)
    np.testing.assert_allclose(
        with_themselves["chance"], [(3 * 3 + 1) / 16, (2 * 2 + 2 * 2) / 16, (2 * 2 + 1 + 1) / 16]
    )


def test_chance_is_what_random_neighbours_reach():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice(3, 60, p=[0.6, 0.3, 0.1]), rng.integers(2, size=60)
    own = np.tile(np.arange(60), 30)  # each image asks 30 times
    shuffled = np.stack([rng.permutation(np.delete(np.arange(60), q))[:20] for q in own])
    found = agreement(labels[own], predicted[own], shuffled, labels, predicted, own, resamples=9)
    np.testing.assert_allclose(found["share"], found["chance"], atol=0.01)
    everyone = np.stack([np.delete(np.arange(60), q) for q in range(60)])  # all the others: chance exactly
    exact = agreement(labels, predicted, everyone, resamples=9)
    np.testing.assert_allclose(exact["share"], exact["chance"], rtol=1e-12)
    np.testing.assert_allclose(found["chance"], exact["chance"], rtol=1e-12)


def test_agreement_with_other_candidates():
    found = agreement([0, 1], [1, 0], [[0], [0]], [0, 0, 1, 1], [1, 0, 0, 0], resamples=9)
    np.testing.assert_allclose(found["share"], [1 / 2, 1 / 2, 1 / 2])
    np.testing.assert_allclose(found["chance"], [2 / 4, (1 / 4 + 3 / 4) / 2, (1 / 4 + 2 / 4) / 2])


def test_interval_is_that_of_a_bootstrap_over_queries():
    rng = np.random.default_rng(1)
    labels = rng.integers(4, size=300)
    ids = rng.integers(300, size=(300, 5))
    found = agreement(labels, labels, ids).loc["true"]
    each = (labels[ids] == labels[:, None]).mean(axis=1)
    margin = 1.96 * each.std(ddof=1) / 300**0.5  # the normal approximation
    assert found["high"] - found["low"] == pytest.approx(2 * margin, rel=0.1)
    assert found["share"] == pytest.approx(each.mean())
    half = agreement(labels, labels, ids, level=0.5).loc["true"]
    scipys = bootstrap((each,), np.mean, confidence_level=0.5, method="percentile", rng=2).confidence_interval
    np.testing.assert_allclose([half["low"], half["high"]], scipys, atol=0.05 * margin)
    again = agreement(labels, labels, ids, level=0.95, resamples=2000, seed=0).loc["true"]
    assert again.equals(found) and not agreement(labels, labels, ids, seed=1).loc["true"].equals(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nearly_dead_unit_does_not_overflow(dtype):
    values = np.random.default_rng(0).exponential(size=(60, 3)).astype(np.float32)
    values[:, 2] *= 1e-40  # its z-scores reach 1e40, which float32 cannot hold
    new = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 0.0]], dtype=dtype)
    ids, similarity = nearest(new, reference=pss.Reference.fit(values), k=2)
    assert similarity.isfinite().all() and similarity.dtype == dtype
    assert ids[:2, 0].tolist() == [1, 0]
    torch.testing.assert_close(similarity[:2, 0], torch.ones(2, dtype=dtype))
