"""The smallest correcting step: gains by autograd, curvature by brute force, closed forms, the search, and no trace."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from networks import Skip
from scipy import optimize
from torch import nn
from torch.nn import functional as F

from pss.correction import (
    Curvature,
    changes,
    divergences,
    gain_jacobian,
    margins,
    rival_margins,
    shifted,
    smallest,
    smallest_correction,
    unit_maps,
)
from pss.engine import growing
from pss.units import UnitGroup, Units


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
    model = Skip().double().eval()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(36, 2, 5, 5, generator=generator, dtype=torch.float64)
    labels = (model(images).argmax(dim=1) + (torch.arange(36) < 6).long()) % 3  # the first six are wrong
    return model, images[:6], labels[:6], (images[6:], labels[6:])


through_weights = partial(smallest_correction, through="weights", progress=False)


def rows_in_order(images, units):
    return torch.arange(len(units)).expand(len(images), -1)


# ------------------------------------------------------------------------------------------------ gains and curvature


class Odd(nn.Module):
    """Groups, a transposed convolution with groups, a layer used twice, two layers that share a weight, tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.twice = nn.Conv2d(6, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.down = nn.ConvTranspose2d(4, 6, 1)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.right.weight = self.left.weight
        self.qkv, self.num_heads = nn.Linear(6, 18), 2
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.stem(x).tanh()).relu_())
        x = self.down(self.up(x).tanh()).flatten(2).mT[:, ::7]
        x = self.right(self.left(x).sigmoid())
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + (q @ k.mT).softmax(dim=-1) @ v
        return self.head((x + self.attention(x, x, x)[0]).mean(dim=1))


def halves(model):  # units of one's own: half a parameter, in pieces of two rows
    yield UnitGroup("twice.weight", tuple(model.twice.weight.shape), 2, rows=2, offset=2)


@pytest.mark.parametrize("kind", ["filters", "rows", "heads", "all", halves])
@pytest.mark.parametrize("moved", [False, True])
def test_gain_jacobian_is_the_sum_of_weight_times_gradient(kind, moved):
    torch.manual_seed(0)
    model, x = Odd().double().train(), torch.randn(3, 2, 5, 5, dtype=torch.float64)
    units = Units.of(model, kind)
    steps = 0.3 * torch.randn(len(units), dtype=torch.float64) if moved else None
    found = gain_jacobian(model, x, units, steps=steps)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    weights = dict(model.named_parameters())
    names = list(dict.fromkeys(group.parameter for group in units.layers))
    base = {name: weights[name].detach().clone() for name in names}
    with torch.no_grad():
        for u in range(len(units) if moved else 0):
            units.view(model, u).mul_(1 + steps[u])
    model.eval()
    for b in range(len(x)):
        for j, logit in enumerate(model(x[b : b + 1])[0]):
            gradients = torch.autograd.grad(logit, [weights[n] for n in names], retain_graph=True)
            products = {n: (g * base[n])[None] for n, g in zip(names, gradients, strict=True)}
            expected = units.reduce(products)[0] * torch.as_tensor(units.sizes)
            torch.testing.assert_close(found[b, j], expected, rtol=1e-9, atol=1e-12)


def test_usual_layers_need_one_pass_for_all_logits(net):
    model, _, _, (retain, _) = net
    gain_jacobian(model, retain, Units.of(model))  # verifies an image
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    gain_jacobian(model, retain, Units.of(model))
    handle.remove()
    assert len(passes) == 1 + 1  # and one image, to count the logits


def test_gain_of_zero_has_no_derivative_that_is_not_finite(net):
    model, _, _, (retain, _) = net
    units = Units.of(model)
    steps = -torch.eye(len(units), dtype=torch.double)[0]
    found = gain_jacobian(model, retain, units, steps=steps)
    assert found.isfinite().all() and not found[..., 0].any() and found[..., 1:].any()


