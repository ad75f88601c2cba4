"""Ranking methods against direct computation, and their populations."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from pss.ranking import RANKINGS, rank, rank_together, score
from pss.reference import Reference
from pss.statistics import fdr_significant, stage_shares
from pss.units import Units


@pytest.fixture(scope="module")
def units() -> Units:
    model = nn.Module()
    model.conv1, model.layer1, model.layer2 = nn.Conv2d(3, 10, 3), nn.Module(), nn.Module()
    model.layer1.conv, model.layer2.conv = nn.Conv2d(10, 20, 3), nn.Conv2d(20, 30, 3)
    return Units.of(model)


@pytest.fixture(scope="module")
def profiles() -> torch.Tensor:
    values = torch.from_numpy(np.random.default_rng(0).lognormal(sigma=1.5, size=(400, 60)))
    values[:, 17] = 0  # dead, also once divided by the size of the profile
    return values


@pytest.fixture(scope="module")
def reference(profiles) -> Reference:
    return Reference.fit(profiles)


@pytest.fixture(scope="module")
def references(profiles, reference) -> dict[bool, Reference]:
    """By whether they are scale-free."""
    return {False: reference, True: Reference.fit(profiles, scale_free=True)}


LAST_STAGE = ("random_last_stage", "last_stage_raw")


@pytest.mark.parametrize("method", RANKINGS)
def test_every_method_ranks_every_unit_once_and_dead_ones_last(method, profiles, references, units):
    reference = references["scale_free" in RANKINGS[method].needs]
    new = profiles[:8].clone()
    new[:, 17] = 1e6
    k = 30 if method in LAST_STAGE else 60
    ids = rank(new, reference, method, k, units)
    assert ids.shape == (8, k) and ids.dtype == torch.int64
    everyone = torch.arange(60)[-k:]
    assert torch.equal(ids.sort(dim=1).values, everyone.expand(8, k))
    assert method in LAST_STAGE or (ids[:, -1] == 17).all()


@pytest.mark.parametrize("method", RANKINGS)
def test_what_an_entry_needs_is_asked_for_and_nothing_else(method, profiles, references, units):
    """Each need, taken away, is refused by name; with all of them, and no more, it ranks."""
    entry, new = RANKINGS[method], profiles[:2]
    given = {"units": units, "reference": references["scale_free" in entry.needs]}
    needs = {n for n in entry.needs if n != "scale_free"} | (
        {"reference"} if method == "layer_matched_random" else set()
    )
    rank(new, method=method, k=5, **{name: given[name] for name in needs})
    for name in needs:
        with pytest.raises(ValueError, match=f"needs (a )?{name}"):
            rank(new, method=method, k=5, **{n: given[n] for n in needs - {name}})
    if entry.tail:
        log_p = references["scale_free" in entry.needs].log_tail_probability(new, entry.tail)
        here = log_p.isfinite()
        torch.testing.assert_close(score(new, given["reference"], method)[here], -log_p[here])


@pytest.mark.parametrize("method", ["random_last_stage", "layer_matched_random"])
def test_random_units_are_dead_ones_last(method, units):
    values = torch.from_numpy(np.random.default_rng(0).lognormal(size=(100, 60)))
    values[:, 30:50] = 0.0  # 20 of the 30 units of the last stage, which is one layer
    reference = Reference.fit(values)
    new = values[:20].clone()
    new[:, 50:] *= 100
    ids = rank(new, reference, method, 10, units, match="zscore")
    assert not reference.dead[ids].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["pot", "raw", "random_last_stage"])
def test_a_profile_that_is_not_finite_is_refused(method, value, profiles, reference, units):
    new = profiles[:3].clone()
    new[1, 4] = value
    with pytest.raises(ValueError, match=r"profiles \[1\] are not finite"):
        rank(new, reference, method, 5, units)


def test_orders_are_those_of_the_definitions(profiles, reference):
    new = profiles[:1]
    alive = [u for u in range(60) if u != 17]
    z = (new[0] - profiles.mean(dim=0)) / profiles.std(dim=0)
    by = lambda key: sorted(alive, key=key)  # noqa: E731
    assert rank(new, reference, "zscore")[0, :59].tolist() == by(lambda u: -z[u])
    assert rank(new, reference, "abs_zscore")[0, :59].tolist() == by(lambda u: -abs(z[u]))
    assert rank(new, reference, "lowest_zscore")[0, :59].tolist() == by(lambda u: z[u])
    assert rank(new, reference, "raw")[0, :59].tolist() == by(lambda u: -new[0, u])
    assert rank(new, reference, "ratio")[0, :59].tolist() == by(lambda u: -new[0, u] / profiles[:, u].mean())
    log_p, plain = (reference.log_tail_probability(new, tail)[0] for tail in ("gpd", "exponential"))
    assert rank(new, reference, "exponential")[0, :59].tolist() == by(lambda u: plain[u]) != by(lambda u: log_p[u])
    assert rank(new, reference, "pot")[0, :59].tolist() == by(lambda u: log_p[u])
    assert torch.equal(rank(new, reference), rank(new, reference, "zscore", 60))
    assert rank(new, reference, k=1).tolist() == [[by(lambda u: -z[u])[0]]]


def test_relative_to_the_layer_by_hand(profiles, reference, units):
    new = profiles[:4].clone()
    new[:, 30:] *= 20  # a whole layer that is unusual hides a unit that is alone in its own
    new[:, 12] = 3 * profiles[:, 12].std() + profiles[:, 12].mean()
    z = reference.abs_zscore(new)
    expected = torch.zeros_like(z)
    for span in map(units.span, range(3)):
        for u in range(60)[span]:
            others = [v for v in range(60)[span] if v not in (u, 17)]  # 17 is dead, and no measure of others
            expected[:, u] = z[:, u] / z[:, others].mean(1)
    torch.testing.assert_close(score(new, reference, "layer_relative_zscore", units=units), expected)
    first = [
        rank_together(new, reference, how, units=units)["unit"][0] for how in ("layer_relative_zscore", "abs_zscore")
    ]
    assert first[0] == 12 and first[1] >= 30


def test_relative_to_a_layer_of_one_unit_or_of_dead_ones(units):
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 3, 3))
    values = torch.rand(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 2:] = 0.5
    reference, new = Reference.fit(values), torch.tensor([[9.0, 3.0, 0.5, 7.0]], dtype=torch.float64)
    got = score(new, reference, "layer_relative_zscore", units=Units.of(model))
    torch.testing.assert_close(got, reference.abs_zscore(new))
    assert rank(new, reference, "layer_relative_zscore", units=Units.of(model)).tolist() == [[0, 1, 2, 3]]


def test_equal_scores_go_by_id():
    values = torch.arange(2000) % 3 == 0
    ids = rank(values[None].double(), None, "raw")[0]
    assert ids.tolist() == [*range(0, 2000, 3), *(i for i in range(2000) if i % 3)]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_first_are_those_of_a_whole_sort_where_scores_are_equal_too(k):
    generator = torch.Generator().manual_seed(k)
    few = torch.randint(6, (200, 20), generator=generator).double()  # many are equal, at the last place too
    rows = torch.where(torch.arange(200)[:, None] % 2 == 0, few, torch.rand(200, 20, generator=generator).double())
    assert torch.equal(rank(rows, None, "raw", k), (-rows).argsort(dim=1, stable=True)[:, :k])


def test_scores_are_float64(profiles, reference):
    for method, entry in RANKINGS.items():
        if not {"units", "scale_free"} & set(entry.needs):
            of = score(profiles[:2].float(), reference, method)
            assert of.dtype == torch.float64 and of.shape == (2, 60), method


def test_beyond_the_support_comes_first_and_in_order(profiles):
    bounded = torch.rand(500, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reference = Reference.fit(bounded)
    new = torch.tensor([[0.5, 3.0, 0.99, 9.0]], dtype=torch.float64)
    assert rank(new, reference, "pot", 4)[0].tolist() == [3, 1, 2, 0]


def test_layer_matched_random_copies_the_layers_not_the_units(profiles, reference, units):
    base = rank(profiles[:50], reference, "zscore", 12, units)
    drawn = rank(profiles[:50], reference, "layer_matched_random", 12, units, match="zscore")
    layers = torch.from_numpy(units.layer_ids)
    assert torch.equal(layers[base], layers[drawn])
    assert all(len(set(row)) == 12 for row in drawn.tolist())
    assert (base == drawn).double().mean() < 0.2


@pytest.mark.parametrize("method", ["random", "random_last_stage", "layer_matched_random"])
def test_randomness_comes_from_the_generator(method, profiles, units):
    def draw(*generator):
        return rank(profiles[:3], None, method, 10, units, *generator, match="raw")

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len(draw(1).unique(dim=0)) == 3  # each image has its own
    assert torch.equal(draw(), draw(0))
    source = torch.Generator().manual_seed(1)
    first, second = draw(source), draw(source)  # it goes on
    assert torch.equal(first, draw(1)) and not torch.equal(first, second)


def test_scores_drawn_at_random_have_the_seed_of_the_ranking(profiles):
    assert torch.equal(score(profiles, None, "random"), score(profiles, None, "random", 0))


def test_layers_to_be_matched_can_be_those_of_any_ranking(profiles, units):
    drawn = rank(profiles[:3], None, "layer_matched_random", 10, units, match="random_last_stage")
    assert (drawn >= 30).all()


def test_significant_is_benjamini_hochberg_by_hand():
    p = torch.tensor([[0.001, 0.5, 0.012, 0.03, 0.9]])  # sorted: .001 .012 .03 .5 .9 against .01 .02 .03 .04 .05
    assert fdr_significant(p.log(), 10**6, q=0.05).tolist() == [[True, False, True, True, False]]
    assert fdr_significant(p.log(), 10**6, q=0.05, dependent=True).tolist() == [[True, False, False, False, False]]


def test_what_no_reference_image_has_shown_is_not_significant_alone():
    """Of 10 units and 99 images one alone needs p <= 0.005, which they cannot show; of three it is 0.015."""
    log_p = torch.full((3, 10), -0.1)
    log_p[0, :1], log_p[1, :5], log_p[2, :1] = -torch.inf, -torch.inf, math.log(0.01)
    assert fdr_significant(log_p, 99, q=0.05).sum(dim=1).tolist() == [0, 5, 0]
    assert fdr_significant(log_p, 199, q=0.05).sum(dim=1).tolist() == [1, 5, 0]


def test_significance_at_its_bounds():
    assert fdr_significant(torch.tensor([[0.5]]).double().log(), 99, q=0.5).tolist() == [[True]]  # at most q
    assert fdr_significant(torch.tensor([[0.0, -9.0]]), 10**6).tolist() == [[False, True]]  # p = 1 is a probability


def test_false_discoveries_are_held_at_q():
    p = torch.rand(4000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    any_found = fdr_significant(p.log(), 10**6, q=0.1).any(dim=1).double().mean().item()
    assert 0.08 < any_found < 0.12  # every discovery is false: the rate of any is q


def test_stage_shares(units):
    shares = stage_shares(torch.tensor([[0, 1, 10, 30], [0, 10, 11, 12]]), units)
    expected = pd.DataFrame(
        {"share": [3 / 8, 4 / 8, 1 / 8], "error": [0.125, 0.25, 0.125], "prior": [1 / 6, 2 / 6, 3 / 6]},
        index=pd.Index(["conv1", "conv2_x", "conv3_x"], name="stage"),
    )
    pd.testing.assert_frame_equal(shares, expected)
    one = stage_shares(torch.tensor([[0, 10, 11, 12]]), units)
    assert one["share"].tolist() == [1 / 4, 3 / 4, 0] and one["error"].isna().all()


def test_last_stage_is_ranked_by_raw_saliency(profiles, units):
    ids = rank(profiles[:4], None, "last_stage_raw", 3, units)
    assert torch.equal(ids, 30 + profiles[:4, 30:].argsort(dim=1, descending=True)[:, :3])
    with pytest.raises(ValueError, match=r"k = 31 is more than the 30 units that 'last_stage_raw' ranks"):
        rank(profiles[:4], None, "last_stage_raw", 31, units)


def test_a_scale_free_ranking_is_the_plain_one_of_a_scale_free_reference(profiles, references):
    for method in ("zscore", "pot"):
        free = rank(profiles[:5], references[True], f"scale_free_{method}")
        assert torch.equal(free, rank(7 * profiles[:5], references[True], method))
        assert not torch.equal(free, rank(profiles[:5], references[False], method))
