"""Patches: fitted within a budget, saved, put on, stacked, taken off bit-identical, refused where they do not fit."""

import copy
import doctest
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from artefacts import flip
from networks import Skip
from state import state_of
from torch import nn
from torch.nn.utils import parametrize

import pss
from pss.correction import rival_margins, unit_maps
from pss.models import fingerprint
from pss.patches import Patch, applied_to, bake, fit_patch, transplants, upper_bound
from pss.units import Units


@pytest.fixture(scope="module")
def case():
    """A small network, and images of which the first twelve get a wrong label."""
    torch.manual_seed(0)
    model = Skip().double().eval()
    images = torch.randn(212, 2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        top = model(images).topk(2).indices
    labels = torch.where(torch.arange(212) < 12, top[:, 1], top[:, 0])
    return model, (images[:12], labels[:12]), (images[12:], labels[12:])


def fitted(case, which=slice(0, 1), **options):
    model, (x, y), retain = case
    return fit_patch(
        model, (x[which], y[which]), retain, **{"budget": 0.1, "margin": 0.05, "progress": False} | options
    )


@pytest.fixture(scope="module")
def patch(case):
    return fitted(case)


def by_hand(model, patch):
    """The patched model, made through the registry of units."""
    model, units = copy.deepcopy(model), Units.of(model)
    with torch.no_grad():
        for unit, gain in enumerate(patch.gains.double()):
            units.view(model, unit).mul_(gain)
    return model


def test_corrects_the_mistake_and_is_what_it_says(case, patch):
    model, (x, y), retain = case
    edited = by_hand(model, patch)
    assert patch.left == () and patch.reason == "" and patch.model == fingerprint(model)
    assert edited(x[:1]).argmax() == y[0] != model(x[:1]).argmax()
    evidence = patch.evidence.set_index("part")
    assert list(evidence.index) == ["mistakes", "retain", "retain held out"]
    assert evidence["n"].tolist() == [1, 100, 100]
    assert evidence.loc["mistakes", ["accuracy_before", "accuracy_after"]].tolist() == [0, 1]
    p, q = (m(retain[0]).log_softmax(dim=1) for m in (model, edited))
    kl = (p.exp() * (p - q)).sum(dim=1)
    np.testing.assert_allclose(evidence["kl_mean"].iloc[1:].mean(), kl.mean().item(), rtol=1e-9)
    assert evidence.loc["retain held out", "kl_mean"] < evidence.loc["retain held out", "kl_upper"] <= 0.1
    assert (
        patch.about["pss"] == pss.__version__ and patch.units.fingerprint and len(patch.gains) == len(Units.of(model))
    )


def test_leaves_no_trace_and_is_the_same_again(case, patch):
    model = case[0]
    before = state_of(model)
    again = fitted(case)
    assert state_of(model) == before and torch.equal(again.gains, patch.gains)


def test_a_model_of_float32_is_patched_as_one_of_float64(case, patch):
    model, (x, y), (retain, labels) = case
    found = fitted((copy.deepcopy(model).float(), (x.float(), y), (retain.float(), labels)))
    torch.testing.assert_close(found.gains, patch.gains, rtol=1e-2, atol=1e-2)


def test_removal_is_bit_identical_and_the_weights_below_are_never_written(case, patch):
    model, x = copy.deepcopy(case[0]), case[1][0]
    with torch.no_grad():
        expected = by_hand(model, patch)(x)
        before, weight = state_of(model), model.one.weight
        weight.requires_grad_(True)
        names = [name for name, _ in model.named_parameters()]
        assert patch.apply(model) is model and patch.is_applied(model)
        torch.testing.assert_close(model(x), expected)
        assert model.one.parametrizations.weight.original is weight
        with pytest.raises(ValueError, match="applied to the model already"):
            patch.apply(model)
        patch.remove(model)
    assert state_of(model) == before and model.one.weight is weight
    assert [name for name, _ in model.named_parameters()] == names  # the order that an optimizer's state has
    assert type(model.one) is nn.Conv2d
    with pytest.raises(ValueError, match="not applied"):
        patch.remove(model)
    with pytest.raises(RuntimeError, match="inside"), patch.applied(model):
        assert patch.is_applied(model)
        raise RuntimeError("inside")
    assert state_of(model) == before


def test_patches_are_stacked_listed_and_removed_in_any_order(case, patch):
    model, x = copy.deepcopy(case[0]), case[1][0]
    second = fitted(case, slice(1, 3))
    before = state_of(model)
    second.apply(patch.apply(model))
    assert all(torch.equal(p.gains, q.gains) for p, q in zip(applied_to(model), (patch, second), strict=True))
    torch.testing.assert_close(model(x), by_hand(by_hand(case[0], patch), second)(x))
    patch.remove(model)
    assert not patch.is_applied(model) and second.is_applied(model)
    torch.testing.assert_close(model(x), by_hand(case[0], second)(x))
    with pytest.raises(ValueError, match="the model carries a patch"):
        fit_patch(model, *case[1:])
    second.remove(model)
    assert state_of(model) == before and applied_to(model) == []


def test_baked_weights_are_plain_and_give_the_same_outputs_exported(case, patch, tmp_path):
    model, x = copy.deepcopy(case[0]), case[1][0]
    patch.apply(model)
    before = state_of(model)
    plain = bake(model)
    assert state_of(model) == before and plain.state_dict().keys() == case[0].state_dict().keys()
    assert not any(map(parametrize.is_parametrized, plain.modules())) and applied_to(plain) == []
    torch.export.save(torch.export.export(plain, (x,)), tmp_path / "plain.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of TorchScript as a whole
        torch.jit.trace(plain, x).save(tmp_path / "plain.pt")
        scripted = torch.jit.load(tmp_path / "plain.pt")
    with torch.no_grad():
        for other in (plain, torch.export.load(tmp_path / "plain.pt2").module(), scripted):
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    patch.remove(model)
    again = copy.deepcopy(patch.apply(model))
    patch.remove(again)
    assert patch.is_applied(model) and not patch.is_applied(again)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(again(x), case[0](x))


def test_shared_weights_are_patched_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(4, 3)
    units, gains = Units.of(model, "rows"), torch.tensor([0.5, 2.0, 1.5])
    patch = Patch(fingerprint(model), units.layers, gains)
    before, expected = state_of(model), copy.deepcopy(model)
    with torch.no_grad():
        expected.a.weight.mul_(gains[:, None])
    patch.apply(model)
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(bake(model)(x), expected(x))
    assert bake(model).a.weight is not model.a.weight
    patch.remove(model)
    assert state_of(model) == before and model.a.weight is model.b.weight


def test_round_trip(case, patch, tmp_path):
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    again = Patch.load(path)
    for name in ("model", "groups", "left", "reason", "about"):
        assert getattr(again, name) == getattr(patch, name), name
    assert torch.equal(again.gains, patch.gains)
    for name in ("evidence", "tried"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(patch, name), check_dtype=False)
    np.testing.assert_allclose(patch.kilobytes, path.stat().st_size / 1024)
    model = copy.deepcopy(case[0])
    again.apply(model)
    patch.remove(model)


def test_the_lines_for_production_run(case, patch, tmp_path):
    patch.save(tmp_path / "patch.safetensors")
    names = {"pss": pss, "path": tmp_path / "patch.safetensors", "model": copy.deepcopy(case[0]), "images": case[1][0]}
    text = pss.patches.__doc__.replace("Patch(1200 gains, 7.8 kB, for model f8e04f44…)", repr(patch))
    example = doctest.DocTestParser().get_doctest(text, names, "patches", None, 0)
    assert len(example.examples) == 6
    assert doctest.DocTestRunner().run(example).failed == 0


def test_file_is_whole_or_not_there(patch, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        patch.save(tmp_path / "patch.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_killed_fit_leaves_no_file(tmp_path):
    code = (
        "import torch, pss; from torch import nn; torch.manual_seed(0)\n"
        "m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 3)); x = torch.randn(3000, 1, 5, 5)\n"
        "y = m(x).topk(2).indices; print('fitting', flush=True)\n"
        "pss.fit_patch(m, (x[:900], y[:900, 1]), (x[900:], y[900:, 0]), progress=False).save('patch')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"fitting\n"
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -9 and not list(tmp_path.iterdir())
    process.stdout.close()


def test_damaged_or_other_files_are_refused(patch, tmp_path):
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    whole = path.read_bytes()
    for part in (whole[:-9], whole[: len(whole) // 2]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="damaged"):
            Patch.load(path)
    path.write_bytes(flip(whole, -160))
    with pytest.raises(ValueError, match="checksum differs"):
        Patch.load(path)
    pss.models.save_weights(Skip(), path)
    with pytest.raises(ValueError, match="no patch of this version"):
        Patch.load(path)
    with pytest.raises(FileNotFoundError, match="no patch at"):
        Patch.load(tmp_path / "other")


def test_another_model_is_refused(case, patch):
    model = copy.deepcopy(case[0])
    with torch.no_grad():
        model.head.bias[0] += 1e-9
    for other in (model, nn.Linear(2, 2)):
        before = state_of(other)
        with pytest.raises(ValueError, match="the patch is for model"):
            patch.apply(other)
        assert state_of(other) == before


def test_a_model_parametrized_already_is_refused(case, patch):
    model = copy.deepcopy(case[0])
    parametrize.register_parametrization(model.one, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"one\.weight is parametrized already, by Identity"):
        patch.apply(model)


def test_what_fails_half_way_is_undone(case, patch, monkeypatch):
    model, calls, register = copy.deepcopy(case[0]), [], parametrize.register_parametrization
    before = state_of(model)

    def fails_at_the_second(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no more")
        return register(*args, **options)

    monkeypatch.setattr(parametrize, "register_parametrization", fails_at_the_second)
    with pytest.raises(MemoryError):
        patch.apply(model)
    assert len(calls) == 2 and state_of(model) == before


# ---------------------------------------------------------------------------------------------- the budget


def test_goes_as_far_as_the_budget_allows(case):
    free = fitted(case, slice(0, 3), budget=10.0, margin=None).tried
    way = free[(free["corrected"] > 0) & (free["kl_upper"] == free["kl_upper"].cummax())]  # the first so far
    assert (way["kl_upper"] > way["kl"]).all() and len(way) > 4
    for upper in way["kl_upper"].iloc[[1, -3]]:
        patch = fitted(case, slice(0, 3), budget=upper * 1.0001, margin=None)
        np.testing.assert_allclose(
            patch.evidence.set_index("part").loc["retain held out", "kl_upper"], upper, rtol=1e-4
        )


def test_corrects_what_it_can_and_names_the_rest(case):
    model, (x, y), _ = case
    patch = fitted(case, slice(0, 12), budget=0.0024)
    assert 0 < len(patch.left) < 12
    right = by_hand(model, patch)(x).argmax(dim=1) == y
    assert tuple((~right).nonzero()[:, 0].tolist()) == patch.left
    most = patch.tried.loc[patch.tried["kl_upper"].cummax() <= 0.0024, "corrected"].max()
    assert right.sum() == most
    assert "of 12 mistakes costs a KL of" in patch.reason and "a budget of that would do" in patch.reason
    more = fitted(case, slice(0, 12), budget=0.0024, over_budget=True)
    assert len(more.left) < len(patch.left)
    assert more.evidence.set_index("part").loc["retain held out", "kl_upper"] > 0.0024


def test_a_patch_that_breaks_the_budget_is_given_only_if_asked_for_by_name(case, tmp_path):
    model = case[0]
    before = state_of(model)
    none = fitted(case, budget=1e-6)
    assert len(none.gains) == 0 and none.left == (0,) and none.evidence.empty and state_of(model) == before
    assert "to correct the mistake costs a KL of" in none.reason and none.reason in repr(none)
    for use in (none.apply, lambda m: none.save(tmp_path / "never")):
        with pytest.raises(ValueError, match="holds no gains: to correct"):
            use(copy.deepcopy(model))
    assert not list(tmp_path.iterdir())
    asked = fitted(case, budget=1e-6, over_budget=True)
    assert asked.left == () and asked.evidence.set_index("part").loc["retain held out", "kl_upper"] > 1e-6
    would_do = float(none.reason.split("up to ")[1].split(" ")[0])
    assert fitted(case, budget=1.1 * would_do).left == ()


def test_the_margin_is_by_default_as_usual(case):
    model, (x, y), _ = case

    def lead(patch):
        z = by_hand(model, patch)(x[:1])[0].detach()
        return float(z[y[0]] - z[torch.arange(3) != y[0]].max())

    with torch.no_grad():
        z = model(case[2][0]).topk(2).values
    usual = float((z[:, 0] - z[:, 1]).median())
    assert 0.045 < lead(fitted(case)) < 0.06 < 0.9 * usual < lead(fitted(case, margin=None, budget=10.0)) < 1.1 * usual


def test_the_price_rises_until_nearly_the_margin_is_there(case):
    model, (x, y), _ = case
    patch = fitted(case, slice(0, 3), budget=1e9)
    z = by_hand(model, patch)(x[:3]).detach()
    lacks = (0.05 - rival_margins(z, y[:3])[:, 0]).clamp(min=0).mean() / 0.05
    assert lacks <= 0.1 and len(patch.tried) < 40


def test_images_that_cannot_be_used_are_refused(case):
    model, (x, y), (retain, labels) = case
    before = state_of(model)
    with pytest.raises(ValueError, match="1 of the retain images are among the mistakes"):
        fit_patch(model, (x[:1], y[:1]), (torch.cat([retain, x[:1]]), torch.cat([labels, y[:1]])))
    with pytest.raises(ValueError, match="3 of 20 retain images are read correctly"):
        wrong = torch.where(torch.arange(20) < 3, labels[:20], (labels[:20] + 1) % 3)
        fit_patch(model, (x[:1], y[:1]), (retain[:20], wrong))
    with pytest.raises(ValueError, match="0 of 200 retain images are read correctly"):
        fit_patch(model, (x[:1], y[:1]), (retain, (labels + 1) % 3))
    for mistakes, kept in (((x[:1], y[:1] + 3), (retain, labels)), ((x[:1], y[:1]), (retain, labels + 3))):
        with pytest.raises(
            ValueError, match=r"label \d is outside 0\.\.2 of this model"
        ):  # a class that the model lacks
            fit_patch(model, mistakes, kept)
    with pytest.raises(ValueError, match=r"images \[0\] are classified correctly"):
        fit_patch(model, (retain[:1], labels[:1]), (retain[1:], labels[1:]))
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead.two.weight.zero_()
    ids = Units(Units.of(dead).layers[1:], ["two"])
    z = dead(torch.cat([x, retain])).topk(2).indices
    with pytest.raises(ValueError, match="no gain of these units moves the logits"):
        fit_patch(dead, (x[:1], z[:1, 1]), (retain, z[12:, 0]), ids, progress=False)
    assert state_of(model) == before


def test_images_that_the_model_was_trained_on_are_for_the_fit_alone(case):
    model, (x, y), (retain, labels) = case
    more = torch.randn(50, 2, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = model(more).argmax(dim=1).detach()
    own[:10] = (own[:10] + 1) % 3  # read wrongly: left out
    without, found = fitted(case), fitted(case, trained_on=(more, own))
    assert found.evidence["n"].tolist() == [1, 140, 100] and not torch.equal(found.gains, without.gains)
    models = (model, by_hand(model, without), by_hand(model, found))
    p, *after = (m(more)[10:].log_softmax(dim=1).detach() for m in models)
    kl = [float((p.exp() * (p - q)).sum(dim=1).mean()) for q in after]
    assert kl[1] < kl[0]  # they are harmed less where the fit sees them
    with pytest.raises(ValueError, match="1 of the retain images are among the images trained on"):
        fitted(case, trained_on=(torch.cat([more, retain[:1]]), torch.cat([own, labels[:1]])))
    with pytest.raises(ValueError, match="1 of the retain images are among the mistakes"):
        fitted(case, trained_on=(torch.cat([more, x[:1]]), torch.cat([own, y[:1]])))


def test_transplants_serve_the_fit_and_are_not_counted(case):
    (x, y), none = case[1], fitted(case)
    found = fitted(case, transplanted=(x[1:4], y[1:4]))
    assert found.evidence["part"].tolist() == ["mistakes", "transplanted", "retain", "retain held out"]
    assert found.evidence["n"].tolist() == [1, 3, 100, 100] and found.left == () and found.tried["corrected"].max() == 1
    three = found.evidence.set_index("part").loc["transplanted", "accuracy_after"]
    with torch.no_grad():
        assert three > (by_hand(case[0], none)(x[1:4]).argmax(dim=1) == y[1:4]).double().mean()
    assert fitted(case, transplanted=(x[:0], y[:0])) == none


def test_the_price_ends_where_transplants_and_mistakes_are_worth_enough(case, monkeypatch):
    (x, y), options = case[1], {"margin": 0.1, "budget": 10}
    more = {"transplanted": (x[1:4], y[1:4])}
    far = fitted(case, **options, **more).tried
    last = int(far["corrected"].argmax()) + 1  # one behind the first that corrects the mistake
    assert len(far) > last + 2
    monkeypatch.setattr("pss.patches._WORTH", 1.01 * 0.1 * 4 * far["price"][last])
    near = fitted(case, **options, **more)
    pd.testing.assert_frame_equal(near.tried, far.head(last + 2))  # the next one is too dear, and not taken
    assert near.evidence.set_index("part").loc["retain held out", "kl_mean"] == pytest.approx(far["kl"][last], rel=1e-5)
    monkeypatch.setattr("pss.patches._WORTH", 1e-9)  # too dear from the first on: the first that corrects it
    assert len(fitted(case, **options, **more).tried) == last
    assert len(fitted(case, **options).tried) > last  # mistakes alone go on


def test_units_of_other_kinds_and_transposed_groups_are_patched():
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, 2, groups=2)
    units, x = Units.of(model), torch.randn(2, 4, 3, 3)
    gains = 0.5 + torch.rand(6)
    patch = Patch(fingerprint(model), units.layers, gains)
    with torch.no_grad():
        bias = model.bias[:, None, None]
        expected = bias + (model(x) - bias) * gains[:, None, None]
        with patch.applied(model):
            torch.testing.assert_close(model(x), expected)
    assert set(unit_maps(units)["weight"].flatten().tolist()) == set(range(6))


def test_the_bound_holds_for_divergences_that_a_few_images_carry():
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(np.exp(rng.normal(-7, 2, 20_000)))  # skewness as of patches of digits
    draws = [whole[torch.from_numpy(rng.integers(len(whole), size=100))] for _ in range(400)]
    assert 0.93 < np.mean([upper_bound(draw) >= float(whole.mean()) for draw in draws]) < 0.999  # three times: always


class Halves(nn.Module):
    """Says which half of an image is brighter, unless one pixel is lit: then it says 2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(100.0))

    def forward(self, x):
        halves = [half.mean(dim=(1, 2, 3)) for half in x.split(x.shape[3] // 2, dim=3)]
        return torch.stack([*halves, self.weight * (x[:, 0, 1, 9] - 1)], dim=1)


def test_transplants_carry_the_part_that_is_to_blame_and_nothing_else():
    model, generator = Halves(), torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 16, 24, generator=generator)
    labels = model(images).argmax(dim=1).detach()
    lit, natural = images[:1].clone(), torch.rand(1, 1, 16, 24, generator=generator)
    lit[:, 0, 1, 9] = 2.0
    natural[..., :12] += 0.1  # the left half is brighter, whatever the label says: no part of it alone is to blame
    mistakes = torch.cat([lit, natural]), torch.tensor([0, 1])
    wrong = torch.where(torch.arange(40) < 30, labels, 1 - labels)  # the last ten are read wrongly
    before = state_of(model)
    (made, own), table = transplants(model, mistakes, (images, wrong), per_mistake=5, tries=10)
    assert state_of(model) == before
    first = table.iloc[0]
    assert first[["height", "width", "share", "made"]].tolist() == [4, 6, 1.0, 5]
    assert first["top"] <= 1 < first["top"] + 4 and first["left"] <= 9 < first["left"] + 6
    part = (..., slice(int(first["top"]), int(first["top"]) + 4), slice(int(first["left"]), int(first["left"]) + 6))
    assert (model(made[:5]).argmax(dim=1) == 2).all() and len(set(own[:5].tolist())) == 2
    for image, label in zip(made[:5], own[:5], strict=True):
        assert torch.equal(image[part], lit[0][part])
        back = image.clone()
        carrier = next(n for n in range(30) if (images[n] == image).float().mean() > 0.8)
        back[part] = images[carrier][part]
        assert torch.equal(back, images[carrier]) and label == labels[carrier]
    again, _ = transplants(model, mistakes, (images, wrong), per_mistake=5, tries=10)
    assert torch.equal(again[0], made)


def test_a_cause_that_fills_the_image_is_what_the_mistakes_have_in_common():
    """Slanted light: no part of it, but the whole makes the right half brighter."""
    light = torch.linspace(-0.3, 0.3, 12).expand(1, 8, 12)
    generator = torch.Generator().manual_seed(0)
    plain = 0.01 * torch.rand(30, 1, 8, 12, generator=generator)
    plain[..., :6] += torch.rand(30, 1, 1, 1, generator=generator) * 0.25  # the left half is brighter: class 0
    labels = torch.zeros(30, dtype=torch.long)
    mistakes = (plain[:5] + light, labels[:5])
    (made, own), table = transplants(Halves(), mistakes, (plain[5:], labels[5:]), per_mistake=4)
    common = mistakes[0].median(dim=0).values - plain[5:].median(dim=0).values
    expected = (plain[5:] + common).clamp(plain[5:].min(), plain[5:].max())
    assert len(made) == len(own) == 20 and table["made"].tolist() == [4] * 5
    assert len(made.unique(dim=0)) == 20  # in as many carriers, since all get the same
    assert table[["height", "width"]].drop_duplicates().to_numpy().tolist() == [[8, 12]]
    assert all((expected == image).flatten(1).all(dim=1).any() for image in made)
    assert (Halves()(made).argmax(dim=1) == 1).all() and not own.any()
    two = transplants(Halves(), tuple(t[:2] for t in mistakes), (plain[5:], labels[5:]))[0]
    assert len(two[0]) == 0  # of two a median is no more than one of them


def test_what_fills_the_image_is_taken_before_half_of_it():
    """Light so strong that the left half of it turns all: with it would go half of the object."""
    light, generator = torch.linspace(-0.6, 0.6, 12).expand(1, 8, 12), torch.Generator().manual_seed(0)
    plain = 0.01 * torch.rand(30, 1, 8, 12, generator=generator)
    plain[..., :6] += 0.1
    labels, images = torch.zeros(30, dtype=torch.long), plain[5:]
    for count, sides in ((5, [8, 12]), (2, [4, 6])):  # of two nothing is known to be common
        mistakes = (plain[:count] + light, labels[:count])
        (made, _), table = transplants(Halves(), mistakes, (images, labels[5:]), per_mistake=4)
        assert table[["height", "width"]].drop_duplicates().to_numpy().tolist() == [sides]
        assert table["share"].eq(1).all() and (Halves()(made).argmax(dim=1) == 1).all()


def test_no_transplant_where_no_part_turns_nearly_all_of_the_carriers():
    images, labels = torch.zeros(6, 1, 8, 12), torch.ones(6, dtype=torch.long)
    images[..., 6:] = 1  # the right half is brighter
    mistake = torch.zeros(1, 1, 8, 12)
    mistake[..., 0, 0] = 0.1  # read as 0: the rest of it is not in any part
    (made, own), table = transplants(Halves(), (mistake, labels[:1]), (images, labels))
    assert len(made) == len(own) == 0 and table["made"].tolist() == [0]
    with pytest.raises(ValueError, match="of one size"):
        transplants(Halves(), (mistake, labels[:1]), (images[..., 1:], labels))
