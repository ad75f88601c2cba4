"""Patches: fitted within a budget, saved, applied, removed bit-identical, refused where they do not belong."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from test_cost import Net

import pss
from pss.models import fingerprint
from pss.patches import Patch, fit_patch
from pss.units import Units


@pytest.fixture(scope="module")
def case():
    """A small network, images of which the first twelve get a wrong label, and the Fisher information."""
    torch.manual_seed(0)
    model = Net().double().eval()
    images = torch.randn(112, 2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        top = model(images).topk(2).indices
    labels = torch.where(torch.arange(112) < 12, top[:, 1], top[:, 0])
    retain = (images[12:], labels[12:])
    return model, (images[:12], labels[:12]), retain, pss.fisher_diagonal(model, retain)


@pytest.fixture(scope="module")
def patch(case):
    return fitted(case)


def fitted(case, which=slice(0, 1), **options):
    model, (x, y), retain, fisher = case
    options = {"budget": 5.0, "fisher": fisher, "ks": (1, 4, 12)} | options
    return fit_patch(model, (x[which], y[which]), retain, Units.of(model), progress=False, **options)


def by_hand(model, patch):
    """The patched model, made through the registry of units."""
    model, units = copy.deepcopy(model), Units.of(model)
    with torch.no_grad():
        for unit, difference in zip(patch.units, patch.difference, strict=True):
            units.view(model, unit).add_(difference)
    return model


def test_corrects_the_mistake_and_is_what_it_says(case, patch):
    model, (x, y), retain, _ = case
    before = fingerprint(model)
    assert patch.corrected and patch.reason == "" and patch.model == before
    edited = by_hand(model, patch)
    assert edited(x[:1]).argmax() == y[0] != model(x[:1]).argmax()
    evidence = patch.evidence.set_index("part")
    assert list(evidence.index) == ["mistakes", "retain", "retain held out"]
    assert evidence["n"].tolist() == [1, 70, 30]
    assert evidence.loc["mistakes", ["accuracy_before", "accuracy_after"]].tolist() == [0, 1]
    p, q = (m(retain[0]).log_softmax(dim=1) for m in (model, edited))
    kl = (p.exp() * (p - q)).sum(dim=1)
    total = (evidence["n"] * evidence["kl_mean"])[["retain", "retain held out"]].sum() / 100
    np.testing.assert_allclose(total, kl.mean().item(), rtol=1e-9)
    names = Units.of(model).table()["name"]
    assert patch.names == tuple(names[list(patch.units)])
    assert patch.about["direction"] == patch.about["method"] == "fisher" and patch.about["pss"] == pss.__version__
    assert fingerprint(model) == before


def test_apply_remove_apply(case, patch):
    model = copy.deepcopy(case[0])
    before, after = fingerprint(model), fingerprint(by_hand(model, patch))
    assert patch.apply(model) is model
    assert fingerprint(model) == after and patch.is_applied(model)
    with pytest.raises(ValueError, match="applied to it already"):
        patch.apply(model)
    patch.remove(model)
    assert fingerprint(model) == before and not patch.is_applied(model)
    with pytest.raises(ValueError, match="not applied"):
        patch.remove(model)
    assert fingerprint(patch.apply(model)) == after
    patch.remove(model)
    with pytest.raises(RuntimeError, match="inside"), patch.applied(model):
        assert fingerprint(model) == after
        raise RuntimeError("inside")
    assert fingerprint(model) == before


def test_original_weights_come_back_where_differences_would_round(case):
    model = copy.deepcopy(case[0]).float()
    big = torch.full((1, 2, 3, 3), 1e8)
    with torch.no_grad():
        model.one.weight[2].mul_(1.1)
    view = model.one.weight[2:3].detach().clone()
    assert not torch.equal((view + big) - big, view)
    place = ("one.weight", ((2, 3), (None, None), (None, None), (None, None)))
    patch = Patch(fingerprint(model), (2,), ("one[2]",), (place,), (view,), (big,), True)
    before = fingerprint(model)
    patch.remove(patch.apply(model))
    assert fingerprint(model) == before


def test_round_trip(case, patch, tmp_path):
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    again = Patch.load(path)
    for name in ("model", "units", "names", "places", "corrected", "reason", "about"):
        assert getattr(again, name) == getattr(patch, name), name
    for name in ("original", "difference"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(again, name), getattr(patch, name), strict=True))
    for name in ("evidence", "tried"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(patch, name), check_dtype=False)
    np.testing.assert_allclose(patch.kilobytes, path.stat().st_size / 1024)
    model = copy.deepcopy(case[0])
    assert fingerprint(again.apply(model)) == fingerprint(by_hand(case[0], patch))
    patch.remove(model)


def test_file_is_whole_or_not_there(patch, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        patch.save(tmp_path / "patch.safetensors")
    assert not list(tmp_path.iterdir())


def test_damaged_or_other_files_are_refused(patch, tmp_path):
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        Patch.load(path)
    patch.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(ValueError, match="checksum differs"):
        Patch.load(path)
    pss.models.save_weights(Net(), path)
    with pytest.raises(ValueError, match="no patch of pss"):
        Patch.load(path)
    with pytest.raises(FileNotFoundError, match="no patch at"):
        Patch.load(tmp_path / "other")


def test_another_model_is_refused(case, patch):
    model = copy.deepcopy(case[0])
    with torch.no_grad():
        model.head.bias[0] += 1e-9
    before = fingerprint(model)
    with pytest.raises(ValueError, match="the patch is for model"):
        patch.apply(model)
    with pytest.raises(ValueError, match="the patch is for model"):
        patch.apply(torch.nn.Linear(2, 2))
    assert fingerprint(model) == before


def test_patches_add_or_say_that_they_conflict(case):
    model, (x, y), retain, _ = case
    first = fitted(case, ks=(12,))
    second = fitted(case, slice(1, 2), ks=(12,))
    with pytest.raises(ValueError, match=r"conflict: both change units \[0, 1"):
        first + second
    part = lambda patch, keep: Patch(  # noqa: E731
        patch.model, *(tuple(v for u, v in zip(patch.units, getattr(patch, n), strict=True) if u in keep) for n in
        ("units", "names", "places", "original", "difference")), True, about=patch.about,
    )  # fmt: skip
    low, high = part(first, range(6)), part(second, range(6, 12))
    both = low + high
    assert set(both.units) == set(range(12)) and both.evidence.empty
    expected = by_hand(by_hand(model, low), high)
    other = copy.deepcopy(model)
    assert fingerprint(both.apply(other)) == fingerprint(expected)
    both.remove(other)
    low.apply(other)
    with pytest.raises(ValueError, match="apply the sum of both"):
        high.apply(other)
    evidence = both.measured(model, {"two": (x[:2], y[:2]), "retain": retain}).evidence
    right = (expected(x[:2]).argmax(dim=1) == y[:2]).double().mean().item()
    assert evidence["accuracy_after"][0] == right
    stranger = Patch(
        "0" * 64, (99,), ("x",), low.places[:1], low.original[:1], low.difference[:1], True, about=low.about
    )
    with pytest.raises(ValueError, match="different models"):
        low + stranger


@pytest.mark.parametrize("measure", ["kl", "accuracy"])
def test_budget_is_kept_or_the_patch_says_that_it_cannot(case, measure):
    model = case[0]
    free = fitted(case, budget=1e9, measure=measure, ks=(1, 2, 4, 8, 12))
    tried = free.tried
    assert free.corrected and (tried["corrected"].sum() == 1) and tried["corrected"].iloc[-1]  # the first that does
    damage = fitted(case, budget=1e9, ks=(12,), measure=measure).tried[measure].iloc[0]
    kept = fitted(case, budget=damage, measure=measure, ks=(12,))
    assert kept.corrected and kept.tried[measure].iloc[-1] <= damage
    if measure == "kl":
        np.testing.assert_allclose(kept.evidence.set_index("part").loc["retain", "kl_mean"], damage, rtol=1e-6)
    before = fingerprint(model)
    none = fitted(case, budget=0.0, measure="kl")
    assert not none.corrected and none.units == () and "over the budget 0" in none.reason
    assert none.tried["k"].tolist() == [1, 4, 12] and fingerprint(model) == before
    for use in (none.apply, none.remove, lambda m: none.save("never"), lambda m: none + kept):
        with pytest.raises(ValueError, match="holds no units: the least damage"):
            use(copy.deepcopy(model))


def test_says_when_no_step_corrects(case):
    none = fitted(case, max_relative_step=1e-9)
    assert (
        not none.corrected
        and "no step within the cap through the top 1, 4, 12 units corrects the mistake" in none.reason
    )
    assert "no step" in repr(none)


class Watched(Net):
    """Remembers the images of which it was asked for gradients."""

    def forward(self, x):
        if torch.is_grad_enabled():
            self.seen.extend(x.detach())
        return super().forward(x)


def test_several_mistakes_at_once_with_some_held_out(case):
    model, (x, y), retain, _ = case
    watched = Watched().double().eval()
    watched.load_state_dict(model.state_dict())
    watched.seen = []
    how = {"budget": 1e9, "ks": (5,), "held_out": 0.5, "max_relative_step": 30, "method": "raw", "progress": False}
    several = fit_patch(watched, (x[:6], y[:6]), retain, Units.of(model), **how)
    assert several.corrected and several.tried["k"].tolist() == [5]
    used = [i for i in range(6) if any(torch.equal(x[i], image) for image in watched.seen)]
    assert len(used) == 3 and not any(torch.equal(g, image) for g in retain[0] for image in watched.seen)
    order, everything = (
        pss.profile(model, x[i], y[i]).mean(dim=0).argsort(descending=True)[:5].tolist() for i in (used, range(6))
    )
    assert list(several.units) == order != everything
    evidence = several.evidence.set_index("part")
    assert evidence["n"].to_dict() == {"mistakes": 3, "mistakes held out": 3, "retain": 50, "retain held out": 50}
    right = by_hand(model, several)(x[:6]).argmax(dim=1) == y[:6]
    assert right[used].all() and evidence.loc["mistakes", "accuracy_after"] == 1
    assert right.sum() == 3 + round(3 * evidence.loc["mistakes held out", "accuracy_after"]) < 6
    all_of_them = fitted(case, slice(0, 3), budget=1e9, ks=(12,), held_out=0)
    assert set(all_of_them.evidence["part"]) == {"mistakes", "retain"}


def test_a_patch_goes_beyond_the_boundary_by_its_margin(case):
    """A tenth further than what was found to correct, which lies at most 5% beyond the boundary: 9% less does."""
    model, (x, y), _, _ = case
    for i in range(4):
        patch = fitted(case, slice(i, i + 1), budget=1e9, ks=(12,))
        for part, right in ((1 / 1.09, True), (1 / 1.1 / 1.06, False)):
            shorter = dataclasses.replace(patch, difference=tuple(part * d for d in patch.difference))
            assert (by_hand(model, shorter)(x[i : i + 1]).argmax() == y[i]).item() is right


def test_ranking_and_direction_can_be_chosen(case):
    model, _, retain, _ = case
    store = pss.profile(model, *retain)
    reference = pss.Reference.fit(store)
    plain = fitted(case, fisher=None, reference=reference, ks=(4,), budget=1e9)
    assert plain.about["method"] == "zscore" and plain.about["direction"] == "gradient"
    s = pss.profile(model, case[1][0][:1], case[1][1][:1])
    assert plain.units == tuple(pss.rank(s, reference, "zscore", 4)[0].tolist())
    with_fisher = fitted(case, reference=reference, ks=(4,))
    assert with_fisher.about["method"] == with_fisher.about["direction"] == "fisher"
    raw = fitted(case, method="raw", direction="gradient", ks=(4,), budget=1e9)
    assert raw.units == tuple(pss.rank(s, None, "raw", 4)[0].tolist())


def test_guard_and_mistakes_never_overlap(case):
    model, (x, y), (retain, labels), _ = case
    both = (torch.cat([retain, x[:1]]), torch.cat([labels, y[:1]]))
    with pytest.raises(ValueError, match="1 of the retain images are among the mistakes"):
        fit_patch(model, (x[:1], y[:1]), both, Units.of(model), method="raw")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "loss"}, "unknown measure"),
        ({"budget": -1}, "budget must be"),
        ({"held_out": 1}, "held_out"),
        ({"ks": ()}, "ks ="),
        ({"ks": (13,)}, "ks ="),
        ({"direction": "fisher", "fisher": None}, "direction 'fisher'"),
        ({"method": "fisher", "fisher": None}, "needs fisher="),
        ({"fisher": None}, "needs a reference"),
    ],
)
def test_says_what_is_wrong(case, options, message):
    with pytest.raises(ValueError, match=message):
        fitted(case, **options)


def test_a_right_image_is_no_mistake(case):
    model, _, (retain, labels), fisher = case
    with pytest.raises(ValueError, match="classified correctly"):
        fit_patch(model, (retain[:1], labels[:1]), (retain[1:], labels[1:]), Units.of(model), fisher=fisher)


def test_reached_beside_repair():
    assert pss.editing.fit_patch is fit_patch is pss.fit_patch and pss.editing.Patch is pss.Patch is Patch
