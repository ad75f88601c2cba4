"""Every path against `torch.autograd.grad`, one image at a time."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pss import Units, parameter_saliency, profile
from pss import saliency as gradients
from pss.data.vision import torchvision
from pss.engine import kernels
from pss.saliency import LOSSES, cross_entropy
from pss.units import UnitGroup

models = torchvision.models


def seeded(factory, seed=0, dtype=torch.float64):
    """A network with random values in every parameter and in the statistics of BatchNorm, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory().to(dtype).eval()
        for p in model.parameters():
            if p.dim() == 1 or not p.any():  # biases, scales, and heads that start at zero
                nn.init.uniform_(p, 0.1, 0.9)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def batch(shape, count=7, classes=10, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *shape, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (count,), generator=generator)


def one_by_one(model, images, labels, units, loss=None, signed=False):
    """The second source: plain autograd, one image at a time."""
    model = copy.deepcopy(model).eval()
    loss = loss or (lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"))
    names = list(dict.fromkeys(layer.parameter for layer in units.layers))
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    rows = []
    for b in range(len(images)):
        value = loss(model(images[b : b + 1]), labels[b : b + 1]).sum()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        whole = {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
        rows.append(units.reduce({n: (g if signed else g.abs())[None] for n, g in whole.items()}))
    return torch.cat(rows)


def assert_close(got, expected, units, tolerance=1e-9):
    """By layer, relative to its largest value; and by value, where that is not tiny."""
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    for number, layer in enumerate(units.layers):
        a, b = got[:, units.span(number)], expected[:, units.span(number)]
        scale = b.abs().max()
        assert (a - b).abs().max() <= tolerance * scale, layer.parameter
        large = b.abs() > 1e-3 * scale
        assert ((a - b).abs()[large] <= 100 * tolerance * b.abs()[large]).all(), layer.parameter


def assert_equal_to_loop(
    model, shape, kind="filters", sizes=(1, 2, 7), strategy="fast", classes=10, verify=True, **options
):
    images, labels = batch(shape, max(sizes), classes)
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


def small_vgg(config):
    model = models.VGG(models.vgg.make_layers(models.vgg.cfgs[config]), init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


# At a quarter of their width where autograd in float64 would take seconds: the layers are the same.
ZOO = {
    "resnet18": (lambda: models.ResNet(models.resnet.BasicBlock, [2, 2, 2, 2], 10), 32, "all"),
    "resnet50": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 10), 48, "filters"),
    "resnext": (
        lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 10, groups=4, width_per_group=8),
        40,
        "filters",
    ),
    "vgg11": (lambda: small_vgg("A"), 32, "all"),
    "vgg19": (lambda: small_vgg("E"), 32, "filters"),
    "densenet121": (lambda: models.DenseNet(8, (6, 12, 24, 16), 16, num_classes=10), 64, "all"),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=10, width_mult=0.25), 32, "all"),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=10, width_mult=0.25), 32, "all"),
    "efficientnet": (
        lambda: models.EfficientNet(
            [models.efficientnet.MBConvConfig(*c, 1.0, 1.0) for c in [(1, 3, 1, 8, 8, 1), (6, 5, 2, 8, 16, 2)]],
            dropout=0.2,
            last_channel=32,
            num_classes=10,
        ),
        32,
        "all",
    ),
    "convnext": (
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(*c) for c in [(16, 32, 2), (32, None, 2)]], num_classes=10
        ),
        56,
        "all",
    ),
    "vit rows": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 32, "all"),
    "vit heads": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 32, "heads"),
    "swin": (lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=10), 32, "rows"),
}


@pytest.mark.parametrize("name", ZOO)
def test_fast_path_equals_one_image_at_a_time(name):
    factory, size, kind = ZOO[name]
    assert_equal_to_loop(seeded(factory), (3, size, size), kind)


def test_inception_counts_its_unused_head_as_zero():
    model = seeded(lambda: models.inception_v3(num_classes=10, aux_logits=True, init_weights=False))
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
    factory, size, kind = ZOO[name]
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


