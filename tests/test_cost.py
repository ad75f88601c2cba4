"""Cost of a correction: closed forms on linear models, the boundary from both sides, and no trace."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pss
from pss.correction import smallest_correction
from pss.engine import growing as _variants
from pss.fisher import digest, fisher_diagonal, fisher_scores
from pss.lines import shifted, smallest
from pss.units import Units


class Net(nn.Module):
    """Two convolutions with a skip connection, batch normalization, and a head with a bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(x).tanh()
        x = x + self.norm(self.two(x)).relu_()
        return self.head(x.mean((2, 3)))


class Centred(Net):
    """Looks at the mean of the batch: its rows interact, so that no growing batch can carry it."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=0, keepdim=True) * (len(x) > 1))


@pytest.fixture
def linear():
    """Two classes, five inputs, a misclassified image and a retain set, float64."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Linear(5, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(draw(2, 5))
    images, retain = draw(4, 5), draw(30, 5)
    labels = 1 - model(images).argmax(dim=1)
    return model, images, labels, (retain, (retain[:, 0] > 0).long())


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double().eval()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(36, 2, 5, 5, generator=generator, dtype=torch.float64)
    labels = (model(images).argmax(dim=1) + (torch.arange(36) < 6).long()) % 3  # the first six are wrong
    return model, images[:6], labels[:6], (images[6:], labels[6:])


def rows_in_order(images, units):
    return torch.arange(len(units)).expand(len(images), -1)


# ---------------------------------------------------------------------------------------------- closed forms


