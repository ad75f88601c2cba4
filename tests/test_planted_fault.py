"""A fault with a known place: break one filter of the shipped model and see whether its mistakes point at it.

The fault is a gain: the BatchNorm after one filter multiplies that filter's output by 20. The images are those that
were right before and are wrong now, the references those of the healthy model. How often the broken filter is among an
image's first ten of 1,200 is in the table that the tests print (``-s``), and in their messages when they fail.
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


class Bench:
    """The shipped model, its healthy references, and what happens to the images when one filter is broken."""

    def __init__(self):
        self.model, self.data = pss.models.digits(), pss.data.mnist("validation")
        self.units = pss.Units.of(self.model)
        store = pss.profile_dataset(self.model, self.data, self.units, progress=False)
        self.references = {
            "plain": pss.Reference.fit(store),
            "scale-free": pss.Reference.fit(store, scale_free=True),
        }
        self.right = pss.models.predict(self.model, self.data.images).argmax(1) == self.data.labels

    def with_gain(self, unit: int, gain: float = 20.0) -> torch.nn.Module:
        broken, (number, row) = copy.deepcopy(self.model), self.units.locate(unit)
        names = [name for name, _ in broken.named_modules()]
        norm = broken.get_submodule(names[names.index(self.units.layers[number].name) + 1])
        assert isinstance(norm, torch.nn.BatchNorm2d)
        with torch.no_grad():
            norm.weight[row] *= gain
        return broken

    def with_weights(self, unit: int, factor: float = 10.0) -> torch.nn.Module:
        broken = copy.deepcopy(self.model)
        with torch.no_grad():
            self.units.view(broken, unit).mul_(factor)
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
            broken = bench.with_gain(unit)
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
def test_weights_out_of_scale_are_not_found(bench, name):
    """A limit: the gradient of a filter does not grow with its own weights, rather that of later ones does."""
    unit = next(u for u in range(len(bench.units)) if bench.units.name(u) == name)
    broken = bench.with_weights(unit)
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
    broken = bench.with_gain(unit)
    profiles = bench.profiles(broken, bench.newly_wrong(broken))
    of_broken = bench.profiles(broken, torch.arange(400))
    for kind, healthy in bench.references.items():
        own = pss.Reference.fit(of_broken, scale_free=kind == "scale-free")
        for method in METHODS:
            seen, hidden = ((place(profiles, r, method, unit) < TOP).double().mean().item() for r in (healthy, own))
            assert hidden < 0.25 and seen > hidden + 0.3, f"{kind} {method}: {seen:.2f} healthy, {hidden:.2f} own"