class Net(nn.Module):
    """Convolution, the difficulty, average over positions, linear classifier."""

    def __init__(self, width=6, channels=3, dims=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first = conv(channels, width, 3, padding=1)
        self.head = nn.Linear(width, 10)
        self.dims = dims

    def middle(self, x):
        return x

    def forward(self, x):
        x = self.middle(F.silu(self.first(x)))
        return self.head(x.flatten(2).mean(2))


def net(name, build, middle, **options):
    def factory():
        model = type(name, (Net,), {"middle": middle})(**options)
        build(model)
        return model

    factory.__name__ = name
    return factory


def with_layer(name, make, **options):
    return net(name, lambda m: setattr(m, "layer", make()), lambda m, x: F.silu(m.layer(x)), **options)


def set_all(**makers):
    return lambda m: [setattr(m, name, make()) for name, make in makers.items()]


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(6, 6, *args, **kwargs)


def bn(**kwargs):
    return lambda: nn.BatchNorm2d(6, **kwargs)


def reads_first(m, x):
    y = m.layer(x)
    with torch.no_grad():
        scale = y.abs().mean((1, 2, 3), keepdim=True)
    return m.bn(y) / scale


def computes_first(m, x):
    with torch.no_grad():
        y = m.layer(x)
    return x[:, :, 1:-1, 1:-1] * m.bn(y)


FAST = [
    with_layer("with bias", conv(3, bias=True)),
    with_layer("without bias", conv(3, bias=False)),
    with_layer("stride", conv(3, stride=(2, 3), padding=(0, 2))),
    with_layer("kernel", conv((3, 1), padding=(1, 0))),
    with_layer("strided 1x1", conv(1, stride=2)),
    with_layer("dilation", conv(3, dilation=2, padding=2)),
    with_layer("groups", conv(3, groups=3)),
    with_layer("depthwise", conv(3, groups=6, padding=1)),
    with_layer("padding same", conv(3, padding="same")),
    with_layer("padding same, even kernel", conv((4, 2), padding="same", dilation=(1, 3))),
    with_layer("padding valid", conv(3, padding="valid")),
    with_layer("padding circular", conv(3, padding=1, padding_mode="circular")),
    with_layer("padding reflect", conv(3, padding=1, padding_mode="reflect")),
    with_layer("whole image", conv(8)),
    with_layer("few positions, padding", conv(3, stride=7, padding=2)),
    with_layer("few positions, dilation", conv((4, 2), stride=(5, 4), padding=(3, 1), dilation=(3, 5))),
    with_layer("few positions, taps only in padding", conv(5, stride=9, padding=4)),
    with_layer("as many positions as patches pay", lambda: nn.Conv2d(6, 6, 3, stride=2)),
    net(
        "in-place activations",
        set_all(layer=conv(3), relu=lambda: nn.ReLU(inplace=True)),
        lambda m, x: m.relu(m.layer(m.relu(x))),
    ),
    net(
        "functional call",
        lambda m: setattr(m, "weight", nn.Parameter(torch.randn(6, 6, 3, 3))),
        lambda m, x: F.conv2d(input=x, weight=m.weight, padding=1),
    ),
    net("shared module", set_all(layer=conv(3, padding=1)), lambda m, x: m.layer(F.silu(m.layer(x)))),
    net("shared module, other sizes", set_all(layer=conv(3)), lambda m, x: m.layer(F.silu(m.layer(x)))),
    net("unused layer", set_all(layer=conv(3), unused=conv(3)), lambda m, x: m.layer(x)),
    net("unused output", set_all(layer=conv(3), unused=conv(3)), lambda m, x: (m.unused(x), m.layer(x))[1]),
    net(
        "without gradient",
        set_all(layer=conv(3), other=conv(3)),
        lambda m, x: m.layer(x) * m.other(x).detach().sigmoid(),
    ),
    net("read without gradients first", set_all(layer=conv(3), bn=bn()), reads_first),
    net("computed without gradients", set_all(layer=conv(3), bn=bn()), computes_first),
    net("conv and BatchNorm", set_all(layer=conv(3), bn=bn()), lambda m, x: m.bn(m.layer(x))),
    net("BatchNorm not affine", set_all(layer=conv(3), bn=bn(affine=False)), lambda m, x: m.bn(m.layer(x))),
    net(
        "output used before BatchNorm too",
        set_all(layer=conv(3), bn=bn()),
        lambda m, x: (lambda y: F.silu(y) + m.bn(y))(m.layer(x)),
    ),
    net(
        "output used after BatchNorm too",
        set_all(layer=conv(3), bn=bn()),
        lambda m, x: (lambda y: m.bn(y) + F.silu(y))(m.layer(x)),
    ),
    net(
        "output changed in place before BatchNorm",
        set_all(layer=conv(3), bn=bn()),
        lambda m, x: (lambda y: (y.mul_(2), m.bn(y))[1])(m.layer(x)),
    ),
    net(
        "two BatchNorms on one output",
        set_all(layer=conv(3), a=bn(), b=bn()),
        lambda m, x: (lambda y: m.a(y) * m.b(y).sigmoid())(m.layer(x)),
    ),
    net(
        "shared BatchNorm",
        set_all(layer=conv(3, padding=1), other=conv(3, padding=1), bn=bn()),
        lambda m, x: m.bn(m.other(F.silu(m.bn(m.layer(x))))),
    ),
    net(
        "shared conv, own BatchNorms",
        set_all(layer=conv(3, padding=1), a=bn(), b=bn()),
        lambda m, x: m.b(m.layer(F.silu(m.a(m.layer(x))))),
    ),
    with_layer("1-D", lambda: nn.Conv1d(6, 6, 3, stride=2, dilation=2), dims=1),
    with_layer("3-D", lambda: nn.Conv3d(6, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), dims=3),
    net(
        "parts of an image, sample by sample",
        set_all(layer=conv(3)),
        lambda m, x: m.layer(x.unflatten(3, (2, 4)).movedim(3, 1).flatten(0, 1)).unflatten(0, (-1, 2)).mean(1),
    ),
    net(
        "parts of an image, part by part",
        set_all(layer=conv(3)),
        lambda m, x: m.layer(torch.cat([x, x.flip(3), 2 * x])).unflatten(0, (3, -1)).sum(0),
    ),
]


@pytest.mark.parametrize("factory", FAST, ids=lambda f: f.__name__)
@pytest.mark.parametrize("signed", [False, True], ids=["absolute", "signed"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own, in the second source
def test_one_difficulty_at_a_time(factory, signed):
    model = seeded(factory)
    shape = (3, *[8] * model.dims)
    assert_equal_to_loop(model, shape, "all", signed=signed)


def heads_of(model):
    return Units.of(model, "heads")


class Attention(nn.Module):
    """Self-attention, then attention from a learned query: in either layout."""

    def __init__(self, batch_first, cross=False):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.feed = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)
        self.batch_first, self.cross = batch_first, cross

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        x = F.silu(self.embed(x))
        other = x.flip(-1) if self.cross else x
        x = x + self.attention(x, other, other)[0]
        x = x + F.silu(self.feed(x))
        return self.head(x.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [2, 5, 7], ids="length {}".format)  # also as long as the batch
@pytest.mark.parametrize("kind", ["heads", "rows"])
def test_attention_in_either_layout(batch_first, length, kind):
    assert_equal_to_loop(seeded(lambda: Attention(batch_first)), (length, 3), kind)


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)

    def factory():
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return nn.Sequential(nn.Linear(3, 8), encoder, nn.Flatten(), nn.Linear(40, 10))

    for kind in ("heads", "rows"):
        assert_equal_to_loop(seeded(factory), (5, 3), kind)


# What PyTorch's function overrides do not show


class Swish(torch.autograd.Function):
    """Saves its input only, as memory-efficient activations do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s * (1 + x * (1 - s)))


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes the gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.mul(4).round().div(4)

    @staticmethod
    def backward(ctx, g):
        return g


class Reversal(torch.autograd.Function):
    """Turns the gradient round, and hands its input on as a view."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class OwnConvolution(torch.autograd.Function):
    """Convolves within."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return nn.grad.conv2d_input(x.shape, weight, g), nn.grad.conv2d_weight(x, weight.shape, g)


def in_place_first(m, x):
    y = m.layer(x)
    y.mul_(2)
    return Swish.apply(y)


OWN_FUNCTIONS = [
    net("memory-efficient swish", set_all(layer=conv(3)), lambda m, x: Swish.apply(m.layer(x))),
    net("straight-through", set_all(layer=conv(3)), lambda m, x: StraightThrough.apply(m.layer(x))),
    net("gradient reversal", set_all(layer=conv(3)), lambda m, x: Reversal.apply(m.layer(x)).sin()),
    net("before BatchNorm", set_all(layer=conv(3), bn=bn()), lambda m, x: m.bn(Swish.apply(m.layer(x)))),
    net(
        "beside BatchNorm",
        set_all(layer=conv(3), bn=bn()),
        lambda m, x: (lambda y: m.bn(y) + Swish.apply(y) + y.sin())(m.layer(x)),
    ),
    net("after a change in place", set_all(layer=conv(3)), in_place_first),
]


@pytest.mark.parametrize("factory", OWN_FUNCTIONS, ids=lambda f: f.__name__)
def test_own_autograd_functions_on_outputs(factory):
    assert_equal_to_loop(seeded(factory), (3, 8, 8), "all", verify=False)


def test_own_autograd_function_that_convolves():
    model = seeded(
        net("own", set_all(layer=conv(3), after=conv(3)), lambda m, x: m.after(OwnConvolution.apply(x, m.layer.weight)))
    )
    assert_equal_to_loop(model, (3, 8, 8), "all", strategy="auto", verify=False)


class Complex(nn.Module):
    """Two complex layers behind a real one."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 10)
        self.one, self.two = (nn.Linear(4, 4, dtype=torch.complex128) for _ in range(2))

    def forward(self, x):
        x = torch.complex(self.first(x), self.first(x.flip(-1)))
        return self.head(self.two(self.one(x).sin()).abs())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_complex_layers(signed, strategy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Complex()
        model.first.double(), model.head.double()
    assert_equal_to_loop(model, (3,), "rows", strategy=strategy, signed=signed, verify=False)
    rows = [
        profile(model, *batch((3,), 2), Units.of(model, "rows"), strategy=s, signed=signed) for s in (strategy, "loop")
    ]
    assert rows[0].dtype == rows[1].dtype == (torch.complex128 if signed else torch.float64)


class Hypernetwork(nn.Module):
    """Makes weights from a vector: as many rows as there are images, where there are so many."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(5))
        self.one, self.two, self.first = nn.Linear(5, 42), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(7, 10)

    def forward(self, x):
        rows = self.two(F.silu(self.one(self.vector)).reshape(7, 6))
        return self.head(F.silu(self.first(x)) @ rows.T)


class Sorting(nn.Module):
    """Sorts its batch, and restores the order at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = F.silu(self.first(x))
        order = x.mean(1).argsort()
        return self.head(F.silu(self.second(x[order]))[order.argsort()])


class Reversed(Sorting):
    """Reverses its batch, and restores the order at the end."""

    def forward(self, x):
        return self.head(F.silu(self.second(F.silu(self.first(x)).flip(0))).flip(0))


@pytest.mark.parametrize("network", [Hypernetwork, Sorting, Reversed])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_first_dimension_that_is_not_the_batch(network, count):
    for seed in range(1, 4):
        model = seeded(network)
        images, labels = batch((6,), count, seed=seed)
        units = Units.of(model, "rows")
        expected = one_by_one(model, images, labels, units)
        assert_close(profile(model, images, labels, units, verify=False), expected, units)


def test_a_sorted_batch_whose_last_image_keeps_its_place():
    model = seeded(Sorting)
    units = Units.of(model, "rows")
    batches = [batch((6,), 3, seed=seed) for seed in range(60)]
    orders = [F.silu(model.first(images)).mean(1).argsort().tolist() for images, _ in batches]
    images, labels = batches[orders.index([1, 0, 2])]
    assert_close(profile(model, images, labels, units, verify=False), one_by_one(model, images, labels, units), units)


def test_a_course_that_is_known_for_another_batch_only():
    """Experts get as many of the images as there are: by chance the whole batch, in another order."""

    class Experts(Sorting):
        def forward(self, x):
            wide = x[:, 0] > 0
            x = torch.cat([self.first(x[wide]), self.second(x[~wide])])
            order = torch.cat([wide.nonzero(), (~wide).nonzero()])[:, 0]
            return self.head(F.silu(x)[order.argsort()])

    model = seeded(Experts)
    units = Units.of(model, "rows")
    for seed in range(6):
        images, labels = batch((6,), 4, seed=seed)
        expected = one_by_one(model, images, labels, units)
        assert_close(profile(model, images, labels, units, verify=False), expected, units)


def transposing(m, x):
    """The normalization does not follow a convolution, into which it would be folded, nor get channels last."""
    x = m.bn(F.silu(m.layer(x)).contiguous())
    return m.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))


