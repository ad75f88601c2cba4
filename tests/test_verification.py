"""The check that every pass makes of itself: each guard of the fast strategy is broken, and it must see that."""

import logging
from contextlib import nullcontext

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import assert_close, batch, bn, conv, image, net, own, seeded
from torch import nn

from pss import Units, profile, profile_dataset
from pss.engine import calls, kernels, locating, recorder, strategies


def unlinked(monkeypatch):
    """A deferred output that is not in the graph, so that own functions lose what is before it."""

    def value(self):
        if self._value is None:
            self._value = self._call(self.input())
        return self._value

    monkeypatch.setattr(calls.LayerCall, "deferred", lambda self, x: calls.DeferredConvolution(self, x))
    monkeypatch.setattr(calls.DeferredConvolution, "value", value)
    monkeypatch.setattr(
        calls, "computed", lambda tree: calls.tree_map_only(calls.DeferredConvolution, lambda d: d.value(), tree)
    )
    monkeypatch.setattr(recorder, "computed", calls.computed)


def unconjugated(monkeypatch):
    monkeypatch.setattr(recorder.GradientRecorder, "_is_ours", lambda self, x, w, b: id(w) in self.names)


def trusting(monkeypatch):
    """Any first dimension as long as the batch is the batch."""
    monkeypatch.setattr(locating.Locator, "batches", lambda self: [None] * len(self.calls))
    monkeypatch.setattr(recorder.Constants, "are_all", lambda *_: False)


def native(monkeypatch):
    """PyTorch's own BatchNorm in recorded passes."""
    monkeypatch.setattr(recorder, "NORMALIZATIONS", {})


def without_abs(monkeypatch):
    real = recorder.GradientRecorder.collect

    def collect(self, call, x, g):
        real(self, call, x, g)
        if call.scale is not None and call.name in self.sums:
            self.sums[call.name] *= call.scale.sign()

    monkeypatch.setattr(recorder.GradientRecorder, "collect", collect)


def in_company(monkeypatch):
    monkeypatch.setattr(strategies, "close", lambda *_: True)


def counted_once(monkeypatch):
    """The last use of a shared weight replaces those before."""
    real = recorder.GradientRecorder.collect

    def collect(self, call, x, g):
        self.uses[call.name] = 1
        real(self, call, x, g)

    monkeypatch.setattr(recorder.GradientRecorder, "collect", collect)


def unstandardized(monkeypatch):
    """The gradient of a weight that is made of a parameter is taken for that of the parameter."""
    monkeypatch.setattr(
        recorder.GradientRecorder,
        "_collect_made",
        lambda self, call, x, g: self._add(call.name, self._gradients(call, x, g)),
    )


def forgotten(monkeypatch):
    """A weight that autograd reaches counts as zero there."""
    real = recorder.GradientRecorder.row_means

    def row_means(self, losses):
        means, reached = real(self, losses)
        zeros = {name: (p.new_zeros(self.samples, len(p)),) for name, p in self.wanted.items()}
        return {**zeros, **means}, reached

    monkeypatch.setattr(recorder.GradientRecorder, "row_means", row_means)


def shifted(monkeypatch):
    """A kernel that is columns off."""
    real = kernels.Convolution.row_sums
    monkeypatch.setattr(kernels.Convolution, "row_sums", lambda self, x, g, s: real(self, x.roll(3, -1), g, s))


def mixed_gains(dtype):
    model = seeded(net(lambda m, x: m.bn(m.layer(x)), layer=conv(3, padding=1), bn=bn()), dtype=dtype)
    with torch.no_grad():
        model.bn.weight[::2] *= -1
    return model


