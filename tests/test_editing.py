"""Repair: edits that are undone, and curves that equal copying the whole model for every edit."""

import copy
import logging

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import OwnConvolution, models
from scipy import stats
from state import state_of, unsettled
from torch import nn

import pss.editing
from pss.editing import edit_curve, edit_curves, edited, side_effects, unit_steps
from pss.saliency import parameter_saliency
from pss.units import UnitGroup, Units

# ------------------------------------------------------------------------------------------------ models


class Chain(nn.Module):
    """Biases, groups, dilation, string padding, in-place activations, and a linear head."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding="same")
        self.two = nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2, padding_mode="reflect")
        self.three = nn.Conv2d(12, 12, 3, groups=12, stride=2, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.one(x), inplace=True)
        x = self.two(x).relu_()
        return self.head(self.three(x).tanh().mean((2, 3)))


class Branches(nn.Module):
    """Branches whose rows differ meet by a sum in place, by a functional call, a concatenation and an assignment."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(12, 6, 3)
        self.unused = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).tanh() * 0.5
        left, right = self.left(x), self.right(x)
        x = x.clone()
        x.add_(left)  # x has fewer rows than left, and grows in place
        left += right
        both = torch.cat([x, left, right], dim=1).clone()
        both[:, 0] = right[:, 1]
        room = torch.zeros(both.shape, dtype=both.dtype)
        room[:, 1:] = both[:, 1:]
        both = both + room
        x = self.last(both)
        return self.head(torch.where(x > 0, x, 0.1 * x).flatten(2).mean(2))


class Shared(nn.Module):
    """One convolution used as often as the shape of the data says, and a convolution in one dimension."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv1d(18, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        for _ in range(2 if x.shape[-1] > 4 else 1):
            x = self.conv(x).sin()
        return self.head(self.other(x.unfold(2, 3, 3).sum(3).flatten(1, 2)).mean(2))


class Up(nn.Module):
    """A transposed convolution: its filters lie along the second dimension."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.up(self.conv(x).tanh()).mean((2, 3)))


class Mixing(nn.Module):
    """Batch norm over the batch at hand, in evaluation too: the rows are not independent."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().amax((2, 3)))


class Hidden(nn.Module):
    """A convolution with a backward pass of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(OwnConvolution.apply(x, self.conv.weight).tanh().mean((2, 3)))


class Secret(Chain):
    """Uses a filter's values as Python numbers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(1, 4, 1)

    def forward(self, x):
        return super().forward(x) * sum(abs(w[0][0][0]) for w in self.scale.weight.tolist())


class Stale(nn.Module):
    """Remembers the batch size across a layer where the batch may grow."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        n = x.shape[0]
        return self.head(self.conv(x).tanh().flatten().unflatten(0, (n, 4, -1)).mean(2))


def resnet():
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def vgg():
    features = models.vgg.make_layers([4, "M", 8, 8, "M", 8], batch_norm=True)
    model = models.VGG(features, num_classes=5, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))
    return model


def vit():
    return models.VisionTransformer(16, 4, 2, 4, 16, 32, num_classes=5)


