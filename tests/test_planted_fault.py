"""Faults with a known place: break one filter of a network, and see whether the images that it spoils point at it.

`bench.planted_faults` does so for seven kinds of fault and three networks. Here its faults are looked at, some rows of
the table that it left are made again, and what is said of the table is held, with floors well below what is measured.
"""

from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch

import pss
from bench import groups, planted_faults, pruned_filters, tables
from bench.planted_faults import KINDS, PER_STAGE, RANKINGS, TOP, Network, look

TABLE = tables.read(planted_faults.OUT)
FOUR = ("weights x10", "noise", "one weight", "gain x20")
OWN, BOTH = "output, in layer", "output and gain, in turns"
TAILS = ["output and gain, smaller p", "output and gain, product of p"]


def found(table: pd.DataFrame) -> pd.DataFrame:
    """Whether the broken filter is in the group's first ten, by every ranking."""
    return pd.DataFrame({name: table[f"{name}: place"] <= TOP for name in RANKINGS})


def images(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the spoiled images that have the broken filter in their own first ten."""
    return pd.DataFrame({name: table[f"{name}: images"] / table["images"] for name in RANKINGS})


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_changes_its_filter_and_nothing_else(network, kind):
    for unit in (3, 700):
        healthy, broken = network.model.state_dict(), network.broken(kind, unit).state_dict()
        number, row = network.units.locate(unit)
        changed = {
            name: (broken[name] != healthy[name]).nonzero()[:, 0].unique() for name in healthy if broken[name].dim()
        }
        changed = {name: rows.tolist() for name, rows in changed.items() if len(rows)}
        place = network.units.layers[number].parameter
        expected = {"gain x20": f"{network.norms[number]}.weight", "shift": f"{network.norms[number]}.bias"}
        assert changed == {expected.get(kind, place): [row]}
        assert all(map(torch.equal, network.broken(kind, unit).parameters(), network.broken(kind, unit).parameters()))


def test_spoiled_images_are_those_that_the_whole_broken_network_misreads(network):
    assert not set(network.test.sources) & set(pss.data.mnist("reference").sources)
    for unit in np.searchsorted(network.units.stage_ids, range(5)) + 1:
        broken = network.broken("gain x20", int(unit))
        wrong = pss.models.predict(broken, network.test.images).argmax(1) != network.test.labels
        expected = (network.right & wrong).nonzero()[: planted_faults.IMAGES, 0]
        assert torch.equal(network.spoiled("gain x20", int(unit)), expected)


def test_activations_are_what_a_relu_leaves_of_the_normalized_outputs(network):
    x, y = network.test.images[:4], network.test.labels[:4]
    of = network.quantities(network.model, x, y)
    first = network.model.bn1(network.model.conv1(x)).relu().mean((2, 3))
    torch.testing.assert_close(of["activation"][:, : first.shape[1]], first.detach())
    assert (of["activation"] >= of["output"] - 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_table_are_made_again(network, kind):
    """One fault of each kind: as many images, and the same places, but for what rounding decides."""
    there = TABLE.query("network == 0 and kind == @kind").sample(1, random_state=0)
    unit = int(there["unit"].iloc[0])
    again = pd.DataFrame([look(network, kind, unit, network.spoiled(kind, unit))])
    about = ["network", "kind", "stage", "unit", "images"]
    assert again[about].values.tolist() == there[about].values.tolist()
    assert (found(again).to_numpy() == found(there).to_numpy()).mean() >= 0.95
    assert np.abs(images(again).to_numpy() - images(there).to_numpy()).max() <= 0.1


def test_the_table_is_of_three_networks_and_all_kinds():
    count = TABLE.groupby(["kind", "stage", "network"]).size()
    assert TABLE["network"].nunique() >= 3 and set(TABLE["kind"]) == set(KINDS) and (count <= PER_STAGE).all()
    assert (TABLE.groupby(["kind", "network"]).size() >= 10).all()
    assert not TABLE.duplicated(["network", "kind", "unit"]).any()


def test_what_contributes_is_found_by_gain_and_not_by_gradient():
    by = found(TABLE).groupby(TABLE["kind"]).mean()
    for how in ("raw", "z", "free z", "POT 0.90"):
        assert (by.loc[["weights x10", "shift"], f"gradient, {how}"] <= 0.2).all()
    assert (by.loc[list(FOUR), "gain, free z"] >= 0.8).all()
    assert (by.loc[[*FOUR, "zeroed"], "gain, root"] >= 0.8).all()
    assert by.loc["gain x20", "gradient, free z"] >= 0.9 and by.loc[["zeroed", "shift"], "gain, free z"].max() <= 0.3


def test_the_output_relative_to_its_layer_names_all_kinds_in_every_network():
    of, first = found(TABLE), TABLE.filter(like=": place") == 1
    for how in (OWN, BOTH):
        assert (of[how].groupby(TABLE["network"]).mean() >= 0.95).all()
        assert (of[how].groupby(TABLE["kind"]).mean() >= 0.85).all()
        assert of[how].mean() > of[[*TAILS, "output, |z|", "gain, root"]].mean().max() + 0.02
    rivals = first.drop(columns=[f"{how}: place" for how in (OWN, BOTH)]).mean()
    assert first[f"{OWN}: place"].mean() > max(0.9, rivals.max() + 0.02)
    assert images(TABLE)[OWN].mean() > images(TABLE)["output, |z|"].mean() + 0.02


def test_a_scale_free_gradient_finds_more_in_the_early_stages():
    early = TABLE.query("kind == 'gain x20' and stage in ('conv1', 'conv2_x')")
    share = images(early).mean()
    assert share["gradient, free z"] > share["gradient, z"] + 0.05
    assert share["gradient, free POT"] > share["gradient, POT 0.90"] + 0.05


@pytest.mark.parametrize("name", ["layer1.1.conv1[2]", "layer2.0.conv2[9]", "layer3.0.conv2[44]"])
def test_a_reference_of_the_broken_network_hides_the_fault(network, name):
    unit = next(u for u in range(len(network.units)) if network.units.name(u) == name)
    broken, at, usual = network.broken("gain x20", unit), network.spoiled("gain x20", unit), pss.data.mnist("reference")
    spoiled = network.quantities(broken, network.test.images[at], network.test.labels[at])
    for quantity, values in network.quantities(broken, usual.images, usual.labels).items():
        if quantity in ("gradient", "gain"):
            references = network.references[quantity, "free"], pss.Reference.fit(values, scale_free=True)
            seen, hidden = (pss.rank_together(spoiled[quantity], r, "zscore", TOP) for r in references)
            share = lambda table: table.set_index("unit")["images"][unit]  # noqa: E731
            assert share(hidden) < 0.25 and share(seen) > share(hidden) + 0.3, quantity


# Groups where nothing is broken, and pruning


def test_a_planted_fault_stands_out_more_than_what_is_read_right():
    table = tables.read(groups.OUT)
    assert table["network"].nunique() >= 3
    sort = table["group"].str.split(",").str[0]
    for ranking in groups.ASKED:
        top = table.pivot_table(f"{ranking}: score", "network", sort, "median")
        assert (top["broken"] > 2 * top["read right"]).all()


def test_relative_to_its_layer_a_planted_fault_stands_out_more_than_anything_where_nothing_is_broken():
    table = tables.read(groups.OUT)
    broken, scores = table["sort"] == "broken", table.filter(like=": score")
    above = (scores[broken] > scores[~broken].max()).mean()
    assert above[f"{OWN}: score"] > max(0.7, above["gain, root: score"] + 0.3, above["output, |z|: score"] + 0.3)


def test_a_row_of_the_groups_is_made_again(network):
    there = tables.read(groups.OUT).query("network == 0 and sort == 'healthy'").iloc[:2]
    rows = [groups.look(0, "healthy", *group) for group in islice(groups.healthy(network), 2)]
    pd.testing.assert_frame_equal(pd.DataFrame(rows), there.reset_index(drop=True), rtol=0.01, atol=0.01)


def test_a_row_of_the_pruned_is_made_again():
    there = tables.read(pruned_filters.OUT).query("network == 0 and domain == 'digits' and ranking == 'margin gain'")
    network = pruned_filters.Network(0)
    wrong, retain = network.mistakes("digits", pruned_filters.IMAGES)
    again = pruned_filters.look(network, network.rankings(*wrong)["margin gain"], wrong, retain)
    for name, value in again.items():
        assert there[name].iloc[0] == pytest.approx(value, abs=2.1 / pruned_filters.IMAGES), name


def test_pruning_by_margin_gain_repairs_more_than_gradients_and_random():
    table = tables.read(pruned_filters.OUT)
    assert table["network"].nunique() >= 3
    one, ever = (table.pivot_table(index="ranking", values=k).iloc[:, 0] for k in ("k = 1", "any k"))
    rivals = ["raw", "zscore", "pot", "scale_free_zscore", "random", "output, |z|", "activation, |z|"]
    assert one["margin gain"] > one[rivals].max() and ever["margin gain"] > ever[rivals].max()


def test_intervals_of_few_networks_hold_the_mean_share():
    """Three networks, shares near 1, near 0 and between: 4,000 draws, 4 standard errors are 1.4%."""
    rng = np.random.default_rng(0)
    for mean, spread in ((0.99, 0.008), (0.97, 0.03), (0.9, 0.05), (0.7, 0.1), (0.05, 0.04)):
        size = mean * (1 - mean) / spread**2 - 1
        of_networks = rng.beta(size * mean, size * (1 - mean), (3, 4000))
        for count in (30, 250):
            shares = rng.binomial(count, of_networks) / count
            found, low, high = pss.statistics.share_interval(shares, count)
            np.testing.assert_allclose(found, shares.mean(axis=0))
            assert 0.936 < ((low <= mean) & (mean <= high)).mean() < 0.995, (mean, count)
        _, low, high = pss.statistics.interval(shares)
        assert mean == 0.7 or ((low <= mean) & (mean <= high)).mean() < 0.945, mean


def test_an_interval_of_shares_by_hand():
    log_odds = lambda p: np.log(p / (1 - p))  # noqa: E731
    _, _, high = pss.statistics.share_interval(np.array([0.5, 0.9]), np.array([10, 20]))
    odds = np.log([5.5 / 5.5, 18.5 / 2.5])
    half = 12.7062 * np.std(odds, ddof=1) / 2**0.5  # Student's 97.5% quantile at one degree of freedom
    np.testing.assert_allclose(log_odds(high), odds.mean() + half, rtol=1e-4)
    _, low, high = pss.statistics.share_interval(np.full((3, 2), 0.1), 30)  # three that agree: as of 90 images
    half = 1.95996 * (1 / 3.5 + 1 / 27.5) ** 0.5 / 3**0.5
    np.testing.assert_allclose(
        log_odds(np.stack([low, high])), np.log(3.5 / 27.5) + half * np.array([[-1] * 2, [1] * 2]), rtol=1e-4
    )