def channels_last(m, x):
    """The image's own memory format brings it on: right in plain autograd of an image that is contiguous."""
    x = m.bn(F.silu(m.layer(x)).flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (6, 6)))
    return m.mix(x.flatten(2).contiguous().transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))


TRANSPOSING = {"transposed": transposing, "channels last": channels_last}
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
    build = set_all(layer=conv(3), bn=NORMALIZATIONS[name], mix=lambda: nn.Linear(6, 6))
    model = seeded(net("t", build, TRANSPOSING[way]))
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
    model = seeded(net("t", set_all(layer=conv(3), bn=bn(), mix=lambda: nn.Linear(6, 6)), transposing))
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


def own(*names):
    """Units of whole rows, of the parameters named."""
    return lambda model: [UnitGroup(n, tuple(model.get_parameter(n).shape), len(model.get_parameter(n))) for n in names]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 10)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Branching(Net):
    """Takes another branch for some images, which vmap cannot follow."""

    def middle(self, x):
        return x * 2 if float(x.detach().mean()) > 0.05 else x.square()


def weight_normed():
    model = with_layer("weight_norm", conv(3))()
    nn.utils.parametrizations.weight_norm(model.layer)
    return model


image, sequence = (3, 8, 8), (5, 3)
GENERAL = {
    "transposed convolution": (
        with_layer("t", lambda: nn.ConvTranspose2d(6, 6, 3, groups=2)),
        image,
        "filters",
    ),
    "transposed, dim 0 is as long": (with_layer("t", lambda: nn.ConvTranspose2d(6, 6, 3)), image, "filters"),
    "transposed 1-D": (
        with_layer("t", lambda: nn.ConvTranspose1d(6, 6, 3, stride=2), dims=1),
        (3, 8),
        "filters",
    ),
    "weight in a product": (
        net("p", set_all(layer=lambda: nn.Linear(8, 8)), lambda m, x: x @ m.layer.weight.T),
        image,
        "all",
    ),
    "weight called and in a product": (
        net("p", set_all(layer=lambda: nn.Linear(8, 8)), lambda m, x: m.layer(x) @ m.layer.weight.T),
        image,
        "all",
    ),
    "bias made of a weight": (
        net(
            "p",
            set_all(layer=conv(3), other=conv(3)),
            lambda m, x: F.conv2d(x, m.layer.weight, m.other.weight.mean((1, 2, 3))),
        ),
        image,
        "all",
    ),
    "wanted biases": (with_layer("b", conv(3)), image, own("layer.bias", "layer.weight")),
    "scale of a BatchNorm": (
        net("s", set_all(layer=conv(3), bn=bn()), lambda m, x: m.bn(m.layer(x))),
        image,
        own("bn.weight", "layer.weight"),
    ),
    "statistics of the batch": (
        with_layer("bn", lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))),
        image,
        "filters",
    ),
    "one image at a time by itself": (
        net("u", set_all(layer=conv(3)), lambda m, x: torch.stack([m.layer(i) for i in x])),
        image,
        "all",
    ),
    "checkpoint": (
        net(
            "c",
            set_all(layer=lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3))),
            lambda m, x: checkpoint(m.layer, x, use_reentrant=False),
        ),
        image,
        "all",
    ),
    "LSTM": (Recurrent, sequence, own("cell.weight_ih_l0", "cell.weight_hh_l0", "head.weight")),
    "branches": (Branching, image, "filters"),
}