def build(make, size=16, seed=0):
    """Float64, batch norms calibrated on random images, weights that tell images apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.momentum = None  # cumulative average
        if isinstance(model, models.VisionTransformer):
            nn.init.normal_(model.heads.head.weight)
        with torch.no_grad():
            model(torch.randn(16, 3, size, size))
    return model.double().eval()


def batch(count=2, size=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=g, dtype=torch.float64), torch.arange(count) % 5


def case(make, count=2, size=16, kind="filters", k=8):
    """Model, images, labels, a ranking for each image, and units."""
    model = build(make, size)
    units, generator = Units.of(model, kind), torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(len(units), generator=generator)[:k] for _ in range(count)])
    return model, *batch(count, size), ids, units


def copying_loop(model, images, labels, ids, units, edit="finetune", lr=0.5):
    """The second source: a copy of the model for every edit, the gradient from plain autograd. (B, K + 1, C)."""
    results = []
    for image, label, own in zip(images, labels, ids, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = dict(zip(parameters, gradients, strict=True))
        variant = copy.deepcopy(model)
        with torch.no_grad():
            rows = [variant(image[None])[0]]
            for unit in own.tolist():
                number, j = units.locate(unit)
                layer = units.layers[number]
                view, gradient = units.view(variant, unit), gradients[layer.parameter]
                if edit == "prune":
                    view.zero_()
                elif gradient is not None:
                    view.sub_(lr * gradient[layer.index(j)])
                rows.append(variant(image[None])[0])
        results.append(torch.stack(rows))
    return torch.stack(results)


def assert_same_curves(curves, logits, labels, rel=1e-9):
    count, variants, _ = logits.shape
    probabilities = logits.softmax(2)
    before = logits[:, 0].argmax(1)
    pick = lambda c: probabilities.gather(2, c[:, None, None].expand(-1, variants, 1)).flatten().numpy()  # noqa: E731
    np.testing.assert_allclose(curves["confidence_true"], pick(labels), rtol=rel)
    np.testing.assert_allclose(curves["confidence_wrong"], pick(before), rtol=rel)
    np.testing.assert_allclose(curves["loss"], -np.log(pick(labels)), rtol=rel, atol=1e-15)
    assert curves["predicted"].tolist() == logits.argmax(2).flatten().tolist()
    assert curves["predicted0"].tolist() == before.repeat_interleave(variants).tolist()
    assert curves["k"].tolist() == list(range(variants)) * count


# ------------------------------------------------------------------------- curves against the copying loop

CARRIED = [
    (resnet, 32, "filters"),
    (resnet, 32, "all"),
    (vgg, 32, "all"),
    (lambda: models.densenet121(num_classes=5), 32, "filters"),
    (lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25), 32, "all"),
    (lambda: models.shufflenet_v2_x0_5(num_classes=5), 32, "filters"),
    (Chain, 16, "all"),
    (Shared, 18, "all"),
]
ALONE = [(Up, 16, "filters"), (Hidden, 16, "filters"), (vit, 16, "heads"), (vit, 16, "all")]


def assert_copying(given, edit="finetune", lr=0.5, rel=1e-9, expected=None, **options):
    """Curves of a case equal the copying loop's."""
    expected = copying_loop(*given, edit, lr) if expected is None else expected
    curves = edit_curves(*given, edit, lr=lr, progress=False, **options)
    assert_same_curves(curves, expected, given[2], rel)
    return curves


both_edits = pytest.mark.parametrize("edit", ["finetune", "prune"])


@both_edits
@pytest.mark.parametrize(
    ("make", "size", "kind", "strategy"), [(*c, "variants") for c in CARRIED] + [(*c, "auto") for c in ALONE]
)
def test_curves_equal_the_copying_loop(make, size, kind, strategy, edit):
    given = case(make, 3, size, kind)
    expected = copying_loop(*given, edit)
    assert (expected[:, 0] - expected[:, -1]).abs().max() > 1e-6, "the edits must do something"
    before = state_of(unsettled(given[0]))
    assert_copying(given, edit, expected=expected, strategy=strategy)
    assert state_of(given[0]) == before


@both_edits
def test_branches_of_different_rows_meet(edit):
    given = case(Branches, 3, k=18)
    assert {given[4].name(u).partition("[")[0] for u in given[3].flatten().tolist()} >= {"left", "right", "unused"}
    assert_copying(given, edit, strategy="variants")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Mixing, "its rows interact"),
        (Stale, "keeps or changes its size"),
        (Up, "the first dimension of their weight"),
        (Secret, "not seen"),
        (vit, "multi_head"),
    ],
)
def test_auto_falls_back_and_says_so(make, why, caplog):
    model, images, labels, _, units = case(make, kind="heads" if make is vit else "filters", k=4)
    given = model, images, labels, torch.arange(len(units) - 4, len(units)).expand(2, 4), units
    with caplog.at_level(logging.INFO, logger="pss.engine.edits"):
        assert_copying(given, "prune")
    assert "in place" in caplog.text
    assert why in caplog.text
    with pytest.raises(RuntimeError):
        edit_curves(*given, "prune", strategy="variants")


