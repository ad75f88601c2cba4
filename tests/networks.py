"""Small networks, networks with one difficulty each, and data for them; and plain autograd, one image at a time."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from pss.data.vision import torchvision
from pss.units import UnitGroup

models = torchvision.models

N, PIXELS = 26, 8


class Small(nn.Module):
    """Two convolutions and a linear layer: 8 filters, 3 classes, images (3, 8, 8)."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x).tanh()).tanh().mean((2, 3)))


class Skip(nn.Module):
    """Two convolutions with a skip connection, batch normalization, and a head with a bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(x).tanh()
        x = x + self.norm(self.two(x)).relu_()
        return self.head(x.mean((2, 3)))


def make_model(seed: int = 0, width: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 4)]
        return nn.Sequential(*layers)


def make_data(n: int = N, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, PIXELS, PIXELS, generator=generator)
    return TensorDataset(images, torch.randint(4, (n,), generator=generator))


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


def net(middle, width=6, channels=3, dims=2, **layers):
    """What makes a `Net` with this middle, and layers for it."""

    def factory():
        model = type("Net", (Net,), {"middle": middle})(width, channels, dims)
        for name, make in layers.items():
            setattr(model, name, make())
        return model

    return factory


def with_layer(make, **options):
    return net(lambda m, x: F.silu(m.layer(x)), layer=make, **options)


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


FAST = {
    "with bias": with_layer(conv(3, bias=True)),
    "without bias": with_layer(conv(3, bias=False)),
    "stride": with_layer(conv(3, stride=(2, 3), padding=(0, 2))),
    "kernel": with_layer(conv((3, 1), padding=(1, 0))),
    "strided 1x1": with_layer(conv(1, stride=2)),
    "dilation": with_layer(conv(3, dilation=2, padding=2)),
    "groups": with_layer(conv(3, groups=3)),
    "depthwise": with_layer(conv(3, groups=6, padding=1)),
    "padding same": with_layer(conv(3, padding="same")),
    "padding same, even kernel": with_layer(conv((4, 2), padding="same", dilation=(1, 3))),
    "padding valid": with_layer(conv(3, padding="valid")),
    "padding circular": with_layer(conv(3, padding=1, padding_mode="circular")),
    "padding reflect": with_layer(conv(3, padding=1, padding_mode="reflect")),
    "whole image": with_layer(conv(8)),
    "few positions, padding": with_layer(conv(3, stride=7, padding=2)),
    "few positions, dilation": with_layer(conv((4, 2), stride=(5, 4), padding=(3, 1), dilation=(3, 5))),
    "few positions, taps only in padding": with_layer(conv(5, stride=9, padding=4)),
    "as many positions as patches pay": with_layer(lambda: nn.Conv2d(6, 6, 3, stride=2)),
    "in-place activations": net(
        lambda m, x: m.relu(m.layer(m.relu(x))), layer=conv(3), relu=lambda: nn.ReLU(inplace=True)
    ),
    "functional call": net(
        lambda m, x: F.conv2d(input=x, weight=m.weight, padding=1), weight=lambda: nn.Parameter(torch.randn(6, 6, 3, 3))
    ),
    "shared module": net(lambda m, x: m.layer(F.silu(m.layer(x))), layer=conv(3, padding=1)),
    "shared module, other sizes": net(lambda m, x: m.layer(F.silu(m.layer(x))), layer=conv(3)),
    "unused layer": net(lambda m, x: m.layer(x), layer=conv(3), unused=conv(3)),
    "unused output": net(lambda m, x: (m.unused(x), m.layer(x))[1], layer=conv(3), unused=conv(3)),
    "without gradient": net(lambda m, x: m.layer(x) * m.other(x).detach().sigmoid(), layer=conv(3), other=conv(3)),
    "read without gradients first": net(reads_first, layer=conv(3), bn=bn()),
    "computed without gradients": net(computes_first, layer=conv(3), bn=bn()),
    "conv and BatchNorm": net(lambda m, x: m.bn(m.layer(x)), layer=conv(3), bn=bn()),
    "BatchNorm not affine": net(lambda m, x: m.bn(m.layer(x)), layer=conv(3), bn=bn(affine=False)),
    "output used before BatchNorm too": net(
        lambda m, x: (lambda y: F.silu(y) + m.bn(y))(m.layer(x)), layer=conv(3), bn=bn()
    ),
    "output used after BatchNorm too": net(
        lambda m, x: (lambda y: m.bn(y) + F.silu(y))(m.layer(x)), layer=conv(3), bn=bn()
    ),
    "output changed in place before BatchNorm": net(
        lambda m, x: (lambda y: (y.mul_(2), m.bn(y))[1])(m.layer(x)), layer=conv(3), bn=bn()
    ),
    "two BatchNorms on one output": net(
        lambda m, x: (lambda y: m.a(y) * m.b(y).sigmoid())(m.layer(x)), layer=conv(3), a=bn(), b=bn()
    ),
    "shared BatchNorm": net(
        lambda m, x: m.bn(m.other(F.silu(m.bn(m.layer(x))))),
        layer=conv(3, padding=1),
        other=conv(3, padding=1),
        bn=bn(),
    ),
    "shared conv, own BatchNorms": net(
        lambda m, x: m.b(m.layer(F.silu(m.a(m.layer(x))))), layer=conv(3, padding=1), a=bn(), b=bn()
    ),
    "1-D": with_layer(lambda: nn.Conv1d(6, 6, 3, stride=2, dilation=2), dims=1),
    "3-D": with_layer(lambda: nn.Conv3d(6, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), dims=3),
    "parts of an image, sample by sample": net(
        lambda m, x: m.layer(x.unflatten(3, (2, 4)).movedim(3, 1).flatten(0, 1)).unflatten(0, (-1, 2)).mean(1),
        layer=conv(3),
    ),
    "parts of an image, part by part": net(
        lambda m, x: m.layer(torch.cat([x, x.flip(3), 2 * x])).unflatten(0, (3, -1)).sum(0), layer=conv(3)
    ),
}


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


OWN_FUNCTIONS = {
    "memory-efficient swish": net(lambda m, x: Swish.apply(m.layer(x)), layer=conv(3)),
    "straight-through": net(lambda m, x: StraightThrough.apply(m.layer(x)), layer=conv(3)),
    "gradient reversal": net(lambda m, x: Reversal.apply(m.layer(x)).sin(), layer=conv(3)),
    "before BatchNorm": net(lambda m, x: m.bn(Swish.apply(m.layer(x))), layer=conv(3), bn=bn()),
    "beside BatchNorm": net(
        lambda m, x: (lambda y: m.bn(y) + Swish.apply(y) + y.sin())(m.layer(x)), layer=conv(3), bn=bn()
    ),
    "after a change in place": net(in_place_first, layer=conv(3)),
}


class Complex(nn.Module):
    """Two complex layers behind a real one."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 10)
        self.one, self.two = (nn.Linear(4, 4, dtype=torch.complex128) for _ in range(2))

    def forward(self, x):
        x = torch.complex(self.first(x), self.first(x.flip(-1)))
        return self.head(self.two(self.one(x).sin()).abs())


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


