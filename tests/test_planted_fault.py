"""A fault with a known place: break one filter of the shipped model and see whether its mistakes point at it.

First the one that gradients find, by every image on its own; then seven kinds by what a filter contributes and says,
for the images together.

The first fault is a gain: the BatchNorm after one filter multiplies that filter's output by 20. The images are those
that were right before and are wrong now, the references those of the healthy model. How often the broken filter is
among an image's first ten of 1,200 is in the table that the tests print (``-s``), and in their messages when they fail.
"""

import copy

import pandas as pd
import pytest
import torch

import pss

PER_STAGE, TOP, IMAGES = 5, 10, 64
METHODS = ("zscore", "pot")
STAGES = ("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x")
# Least mean share over a stage's filters, well below what is measured. With the plain reference the first
# convolution is found more often than by chance but not reliably: what breaks there makes later filters unusual too.
LEAST = {
    ("plain", "zscore"): {"conv1": 0.08, "conv2_x": 0.5, "conv3_x": 0.7, "conv4_x": 0.75, "conv5_x": 0.8},
    ("plain", "pot"): {"conv1": 0.02, "conv2_x": 0.25, "conv3_x": 0.45, "conv4_x": 0.6, "conv5_x": 0.6},
    ("scale-free", "zscore"): {"conv1": 0.3, "conv2_x": 0.8, "conv3_x": 0.85, "conv4_x": 0.85, "conv5_x": 0.85},
    ("scale-free", "pot"): {"conv1": 0.05, "conv2_x": 0.7, "conv3_x": 0.75, "conv4_x": 0.8, "conv5_x": 0.8},
}
KINDS = {  # what is done to a filter's weights w of deviation s, or to its place r in the normalization n behind it
    "weights x10": lambda w, n, r, s: w.mul_(10),
    "noise": lambda w, n, r, s: w.copy_(10 * s * torch.randn(w.shape, generator=torch.Generator().manual_seed(r))),
    "one weight": lambda w, n, r, s: w.view(-1)[r % w.numel()].add_(30 * s),
    "gain x20": lambda w, n, r, s: n.weight[r].mul_(20),
    "sign": lambda w, n, r, s: w.neg_(),
    "zeroed": lambda w, n, r, s: w.zero_(),
    "shift": lambda w, n, r, s: n.bias[r].add_(10),
}


class Bench:
    """The shipped model, its healthy references, and what happens to the images when one filter is broken."""

    def __init__(self):
        self.model, self.data = pss.models.digits(), pss.data.mnist("validation")
        self.units = pss.Units.of(self.model)
        store = pss.profile_dataset(self.model, self.data, self.units, progress=False)
        self.references = {"plain": pss.Reference.fit(store), "scale-free": pss.Reference.fit(store, scale_free=True)}
        self.right = pss.models.predict(self.model, self.data.images).argmax(1) == self.data.labels

    def broken(self, kind: str, unit: int) -> torch.nn.Module:
        broken, (number, row) = copy.deepcopy(self.model), self.units.locate(unit)
        names = [name for name, _ in broken.named_modules()]
        norm = broken.get_submodule(names[names.index(self.units.layers[number].name) + 1])
        assert isinstance(norm, torch.nn.BatchNorm2d)
        with torch.no_grad():
            deviation = broken.get_parameter(self.units.layers[number].parameter).std()
            KINDS[kind](self.units.view(broken, unit), norm, row, deviation)
        return broken

    def newly_wrong(self, broken: torch.nn.Module) -> torch.Tensor:
        wrong = pss.models.predict(broken, self.data.images).argmax(1) != self.data.labels
        return (self.right & wrong).nonzero()[:IMAGES, 0]

    def profiles(self, broken: torch.nn.Module, at: torch.Tensor) -> torch.Tensor:
        return pss.profile(broken, self.data.images[at], self.data.labels[at], self.units)

    def shuffled(self, stage: str) -> list[int]:
        ids = torch.from_numpy(self.units.stage_ids == STAGES.index(stage)).nonzero()[:, 0]
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))].tolist()


def place(profiles: torch.Tensor, reference: pss.Reference, method: str, unit: int) -> torch.Tensor:
    """Place of the unit in every image's ranking, 0 for the first; (B,)."""
    return (pss.rank(profiles, reference, method) == unit).nonzero()[:, 1].double()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module")
def found(bench) -> pd.DataFrame:
    """One row for each planted fault and way of ranking: how often the broken filter is in the top, and its place."""
    rows = []
    for stage in STAGES:
        planted = 0
        for unit in bench.shuffled(stage):
            broken = bench.broken("gain x20", unit)
            at = bench.newly_wrong(broken)
            if not len(at):
                continue  # nothing went wrong: in the last stage many a filter can be broken unnoticed
            profiles = bench.profiles(broken, at)
            for name, reference in bench.references.items():
                for method in METHODS:
                    places = place(profiles, reference, method, unit)
                    share = (places < TOP).double().mean().item()
                    row = (stage, bench.units.name(unit), len(at), name, method, share, places.median().item() + 1)
                    rows.append(row)
            planted += 1
            if planted == PER_STAGE:
                break
    columns = ["stage", "filter", "images", "reference", "method", "share", "median rank"]
    table = pd.DataFrame(rows, columns=columns)
    print(f"\nshare of images that have the broken filter in their top {TOP} (chance {TOP / len(bench.units):.3f}):")
    print(table.pivot_table(index="stage", columns=["reference", "method"], values="share").round(2).to_string())
    return table


def test_several_filters_of_every_stage_are_broken(found):
    assert (found.groupby("stage")["filter"].nunique().reindex(STAGES) == PER_STAGE).all()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("reference", "method"), LEAST)