class Threshold(Chain):
    """Takes another branch for some batches."""

    def forward(self, x):
        x = F.relu(self.one(x)) * (2 if x.mean() > 0.02 else 1)
        return self.head(self.three(self.two(x)).mean((2, 3)))


@pytest.mark.parametrize("make", [Mixing, Threshold])
@both_edits
def test_images_do_not_see_each_other(make, edit):
    """Neither in the logits, nor in the gradients of which the steps are made."""
    assert_copying(case(make, 4), edit)


@pytest.mark.parametrize("strategy", ["variants", "in_place"])
def test_gradients_also_in_inference_mode(strategy):
    model, images, labels, ids, units = given = case(Chain)
    expected = edit_curves(*given, lr=0.5, strategy=strategy)
    with torch.inference_mode():
        got = edit_curves(model, images.clone(), labels.clone(), ids, units, lr=0.5, strategy=strategy)
        steps = unit_steps(model, images.clone(), labels.clone(), units, ids, strategy=strategy)
    pd.testing.assert_frame_equal(got, expected)
    assert any(step.any() for step in steps[0])


def test_the_log_names_the_growing_batch(caplog):
    with caplog.at_level(logging.INFO, logger="pss.engine.edits"):
        edit_curves(*case(Chain))
    assert [r.message for r in caplog.records] == ["all edits of up to 2 images in one pass"]


def test_unused_units_change_nothing():
    model, images, labels, _, units = case(Branches, 1)
    ids = [u for u in range(len(units)) if units.name(u).startswith("unused")]
    for edit in ("prune", "finetune"):
        curve = edit_curve(model, images[0], 0, ids, units, edit, strategy="variants")
        assert (curve["confidence_true"] == curve["confidence_true"][0]).all()
    for how in ({"lr": 1.0}, {"step_norm": 1.0}):
        assert all(not step.any() for step in unit_steps(model, images, labels, units, [ids], **how)[0])


def test_own_units_of_several_rows():
    """Units of two neighbouring rows of a linear layer, beginning at row 1."""
    kind = lambda m: [UnitGroup("head.weight", (5, 12), 2, rows=2, offset=1, label="pair")]  # noqa: E731
    assert_copying(case(Chain, kind=kind), strategy="variants")


def test_chunks_do_not_matter(monkeypatch):
    model, images, *_ = given = case(Chain, 5)
    whole, sizes = edit_curves(*given, lr=0.5), []
    monkeypatch.setattr(pss.editing, "_CHUNK", 2 * images[0].numel() * 9)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pd.testing.assert_frame_equal(whole, edit_curves(*given, lr=0.5), rtol=1e-12)
    assert set(sizes) == {1, 2}


@both_edits
def test_float32_stays_within_rounding(edit):
    model, images, *rest = case(resnet, 2, 32, k=25)
    assert_copying((model.float(), images.float(), *rest), edit, 0.1, rel=1e-4, strategy="variants")


# ---------------------------------------------------------------------------------------------- by hand


def linear():
    model = nn.Sequential(nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.5, -1.0]))
    return model


def softmax(z):
    e = np.exp(np.asarray(z, dtype=float))
    return e / e.sum()


