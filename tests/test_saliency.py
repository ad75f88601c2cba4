"""Every path against `torch.autograd.grad`, one image at a time."""

import copy
import logging

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import assert_close, batch, bn, conv, net, one_by_one, own, seeded
from torch import nn

import pss
from pss import Units, parameter_saliency, profile
from pss import saliency as gradients
from pss.engine import kernels
from pss.saliency import LOSSES, cross_entropy
from pss.units import UnitGroup


def assert_equal_to_loop(
    model, shape, kind="filters", sizes=(1, 2, 7), strategy="fast", seed=1, verify=True, **options
):
    images, labels = batch(shape, max(sizes), seed=seed)
    units = Units.of(model, kind)
    expected = one_by_one(model, images, labels, units, **options)
    assert expected.any()
    for size in sizes:
        got = profile(model, images[:size], labels[:size], units, strategy=strategy, verify=verify, **options)
        assert_close(got, expected[:size], units)


# A layer's weight gradients

GEOMETRIES = [  # channels, filters, kernel, stride, padding, dilation, groups, size of the input
    (32, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 5)),
    (32, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1, (7, 8)),
    (33, 8, (3, 2), (2, 3), (0, 4), (2, 1), 1, (9, 10)),
    (32, 8, (5, 1), (1, 2), (2, 0), (1, 3), 1, (5, 8)),
    (32, 8, (2, 2), (3, 3), (0, 0), (1, 1), 1, (11, 10)),  # places that no tap sees
    (32, 8, (7, 3), (4, 2), (3, 5), (1, 2), 1, (13, 6)),
    (32, 16, (4,), (3,), (2,), (1,), 1, (40,)),
    (32, 16, (2, 3, 2), (1, 2, 1), (1, 0, 0), (1, 1, 2), 1, (3, 5, 6)),
    (3, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (5, 6)),
    (3, 4, (3, 3), (2, 1), (1, 1), (1, 1), 1, (12, 12)),
    (40, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (2, 2)),
    (8, 16, (1, 1), (2, 2), (0, 0), (1, 1), 1, (5, 6)),
    (8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8, (4, 4)),
    (8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8, (10, 10)),
    (8, 12, (3, 5), (2, 1), (1, 2), (1, 1), 4, (9, 5)),
    (2100, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, (9, 9)),
]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("block", "small"), [(2**19, 2**19), (2**19, 0), (300, 0)])  # in parts too
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_way_to_a_weight_gradient(geometry, block, small, signed, monkeypatch):
    channels, filters, kernel, stride, padding, dilation, groups, size = geometry
    monkeypatch.setattr(kernels, "CPU_BLOCK", block)
    monkeypatch.setattr(kernels, "SMALL", small)
    monkeypatch.setattr(kernels, "LARGE", small)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, channels, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(filters, channels // groups, *kernel, generator=generator, dtype=torch.float64)
    layer = kernels.Convolution(weight.shape, stride, padding, dilation, groups)
    y = layer.forward(x, weight, None)
    assert y.shape == layer.output_shape(x.shape)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    expected = torch.stack(
        [
            torch.func.vjp(lambda w, i=i: layer.forward(x[i : i + 1], w, None), weight)[1](g[i : i + 1])[0]
            for i in range(5)
        ]
    )
    shift = torch.randn(filters, generator=generator, dtype=torch.float64)
    gained = torch.einsum("bo...,bo...->bo", g, y - shift.reshape(-1, *[1] * len(kernel)))
    whole, expected = expected, (expected if signed else expected.abs()).flatten(2).sum(2)
    ways = {"contiguous": (x, g)}
    if x.dim() == 4:
        ways["channels last"] = tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    for a, b in ways.values():
        kept = a.clone(), b.clone()
        torch.testing.assert_close(layer.gradients(a, b), whole)
        single = layer.gradients(a.float(), b.float()).double()
        torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
        torch.testing.assert_close(layer.row_sums(a, b, signed), expected)
        torch.testing.assert_close(layer.sums_with(y, shift, b), gained)
        torch.testing.assert_close(
            layer.sums_with(y.float(), shift.float(), b.float()).double(), gained, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


def test_every_way_is_taken(monkeypatch):
    taken, ways = [], ("_by_im2col", "_per_tap", "_on_a_shifted_grid", "_gradient")
    for way in ways:
        real = getattr(kernels.Convolution, way)
        monkeypatch.setattr(kernels.Convolution, way, lambda *a, way=way, real=real: taken.append(way) or real(*a))
    for number, (channels, filters, kernel, stride, padding, dilation, groups, size) in enumerate(GEOMETRIES):
        monkeypatch.setattr(kernels, "SMALL", 2**19 * (number % 2))
        layer = kernels.Convolution((filters, channels // groups, *kernel), stride, padding, dilation, groups)
        x = torch.randn(2, channels, *size)
        layer.row_sums(x, torch.randn(layer.output_shape(x.shape)), False)
    assert set(taken) == set(ways)


# Models of the zoo


@pytest.mark.parametrize("name", networks.ZOO)
def test_fast_path_equals_one_image_at_a_time(name):
    factory, size, kind = networks.ZOO[name]
    assert_equal_to_loop(seeded(factory), (3, size, size), kind)


def test_inception_counts_its_unused_head_as_zero():
    model = seeded(lambda: networks.models.inception_v3(num_classes=10, aux_logits=True, init_weights=False))
    images, labels = batch((3, 75, 75), 2)
    units = Units.of(model)
    got = profile(model, images, labels, units, strategy="fast")
    assert_close(got, one_by_one(model, images, labels, units), units)
    unused = torch.tensor([layer.parameter.startswith("AuxLogits") for layer in units.layers])[units.layer_ids]
    assert len(units) == 18112
    assert not got[:, unused].any()
    assert int(unused.sum()) == 18112 - 17216


def smooth(model):
    """Replace activations that change branch at zero, where float32 and float64 may differ."""
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU | nn.ReLU6):
            setattr(model, name, nn.SiLU())
        else:
            smooth(child)
    return model


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "vit rows"])
@pytest.mark.parametrize("fold", [True, False])
def test_float32_with_smooth_activations(name, fold):
    factory, size, kind = networks.ZOO[name]
    model = smooth(seeded(factory))
    for module in model.modules():  # a maximum changes branch too
        if isinstance(module, nn.Sequential):
            for key, child in module.named_children():
                if isinstance(child, nn.MaxPool2d):
                    setattr(module, key, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    if hasattr(model, "maxpool"):
        model.maxpool = nn.AvgPool2d(3, 2, 1)
    images, labels = batch((3, size, size), 3)
    units = Units.of(model, kind)
    expected = one_by_one(model, images, labels, units)
    got = profile(model.float(), images.float(), labels, units, strategy="fast", fold=fold)
    assert got.dtype == torch.float32
    assert_close(got.double(), expected, units, 2e-5)


# Networks with one difficulty each


@pytest.mark.parametrize("name", networks.FAST)
@pytest.mark.parametrize("signed", [False, True], ids=["absolute", "signed"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own, in the second source
def test_one_difficulty_at_a_time(name, signed):
    model = seeded(networks.FAST[name])
    shape = (3, *[8] * model.dims)
    assert_equal_to_loop(model, shape, "all", signed=signed)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [2, 5, 7], ids="length {}".format)  # also as long as the batch
@pytest.mark.parametrize("kind", ["heads", "rows"])
def test_attention_in_either_layout(batch_first, length, kind):
    assert_equal_to_loop(seeded(lambda: networks.Attention(batch_first)), (length, 3), kind)


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)

    def factory():
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return nn.Sequential(nn.Linear(3, 8), encoder, nn.Flatten(), nn.Linear(40, 10))

    for kind in ("heads", "rows"):
        assert_equal_to_loop(seeded(factory), (5, 3), kind)


# What PyTorch's function overrides do not show


@pytest.mark.parametrize("name", networks.OWN_FUNCTIONS)
def test_own_autograd_functions_on_outputs(name):
    assert_equal_to_loop(seeded(networks.OWN_FUNCTIONS[name]), (3, 8, 8), "all", verify=False)


def test_own_autograd_function_that_convolves():
    middle = lambda m, x: m.after(networks.OwnConvolution.apply(x, m.layer.weight))  # noqa: E731
    model = seeded(net(middle, layer=conv(3), after=conv(3)))
    assert_equal_to_loop(model, (3, 8, 8), "all", strategy="auto", verify=False)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_complex_layers(signed, strategy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.Complex()
        model.first.double(), model.head.double()
    assert_equal_to_loop(model, (3,), "rows", strategy=strategy, signed=signed, verify=False)
    rows = [
        profile(model, *batch((3,), 2), Units.of(model, "rows"), strategy=s, signed=signed) for s in (strategy, "loop")
    ]
    assert rows[0].dtype == rows[1].dtype == (torch.complex128 if signed else torch.float64)


class Reversed(networks.Sorting):
    """Reverses its batch, and restores the order at the end."""

    def forward(self, x):
        return self.head(F.silu(self.second(F.silu(self.first(x)).flip(0))).flip(0))


@pytest.mark.parametrize("network", [networks.Hypernetwork, networks.Sorting, Reversed])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_first_dimension_that_is_not_the_batch(network, count):
    for seed in range(1, 4):
        assert_equal_to_loop(seeded(network), (6,), "rows", (count,), "auto", seed, verify=False)


def test_a_sorted_batch_whose_last_image_keeps_its_place():
    model = seeded(networks.Sorting)
    units = Units.of(model, "rows")
    batches = [batch((6,), 3, seed=seed) for seed in range(60)]
    orders = [F.silu(model.first(images)).mean(1).argsort().tolist() for images, _ in batches]
    images, labels = batches[orders.index([1, 0, 2])]
    assert_close(profile(model, images, labels, units, verify=False), one_by_one(model, images, labels, units), units)


def test_a_course_that_is_known_for_another_batch_only():
    """Experts get as many of the images as there are: by chance the whole batch, in another order."""

    class Experts(networks.Sorting):
        def forward(self, x):
            wide = x[:, 0] > 0
            x = torch.cat([self.first(x[wide]), self.second(x[~wide])])
            order = torch.cat([wide.nonzero(), (~wide).nonzero()])[:, 0]
            return self.head(F.silu(x)[order.argsort()])

    model = seeded(Experts)
    for seed in range(6):
        assert_equal_to_loop(model, (6,), "rows", (4,), "auto", seed, verify=False)


def channels_last(m, x):
    """The image's own memory format brings it on: right in plain autograd of an image that is contiguous."""
    x = m.bn(F.silu(m.layer(x)).flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (6, 6)))
    return m.mix(x.flatten(2).contiguous().transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))


TRANSPOSING = {"transposed": networks.transposing, "channels last": channels_last}
NORMALIZATIONS = {
    "BatchNorm": bn(),
    "BatchNorm not affine": bn(affine=False),
    "BatchNorm without statistics": bn(track_running_stats=False),
    "InstanceNorm": lambda: nn.InstanceNorm2d(6, affine=True),
    "InstanceNorm with statistics": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("way", TRANSPOSING)
@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_one_image_with_a_gradient_that_is_transposed_in_memory(name, way, strategy):
    """Where PyTorch's own is wrong: so against finite differences."""
    model = seeded(net(TRANSPOSING[way], layer=conv(3), bn=NORMALIZATIONS[name], mix=lambda: nn.Linear(6, 6)))
    images, labels = batch((3, 8, 8), 1)
    units = Units.of(model, "filters")
    got = profile(model, images, labels, units, signed=True, strategy=strategy, verify=False)
    for unit in range(len(units)):
        with torch.no_grad():
            view, step, values = units.view(model, unit), 1e-5, []
            kept = view.clone()
            for sign in (1, -1):
                view.add_(sign * step)
                values.append(F.cross_entropy(model(images), labels))
                view.copy_(kept)
        slope = (values[0] - values[1]) / (2 * step) / view.numel()
        assert torch.isclose(got[0, unit], slope, rtol=1e-6, atol=1e-9), units.name(unit)


def test_batches_of_every_size_agree_where_a_gradient_is_transposed():
    model = seeded(net(networks.transposing, layer=conv(3), bn=bn(), mix=lambda: nn.Linear(6, 6)))
    images, labels = batch((3, 8, 8), 3)
    units = Units.of(model, "all")
    for strategy in ("fast", "vmap", "loop"):
        whole = profile(model, images, labels, units, strategy=strategy)
        alone = [profile(model, images[i : i + 1], labels[i : i + 1], units, strategy=strategy) for i in range(3)]
        assert_close(torch.cat(alone), whole, units)


class InPlace(nn.Module):
    """Layers on several places of an image, whose outputs are changed in place."""

    def __init__(self):
        super().__init__()
        self.embed, self.convolve, self.head = nn.Linear(3, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = self.convolve(F.silu(self.embed(x), inplace=True).mT).relu_()
        return F.silu(self.head(x.mT), inplace=True).mean(1)


def test_outputs_changed_in_place_are_no_views():
    assert_equal_to_loop(seeded(InPlace), (5, 3), "all")


# What the fast path does not know


@pytest.mark.parametrize("name", networks.GENERAL)
def test_general_path_is_right_and_says_so(name, caplog):
    factory, shape, kind = networks.GENERAL[name]
    model = seeded(factory)
    with caplog.at_level(logging.INFO, logger="pss"):
        assert_equal_to_loop(model, shape, kind, strategy="auto")
    assert "one image at a time for" in caplog.text
    assert ("gradients of one sample at a time for" in caplog.text) == (name == "checkpoint")
    images, labels = batch(shape, 2)
    with pytest.raises(RuntimeError):
        profile(model, images, labels, Units.of(model, kind), strategy="fast")


@pytest.mark.parametrize("name", networks.MADE)
def test_weights_and_tables_that_are_made_of_parameters(name):
    factory, shape, kind = networks.MADE[name]
    for signed in (False, True)[: 1 if "standard" in name else 2]:  # the mean over a standardized row is zero
        assert_equal_to_loop(seeded(factory), shape, kind, sizes=(1, 2, 5, 6, 7), signed=signed)


def written(x, view=False):
    """Where an image is positive, as a mask that was made without it; or what it was a view of."""
    mask = torch.zeros(len(x), 1, dtype=torch.bool)
    part = mask[:, 0]
    part |= x.detach().mean((1, 2, 3)) > 0
    return mask if view else part


class Columns(nn.Module):
    """Layers that multiply by their weights untransposed."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 8) / 3)
        self.bias, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 10)

    def forward(self, x):
        flat = F.silu(torch.addmm(self.bias, x.reshape(-1, 3), self.one))
        flat = F.silu(torch.addmm(self.bias, flat, self.two))
        flat = torch.addmm(self.bias, flat, self.two).mul_(self.two.mean())
        return self.head(flat.view(*x.shape[:2], 8).mean(1))


@pytest.mark.parametrize("signed", [False, True])
def test_units_that_are_columns(signed):
    groups = [UnitGroup("one", (3, 8), 8, dim=1), UnitGroup("two", (8, 8), 3, dim=1, rows=2, offset=2)]
    columns = lambda model: groups  # noqa: E731
    assert_equal_to_loop(seeded(Columns), (5, 3), columns, signed=signed)
    assert_equal_to_loop(seeded(Columns), (5, 3), own("one", "two"), strategy="auto", signed=signed)


@pytest.mark.parametrize("name", ["weight standardization", "weight in a penalty", "table of windows", "columns"])
def test_gains_of_weights_that_are_made_or_untransposed(name):
    factory, shape, kind = networks.MADE.get(name, (Columns, (5, 3), lambda _: [UnitGroup("two", (8, 8), 8, dim=1)]))
    model = seeded(factory)
    images, labels = batch(shape, 3)
    units = Units.of(model, kind)
    expected = profile(model, images, labels, units, of="gain", strategy="loop")
    got = profile(model, images, labels, units, of="gain", verify=False)
    assert expected.any()
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_outputs_of_columns_are_those_of_their_layer():
    model = seeded(Columns)
    images, labels = batch((5, 3), 3)
    got = profile(model, images, labels, Units.of(model, lambda _: [UnitGroup("one", (3, 8), 8, dim=1)]), of="output")
    said = (images.mean(1) @ model.one + model.bias).detach()
    assert torch.allclose(got, said.abs(), rtol=1e-9)


READS = {  # what a network may read of its batch to decide by: nothing that images have a part in
    "positions": (lambda m, x: (torch.arange(x.shape[3])[None].diff() == 1).all(), True),
    "a mask of ones": (lambda m, x: bool(torch.ones_like(x[:, 0], dtype=torch.bool).all()), True),
    "a buffer": (lambda m, x: m.bn.running_mean[0].item() > 0, True),
    "a parameter in a mask": (
        lambda m, x: torch.zeros(2).masked_fill_(m.layer.bias[:2] > 0, 1).tolist() == [1, 1],
        True,
    ),
    "the images": (lambda m, x: x.detach().mean() > 0, False),
    "a mask that was written into": (lambda m, x: written(x).any(), False),
    "a mask that was written into through a view": (lambda m, x: written(x, True).any(), False),
    "a share of images": (lambda m, x: torch.full((2,), 0.5).to(x) @ x.detach()[0, 0, 0, :2] > 0, False),
}


@pytest.mark.parametrize("name", READS)
def test_decisions_by_what_images_have_no_part_in(name):
    read, allowed = READS[name]
    middle = lambda m, x: m.bn(m.layer(x)) * 2 if read(m, x) else m.layer(x).square()  # noqa: E731
    model = seeded(net(middle, layer=conv(3), bn=bn()))
    assert_equal_to_loop(model, (3, 8, 8), "all", strategy="auto", verify=False)
    images, labels = batch((3, 8, 8))
    if not allowed:
        with pytest.raises(RuntimeError, match="reads values of a whole batch"):
            profile(model, images, labels, Units.of(model, "all"), strategy="fast")
    else:
        assert_equal_to_loop(model, (3, 8, 8), "all")


class Prototypes(nn.Module):
    """Classes are compared with images; their table is no batch, also where it is as long as one."""

    def __init__(self):
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(10, 5))
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x):
        return F.silu(self.conv(x)).mean((2, 3)) @ self.two(F.silu(self.one(self.table))).T


@pytest.mark.parametrize("count", [1, 7, 10])
def test_a_table_as_long_as_the_batch(count):
    model = seeded(Prototypes)
    assert_equal_to_loop(model, (3, 8, 8), "all", sizes=(count,), strategy="auto")


def test_images_prepared_by_the_network_stay_on_the_fast_path():
    model = seeded(net(lambda m, x: x))
    model.first = nn.Sequential(nn.ZeroPad2d(1), model.first, nn.BatchNorm2d(6).double())
    assert_equal_to_loop(model, (3, 8, 8), "all", strategy="fast")


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_a_parameter_kept_outside_of_the_modules(strategy):
    model = seeded(networks.Alias)
    images, labels = batch((3, 8, 8), 3)
    units = Units.of(model, "all")
    rows = []
    for b in range(3):
        value = F.cross_entropy(model(images[b : b + 1]), labels[b : b + 1])
        found = torch.autograd.grad(value, [model.conv.weight, model.head.weight])
        names = ("conv.weight", "head.weight")
        rows.append(units.reduce({name: g.abs()[None] for name, g in zip(names, found, strict=True)}))
    got = profile(model, images, labels, units, strategy=strategy)
    assert not got.requires_grad
    assert_close(got, torch.cat(rows), units)


@pytest.mark.parametrize("strategy", ["fast", "vmap", "loop"])
def test_profiles_carry_no_graph_and_idle_layers_are_zero(strategy):
    model = seeded(net(lambda m, x: x, unused=conv(3)))
    images, labels = batch((3, 8, 8), 3)
    versions = [p._version for p in model.parameters()]
    got = profile(model, images, labels, Units.of(model), strategy=strategy)
    assert not got.requires_grad and versions == [p._version for p in model.parameters()]
    assert not got[:, 6:].any() and got[:, :6].any()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    ],
    ids=["memory", "memory of the CPU", "worker"],
)
@pytest.mark.parametrize("strategy", ["auto", "vmap"])
def test_faults_of_the_machine_are_no_reason_for_a_slower_path(strategy, error):
    model, calls = seeded(networks.Net), []

    def fail(module, inputs):
        calls.append(len(inputs[0]))
        raise error

    model.head.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)[:10].replace("[", r"\[")):
        profile(model, *batch((3, 8, 8), 3), strategy=strategy)
    assert len(calls) == 1


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_within_the_network(create_graph):
    assert_equal_to_loop(seeded(lambda: networks.InnerGradient(create_graph)), (3, 8, 8), "all", strategy="auto")


def test_images_that_scale_each_other():
    assert_equal_to_loop(seeded(networks.Company), (5, 3), "rows", strategy="auto", verify=False)


def test_images_that_lower_each_other():
    """All outputs and losses are smaller in company: a difference without its size would not show it."""
    assert_equal_to_loop(seeded(networks.Lowering), (3,), "rows", strategy="auto", verify=False, loss=LOSSES["logit"])


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_general_paths_on_request(strategy):
    for name in ("resnet50", "vit heads"):
        factory, size, kind = networks.ZOO[name]
        assert_equal_to_loop(seeded(factory), (3, size, size), kind, sizes=(3,), strategy=strategy)


def test_folding_changes_nothing_and_is_used(monkeypatch):
    model = seeded(networks.ZOO["resnet18"][0])
    with torch.no_grad():
        model.layer1[0].bn1.weight[0] = 0
        model.layer1[0].bn1.weight[1] *= -1
    images, labels = batch((3, 64, 64), 2)
    units = Units.of(model)
    folded = profile(model, images, labels, units, strategy="fast")
    assert_close(folded, profile(model, images, labels, units, strategy="fast", fold=False), units)
    assert_close(folded, one_by_one(model, images, labels, units), units)
    dead = [units.name(i) for i in range(len(units))].index("layer1.0.conv1[0]")
    assert not folded[:, dead].any()
    calls = []
    original = torch.addcmul
    monkeypatch.setattr(torch, "addcmul", lambda *a: calls.append(1) or original(*a))
    profile(model, images, labels, units, strategy="fast")
    with_fold = len(calls)
    profile(model, images, labels, units, strategy="fast", fold=False)
    assert with_fold < len(calls) - with_fold == 20


def test_folded_gains_of_both_signs():
    model = seeded(net(lambda m, x: m.bn(m.layer(x)), layer=conv(3, padding=1), bn=bn()))
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([-1.5, 0.7, -0.2, 0.0, 1.0, -1.0]))
    for signed in (False, True):
        assert_equal_to_loop(model, (3, 8, 8), "all", signed=signed, verify=False)


def test_an_input_changed_in_place_before_batchnorm_asks_for_the_output():
    def middle(m, x):
        y = m.layer(x)
        x.mul_(2)  # autograd does not mind where it needs no gradient to the weight: y is what it was
        return m.bn(y)

    model = seeded(net(middle, layer=conv(3, padding=1), bn=bn()))
    model.first.weight.requires_grad_(False)
    units = Units.of(model, own("head.weight"))
    images, labels = batch((3, 8, 8), 3)
    plain = copy.deepcopy(model)
    plain.layer.weight.requires_grad_(False), plain.layer.bias.requires_grad_(False)
    assert_close(profile(model, images, labels, units), one_by_one(plain, images, labels, units), units)
    units = Units.of(model, "all")  # its own gradient is not defined so: an error, as of autograd, and no number
    with pytest.raises(RuntimeError, match=r"modified (by|in place)"):
        profile(model, images, labels, units, verify=False)


class Remembering(networks.Net):
    """Keeps an output in a list."""

    def __init__(self):
        super().__init__(dims=2)
        self.layer, self.bn, self.kept = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), []

    def middle(self, x):
        return self.bn(self.layer(x))


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_get_plain_tensors(everywhere):
    model, kept = seeded(Remembering), []

    def keep(module, inputs, output):
        if module is model.layer:
            kept.append(output)

    add = nn.modules.module.register_module_forward_hook if everywhere else model.layer.register_forward_hook
    handle = add(keep)
    try:
        rows = profile(model, *batch((3, 8, 8), 3), strategy="fast")
    finally:
        handle.remove()
    assert kept and all(type(output) is torch.Tensor for output in kept)
    assert_close(rows, profile(model, *batch((3, 8, 8), 3)), Units.of(model))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_networks_are_run_as_they_are_written(in_place, caplog):
    model = seeded(net(lambda m, x: m.bn(m.layer(x)), layer=conv(3), bn=bn()))
    images, labels = batch((3, 8, 8), 3)
    expected = one_by_one(model, images, labels, Units.of(model, "all"))
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    if in_place:
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    units = Units.of(model, "all")
    for size in (3, 2, 1):
        assert_close(profile(model, images[:size], labels[:size], units, strategy="fast"), expected[:size], units)
    assert not traced
    model(images)
    assert traced  # it is compiled as before
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# Losses, layouts, and what surrounds


def test_logit_difference_of_an_image_that_is_right():
    """Of the others: the largest of all is the true one, and would leave nothing."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]], requires_grad=True)
    losses = LOSSES["logit_difference"](logits, torch.tensor([0, 0]))
    assert losses.tolist() == [-1, 2]
    (g,) = torch.autograd.grad(losses.sum(), logits)
    assert g.tolist() == [[-1, 0, 1], [-1, 1, 0]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("signed", [False, True])
def test_losses_against_their_formulas(loss, signed):
    def other_way(logits, labels):
        true, k = logits[0, labels[0]], int(labels[0])
        others = torch.cat([logits[0, :k], logits[0, k + 1 :]])
        values = {
            "cross_entropy": torch.log(1 + torch.exp(others - true).sum()),
            "logit": true,
            "logit_difference": others.max() - true,
        }
        return values[loss][None]

    model = seeded(networks.Net)
    images, labels = batch((3, 8, 8))
    labels[::2] = model(images[::2]).argmax(dim=1)  # some are read rightly, the others not
    assert (model(images).argmax(dim=1) != labels).any()
    units = Units.of(model, "all")
    expected = one_by_one(model, images, labels, units, other_way, signed)
    assert_close(profile(model, images, labels, units, loss, signed), expected, units)


def test_own_loss_over_several_outputs():
    class Two(networks.Net):
        def forward(self, x):
            y = F.silu(self.first(x))
            return {"map": y, "logits": (super().forward(x), y.mean(1))}

    def loss(outputs, targets):
        return outputs["logits"][0][:, 0] * targets + outputs["map"].square().mean((1, 2, 3))

    model = seeded(Two)
    images, _ = batch((3, 8, 8))
    targets = torch.linspace(-1, 1, 7, dtype=torch.float64)
    units = Units.of(model, "all")
    got = profile(model, images, targets, units, loss, strategy="fast")
    assert_close(got, one_by_one(model, images, targets, units, loss), units)


def test_convolution_as_the_last_layer():
    assert_equal_to_loop(seeded(lambda: nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())), (3, 8, 8))
    loss = lambda maps, y: maps.mean((2, 3)).gather(1, y[:, None])[:, 0]  # noqa: E731
    assert_equal_to_loop(seeded(lambda: nn.Sequential(nn.Conv2d(3, 10, 3))), (3, 8, 8), loss=loss)


def test_memory_formats_and_views():
    model = seeded(networks.ZOO["resnet50"][0])
    images, labels = batch((3, 40, 40), 2)
    units = Units.of(model)
    expected = one_by_one(model, images, labels, units)
    other_stride = torch.cat([images, images], dim=3)[..., :40]
    for same in (images.to(memory_format=torch.channels_last), other_stride, images.clone().requires_grad_()):
        assert_close(profile(model, same, labels, units, strategy="fast"), expected, units)
    assert_close(profile(model.to(memory_format=torch.channels_last), images, labels, units), expected, units)


class Viewing(nn.Module):
    """Flattens by ``view``, as networks often do, which features with their channels side by side do not allow."""

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6 * 6 * 6, 10)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x.view(x.size(0), -1))


def test_networks_that_flatten_by_view(caplog):
    caplog.set_level("INFO", "pss")
    model, (images, labels) = seeded(Viewing), batch((3, 10, 10), 9)
    units = Units.of(model, "all")
    expected = one_by_one(model, images, labels, units)
    for strategy in ("fast", "auto", "vmap", "loop"):
        assert_close(profile(seeded(Viewing), images, labels, units, strategy=strategy), expected, units)
    assert_close(units.reduce(pss.parameter_saliency(seeded(Viewing), images, labels)), expected, units)
    for of in ("gain", "output"):
        found = profile(seeded(Viewing), images, labels, units, of=of)
        torch.testing.assert_close(found, profile(model, images, labels, units, of=of, strategy="loop"))
    logits = model(images).detach()
    for seen in (seeded(Viewing), model):  # of which nothing is known, and of which it is
        torch.testing.assert_close(pss.models.predict(seen, images), logits)
        second = logits.topk(2).indices[:, 1]
        right = (images[2:], logits.argmax(1)[2:])
        ids = pss.rank(expected[:2], None, "raw", k=3)
        assert len(pss.edit_curves(seen, images[:2], second[:2], ids, units, "prune")) == 8
        assert len(pss.side_effects(seen, units, ids, *right)) == 2
        patch = pss.fit_patch(seen, (images[:2], second[:2]), right, units, budget=5.0, margin=0.01, progress=False)
        with patch.applied(seen):
            assert torch.equal(seen(images[:2]).argmax(1), second[:2])
    one_channel, (images, labels) = seeded(lambda: Viewing(1)), batch((1, 10, 10), 3)
    units = Units.of(one_channel)
    assert_close(profile(one_channel, images, labels), one_by_one(one_channel, images, labels, units), units)
    assert "at a time" not in caplog.text  # on the fast path


def test_many_images_are_taken_in_parts():
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.SiLU(), nn.Linear(5, 10)))
    assert_equal_to_loop(model, (3, 2, 2), "rows", (600,), "auto")