def test_mistakes_point_at_the_broken_filter(found, bench, reference, method, stage):
    part = found.query("stage == @stage and reference == @reference and method == @method")
    share, chance = part["share"].mean(), TOP / len(bench.units)
    least = LEAST[reference, method][stage]
    said = part[["filter", "images", "share", "median rank"]].round(2).to_string(index=False)
    assert share >= least, f"in the top {TOP} for {share:.2f} of images, chance {chance:.3f}, asked {least}:\n{said}"
    if least >= 0.5:
        assert share > 25 * chance and (part["median rank"] <= 60).all(), said


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_free_reference_finds_more_in_the_early_stages(found, method):
    early = found.query("stage in ('conv1', 'conv2_x') and method == @method").groupby("reference")["share"].mean()
    assert early["scale-free"] > early["plain"] + 0.05, early.to_dict()


@pytest.mark.parametrize("name", ["conv1[5]", "layer1.0.conv2[5]", "layer2.0.downsample.0[17]"])
def test_weights_out_of_scale_are_not_found_by_gradients(bench, name):
    """A limit: the gradient of a filter does not grow with its own weights, rather that of later ones does."""
    unit = next(u for u in range(len(bench.units)) if bench.units.name(u) == name)
    broken = bench.broken("weights x10", unit)
    profiles = bench.profiles(broken, bench.newly_wrong(broken))
    assert len(profiles) >= 30
    later = torch.from_numpy(bench.units.layer_ids > bench.units.layer_ids[unit]).double()
    for kind, reference in bench.references.items():
        for method in METHODS:
            places = place(profiles, reference, method, unit)
            share = (places < TOP).double().mean().item()
            assert share < 0.1 and places.median() > 300, f"{kind} {method}: in the top {share:.2f}"
            if kind == "plain":
                top = pss.rank(profiles, reference, method, TOP)
                assert later[top].mean() > later.mean(), f"{method}: {later[top].mean():.2f} of the top are later"


@pytest.mark.parametrize("name", ["layer1.1.conv1[2]", "layer2.0.conv2[9]", "layer3.0.conv2[44]"])
def test_a_reference_of_the_broken_network_hides_the_fault(bench, name):
    unit = next(u for u in range(len(bench.units)) if bench.units.name(u) == name)
    broken = bench.broken("gain x20", unit)
    profiles = bench.profiles(broken, bench.newly_wrong(broken))
    of_broken = bench.profiles(broken, torch.arange(400))
    for kind, healthy in bench.references.items():
        own = pss.Reference.fit(of_broken, scale_free=kind == "scale-free")
        for method in METHODS:
            seen, hidden = ((place(profiles, r, method, unit) < TOP).double().mean().item() for r in (healthy, own))
            assert hidden < 0.25 and seen > hidden + 0.3, f"{kind} {method}: {seen:.2f} healthy, {hidden:.2f} own"


# Seven kinds of fault, and the images that each spoils together


@pytest.fixture(scope="module")
def together(bench) -> pd.DataFrame:
    """One row for each planted fault: whether the broken filter is in the group's top, by each ranking."""
    usual = {}
    for of in ("gradient", "gain"):
        store = pss.profile_dataset(bench.model, bench.data, bench.units, progress=False, of=of)
        usual[of] = pss.Reference.fit(store, scale_free=True)
    store = pss.profile_dataset(bench.model, bench.data, bench.units, progress=False, of="output", signed=True)
    usual["output"], usual["silence"] = pss.Reference.fit(store), pss.Reference.fit(-store.profiles)
    rows = []
    for kind in KINDS:
        for stage in STAGES:
            for unit in bench.shuffled(stage)[:12]:
                broken = bench.broken(kind, unit)
                at = bench.newly_wrong(broken)[: IMAGES // 2]
                if len(at) >= 3:
                    break
            else:
                continue  # nothing goes wrong whichever of twelve filters is broken
            images, labels = bench.data.images[at], bench.data.labels[at]
            g, c = pss.profile(broken, images, labels, bench.units, of=("gradient", "gain"), verify=False)
            o = pss.profile(broken, images, labels, bench.units, of="output", signed=True)
            tables = {
                "gradient": pss.rank_together(g, usual["gradient"], "zscore"),
                "gain": pss.rank_together(c, usual["gain"], "zscore"),
                "output": pss.rank_together(o, usual["output"], "abs_zscore"),
                "both": pss.rank_together([c, o, -o], [usual[k] for k in ("gain", "output", "silence")], "exponential"),
            }
            found = {how: float((table["unit"][:TOP] == unit).any()) for how, table in tables.items()}
            rows.append({"kind": kind, "stage": stage, **found})
    table = pd.DataFrame(rows)
    shown = table.drop(columns="stage").groupby("kind", sort=False).agg(["mean", "count"]).round(2)
    print(f"\nshare of faults whose filter is in the top {TOP} of the images together:\n{shown.to_string()}")
    return table


def test_what_a_filter_contributes_shows_faults_in_its_weights_and_gradients_do_not(together):
    weights = together.query("kind in ('weights x10', 'noise', 'one weight')")
    assert weights["gain"].mean() >= 0.6 and weights["gradient"].mean() <= 0.3
    assert together.query("kind == 'gain x20'")["gradient"].mean() >= 0.6


def test_what_a_filter_says_shows_what_its_loss_does_not_feel(together):
    silent = together.query("kind in ('zeroed', 'shift')")
    assert silent["output"].mean() >= 0.7 and silent["gain"].mean() <= 0.3


def test_both_together_find_all_kinds(together):
    assert together["both"].mean() >= 0.8
    assert (together.groupby("kind")["both"].mean() >= 0.4).all() and together["kind"].nunique() == len(KINDS)
    assert together["both"].mean() >= together[["gradient", "gain", "output"]].mean().max() - 0.05