@pytest.mark.parametrize("name", GENERAL)
def test_general_path_is_right_and_says_so(name, caplog):
    factory, shape, kind = GENERAL[name]
    model = seeded(factory)
    with caplog.at_level(logging.INFO, logger="pss"):
        assert_equal_to_loop(model, shape, kind, strategy="auto")
    assert "one image at a time for" in caplog.text
    assert ("gradients of one sample at a time for" in caplog.text) == (name == "checkpoint")
    images, labels = batch(shape, 2)
    with pytest.raises(RuntimeError):
        profile(model, images, labels, Units.of(model, kind), strategy="fast")


class Standardized(nn.Conv2d):
    """Weight standardization, written with BatchNorm of the weight, as is usual."""

    def forward(self, x):
        flat = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias)


class Biased(nn.Module):
    """Attention whose bias a small network makes from a table of places."""

    def __init__(self, windows=1, fused=False, repeat=False, into=False):
        super().__init__()
        self.register_buffer("places", torch.randn(25, 2, dtype=torch.float64))
        self.embed, self.attend, self.head = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 10)
        self.one, self.two = nn.Linear(2, 6), nn.Linear(6, 1)
        self.windows, self.fused, self.repeat, self.into = windows, fused, repeat, into

    def forward(self, x):
        x = F.silu(self.embed(x)).unflatten(1, (self.windows, 5)).flatten(0, 1)
        q, k, v = self.attend(x).chunk(3, dim=-1)
        bias = self.two(F.silu(self.one(self.places))).reshape(5, 5)
        bias = bias.repeat(len(x), 1, 1) if self.repeat else bias[None] if self.windows > 1 else bias
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            a = q @ k.mT
            a = a.add_(bias) if self.into else bias + a
            x = a.softmax(-1) @ v
        return self.head(x.unflatten(0, (-1, self.windows)).mean((1, 2)))