def test_confident_images_in_float32():
    """The usual p - 1 rounds: at a loss of 1e-6 the gradient is off by 10%."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))
    images, labels = batch((3, 2, 2), 5)

    def confident(logits, labels):
        return logits + 14 * F.one_hot(labels, 10).to(logits)

    def loss(logits, labels):
        return cross_entropy(confident(logits, labels), labels)

    def usual(logits, labels):
        return F.cross_entropy(confident(logits, labels), labels, reduction="none")

    expected = one_by_one(model, images, labels, Units.of(model, "rows"), usual)
    got = profile(model.float(), images.float(), labels, Units.of(model, "rows"), loss, strategy="fast").double()
    assert ((got - expected).abs() <= 1e-5 * expected).all()


def test_parameter_saliency_is_what_the_profile_averages():
    model = seeded(networks.ZOO["mobilenet_v2"][0])
    images, labels = batch((3, 32, 32), 2)
    units = Units.of(model, "all")
    for signed in (False, True):
        whole = parameter_saliency(model, images, labels, signed=signed)
        assert {n: g.shape[1:] for n, g in whole.items()} == {n: p.shape for n, p in model.named_parameters()}
        assert_close(profile(model, images, labels, units, signed=signed), units.reduce(whole), units)


def test_bfloat16_products_are_near():
    model = seeded(networks.ZOO["resnet50"][0], dtype=torch.float32)
    images, labels = batch((3, 64, 64), 4, dtype=torch.float32)
    exact, near = (profile(model, images, labels, precision=p) for p in ("fp32", "bf16"))
    assert near.dtype == torch.float32
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("strategy", ["fast", "vmap", "loop"])
def test_outputs_are_those_of_the_network(strategy, monkeypatch):
    model = seeded(networks.ZOO["resnet18"][0])
    images, labels = batch((3, 32, 32), 3)
    monkeypatch.setattr("pss.engine.parts.images_at_once", lambda images: 2)
    passes = []
    model.register_forward_hook(lambda module, inputs, outputs: passes.append(len(outputs)))
    units = Units.of(model)
    rows, outputs, losses = gradients.profile_and_outputs(
        model, images, labels, units, "cross_entropy", strategy=strategy
    )
    if strategy == "fast":  # they cost nothing
        passes.clear()
        gradients.profile_and_outputs(model, images, labels, units, "cross_entropy", strategy=strategy)
        assert passes == [2, 1]
    assert not outputs.requires_grad and not losses.requires_grad
    torch.testing.assert_close(rows, profile(model, images, labels, units, strategy=strategy), rtol=0, atol=0)
    torch.testing.assert_close(outputs, model(images).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, F.cross_entropy(outputs, labels, reduction="none"), rtol=1e-9, atol=1e-12)


def test_callers_settings_do_not_matter():
    model = seeded(networks.Net, dtype=torch.float32)
    images, labels = batch((3, 8, 8), 3, dtype=torch.float32)
    expected = profile(model, images, labels)
    with torch.inference_mode():
        assert torch.equal(profile(model, images.clone(), labels.clone(), strategy="fast"), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(profile(model, images, labels), expected)