def test_curvature_is_that_of_the_divergence(net):
    model, *_, (retain, _) = net
    units = Units.of(model)
    own, jacobian = Curvature.of(model, retain, units), gain_jacobian(model, retain, units)
    p = model(retain).detach().softmax(dim=1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = (jacobian.mT @ middle @ jacobian).mean(dim=0)
    torch.testing.assert_close(own.rows.mT @ own.rows, expected, rtol=1e-9, atol=1e-15)
    d = 1e-3 * torch.randn(len(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = {
        name: model.get_parameter(name).detach() * torch.cat([d, d[:0]])[of] for name, of in unit_maps(units).items()
    }
    before = model(retain).log_softmax(dim=1)
    with shifted(model, delta):
        kl = (before.exp() * (before - model(retain).log_softmax(dim=1))).sum(dim=1).mean()
    np.testing.assert_allclose(kl.item(), 0.5 * float(d @ expected @ d), rtol=0.02)
    whole = expected + own.damping * torch.eye(len(units))
    v = torch.randn(2, len(units), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(own.solve(v), torch.linalg.solve(whole, v.mT).mT, rtol=1e-6, atol=0)


def test_curvature_at_a_temperature_is_that_of_the_divergence_there(net):
    model, units, images = net[0], Units.of(net[0]), net[1][:6]
    step = torch.randn(len(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, size = Curvature.of(model, images, units, temperature=4.0).rows, 1e-3
    with torch.no_grad():
        before = model(images) / 4
        with shifted(model, changes(model, unit_maps(units), size * step)):
            kl = 16 * divergences(before, model(images) / 4).mean()
    torch.testing.assert_close((rows @ step).square().sum() / 2, kl / size**2, rtol=2e-2, atol=0)


def test_curvature_of_many_classes_is_of_drawn_labels(net, monkeypatch):
    model, *_, (retain, _) = net
    units, many = Units.of(model), retain.repeat(100, 1, 1, 1)
    exact = Curvature.of(model, retain, units)
    monkeypatch.setattr("pss.correction._EXACT", 0)
    drawn = Curvature.of(model, many, units, seed=1)
    a, b = (each.rows.mT @ each.rows for each in (exact, drawn))
    assert float((a - b).norm() / a.norm()) < 0.1
    assert torch.equal(drawn.rows, Curvature.of(model, many, units, seed=1).rows)


def test_correction_is_the_least_of_all_that_meet_the_needs():
    torch.manual_seed(0)
    own = Curvature(torch.randn(7, 5, dtype=torch.float64))
    form = own.rows.mT @ own.rows + own.damping * torch.eye(5)
    cost = lambda d: 0.5 * float(d @ form @ d)  # noqa: E731
    slopes, needs = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    found = own.correction(slopes, needs)
    assert (slopes @ found >= needs - 1e-6).all()
    bounds = {"type": "ineq", "fun": lambda d: slopes.numpy() @ d - needs.numpy()}
    best = optimize.minimize(lambda d: cost(torch.from_numpy(d)), np.zeros(5), constraints=bounds, tol=1e-12)
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    price = 0.05  # what is lacking costs so much: the whole then is least
    soft = own.correction(slopes, needs, price)
    whole = lambda d: cost(d) + price * float((needs - slopes @ d).clamp(min=0).sum())  # noqa: E731
    near = [soft + 1e-3 * torch.randn(5, dtype=torch.float64) for _ in range(200)]
    assert whole(soft) < whole(found) and all(whole(soft) < whole(d) + 1e-12 for d in near)
    assert not own.correction(0 * slopes, needs).any()


def test_gains_close_the_margins_with_the_least_curvature(linear):
    model, x, y, retain = linear
    units = Units.of(model, "rows")
    usual = retain[0] + 1e-3
    table = smallest_correction(model, x, y, units, retain=retain, usual=usual, max_relative_step=50, progress=False)
    own = Curvature.of(model, usual, units)
    logits = model(x).detach()
    for b, row in table.set_index("image").iterrows():
        sign = 2 * y[b] - 1
        slope = sign * torch.stack([-logits[b, 0], logits[b, 1]])  # of the margin to the two gains, on a linear model
        d = own.solve(slope[None])[0]
        d = d * -(slope.sum() / (slope @ d))
        length = (model.weight.detach() * d[:, None]).norm().item()
        assert row["corrected"] and length * (1 - 1e-6) <= row["step"] <= length * 1.05


def test_margins_are_over_the_strongest_rivals(net):
    model, x, y, _ = net
    units = Units.of(model)
    gaps, slopes = margins(model, x, y, units)
    z = model(x).detach()
    expected = (z.gather(1, y[:, None]) - z.scatter(1, y[:, None], -torch.inf).topk(2).values).double()
    torch.testing.assert_close(gaps, expected)
    assert slopes.shape == (6, 2, 12) and (gaps[:, 0] < 0).all()
    torch.testing.assert_close(rival_margins(model(x), y), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_gains_cost_what_the_least_divergence_does_where_several_rivals_are_in_front(seed):
    """Against SciPy: on a linear model margins are linear in the gains, and the fourth class has three rivals."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Linear(6, 5, bias=False).double().requires_grad_(False)
    model.weight.copy_(draw(5, 6))
    x, usual, retain = draw(3, 6), draw(40, 6), draw(40, 6)
    logits, on_usual, on_retain = model(x), model(usual), model(retain)
    labels, gains = logits.topk(4).indices[:, 3], lambda d: 1 + torch.from_numpy(d)
    how = {"max_relative_step": 50, "tolerance": 1e-3, "progress": False}
    table = smallest_correction(
        model, x, labels, Units.of(model, "rows"), retain=(retain, on_retain.argmax(1)), usual=usual, **how
    )
    for z, label, kl in zip(logits, labels, table["kl_mean"], strict=True):
        rivals = [c for c in range(5) if c != label]
        ahead = lambda d, z=z, label=label, rivals=rivals: (z * gains(d))[label] - (z * gains(d))[rivals]  # noqa: E731
        best = optimize.minimize(
            lambda d: float(divergences(on_usual, on_usual * gains(d)).mean()),
            np.full(5, 0.01),
            constraints={"type": "ineq", "fun": lambda d, ahead=ahead: ahead(d).numpy()},
            tol=1e-10,
        )
        assert best.success
        assert kl == pytest.approx(float(divergences(on_retain, on_retain * gains(best.x)).mean()), rel=0.1)


# ---------------------------------------------------------------------------------------------- closed forms


def test_smallest_step_has_its_closed_form_on_a_linear_model(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    ids = torch.stack([y, 1 - y], dim=1)  # the row of the true class first
    table = through_weights(model, x, y, units, ids, [1, 2], retain=retain, max_relative_step=1)
    logits = model(x).detach()
    margin = logits.gather(1, 1 - y[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]  # what has to be made up
    for k, length in ((1, margin / x.norm(dim=1)), (2, margin / x.norm(dim=1) / 2**0.5)):
        step = torch.tensor(table[table["k"] == k].sort_values("image")["step"].tolist(), dtype=torch.float64)
        weight = (model.weight.detach()[y].norm(dim=1) if k == 1 else model.weight.detach().norm()).expand(len(x))
        within = length <= weight / 1.05  # the cap
        assert within.any()
        assert (step[within] >= length[within] * (1 - 1e-9)).all() and (step[within] <= length[within] * 1.05).all()
        assert step[length > weight].isinf().all()


def test_damage_has_its_closed_form_on_a_linear_model(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    table = through_weights(
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


# ---------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("at", [3e-9, 1e-6, 2.2e-4, 0.3, 0.999])
def test_boundary_is_found_from_both_sides(at):
    found = smallest(lambda size: size >= at, longest=1.0)
    assert at <= found <= at * 1.05
    assert smallest(lambda size: size >= at, longest=at * 0.99) == np.inf


def test_the_step_corrects_and_a_slightly_shorter_one_does_not(net):
    model, x, y, retain = net
    units = Units.of(model)
    ids = rows_in_order(x, units)[:, :4]
    table = through_weights(model, x, y, units, ids, 4, retain=retain, max_relative_step=30)
    assert table["corrected"].any()
    for i, row in table[table["corrected"]].set_index("image").iterrows():
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.zeros_like(model.one.weight)
        g[:4] = torch.autograd.grad(loss, model.one.weight)[0][:4]
        for size, right in ((1.0, True), (1 / 1.0501, False)):
            with shifted(model, {"one.weight": -g / g.norm()}, row["step"] * size):
                assert (model(x[i : i + 1]).argmax() == y[i]).item() is right
        np.testing.assert_allclose(row["relative"], row["step"] / model.one.weight[:4].detach().norm())


class Sized(Skip):
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
    changes = {sized.one.weight: [growing.Change(0, 1, 3, steps[0])]}
    changes[sized.two.weight] = [growing.Change(count - 1, 2, 5, steps[1])]
    found = growing.forward(sized, x[:count], changes, 3)
    for image in range(count):
        for k in range(3):
            delta = {"one.weight": torch.zeros(6, 2, 3, 3).double(), "two.weight": torch.zeros(6, 6, 3, 3).double()}
            delta["one.weight"][3:5] += steps[0] * (k >= 1 and image == 0)
            delta["two.weight"][5:] += steps[1] * (k >= 2 and image == count - 1)
            with shifted(sized, delta):
                torch.testing.assert_close(found[image, k], sized(x[image : image + 1])[0])


def test_pruned_units_can_be_corrected_too():
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 2, 0, 0]]))
    x, y = torch.tensor([[3.0, 1, 2, 0]]).double(), torch.tensor([0])
    units, retain = Units.of(model, "rows"), (-x.repeat(2, 1), torch.tensor([0, 0]))
    row = through_weights(model, x, y, units, torch.tensor([[0, 1]]), 1, retain=retain).iloc[0]
    needed = 5 / float(x.norm())  # the margin over the length of the image
    assert row["corrected"] and needed <= row["step"] <= 1.05 * needed
    assert row["step"] == pytest.approx(row["relative"] * (5 / 2) ** 0.5)  # of a row of usual size
    with torch.no_grad():
        model.weight.zero_()
    y = torch.tensor([1])
    assert not through_weights(model, x, y, units, torch.tensor([[0, 1]]), 1, retain=retain, progress=False).corrected[
        0
    ]


def test_not_corrected_counts_as_infinite(linear):
    model, x, y, retain = linear
    units = Units.of(model, kind="rows")
    table = through_weights(
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
    one = through_weights(model, x, y, units, [[0, 1]], [1, 2], retain=retain).set_index("k")
    np.testing.assert_allclose(one.loc[1, "step"], np.inf)  # a row of zeros has no length to be moved by
    assert 4 / 2**0.5 <= one.loc[2, "step"] <= 4 / 2**0.5 * 1.05
    model.weight.data[0, 0] = -0.5  # moved alone it has to pass 4, and from there on to 5 it corrects
    one = through_weights(model, x, y, units, [[0]], 1, retain=retain, max_relative_step=10).iloc[0]
    assert 4.5 <= one["step"] <= 4.5 * 1.05  # 5, within these, is one of the sizes tried first
    one = through_weights(model, 1.2 * x, y, units, [[0]], 1, retain=retain, max_relative_step=10, progress=False).iloc[
        0
    ]
    assert not one["corrected"]  # the same size leads to a logit of 5.4


def test_image_without_gradient_is_not_corrected(net):
    model, x, y, retain = net
    with torch.no_grad():
        model.two.weight.zero_()
        model.norm.weight.zero_()
    wrong = (model(x).argmax(dim=1) != y).nonzero()[:, 0]
    units = Units.of(model)
    ids = torch.arange(6, 12).expand(len(wrong), -1)  # all filters of the second layer: switched off
    table = through_weights(model, x[wrong], y[wrong], units, ids, 6, retain=retain)
    assert len(wrong) and not table["corrected"].any()


# ---------------------------------------------------------------------------------------------- table and checks


def test_rows_have_the_ids_and_all_units_are_the_same_for_every_ranking(net):
    model, x, y, (retain, labels) = net
    units = Units.of(model)
    rankings = {"a": rows_in_order(x, units), "b": rows_in_order(x, units).flip(1)[:, :4]}
    how = {"retain": (retain[:20], labels[:20]), "usual": retain[20:], "image_ids": list("uvwxyz"), "progress": False}
    table = smallest_correction(model, x, y, units, rankings, [2, 12], ["weights", "gains"], **how)
    assert len(table) == 6 * 2 * 2 * 2 and not table.duplicated(["image", "ranking", "k", "through"]).any()
    assert set(table["image"]) == set("uvwxyz")
    a, b = (table.query("k == 12 and ranking == @r").drop(columns="ranking").reset_index(drop=True) for r in "ab")
    pd.testing.assert_frame_equal(a, b)
    a, b = (table.query("k == 2 and ranking == @r")["step"].tolist() for r in "ab")
    assert a != b
    whole = through_weights(
        model, x, y, units, parameters={"both": ["one.weight", "two.weight"]}, **how | {"usual": None}
    )
    same, own = whole[whole["k"] == 12], whole[whole["k"] == 0]
    np.testing.assert_allclose(same["step"], own["step"])
    np.testing.assert_allclose(own["step"], table.query("k == 12 and ranking == 'a' and through == 'weights'")["step"])


def test_the_curvature_makes_gains_cost_less(net, monkeypatch):
    model, x, y, (retain, labels) = net
    how = {"retain": (retain, labels), "usual": retain + 1e-6, "max_relative_step": 1e3, "progress": False}
    curved = smallest_correction(model, x, y, **how)
    monkeypatch.setattr("pss.correction.DAMPING", 1e9)  # the margin's own slope
    plain = smallest_correction(model, x, y, **how)
    assert curved["corrected"].all() and curved["kl_mean"].median() < plain["kl_mean"].median()


def test_guard_and_mistakes_never_overlap(net):
    model, x, y, (retain, labels) = net
    units = Units.of(model)
    args = (model, x, y, units, rows_in_order(x, units), 3, "weights")
    both = (torch.cat([retain, x[2:3]]), torch.cat([labels, y[2:3]]))
    with pytest.raises(ValueError, match="1 of the retain images"):
        smallest_correction(*args, both)
    with pytest.raises(ValueError, match="2 of the retain images are among the usual images"):
        smallest_correction(model, x, y, units, retain=(retain, labels), usual=retain[3:5])


def test_right_images_are_refused(net):
    model, x, y, retain = net
    units = Units.of(model)
    y = y.clone()
    y[1] = model(x).argmax(dim=1)[1]
    with pytest.raises(ValueError, match=r"images \['v'\] are classified correctly"):  # by the names given
        through_weights(model, x, y, units, rows_in_order(x, units), 2, retain=retain, image_ids=list("uvwxyz"))
    with pytest.raises(ValueError, match=r"images \[1\] are classified correctly"):
        through_weights(model, x, y, units, rows_in_order(x, units), 2, retain=retain)