def test_smallest_step_has_its_closed_form_on_a_linear_model(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    ids = torch.stack([y, 1 - y], dim=1)  # the row of the true class first
    table = smallest_correction(model, x, y, units, ids, [1, 2], retain=retain, max_relative_step=1, progress=False)
    logits = model(x).detach()
    margin = logits.gather(1, 1 - y[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]  # what has to be made up
    for k, length in ((1, margin / x.norm(dim=1)), (2, margin / x.norm(dim=1) / 2**0.5)):
        step = torch.tensor(table[table["k"] == k].sort_values("image")["step"].tolist(), dtype=torch.float64)
        weight = (model.weight.detach()[y].norm(dim=1) if k == 1 else model.weight.detach().norm()).expand(len(x))
        within = length <= weight / 1.05  # the cap
        assert within.any()
        assert (step[within] >= length[within] * (1 - 1e-9)).all() and (step[within] <= length[within] * 1.05).all()
        assert step[length > weight].isinf().all()


def test_fisher_step_has_its_closed_form_on_a_linear_model(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    fisher = fisher_diagonal(model, retain, units)
    damping = 0.3
    table = smallest_correction(
        model,
        x,
        y,
        units,
        rows_in_order(x, units),
        2,
        "fisher",
        retain,
        fisher,
        damping,
        max_relative_step=50,
        progress=False,
    )
    for i, row in table.set_index("image").iterrows():
        p = model(x[i]).detach().softmax(dim=0)
        g = (p - F.one_hot(y[i], 2))[:, None] * x[i]
        d = -g / (fisher["weight"].double() + damping * fisher["weight"].double().mean())
        need, rate = (model(x[i])[1 - y[i]] - model(x[i])[y[i]]).item(), ((d[y[i]] - d[1 - y[i]]) @ x[i]).item()
        length = need / rate * d.norm().item()
        assert length * (1 - 1e-9) <= row["step"] <= length * 1.05
    free = smallest_correction(
        model,
        x,
        y,
        units,
        rows_in_order(x, units),
        2,
        "fisher",
        retain,
        fisher,
        1e9,
        max_relative_step=50,
        progress=False,
    )
    plain = smallest_correction(
        model, x, y, units, rows_in_order(x, units), 2, retain=retain, max_relative_step=50, progress=False
    )
    np.testing.assert_allclose(free["kl_mean"], plain["kl_mean"], rtol=1e-6)  # all damping: the gradient itself


def test_damage_has_its_closed_form_on_a_linear_model(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    table = smallest_correction(
        model, x, y, units, rows_in_order(x, units), 2, retain=retain, max_relative_step=9, progress=False
    )
    v, labels = retain
    a = (v @ (model.weight[1] - model.weight[0])).detach()  # log-odds of class 1
    right = (a > 0).long() == labels
    for i, row in table.set_index("image").iterrows():
        sign = 2 * y[i] - 1
        change = sign * 2**0.5 * row["step"] * (v @ x[i]) / x[i].norm()
        p, q = a.sigmoid(), (a + change).sigmoid()
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        np.testing.assert_allclose(row["kl_mean"], kl[right].mean(), rtol=1e-6)
        np.testing.assert_allclose(row["kl_worst"], kl[right].max(), rtol=1e-6)
        now = (a + change > 0).long() == labels
        np.testing.assert_allclose(row["accuracy_lost"], (right.double().mean() - now.double().mean()), atol=1e-12)
        np.testing.assert_allclose(row["others_corrected"], now[~right].double().mean(), atol=1e-12)


def test_small_divergence_is_half_the_fisher_information(linear):
    model, _, _, (v, _) = linear
    many = v.repeat(400, 1)  # labels drawn from the model itself: then F is the curvature
    draws = torch.rand(len(many), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (draws < model(many).softmax(dim=1)[:, 1]).long()
    fisher = fisher_diagonal(model, (many, labels), progress=False)["weight"].double()
    step = torch.zeros_like(model.weight)
    step[1, 2] = 0.01  # one parameter: the diagonal is then all there is
    before = model(v).log_softmax(dim=1)
    with shifted(model, {"weight": step}):
        after = model(v).log_softmax(dim=1)
    kl = (before.exp() * (before - after)).sum(dim=1).mean()
    np.testing.assert_allclose(kl.item(), 0.5 * (fisher * step**2).sum().item(), rtol=0.05)


# ---------------------------------------------------------------------------------------------- the search


def test_boundary_is_found_from_both_sides():
    at = torch.tensor([3e-9, 1e-6, 2.2e-4, 0.3, 0.999, 1.001, 7.0], dtype=torch.float64)
    found = torch.tensor(
        smallest(lambda sizes: sizes >= at[:, None], len(at), max_relative_step=1.0), dtype=torch.float64
    )
    assert (found[:5] >= at[:5]).all() and (found[:5] <= at[:5] * 1.05).all()
    assert found[5:].isinf().all()


def test_first_of_several_intervals_is_taken():
    corrected = lambda sizes: ((sizes > 0.01) & (sizes < 0.04)) | (sizes > 0.5)  # noqa: E731
    assert 0.01 < smallest(corrected, 1, 1.0)[0] <= 0.0105


def test_the_step_corrects_and_a_slightly_shorter_one_does_not(net):
    model, x, y, retain = net
    units = Units.of(model)
    ids = rows_in_order(x, units)[:, :4]
    table = smallest_correction(model, x, y, units, ids, 4, retain=retain, max_relative_step=30, progress=False)
    assert table["corrected"].any()
    for i, row in table[table["corrected"]].set_index("image").iterrows():
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.zeros_like(model.one.weight)
        g[:4] = torch.autograd.grad(loss, model.one.weight)[0][:4]
        for size, right in ((1.0, True), (1 / 1.0501, False)):
            with shifted(model, {"one.weight": -g / g.norm()}, row["step"] * size):
                assert (model(x[i : i + 1]).argmax() == y[i]).item() is right
        np.testing.assert_allclose(row["relative"], row["step"] / model.one.weight[:4].detach().norm())


def test_growing_batch_carries_points_on_a_line(net):
    model, x, *_ = net
    delta = {n: torch.randn_like(p) for n, p in model.named_parameters() if n in ("one.weight", "two.weight")}
    delta["two.weight"][2:4] = 0
    sizes = torch.tensor([[0.1, 0.5, 2.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    changes = {}
    for b in range(2):
        for start, stop in ((0, 2), (4, 6)):
            for name, d in delta.items():
                change = _variants.Change(b, 0, start, d[start:stop], sizes[b])
                changes.setdefault(model.get_parameter(name), []).append(change)
    with torch.no_grad():
        found = _variants.forward(model, x[:2], changes, 3)
    delta["one.weight"][2:4] = 0
    for b in range(2):
        for s in range(3):
            with shifted(model, delta, sizes[b, s].item()):
                torch.testing.assert_close(found[b, s], model(x[b : b + 1])[0])


def test_in_place_and_in_one_pass_agree(net):
    model, x, y, retain = net
    units = Units.of(model)
    names = {"whole": [layer.parameter for layer in units.layers]}
    args = (model, x, y, units, {"any": rows_in_order(x, units)}, len(units))
    table = smallest_correction(*args, retain=retain, max_relative_step=10, parameters=names, progress=False)
    with_bias = smallest_correction(
        *args, retain=retain, max_relative_step=10, parameters={"head": ["head.weight", "head.bias"]}, progress=False
    )
    first, second = (table[table["ranking"] == name].reset_index() for name in ("any", "whole"))
    np.testing.assert_allclose(first["step"], second["step"], rtol=1e-9)
    assert with_bias.query("ranking == 'head'")["corrected"].all() and (second["k"] == 0).all()
    rows = Centred().double().eval()
    rows.load_state_dict(model.state_dict())
    again = smallest_correction(
        rows, x, y, units, {"any": rows_in_order(x, units)}, 5, retain=retain, max_relative_step=10, progress=False
    )
    plain = smallest_correction(*args[:5], 5, retain=retain, max_relative_step=10, progress=False)
    assert np.isfinite(plain["step"]).any()
    np.testing.assert_allclose(again["step"], plain["step"], rtol=0.05)


class Sized(Net):
    """Reads the size of its batch first, and makes views by it later, as EfficientNets do."""

    def forward(self, x):
        size = len(x)
        x = torch.reshape(self.one(x).tanh().reshape(size, 6, -1), (size, 6, 5, 5))
        x = x + self.norm(self.two(x)).relu()
        return self.head(x.mean((2, 3)).view(size, -1))


@pytest.mark.parametrize("count", [1, 2])
def test_views_by_the_size_that_the_batch_had_are_carried(net, count):
    model, x, _, _ = net
    torch.manual_seed(0)
    sized = Sized().double().eval()
    assert torch.equal(sized(x), model(x))
    steps = [torch.randn(2, 2, 3, 3).double(), torch.randn(1, 6, 3, 3).double()]
    changes = {sized.one.weight: [_variants.Change(0, 1, 3, steps[0])]}
    changes[sized.two.weight] = [_variants.Change(count - 1, 2, 5, steps[1])]
    found = _variants.forward(sized, x[:count], changes, 3)
    for image in range(count):
        for k in range(3):
            delta = {"one.weight": torch.zeros(6, 2, 3, 3).double(), "two.weight": torch.zeros(6, 6, 3, 3).double()}
            delta["one.weight"][3:5] += steps[0] * (k >= 1 and image == 0)
            delta["two.weight"][5:] += steps[1] * (k >= 2 and image == count - 1)
            with shifted(sized, delta):
                torch.testing.assert_close(found[image, k], sized(x[image : image + 1])[0])


class Late(Net):
    """Looks at the mean of the batch, but only between its layers: edits of its head are carried, others not."""

    def forward(self, x):
        x = self.one(x).tanh()
        x = x - x.mean(dim=0, keepdim=True) * (len(x) > 1)
        return self.head((x + self.norm(self.two(x)).relu()).mean((2, 3)))


def test_every_edited_parameter_is_compared_with_an_edit_in_place(net, monkeypatch):
    _, images, _, _ = net
    torch.manual_seed(0)
    model = Late().double().eval()
    retain = (images[1:], torch.arange(5) % 3)
    with torch.no_grad():
        y = model(images[:1]).topk(2).indices[:, 1]
    rows = Units.of(model, "rows")
    how = {"k": 1, "retain": retain, "parameters": {"one": ["one.weight"]}, "progress": False}
    found = smallest_correction(model, images[:1], y, rows, y[:, None], **how)

    def refuse(*_):
        raise _variants.NotCarried("in place, then")

    monkeypatch.setattr(_variants, "forward", refuse)
    in_place = smallest_correction(model, images[:1], y, rows, y[:, None], **how)
    assert in_place["corrected"].all()
    pd.testing.assert_frame_equal(found, in_place, rtol=1e-9)


def test_pruned_units_can_be_corrected_too():
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 2, 0, 0]]))
    x, y = torch.tensor([[3.0, 1, 2, 0]]).double(), torch.tensor([0])
    units, retain = Units.of(model, "rows"), (-x.repeat(2, 1), torch.tensor([0, 0]))
    row = smallest_correction(model, x, y, units, torch.tensor([[0, 1]]), 1, retain=retain, progress=False).iloc[0]
    needed = 5 / float(x.norm())  # the margin over the length of the image
    assert row["corrected"] and needed <= row["step"] <= 1.05 * needed
    assert row["step"] == pytest.approx(row["relative"] * (5 / 2) ** 0.5)  # of a row of usual size
    with torch.no_grad():
        model.weight.zero_()
    y = torch.tensor([1])
    assert not smallest_correction(
        model, x, y, units, torch.tensor([[0, 1]]), 1, retain=retain, progress=False
    ).corrected[0]


def test_not_corrected_counts_as_infinite(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    table = smallest_correction(
        model, x, y, units, rows_in_order(x, units), 1, retain=retain, max_relative_step=1e-3, progress=False
    )
    assert not table["corrected"].any() and len(table) == len(x)
    assert np.isinf(table[["step", "relative", "kl_mean", "kl_worst"]]).all(axis=None)
    assert table[["accuracy_lost", "others_corrected"]].isna().all(axis=None)


class Overflows(nn.Linear):
    """Not a number where a logit grows beyond 5: argmax then points at it, which is class 0 here."""

    def forward(self, x):
        logits = super().forward(x)
        return torch.where(logits.abs().amax(dim=1, keepdim=True) > 5, torch.nan, logits)


def test_overflow_is_no_correction():
    model = Overflows(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    units, retain = Units.of(model, kind="rows"), (torch.eye(2, dtype=torch.float64) / 2, torch.tensor([1, 0]))
    one = smallest_correction(model, x, y, units, [[0, 1]], [1, 2], retain=retain, progress=False).set_index("k")
    np.testing.assert_allclose(one.loc[1, "step"], np.inf)  # a row of zeros has no length to be moved by
    assert 4 / 2**0.5 <= one.loc[2, "step"] <= 4 / 2**0.5 * 1.05
    model.weight.data[0, 0] = -0.5  # moved alone it has to pass 4, and from there on to 5 it corrects
    one = smallest_correction(model, x, y, units, [[0]], 1, retain=retain, max_relative_step=10, progress=False).iloc[0]
    assert 4.5 <= one["step"] <= 4.5 * 1.05  # 5, within these, is one of the sizes tried first
    one = smallest_correction(
        model, 1.2 * x, y, units, [[0]], 1, retain=retain, max_relative_step=10, progress=False
    ).iloc[0]
    assert not one["corrected"]  # the same size leads to a logit of 5.4


def test_image_without_gradient_is_not_corrected(net):
    model, x, y, retain = net
    with torch.no_grad():
        model.two.weight.zero_()
        model.norm.weight.zero_()
    wrong = (model(x).argmax(dim=1) != y).nonzero()[:, 0]
    units = Units.of(model)
    ids = torch.arange(6, 12).expand(len(wrong), -1)  # all filters of the second layer: switched off
    table = smallest_correction(model, x[wrong], y[wrong], units, ids, 6, retain=retain, progress=False)
    assert len(wrong) and not table["corrected"].any()


# ---------------------------------------------------------------------------------------------- table and checks


def test_rows_have_the_ids_and_all_units_are_the_same_for_every_ranking(net):
    model, x, y, retain = net
    units, fisher = Units.of(model), fisher_diagonal(model, retain, progress=False)
    rankings = {"a": rows_in_order(x, units), "b": rows_in_order(x, units).flip(1)[:, :4]}
    table = smallest_correction(
        model,
        x,
        y,
        units,
        rankings,
        [2, 12],
        ["gradient", "fisher"],
        retain,
        fisher,
        image_ids=list("uvwxyz"),
        progress=False,
    )
    assert len(table) == 6 * 2 * 2 * 2 and not table.duplicated(["image", "ranking", "k", "direction"]).any()
    assert set(table["image"]) == set("uvwxyz")
    a, b = (table.query("k == 12 and ranking == @r").drop(columns="ranking").reset_index(drop=True) for r in "ab")
    assert a.equals(b)
    a, b = (table.query("k == 2 and ranking == @r")["step"].tolist() for r in "ab")
    assert a != b


def test_leaves_no_trace(net):
    model, x, y, retain = net
    model.train()
    model.two.weight.requires_grad_(False)
    before = pss.models.fingerprint(model)
    units = Units.of(model)
    model.eval()
    wrong = model(x).argmax(dim=1) != y
    model.train()
    smallest_correction(
        model, x[wrong], y[wrong], units, rows_in_order(x[wrong], units), 3, retain=retain, progress=False
    )
    with pytest.raises(ValueError, match="label 9"):
        smallest_correction(model, x, y * 0 + 9, units, rows_in_order(x, units), 3, retain=retain, progress=False)
    assert pss.models.fingerprint(model) == before and all(m.training for m in model.modules())
    assert not model.two.weight.requires_grad and model.one.weight.requires_grad and model.one.weight.grad is None


def test_guard_and_mistakes_never_overlap(net):
    model, x, y, (retain, labels) = net
    units = Units.of(model)
    args = (model, x, y, units, rows_in_order(x, units), 3, "gradient")
    both = (torch.cat([retain, x[2:3]]), torch.cat([labels, y[2:3]]))
    with pytest.raises(ValueError, match="1 of the retain images"):
        smallest_correction(*args, both)
    with pytest.raises(ValueError, match="1 of the retain images"):
        smallest_correction(*args, (retain, labels), image_ids=range(6), retain_ids=[5, *range(100, 129)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 13}, "k = 13"),
        ({"direction": "up"}, "unknown direction"),
        ({"direction": "fisher"}, "needs fisher="),
        ({"retain": None}, "no retain images"),
        ({"max_relative_step": 0}, "max_relative_step must be"),
        ({"image_ids": "aabcde"}, "6 different ids"),
        ({"tolerance": float("nan")}, "tolerance must be"),
    ],
)
def test_says_what_is_wrong(net, change, message):
    model, x, y, retain = net
    units = Units.of(model)
    options = {"rankings": rows_in_order(x, units), "k": 2, "retain": retain} | change
    with pytest.raises(ValueError, match=message):
        smallest_correction(model, x, y, units, progress=False, **options)


def test_right_images_are_refused(net):
    model, x, y, retain = net
    units = Units.of(model)
    y = y.clone()
    y[1] = model(x).argmax(dim=1)[1]
    with pytest.raises(ValueError, match=r"images \[1\] are classified correctly"):
        smallest_correction(model, x, y, units, rows_in_order(x, units), 2, retain=retain, progress=False)


# ---------------------------------------------------------------------------------------------- Fisher information


def test_fisher_diagonal_and_scores_by_brute_force(net):
    model, x, y, retain = net
    units = Units.of(model)
    everything = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(*retain, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for (name, _), g in zip(everything.items(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            everything[name] += g**2 / len(retain[0])
    fisher = fisher_diagonal(model, retain, progress=False)
    assert set(fisher) == set(everything)
    for name in everything:
        torch.testing.assert_close(fisher[name].double(), everything[name], rtol=1e-5, atol=1e-12)
    assert set(fisher_diagonal(model, retain, units)) == {"one.weight", "two.weight"}

    scores = fisher_scores(model, x, y, units, fisher, damping=0.2)
    together = torch.cat([fisher["one.weight"].flatten(), fisher["two.weight"].flatten()]).double()
    for b in range(2):
        loss = F.cross_entropy(model(x[b : b + 1]), y[b : b + 1])
        gradients = dict(zip(everything, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        for unit in range(len(units)):
            number, j = units.locate(unit)
            name, index = units.layers[number].parameter, units.layers[number].index(j)
            expected = (gradients[name][index] ** 2 / (fisher[name][index].double() + 0.2 * together.mean())).sum()
            torch.testing.assert_close(scores[b, unit], expected, rtol=1e-6, atol=0)
    assert fisher_scores(model, x, y, units, {n: 0 * f for n, f in fisher.items()}, 0).isnan().sum() == 0


def test_digest_is_of_the_bytes_whatever_their_type():
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x) == hashlib.sha256(x.numpy().tobytes()).hexdigest() == digest(x.T.contiguous().T)
    assert digest(x.bfloat16()) == digest(x.bfloat16().clone()) != digest((x + 1).bfloat16())
    assert digest(x[0, 0].bfloat16()) == digest(torch.zeros((), dtype=torch.bfloat16))


def test_fisher_file_is_read_again_and_only_for_the_same_thing(net, tmp_path):
    model, x, y, retain = net
    path = tmp_path / "deep" / "fisher.safetensors"
    path.parent.mkdir()
    first = fisher_diagonal(model, retain, path=path)
    assert [f.name for f in path.parent.iterdir()] == [path.name]  # nothing left beside it
    again = fisher_diagonal(model, retain, path=path)
    assert set(first) == set(again) and all(torch.equal(first[n], again[n]) for n in first)
    with pytest.raises(ValueError, match="another n, images, labels"):
        fisher_diagonal(model, (x, y), path=path)
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(ValueError, match="another model"):
        fisher_diagonal(model, retain, path=path)


def test_fisher_says_what_is_wrong(net):
    model, x, y, retain = net
    units = Units.of(model)
    fisher = fisher_diagonal(model, retain, units)
    with pytest.raises(ValueError, match="damping"):
        fisher_scores(model, x, y, units, fisher, damping=-1)
    with pytest.raises(ValueError, match=r"lacks 'two.weight'"):
        fisher_scores(model, x, y, units, {"one.weight": fisher["one.weight"]})
    with pytest.raises(ValueError, match="no images"):
        fisher_diagonal(model, (x[:0], y[:0]))


def test_reached_beside_repair():
    assert pss.editing.smallest_correction is smallest_correction is pss.smallest_correction
    with pytest.raises(AttributeError, match="no attribute"):
        pss.editing.nothing  # noqa: B018


def test_fisher_file_that_cannot_be_trusted_is_refused(net, tmp_path):
    model, *_, retain = net
    path = tmp_path / "fisher.safetensors"
    with pytest.raises(ValueError, match="a lambda has no name"):
        fisher_diagonal(model, retain, loss=lambda z, y: z.sum(dim=1), path=path)
    fisher_diagonal(model, retain, path=path, progress=False)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        fisher_diagonal(model, retain, path=path)