def transposing(m, x):
    """The normalization does not follow a convolution, into which it would be folded, nor get channels last."""
    x = m.bn(F.silu(m.layer(x)).contiguous())
    return m.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))


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
    model = with_layer(conv(3))()
    nn.utils.parametrizations.weight_norm(model.layer)
    return model


image, sequence = (3, 8, 8), (5, 3)


def case(factory, shape=image, kind="all"):
    """A network, the shape of its images, and its units."""
    return factory, shape, kind


GENERAL = {  # what is taken one image at a time
    "transposed convolution": case(with_layer(lambda: nn.ConvTranspose2d(6, 6, 3, groups=2)), kind="filters"),
    "transposed, dim 0 is as long": case(with_layer(lambda: nn.ConvTranspose2d(6, 6, 3)), kind="filters"),
    "transposed 1-D": case(with_layer(lambda: nn.ConvTranspose1d(6, 6, 3, stride=2), dims=1), (3, 8), "filters"),
    "weight in a product": case(net(lambda m, x: x @ m.layer.weight.T, layer=lambda: nn.Linear(8, 8))),
    "weight called and in a product": case(
        net(lambda m, x: m.layer(x) @ m.layer.weight.T, layer=lambda: nn.Linear(8, 8))
    ),
    "bias made of a weight": case(
        net(lambda m, x: F.conv2d(x, m.layer.weight, m.other.weight.mean((1, 2, 3))), layer=conv(3), other=conv(3))
    ),
    "wanted biases": case(with_layer(conv(3)), kind=own("layer.bias", "layer.weight")),
    "scale of a BatchNorm": case(
        net(lambda m, x: m.bn(m.layer(x)), layer=conv(3), bn=bn()), kind=own("bn.weight", "layer.weight")
    ),
    "statistics of the batch": case(
        with_layer(lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))),
        kind="filters",
    ),
    "one image at a time by itself": case(net(lambda m, x: torch.stack([m.layer(i) for i in x]), layer=conv(3))),
    "checkpoint": case(
        net(
            lambda m, x: checkpoint(m.layer, x, use_reentrant=False),
            layer=lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3)),
        )
    ),
    "LSTM": case(Recurrent, sequence, own("cell.weight_ih_l0", "cell.weight_hh_l0", "head.weight")),
    "branches": case(Branching, kind="filters"),
}


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
    "weight_norm": case(weight_normed, kind=own("layer.parametrizations.weight.original1")),
    "weight in a penalty": case(net(lambda m, x: m.layer(x) * m.layer.weight.square().mean(), layer=conv(3))),
    "weight scaled before the call": case(net(lambda m, x: F.conv2d(x, m.layer.weight * 2), layer=conv(3))),
    "part of a weight": case(net(lambda m, x: F.conv2d(x, m.layer.weight[:3]).repeat(1, 2, 1, 1), layer=conv(3))),
    "weight standardization": case(
        net(lambda m, x: m.after(m.layer(x)), layer=lambda: Standardized(6, 6, 3), after=conv(3))
    ),
    "weight standardization before BatchNorm": case(
        net(lambda m, x: m.bn(m.layer(x)), layer=lambda: Standardized(6, 6, 3), bn=bn())
    ),
    "standardized weight of windows": case(
        net(
            lambda m, x: m.layer(x.unflatten(2, (2, 4)).movedim(2, 1).flatten(0, 1)).unflatten(0, (-1, 2)).mean(1),
            layer=lambda: Standardized(6, 6, 3),
        )
    ),
    "weight that is also a table": case(net(twice, layer=conv(3))),
    "scale of channels": case(
        net(lambda m, x: m.layer(x) * m.other.weight.mean((1, 2, 3))[:, None, None], layer=conv(3), other=conv(3))
    ),
    "attention to something else": case(lambda: Attention(True, cross=True), sequence, "heads"),
    "table": case(Biased, sequence, "rows"),
    "table added in place": case(lambda: Biased(into=True), sequence, "rows"),
    "table of fused attention": case(lambda: Biased(fused=True), sequence, "rows"),
    "table of windows": case(lambda: Biased(windows=3), (15, 3), "rows"),
    "table of windows, repeated": case(lambda: Biased(windows=3, repeat=True), (15, 3), "rows"),
}


class Alias(nn.Module):
    """Keeps a parameter in a list, where `torch.func.functional_call` does not replace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)
        self.kept = [self.conv.weight]

    def forward(self, x):
        return self.head(F.conv_transpose2d(F.silu(self.conv(x)), self.kept[0]).mean((2, 3)))


class InnerGradient(Net):
    """Asks for a gradient on its way, of which the fast path must collect nothing."""

    def __init__(self, create_graph=True):
        super().__init__()
        self.create_graph = create_graph

    def forward(self, x):
        x = x.detach().requires_grad_()
        inner = self.head(F.silu(self.first(x)).flatten(2).mean(2)).square().sum()
        return super().forward(x + torch.autograd.grad(inner, x, create_graph=self.create_graph)[0])


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


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that live after each operation."""

    def __init__(self):
        super().__init__()
        self.storages, self.bytes, self.most, self.at_pool = {}, 0, 0, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}:
            self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {at: known for at, known in self.storages.items() if not known[0].expired()}
        self.bytes = sum(size for _, size in self.storages.values())
        self.most = max(self.most, self.bytes)
        if function is torch.ops.aten.max_pool2d_with_indices_backward.default:
            self.at_pool = self.bytes
        return result