def complex_layers(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.Complex()
        model.first.double(), model.head.double()
    return model


swish = net(lambda m, x: networks.Swish.apply(m.layer(x)), layer=conv(3))
turned = net(networks.transposing, layer=conv(3), bn=bn(), mix=lambda: nn.Linear(6, 6))
shared = net(lambda m, x: m.layer(F.silu(m.layer(x))), layer=conv(3, padding=1))
standardized = net(lambda m, x: m.layer(x), layer=lambda: networks.Standardized(6, 6, 3))
product = net(lambda m, x: m.layer(x) @ m.layer.weight.T, layer=lambda: nn.Linear(8, 8))
BROKEN = {  # guard: network, shape of its images, how many, units
    "own functions": (unlinked, swish, image, 3),
    "complex": (unconjugated, complex_layers, (3,), 3),
    "table": (trusting, networks.Hypernetwork, (6,), 7, own("two.weight", "first.weight", "head.weight")),
    "sorted": (trusting, networks.Sorting, (6,), 6),
    "one image": (native, turned, image, 1),
    "gains": (without_abs, mixed_gains, image, 3),
    "company": (in_company, networks.Lowering, (3,), 3),
    "shared": (counted_once, shared, image, 3),
    "standardized": (unstandardized, standardized, image, 3),
    "product": (forgotten, product, image, 3),
    "kernel": (shifted, net(lambda m, x: m.layer(x), layer=conv(3)), image, 3),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_broken_guard_is_seen(name, dtype, monkeypatch, caplog):
    guard, factory, shape, count, *kind = BROKEN[name]
    if name == "complex":
        dtype = torch.float64
    model = factory(dtype) if factory in (mixed_gains, complex_layers) else seeded(factory, dtype=dtype)
    images, labels = batch(shape, count, dtype=dtype)
    units = Units.of(model, *(kind or ["all"]))
    expected = profile(model, images, labels, units, strategy="loop")
    guard(monkeypatch)
    wrong = profile(model, images, labels, units, verify=False)
    assert (wrong - expected).abs().max() > 1e-2 * expected.abs().max()  # without the check it is
    with caplog.at_level(logging.INFO, logger="pss"):
        got = profile(model, images, labels, units)
    assert_close(got, expected, units, 1e-9 if dtype == torch.float64 else 1e-5)
    assert "differs from plain autograd of one image" in caplog.text
    caplog.clear()
    got = profile(model, images, labels, units)  # it is remembered
    assert_close(got, expected, units, 1e-9 if dtype == torch.float64 else 1e-5)
    assert not caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_strategy_that_was_asked_for_is_not_replaced(precision, monkeypatch):
    images, labels = batch(image, 3, dtype=torch.float32)
    assert profile(mixed_gains(torch.float32), images, labels, strategy="fast", precision=precision).all()
    without_abs(monkeypatch)
    with pytest.raises(RuntimeError, match=r"not what plain autograd gives for it alone, first in layer: use strategy"):
        profile(mixed_gains(torch.float32), images, labels, strategy="fast", precision=precision)


class Random(nn.Module):
    """Draws noise also in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 60), nn.Linear(60, 10)  # the same 60 are never dropped twice

    def forward(self, x):
        return self.two(F.dropout(F.silu(self.one(x)), training=True))


def test_random_networks_are_an_error_that_names_a_layer():
    model, (images, labels) = seeded(Random), batch((6,), 3)
    with pytest.raises(RuntimeError, match=r"first in one: does the network draw random numbers"):
        profile(model, images, labels, Units.of(model, "rows"))
    assert profile(model, images, labels, Units.of(model, "rows"), verify=False).any()


def passes_of(model):
    """Sizes of the batches that run through a model, from now on."""
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_it_costs_one_image_once():
    model, (images, labels) = seeded(swish), batch(image, 3)
    sizes = passes_of(model)
    profile(model, images, labels, verify=False)
    assert sizes == [3, 1, 3]  # the batch, and where it is: the last image, and all in another order
    sizes.clear()
    profile(model, images, labels)
    assert sizes == [3, 1]  # one image alone
    with torch.no_grad():
        model.layer.weight.mul_(2)
    sizes.clear()
    profile(model, images, labels)
    assert sizes == [3]
    profile(model, images, labels, Units.of(model, "rows"))
    assert sizes == [3, 3, 1, 3, 1]  # other units are looked at anew
    for again in ([3, 1, 3, 1], [3]):
        sizes.clear()
        profile(model, images, labels, loss="logit")
        assert sizes == again  # and so is another loss


def test_a_data_set_is_verified_in_its_first_and_its_last_batch(tmp_path):
    data = torch.utils.data.TensorDataset(*batch(image, 8, dtype=torch.float32))
    for verify, expected in ((True, [2, 1, 2, 1, 2, 2, 2, 1]), (False, [2, 1, 2, 2, 2, 2])):
        model = seeded(swish, dtype=torch.float32)  # of which nothing is known
        sizes = passes_of(model)
        store = profile_dataset(model, data, path=tmp_path / str(verify), batch_size=2, verify=verify, progress=False)
        assert sizes == expected
        assert "verify" not in str(store.manifest)  # it changes no number


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3", "vit heads", "swin"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rounding_and_branches_are_no_reason(name, precision, caplog):
    factory, size, kind = networks.ZOO[name]
    model = seeded(factory, dtype=torch.float32)
    images, labels = batch((3, size, size), 4, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="pss"):
        profile(model, images, labels, Units.of(model, kind), strategy="fast", precision=precision)
    assert not caplog.text


class Wide(nn.Module):
    """A hundred hidden units, some of which rounding switches off."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 100), nn.Linear(100, 10)

    def forward(self, x):
        return self.two(F.silu(self.one(x)))


@pytest.mark.parametrize(
    ("off", "also_exact", "decided_in_float64", "wrong"),
    [(2, False, False, False), (3, False, True, False), (3, True, True, True), (60, False, False, True)],
    ids=["few units", "more", "also in float64", "the whole layer"],
)
def test_what_rounding_switches_is_decided_in_float64(off, also_exact, decided_in_float64, wrong, monkeypatch):
    model, (images, labels) = seeded(Wide, dtype=torch.float32), batch((3,), 3, dtype=torch.float32)
    dtypes = set()
    model.register_forward_pre_hook(lambda module, inputs: dtypes.add(inputs[0].dtype))
    collect = recorder.GradientRecorder.collect

    def switched(self, call, x, g):
        if call.name == "one.weight" and (also_exact or x.dtype == torch.float32):
            g = g.clone()
            g[:, :off] = 0
        collect(self, call, x, g)

    monkeypatch.setattr(recorder.GradientRecorder, "collect", switched)
    with pytest.raises(RuntimeError, match="first in one") if wrong else nullcontext():
        profile(model, images, labels, Units.of(model, "rows"), strategy="fast")
    assert (torch.float64 in dtypes) == decided_in_float64