@pytest.mark.parametrize("strategy", ["variants", "in_place"])
def test_curve_by_hand(strategy):
    """x = (2, 1), logits (2, 1.5, 2): class 0 is predicted (the first of equals), the label is 1."""
    model, x = linear(), torch.tensor([2.0, 1.0], dtype=torch.float64)
    units = Units.of(model, "rows")
    pruned = edit_curve(model, x, 1, [2, 0], units, edit="prune", strategy=strategy, image_id="seven")
    logits = [(2, 1.5, 2), (2, 1.5, -1), (0, 1.5, -1)]
    np.testing.assert_allclose(pruned["confidence_true"], [softmax(z)[1] for z in logits])
    np.testing.assert_allclose(pruned["confidence_wrong"], [softmax(z)[0] for z in logits])
    assert pruned["corrected"].tolist() == [False, False, True]
    assert pruned["predicted"].tolist() == [0, 0, 1]
    assert pruned["unit"].tolist() == [-1, 2, 0]
    assert pruned["image"].tolist() == ["seven"] * 3
    assert list(pruned) == [
        "image", "k", "unit", "label", "predicted0", "predicted",
        "confidence_true", "confidence_wrong", "corrected", "loss",
    ]  # fmt: skip

    # gradient of row c is (p_c - [c = y]) x, and a step of -0.3 times it moves logit c by -0.3 (p_c - [c = y]) |x|^2
    p = softmax(logits[0]) - np.array([0, 1, 0])
    moved = np.array(logits[0]) - 0.3 * p * 5 * np.array([[0, 0, 0], [0, 1, 0], [1, 1, 0]])
    tuned = edit_curve(model, x, torch.tensor(1), [1, 0], units, "finetune", lr=0.3, strategy=strategy)
    np.testing.assert_allclose(tuned["confidence_true"], [softmax(z)[1] for z in moved])
    np.testing.assert_allclose(tuned["loss"], [-np.log(softmax(z)[1]) for z in moved])
    # equal norm: row c moves by -eps sign(p_c - [c = y]) x / |x|, its logit by eps |x| in that direction
    moved = np.array(logits[0]) - 0.1 * np.sign(p) * np.sqrt(5) * np.array([[0, 0, 0], [0, 1, 0], [1, 1, 0]])
    equal = edit_curve(model, x[None], torch.tensor([1]), [1, 0], units, "finetune", step_norm=0.1, strategy=strategy)
    np.testing.assert_allclose(equal["confidence_true"], [softmax(z)[1] for z in moved])


@pytest.mark.parametrize("loss", ["cross_entropy", "logit", "logit_difference", lambda z, y: z.square().sum(1)])
def test_steps_equal_per_sample_gradients(loss):
    model, images, labels, ids, units = case(Chain, 3)
    gradients = parameter_saliency(model, images, labels, loss, signed=True)
    before = state_of(unsettled(model))
    for strategy in ("variants", "in_place"):
        steps = unit_steps(model, images, labels, units, ids, loss, lr=0.25, strategy=strategy)
        equal = unit_steps(model, images, labels, units, ids, loss, step_norm=0.25, strategy=strategy)
        for i, own in enumerate(ids.tolist()):
            for n, unit in enumerate(own):
                number, j = units.locate(unit)
                layer = units.layers[number]
                g = gradients[layer.parameter][i][layer.index(j)]
                torch.testing.assert_close(steps[i][n], -0.25 * g, rtol=1e-9, atol=1e-15)
                torch.testing.assert_close(equal[i][n].norm(), torch.tensor(0.25, dtype=torch.float64))
                torch.testing.assert_close(equal[i][n], -0.25 * g / g.norm(), rtol=1e-9, atol=1e-12)
    assert state_of(model) == before


def test_equal_norm_survives_tiny_gradients():
    """Whose squares are nothing in float32."""
    model, x = linear().float(), torch.tensor([[3.0, -4.0]])
    steps = unit_steps(
        model, x, torch.tensor([0]), Units.of(model, "rows"), [[1, 0]], lambda z, y: 1e-30 * z[:, 0], step_norm=0.5
    )
    assert not steps[0][0].any()
    torch.testing.assert_close(steps[0][1].flatten(), torch.tensor([-0.3, 0.4]))


# ------------------------------------------------------------------------------------------ undone edits