def twice(m, x):
    """A weight as it is, and in a table."""
    return m.layer(x) + m.layer.weight.mean((1, 2, 3))[:, None, None]


MADE = {  # weights and tables that are made of parameters, and of no image
    "weight_norm": (weight_normed, image, own("layer.parametrizations.weight.original1")),
    "weight in a penalty": (
        net("p", set_all(layer=conv(3)), lambda m, x: m.layer(x) * m.layer.weight.square().mean()),
        image,
        "all",
    ),
    "weight scaled before the call": (
        net("p", set_all(layer=conv(3)), lambda m, x: F.conv2d(x, m.layer.weight * 2)),
        image,
        "all",
    ),
    "part of a weight": (
        net("p", set_all(layer=conv(3)), lambda m, x: F.conv2d(x, m.layer.weight[:3]).repeat(1, 2, 1, 1)),
        image,
        "all",
    ),
    "weight standardization": (
        net("ws", set_all(layer=lambda: Standardized(6, 6, 3), after=conv(3)), lambda m, x: m.after(m.layer(x))),
        image,
        "all",
    ),
    "weight standardization before BatchNorm": (
        net("ws", set_all(layer=lambda: Standardized(6, 6, 3), bn=bn()), lambda m, x: m.bn(m.layer(x))),
        image,
        "all",
    ),
    "standardized weight of windows": (
        net(
            "ws",
            set_all(layer=lambda: Standardized(6, 6, 3)),
            lambda m, x: m.layer(x.unflatten(2, (2, 4)).movedim(2, 1).flatten(0, 1)).unflatten(0, (-1, 2)).mean(1),
        ),
        image,
        "all",
    ),
    "weight that is also a table": (net("tw", set_all(layer=conv(3)), twice), image, "all"),
    "scale of channels": (
        net(
            "p",
            set_all(layer=conv(3), other=conv(3)),
            lambda m, x: m.layer(x) * m.other.weight.mean((1, 2, 3))[:, None, None],
        ),
        image,
        "all",
    ),
    "attention to something else": (lambda: Attention(True, cross=True), sequence, "heads"),
    "table": (Biased, sequence, "rows"),
    "table added in place": (lambda: Biased(into=True), sequence, "rows"),
    "table of fused attention": (lambda: Biased(fused=True), sequence, "rows"),
    "table of windows": (lambda: Biased(windows=3), (15, 3), "rows"),
    "table of windows, repeated": (lambda: Biased(windows=3, repeat=True), (15, 3), "rows"),
}


@pytest.mark.parametrize("name, signed", [(n, s) for n in MADE for s in (False, True) if not (s and "standard" in n)])
def test_weights_and_tables_that_are_made_of_parameters(name, signed):
    factory, shape, kind = MADE[name]
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
    def columns(model):
        return [UnitGroup("one", (3, 8), 8, dim=1), UnitGroup("two", (8, 8), 3, dim=1, rows=2, offset=2)]

    assert_equal_to_loop(seeded(Columns), (5, 3), columns, signed=signed)
    assert_equal_to_loop(seeded(Columns), (5, 3), own("one", "two"), strategy="auto", signed=signed)


@pytest.mark.parametrize("name", ["weight standardization", "weight in a penalty", "table of windows", "columns"])
def test_gains_of_weights_that_are_made_or_untransposed(name):
    factory, shape, kind = MADE.get(name, (Columns, sequence, lambda _: [UnitGroup("two", (8, 8), 8, dim=1)]))
    model = seeded(factory)
    images, labels = batch(shape, 3)
    units = Units.of(model, kind)
    expected = profile(model, images, labels, units, of="gain", strategy="loop")
    got = profile(model, images, labels, units, of="gain", verify=False)
    assert expected.any()
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_outputs_of_columns_are_those_of_their_layer():
    model = seeded(Columns)
    images, labels = batch(sequence, 3)
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
    build = set_all(layer=conv(3), bn=bn())
    model = seeded(net("d", build, lambda m, x: m.bn(m.layer(x)) * 2 if read(m, x) else m.layer(x).square()))
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
    model = seeded(net("normalized", lambda m: None, lambda m, x: x))
    model.first = nn.Sequential(nn.ZeroPad2d(1), model.first, nn.BatchNorm2d(6).double())
    assert_equal_to_loop(model, (3, 8, 8), "all", strategy="fast")