def test_edited_edits_and_undoes():
    model, images, *_, units = case(Chain, kind="all")
    before = state_of(unsettled(model))
    ids = [0, 9, 25, 33]
    steps = [torch.full_like(units.view(model, u), 1e-3) for u in ids]
    for arguments in ({}, {"edit": "finetune", "steps": steps}):
        reference = copy.deepcopy(model).eval()
        with torch.no_grad():
            for u, step in zip(ids, steps, strict=True):
                units.view(reference, u).copy_(units.view(reference, u) + step if arguments else torch.tensor(0.0))
        with edited(model, units, ids, **arguments) as inside:
            assert inside is model
            assert not any(m.training for m in model.modules())
            assert torch.equal(model(images), reference(images))
        assert state_of(model) == before
        with pytest.raises(KeyError), edited(model, units, ids, **arguments):
            raise KeyError("halfway")
        assert state_of(model) == before


@pytest.mark.parametrize("strategy", ["auto", "in_place"])
def test_undone_when_the_model_raises_halfway(strategy):
    class Tired(Chain):
        def forward(self, x):
            calls.append(x)
            if len(calls) > 4:
                raise RuntimeError("tired")
            return super().forward(x)

    calls = []
    model, *given = case(Tired)
    before, calls = state_of(unsettled(model)), [None] * 3 if strategy == "auto" else []
    with pytest.raises(RuntimeError, match="tired"):
        edit_curves(model, *given, "prune", strategy=strategy)
    assert state_of(model) == before


def test_a_graph_of_the_caller_survives_and_nothing_is_marked():
    model, images, labels, *_ = given = case(Chain)
    loss = F.cross_entropy(model(images), labels)
    for strategy in ("variants", "in_place"):
        edit_curves(*given, strategy=strategy)
    loss.backward()
    assert model.one.weight.grad.abs().sum() > 0
    assert not any(vars(t) for t in [images, *model.parameters(), *model.buffers()])


# --------------------------------------------------------------------------------------------- side_effects


@both_edits
def test_side_effects_by_brute_force(edit, monkeypatch):
    monkeypatch.setattr("pss.editing.RETAIN_BATCH", 7)  # of 20 images
    model, images, labels, ids, units = case(Chain, k=5)
    unsettled(model)
    retain, retain_labels = batch(20, seed=9)
    with torch.no_grad():  # some right, some wrong
        right = copy.deepcopy(model).eval()(retain).argmax(1)
    retain_labels = torch.where(torch.arange(20) < 13, right, (right + 1) % 5)
    steps = unit_steps(model, images, labels, units, ids, step_norm=1.0) if edit == "finetune" else None
    before, how = state_of(model), {"image_ids": ["a", "b"], "progress": False}
    table = side_effects(model, units, ids, retain, retain_labels, edit, steps, **how)
    assert state_of(model) == before
    assert table["image"].tolist() == ["a", "b"]
    for q in range(2):
        variant = copy.deepcopy(model).eval()
        with torch.no_grad():
            old = variant(retain)
            for n, unit in enumerate(ids[q].tolist()):
                view = units.view(variant, unit)
                view.copy_(torch.zeros(()) if steps is None else view + steps[q][n])
            new = variant(retain)
        still = [int(new[i].argmax()) == int(retain_labels[i]) for i in range(20)]
        kl = [stats.entropy(old[i].softmax(0).numpy(), new[i].softmax(0).numpy()) for i in range(13)]
        row = table.iloc[q]
        assert (row["k"], row["right"], row["wrong"], row["accuracy_before"]) == (5, 13, 7, 0.65)
        assert row["accuracy_after"] == pytest.approx(np.mean(still))
        assert row["still_right"] == pytest.approx(np.mean(still[:13]))
        assert row["corrected"] == pytest.approx(np.mean(still[13:]))
        assert row["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-9)
        assert row["kl_worst"] == pytest.approx(np.max(kl), rel=1e-9)
        assert row["kl_worst"] > 0


def test_side_effects_without_right_or_wrong_images_are_nan():
    model, images, *_, units = case(Chain, 3)
    with torch.no_grad():
        right = model(images).argmax(1)
    all_right = side_effects(model, units, [[0]], images, right).iloc[0]
    assert np.isnan(all_right["corrected"])
    all_wrong = side_effects(model, units, [[0]], images, (right + 1) % 5).iloc[0]
    assert np.isnan(all_wrong[["still_right", "kl_mean", "kl_worst"]].astype(float)).all()