class Alias(nn.Module):
    """Keeps a parameter in a list, where `torch.func.functional_call` does not replace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)
        self.kept = [self.conv.weight]

    def forward(self, x):
        return self.head(F.conv_transpose2d(F.silu(self.conv(x)), self.kept[0]).mean((2, 3)))


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_a_parameter_kept_outside_of_the_modules(strategy):
    model = seeded(Alias)
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
    model = seeded(net("idle", set_all(unused=conv(3)), lambda m, x: x))
    images, labels = batch((3, 8, 8), 3)
    got = profile(model, images, labels, Units.of(model), strategy=strategy)
    assert not got.requires_grad
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
    model, calls = seeded(Net), []

    def fail(module, inputs):
        calls.append(len(inputs[0]))
        raise error

    model.head.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)[:10].replace("[", r"\[")):
        profile(model, *batch((3, 8, 8), 3), strategy=strategy)
    assert len(calls) == 1


class InnerGradient(Net):
    """Asks for a gradient on its way, of which the fast path must collect nothing."""

    def __init__(self, create_graph):
        super().__init__()
        self.create_graph = create_graph

    def forward(self, x):
        x = x.detach().requires_grad_()
        inner = self.head(F.silu(self.first(x)).flatten(2).mean(2)).square().sum()
        return super().forward(x + torch.autograd.grad(inner, x, create_graph=self.create_graph)[0])


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_within_the_network(create_graph):
    assert_equal_to_loop(seeded(lambda: InnerGradient(create_graph)), (3, 8, 8), "all", strategy="auto")


class Company(nn.Module):
    """Scales by the mean of a whole batch."""

    def __init__(self):
        super().__init__()
        self.feed, self.head = nn.Linear(3, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = F.silu(self.feed(x))
        return self.head((x / x.mean()).mean(1))


class Lowering(nn.Module):
    """Every image lowers the outputs of all."""

    def __init__(self):
        super().__init__()
        self.feed, self.head = nn.Linear(3, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = self.head(F.silu(self.feed(x)))
        return x - x.exp().sum(0, keepdim=True)


def test_images_that_scale_each_other():
    assert_equal_to_loop(seeded(Company), (5, 3), "rows", strategy="auto", verify=False)


def test_images_that_lower_each_other():
    """All outputs and losses are smaller in company: a difference without its size would not show it."""
    assert_equal_to_loop(seeded(Lowering), (3,), "rows", strategy="auto", verify=False, loss=LOSSES["logit"])


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_general_paths_on_request(strategy):
    for name in ("resnet50", "vit heads"):
        factory, size, kind = ZOO[name]
        assert_equal_to_loop(seeded(factory), (3, size, size), kind, sizes=(3,), strategy=strategy)


def test_folding_changes_nothing_and_is_used(monkeypatch):
    model = seeded(ZOO["resnet18"][0])
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
    model = seeded(net("gains", set_all(layer=conv(3, padding=1), bn=bn()), lambda m, x: m.bn(m.layer(x))))
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([-1.5, 0.7, -0.2, 0.0, 1.0, -1.0]))
    for signed in (False, True):
        assert_equal_to_loop(model, (3, 8, 8), "all", signed=signed, verify=False)


def test_an_input_changed_in_place_before_batchnorm_asks_for_the_output():
    def middle(m, x):
        y = m.layer(x)
        x.mul_(2)  # autograd does not mind where it needs no gradient to the weight: y is what it was
        return m.bn(y)

    model = seeded(net("changed", set_all(layer=conv(3, padding=1), bn=bn()), middle))
    model.first.weight.requires_grad_(False)
    units = Units.of(model, own("head.weight"))
    images, labels = batch((3, 8, 8), 3)
    plain = copy.deepcopy(model)
    plain.layer.weight.requires_grad_(False), plain.layer.bias.requires_grad_(False)
    assert_close(profile(model, images, labels, units), one_by_one(plain, images, labels, units), units)
    units = Units.of(model, "all")  # its own gradient is not defined so: an error, as of autograd, and no number
    with pytest.raises(RuntimeError, match=r"modified (by|in place)"):
        profile(model, images, labels, units, verify=False)


class Remembering(Net):
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
    model = seeded(net("compiled", set_all(layer=conv(3), bn=bn()), lambda m, x: m.bn(m.layer(x))))
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

    model = seeded(Net)
    images, labels = batch((3, 8, 8))
    labels[::2] = model(images[::2]).argmax(dim=1)  # some are read rightly, the others not
    assert (model(images).argmax(dim=1) != labels).any()
    units = Units.of(model, "all")
    expected = one_by_one(model, images, labels, units, other_way, signed)
    assert_close(profile(model, images, labels, units, loss, signed), expected, units)


def test_own_loss_over_several_outputs():
    class Two(Net):
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
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()))
    assert_equal_to_loop(model, (3, 8, 8))
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 10, 3)))
    assert_equal_to_loop(model, (3, 8, 8), loss=lambda maps, y: maps.mean((2, 3)).gather(1, y[:, None])[:, 0])


def test_memory_formats_and_views():
    model = seeded(ZOO["resnet50"][0])
    images, labels = batch((3, 40, 40), 2)
    units = Units.of(model)
    expected = one_by_one(model, images, labels, units)
    other_stride = torch.cat([images, images], dim=3)[..., :40]
    for same in (images.to(memory_format=torch.channels_last), other_stride, images.clone().requires_grad_()):
        assert_close(profile(model, same, labels, units, strategy="fast"), expected, units)
    assert_close(profile(model.to(memory_format=torch.channels_last), images, labels, units), expected, units)


def test_many_images_are_taken_in_parts():
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.SiLU(), nn.Linear(5, 10)))
    images, labels = batch((3, 2, 2), 600)
    units = Units.of(model, "rows")
    assert_close(profile(model, images, labels, units), one_by_one(model, images, labels, units), units)


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
    model = seeded(ZOO["mobilenet_v2"][0])
    images, labels = batch((3, 32, 32), 2)
    units = Units.of(model, "all")
    for signed in (False, True):
        whole = parameter_saliency(model, images, labels, signed=signed)
        assert {n: g.shape[1:] for n, g in whole.items()} == {n: p.shape for n, p in model.named_parameters()}
        assert_close(profile(model, images, labels, units, signed=signed), units.reduce(whole), units)


def test_bfloat16_products_are_near():
    model = seeded(ZOO["resnet50"][0], dtype=torch.float32)
    images, labels = batch((3, 64, 64), 4, dtype=torch.float32)
    exact, near = (profile(model, images, labels, precision=p) for p in ("fp32", "bf16"))
    assert near.dtype == torch.float32
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("strategy", ["fast", "vmap", "loop"])
def test_outputs_are_those_of_the_network(strategy, monkeypatch):
    model = seeded(ZOO["resnet18"][0])
    images, labels = batch((3, 32, 32), 3)
    monkeypatch.setattr(gradients, "_images_at_once", lambda images: 2)
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


class Unruly(Net):
    """Draws random numbers, and can fail halfway."""

    fail = False

    def middle(self, x):
        if self.fail:
            raise RuntimeError("halfway")
        return x + 0 * torch.rand_like(x)


@pytest.mark.parametrize("strategy", ["auto", "fast", "vmap", "loop"])
@pytest.mark.parametrize("fail", [False, True])
def test_leaves_no_trace(strategy, fail):
    model = seeded(lambda: nn.Sequential(Unruly(), nn.BatchNorm1d(10), nn.Dropout()))
    model[0].fail = fail
    model.train()
    model[1].eval()
    model[0].head.weight.requires_grad_(False)
    model[0].first.weight.grad = torch.ones_like(model[0].first.weight)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    images, labels = batch((3, 8, 8), 3)
    kept = images.clone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad():
        if fail:
            with pytest.raises(RuntimeError, match="halfway"):
                profile(model, images, labels, Units.of(model, "all"), strategy=strategy)
        else:
            profile(model, images, labels, Units.of(model, "all"), strategy=strategy)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert [m.training for m in model] == [True, False, True]
    assert len(model[0]._forward_hooks) == 1 and bool(seen) != fail
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, kept) and not images.requires_grad


def test_callers_settings_do_not_matter():
    model = seeded(Net, dtype=torch.float32)
    images, labels = batch((3, 8, 8), 3, dtype=torch.float32)
    expected = profile(model, images, labels)
    with torch.inference_mode():
        assert torch.equal(profile(model, images.clone(), labels.clone(), strategy="fast"), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(profile(model, images, labels), expected)


MAPS = nn.Conv2d(3, 10, 3).double()
BAD_OPTIONS = {
    "has no unit": (nn.Flatten(), {}),
    r"outputs are \(., 10, 6, 6\): expected logits": (MAPS, {}),
    "unknown loss 'hinge'": (seeded(Net), {"loss": "hinge"}),
    r"the loss returned \(\) for . samples": (seeded(Net), {"loss": lambda z, y: F.cross_entropy(z, y)}),
    r"the loss returned \(., 10\)": (seeded(Net), {"loss": lambda z, y: z}),
    "loss is not finite for samples .0": (seeded(Net), {"loss": lambda z, y: z[:, 0] / 0}),
    "unknown option 'fp16'": (seeded(Net), {"precision": "fp16"}),
    "units are not of this model": (seeded(Net), {"units": Units.of(Net(width=7))}),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_bad_models_losses_and_options(message, strategy):
    model, options = BAD_OPTIONS[message]
    with pytest.raises(ValueError, match=message):
        profile(model, *batch((3, 8, 8), 3), strategy=strategy, **options)
