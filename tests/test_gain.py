"""What a unit contributes to the loss, and what it says: against autograd and hooks, one image at a time."""

import logging

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import assert_close, batch, bn, conv, image, net, own, seeded
from torch import nn

from pss import Reference, Units, profile, profile_dataset, rank_together
from pss.engine import calls, kernels, locating
from pss.saliency import LOSSES
from pss.units import UnitGroup


def alone(model, images, labels, units, signed=True, loss=None):
    """The second source: sum of weight times gradient, by plain autograd, one image at a time."""
    loss = loss or (lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"))
    parameters = {layer.parameter: model.get_parameter(layer.parameter) for layer in units.layers}
    rows = []
    for b in range(len(images)):
        value = loss(model(images[b : b + 1]), labels[b : b + 1]).sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
        terms = {n: (p.conj() * g).real.detach()[None] for (n, p), g in zip(parameters.items(), found, strict=True)}
        rows.append(units.reduce(terms) * torch.cat([torch.full((layer.count,), layer.size) for layer in units.layers]))
    return torch.cat(rows) if signed else torch.cat(rows).abs()


def assert_gain(model, shape, kind="all", sizes=(1, 2, 7), strategy="fast", signed=True, fold=True, **options):
    images, labels = batch(shape, max(sizes))
    units = Units.of(model, kind)
    expected = alone(model, images, labels, units, signed)
    assert expected.any()
    how = {"signed": signed, "strategy": strategy, "fold": fold, **options}
    for size in sizes:
        some = images[:size], labels[:size]
        got = profile(model, *some, units, of="gain", **how)
        assert_close(got, expected[:size], units)
        gradient, gain = profile(model, *some, units, of=("gradient", "gain"), **how)
        gain = gain.real if gain.is_complex() else gain
        torch.testing.assert_close(gain, got, rtol=1e-12, atol=1e-12 * float(got.abs().max()))
        torch.testing.assert_close(gradient, profile(model, *some, units, **how))


@pytest.mark.parametrize("name", networks.ZOO)
def test_networks_of_the_zoo(name):
    factory, size, kind = networks.ZOO[name]
    assert_gain(seeded(factory), (3, size, size), kind, sizes=(3,))


@pytest.mark.parametrize(("name", "size"), [("resnet50", 32), ("densenet121", 32), ("inception_v3", 75), ("vgg19", 32)])
def test_networks_of_the_published_statistics(name, size, peer_data):
    """One gain for each unit that the published files hold, equal to autograd's."""
    few = {"num_classes": 10, **({"init_weights": False} if name == "inception_v3" else {})}
    model = seeded(lambda: networks.small_vgg("E") if name == "vgg19" else getattr(networks.models, name)(**few))
    reference = Reference.load(peer_data / f"ImageNet_val_saliency_stat_{name}_filter_wise.pth")
    images, labels = batch((3, size, size), 2)
    units = Units.of(model)
    gain = profile(model, images, labels, units, of="gain", signed=True)
    assert gain.shape == (2, len(reference))
    assert_close(gain, alone(model, images, labels, units), units)


def with_negative_scales(model):
    """Half of the normalizations' scales negative, which folding carries into weights."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight[::2] *= -1
    return model


def added_and_changed(output, term):
    output += term
    term *= 2
    return output


CHANGED = {  # outputs that are written into, by what cuts values off and by what does not
    "add in place": net(lambda m, x: m.layer(x).add_(x), layer=conv(3, padding=1)),
    "add twice": net(lambda m, x: m.layer(x).add_(x).add_(2 * x), layer=conv(3, padding=1)),
    "add, then ReLU": net(lambda m, x: F.relu_(m.layer(x).add_(x)), layer=conv(3, padding=1)),
    "add itself": net(lambda m, x: (lambda y: y.add_(y))(m.layer(x)), layer=conv(3, padding=1)),
    "add to turned": net(lambda m, x: (lambda y: (y.mT.add_(x), y)[1])(m.layer(x)), layer=conv(3, padding=1)),
    "add, then change": net(lambda m, x: added_and_changed(m.layer(x), 3 * x), layer=conv(3, padding=1)),
    "ReLU in place": net(lambda m, x: F.relu(m.layer(x), inplace=True), layer=conv(3)),
    "ReLU6 in place": net(lambda m, x: F.relu6(m.layer(x) * 9, inplace=True), layer=conv(3)),
    "SiLU in place": net(lambda m, x: F.silu(m.layer(x), inplace=True), layer=conv(3)),
    "SiLU, then ReLU": net(lambda m, x: F.relu_(F.silu(m.layer(x), inplace=True)), layer=conv(3)),
    "ReLU in place after another use": net(lambda m, x: (lambda y: y * 2 + F.relu_(y))(m.layer(x)), layer=conv(3)),
    "ReLU, then cut above": net(
        lambda m, x: (lambda y: F.relu(y) + F.hardtanh_(y, -0.1, 0.1))(m.layer(x)), layer=conv(3)
    ),
    "both halves of an activation": net(
        lambda m, x: (lambda y: (lambda n: y.relu_() - n.relu_())(-y))(m.bn(m.layer(x))), layer=conv(3), bn=bn()
    ),
    "ReLU of a view": net(lambda m, x: m.layer(x).flatten(2).relu_().unflatten(2, (6, 6)), layer=conv(3)),
    "ReLU of a part": net(lambda m, x: (lambda y: (y[:, 1:].relu_(), y)[1])(m.layer(x)), layer=conv(3)),
    "ReLU after BatchNorm": net(lambda m, x: F.relu_(m.bn(m.layer(x))), layer=conv(3), bn=bn()),
    "clamp of an output": net(lambda m, x: m.layer(x).clamp_(-0.2, 0.3), layer=conv(3)),
    "filled by index": net(lambda m, x: m.layer(x).index_fill_(1, torch.tensor([2]), 1.0), layer=conv(3)),
}


FAST, SLOW = networks.FAST | CHANGED, networks.GENERAL | networks.MADE


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "plain"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_one_difficulty_at_a_time(name, fold):
    model = with_negative_scales(seeded(FAST[name]))
    assert_gain(model, (3, *[8] * model.dims), fold=fold, signed=not fold)


def test_no_output_of_a_residual_network_is_computed_again(monkeypatch):
    factory, size, _ = networks.ZOO["resnet18"]
    model, counts = seeded(factory), {}
    images, labels = batch((3, size, size), 2)
    forward = kernels.Convolution.forward
    monkeypatch.setattr(kernels.Convolution, "forward", lambda *args: seen.append(1) or forward(*args))
    for of in ("gradient", "gain"):
        seen = []
        profile(model, images, labels, of=of, strategy="fast", verify=False)
        counts[of] = len(seen)
    assert counts["gain"] == counts["gradient"] > 0


@pytest.mark.parametrize("size", [32, 64])
def test_it_keeps_no_more_than_the_gradient_but_what_is_added_to_a_block(size):
    """Autograd keeps the other outputs of a residual network too; and they are let go when the gradient has come."""
    model = seeded(networks.ZOO["resnet50"][0])
    images, labels = batch((3, size, size), 2)
    beside = [layer[0].downsample[0] for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    sizes, at_loss, at_pool = [], {}, {}
    handles = [layer.register_forward_hook(lambda _, __, output: sizes.append(output.nbytes)) for layer in beside]
    model(images)
    for handle in handles:
        handle.remove()

    for of in ("gradient", "gain"):

        def loss(outputs, labels, of=of):
            at_loss.setdefault(of, living.bytes)
            return LOSSES["cross_entropy"](outputs, labels)

        with networks.Living() as living:
            profile(model, images, labels, loss=loss, of=of, verify=False)
        at_pool[of] = living.at_pool
    assert 0 < at_loss["gain"] - at_loss["gradient"] <= sum(sizes)
    assert 0 < at_pool["gain"] <= at_pool["gradient"] < 0.75 * at_loss["gradient"]


def test_samples_are_found_with_one_copy_of_an_input():
    x = torch.randn(4, 3, 8, 8)
    with networks.Living() as living:
        shifted = x.roll(1, 0)
        assert locating.keeps_order(locating.BatchDimension(0, 4, 1), x, shifted)
    assert living.most < 3 * x.nbytes  # and of both of them


@pytest.mark.parametrize("name", networks.OWN_FUNCTIONS)
def test_own_autograd_functions_on_outputs(name):
    assert_gain(seeded(networks.OWN_FUNCTIONS[name]), image, verify=False)


@pytest.mark.parametrize("name", [name for name in SLOW if "norm" not in name and "standard" not in name])
def test_what_the_fast_path_does_not_know(name):
    factory, shape, kind = SLOW[name]
    assert_gain(seeded(factory), shape, kind, strategy="auto")


def test_a_direction_that_is_normalized_contributes_nothing():
    factory, shape, kind = SLOW["weight_norm"]
    model = seeded(factory)
    images, labels = batch(shape)
    for size in (7, 1):  # sums of rounding, which are no reason to distrust
        gain = profile(model, images[:size], labels[:size], Units.of(model, kind), of="gain")
        assert gain.abs().max() < 1e-12


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["heads", "rows"])
def test_heads_and_a_batch_that_is_not_in_front(batch_first, kind):
    for length in (2, 5):
        assert_gain(seeded(lambda: networks.Attention(batch_first)), (length, 3), kind)


@pytest.mark.parametrize("name", ["Hypernetwork", "Sorting", "Company", "InnerGradient", "Alias"])
def test_networks_whose_batch_is_hidden(name):
    model = seeded(getattr(networks, name))
    shape = {"Company": (5, 3), "InnerGradient": image, "Alias": image}.get(name, (6,))
    units = Units.of(model, "rows" if len(shape) < 3 else "all")
    images, labels = batch(shape, 7)
    got = profile(model, images, labels, units, of="gain", signed=True, verify=False)
    assert_close(got, alone(model, images, labels, units), units)


@pytest.mark.parametrize("name", ["resnet50", "vit heads"])
@pytest.mark.parametrize("strategy", ["vmap", "loop", "auto"])
def test_every_strategy(name, strategy):
    factory, size, kind = networks.ZOO[name]
    for signed in (True, False):
        assert_gain(seeded(factory), (3, size, size), kind, (2,), strategy, signed)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_complex_layers(strategy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.Complex()
        model.first.double(), model.head.double()
    assert_gain(model, (3,), "rows", (1, 3), strategy, verify=False)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss):
    model = seeded(networks.Net)
    units = Units.of(model, "all")
    images, labels = batch(image)
    got = profile(model, images, labels, units, loss, True, of="gain")
    assert_close(got, alone(model, images, labels, units, loss=LOSSES[loss]), units)


def test_it_is_the_derivative_to_a_gain_and_what_pruning_changes_to_first_order():
    model = seeded(net(lambda m, x: F.silu(m.bn(m.layer(x))), layer=conv(3), bn=bn()))
    units = Units.of(model)
    images, labels = batch(image, 1)
    gains = profile(model, images, labels, units, of="gain", signed=True)[0]
    for unit in range(len(units)):
        with torch.no_grad():
            view, kept, values = units.view(model, unit), units.view(model, unit).clone(), []
            for gain in (1 + 1e-5, 1 - 1e-5):
                view.copy_(kept * gain)
                values.append(F.cross_entropy(model(images), labels))
            view.copy_(kept)
        assert torch.isclose(gains[unit], (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-10)


def test_a_row_scaled_before_batchnorm_changes_nothing():
    model = seeded(net(lambda m, x: F.silu(m.bn(m.layer(x))), layer=conv(3, bias=False), bn=bn(eps=0)))
    units = Units.of(model)
    images, labels = batch(image)
    how = {"units": units, "of": ("gradient", "gain"), "signed": True}
    gradient, gain = profile(model, images, labels, **how)
    with torch.no_grad():
        model.layer.weight[2] *= 7
        model.bn.running_mean[2] *= 7
        model.bn.running_var[2] *= 49
    scaled_gradient, scaled_gain = profile(model, images, labels, **how)
    assert_close(scaled_gain, gain, units)
    assert torch.allclose(scaled_gradient[:, 8] * 7, gradient[:, 8])


def test_bfloat16_products_are_near():
    model = seeded(networks.ZOO["resnet50"][0], dtype=torch.float32)
    images, labels = batch((3, 64, 64), 4, dtype=torch.float32)
    exact, near = (profile(model, images, labels, precision=p, of="gain") for p in ("fp32", "bf16"))
    assert near.dtype == torch.float32
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05


def test_no_weight_gradient_is_formed(monkeypatch):
    model = seeded(networks.ZOO["resnet18"][0])
    images, labels = batch((3, 32, 32), 3)
    profile(model, images, labels, of="gain")  # after which it is verified
    for name in ("row_sums", "gradients"):
        monkeypatch.setattr(calls.Convolution, name, lambda *_: pytest.fail("a weight gradient"))
    assert profile(model, images, labels, of="gain").any()


# What a unit says


def heard(model, images, modules, positions=(2, 3)):
    """The second source: means over positions of what modules give, by hooks."""
    found = {}

    def keep(module, inputs, output):
        found[module] = output.clone()  # others may write into it

    handles = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return torch.cat([found[module].mean(positions) for module in modules], dim=1)


NORMALIZED = {
    "none": (None, "layer"),
    "BatchNorm": (bn(), "after"),
    "BatchNorm not affine": (bn(affine=False), "after"),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), "after"),
    "LayerNorm": (lambda: nn.LayerNorm((6, 6, 6)), "after"),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), "after"),
    "ReLU": (lambda: nn.ReLU(inplace=True), "layer"),  # is no normalization: what comes before it is heard
}


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "plain"])
@pytest.mark.parametrize("strategy", ["auto", "fast", "loop"])
def test_what_a_filter_says_after_its_normalization(name, fold, strategy):
    make, where = NORMALIZED[name]
    layers = {"layer": conv(3), **({"after": make} if make else {})}
    model = seeded(net(lambda m, x: m.after(m.layer(x)) if make else m.layer(x), **layers))
    images, labels = batch(image)
    expected = heard(model, images, [model.first, model.get_submodule(where)])
    how = {"of": "output", "fold": fold, "strategy": strategy}
    for size in (1, 7):
        got = profile(model, images[:size], labels[:size], signed=True, **how)
        torch.testing.assert_close(got, expected[:size], rtol=1e-9, atol=1e-12)
        got = profile(model, images[:size], labels[:size] * 0, **how)  # labels play no part
        torch.testing.assert_close(got, expected[:size].abs(), rtol=1e-9, atol=1e-12)


def turned(m, x):
    return m.after(m.layer(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


TURNED = {  # a view of the output is normalized, where its dimensions lie otherwise
    "LayerNorm of channels": (turned, {"layer": conv(3), "after": lambda: nn.LayerNorm(6)}, (1, 2)),
    "LayerNorm of as many channels as rows": (turned, {"layer": conv(1), "after": lambda: nn.LayerNorm(6)}, (1, 2)),
    "LayerNorm of tokens": (
        lambda m, x: m.after(m.layer(x).flatten(2).mT).mT,
        {"layer": conv(3), "after": lambda: nn.LayerNorm(6)},
        1,
    ),
    "BatchNorm of a linear layer": (
        lambda m, x: m.after(m.layer(x.flatten(2).mT).mT),
        {"layer": lambda: nn.Linear(6, 6), "after": lambda: nn.BatchNorm1d(6)},
        2,
    ),
    "BatchNorm of all tokens": (
        lambda m, x: m.after(m.layer(x.flatten(2).mT).flatten(0, 1)).unflatten(0, (len(x), -1)).mT,
        {"layer": lambda: nn.Linear(6, 6), "after": lambda: nn.BatchNorm1d(6)},
        None,
    ),
    "RMSNorm": (lambda m, x: m.after(m.layer(x)), {"layer": conv(3), "after": lambda: nn.RMSNorm((6, 6, 6))}, (2, 3)),
}


@pytest.mark.parametrize("strategy", ["fast", "loop"])
@pytest.mark.parametrize("name", TURNED)
def test_what_is_said_after_the_normalization_of_a_view(name, strategy):
    middle, layers, positions = TURNED[name]
    model = seeded(net(middle, **layers))
    images, labels = batch((3, 6, 6) if "rows" in name else image)
    said = []
    model.after.register_forward_hook(lambda module, inputs, output: said.append(output.clone()))
    with torch.no_grad():
        model(images)
    expected = said[0].unflatten(0, (7, -1)).mean(1) if positions is None else said[0].mean(positions)
    units = Units.of(model, "all")
    at = units.span([layer.parameter for layer in units.layers].index("layer.weight"))
    got = profile(model, images, labels, units, of="output", signed=True, strategy=strategy)[:, at]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_what_the_zoo_says():
    model = seeded(networks.ZOO["resnet18"][0])
    images, labels = batch((3, 64, 64), 3)
    units = Units.of(model)
    names = [name for name, _ in model.named_modules()]
    after = [model.get_submodule(names[names.index(layer.name) + 1]) for layer in units.layers]
    got = profile(model, images, labels, units, of="output", signed=True)
    torch.testing.assert_close(got, heard(model, images, after), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_a_row_says(batch_first):
    model = seeded(lambda: networks.Attention(batch_first))
    images, labels = batch((5, 3))
    got = profile(model, images, labels, Units.of(model, own("feed.weight")), of="output", signed=True)
    expected = heard(model, images, [model.feed], 1 if batch_first else 0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_uses_are_averaged_and_idle_layers_say_nothing():
    model = seeded(net(lambda m, x: m.layer(F.silu(m.layer(x))), layer=conv(3, padding=1), unused=conv(3)))
    outputs = []
    model.layer.register_forward_hook(lambda _, __, y: outputs.append(y.detach().mean((2, 3))))
    images, labels = batch(image)
    with torch.no_grad():
        model(images)
    expected = torch.stack(outputs).mean(0)
    got = profile(model, images, labels, of="output", signed=True)
    torch.testing.assert_close(got[:, 6:12], expected, rtol=1e-9, atol=1e-12)
    assert not got[:, 12:].any() and got[:, :6].all()


@pytest.mark.parametrize("name", ["weight in a product", "weight called and in a product", "part of a weight"])
def test_layers_whose_output_is_not_seen_are_refused(name):
    factory, shape, kind = SLOW[name]
    model = seeded(factory)
    images, labels = batch(shape)
    for strategy in ("auto", "fast", "loop"):
        with pytest.raises(RuntimeError, match=r"outputs of layer.weight are not seen"):
            profile(model, images, labels, Units.of(model, kind), of="output", strategy=strategy)


def test_what_units_say_needs_no_labels():
    """Whatever the output is, so long as it shows which weights it is made of; the other quantities need a loss."""
    (factory, shape, kind), how = SLOW["weight in a product"], {"of": "output", "signed": True}
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3)))  # gives maps, no logits
    images, labels = batch(image)
    expected = profile(model, images, labels, loss=lambda outputs, _: outputs.sum((1, 2, 3)), **how)
    assert expected.all() and torch.equal(profile(model, images, **how), expected)
    with pytest.raises(RuntimeError, match=r"outputs of layer.weight are not seen"):
        profile(other := seeded(factory), batch(shape)[0], units=Units.of(other, kind), of="output")
    with pytest.raises(ValueError, match=r"labels are NoneType .*one label per image"):
        profile(model, images, of="gain")
    model.register_forward_hook(lambda module, inputs, outputs: {"out": outputs})
    with pytest.raises(ValueError, match="outputs are dict: expected a row for each image, or give labels and a loss"):
        profile(model, images, **how)


def test_units_that_are_no_rows_say_nothing():
    model = seeded(networks.Net)
    with pytest.raises(ValueError, match="are no rows of a layer"):
        profile(model, *batch(image), Units.of(model, own("first.bias")), of="output")


def upward(dims, norm=None, middle=lambda m, x: F.silu(m.after(m.layer(x))), **geometry):
    """A transposed convolution of six channels, and what follows it."""
    conv_transpose = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return net(middle, dims=dims, layer=lambda: conv_transpose(6, 6, **geometry), after=norm or nn.Identity)


TRANSPOSED = {
    "1-D": upward(1, kernel_size=3, stride=2, output_padding=1),
    "2-D": upward(2, kernel_size=(3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
    "3-D": upward(3, kernel_size=2, stride=(1, 2, 1), bias=False),
    "groups": upward(2, kernel_size=3, groups=3),
    "depthwise": upward(2, kernel_size=4, stride=2, padding=1, groups=6),
    "BatchNorm": upward(2, bn(), kernel_size=3, groups=2),
    "GroupNorm": upward(2, lambda: nn.GroupNorm(3, 6), kernel_size=3),
    "called twice": upward(
        2, middle=lambda m, x: F.silu(m.layer(F.silu(m.layer(x)))), kernel_size=2, stride=2, groups=2
    ),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_say_and_contribute_in_one_pass(name):
    model = seeded(TRANSPOSED[name])
    shape = (3, *[4] * model.dims)
    images, labels = batch(shape)
    said = []
    where = model.after if "Norm" in name else model.layer
    handle = where.register_forward_hook(lambda module, inputs, output: said.append(output.flatten(2).mean(2)))
    with torch.no_grad():
        model(images)
    handle.remove()
    expected, at = torch.stack(said).mean(0), slice(6, 12)
    for size in (1, 7):
        got = profile(model, images[:size], of="output", signed=True, strategy="fast")
        torch.testing.assert_close(got[:, at], expected[:size], rtol=1e-9, atol=1e-12)
        gain = profile(model, images[:size], labels[:size], of="gain", signed=True, strategy="fast")
        assert_close(gain, alone(model, images[:size], labels[:size], Units.of(model)), Units.of(model))
    assert_gain(model, shape, "filters", strategy="auto")


def test_a_weight_that_convolves_both_ways():
    """As in an autoencoder with tied weights: the units are the filters of one of the two."""
    middle = lambda m, x: F.conv_transpose2d(F.silu(m.layer(x)), m.layer.weight)  # noqa: E731
    model = seeded(net(middle, layer=conv(3)))
    assert_gain(model, image, "filters", strategy="auto")
    columns = Units.of(model, lambda model: [UnitGroup("layer.weight", (6, 6, 3, 3), 6, dim=1)])
    images, labels = batch(image)
    got = profile(model, images, labels, columns, of="gain", signed=True)
    assert_close(got, alone(model, images, labels, columns), columns)
    for units in (columns, None):
        with pytest.raises(RuntimeError, match=r"outputs of layer.weight are not seen"):
            profile(model, images, labels, units, of="output")


# Bad input, references, groups, and the check of every pass


@pytest.mark.parametrize(
    "of", ["magnitude", (), ("gain", "gain"), ("gain", "magnitude"), ("gain", "output"), None, 3, [["gain"]]]
)
def test_unknown_quantities(of):
    with pytest.raises(ValueError, match=r"quantity|alone"):
        profile(seeded(networks.Net), *batch(image), of=of)


def test_references_keep_to_their_quantity(tmp_path):
    model = seeded(networks.Net, dtype=torch.float32)
    data = torch.utils.data.TensorDataset(*batch(image, 24, dtype=torch.float32))
    units = Units.of(model)
    stores = {
        of: profile_dataset(model, data, units, tmp_path / of, progress=False, signed=True, of=of)
        for of in ("gradient", "gain", "output")
    }
    for of, store in stores.items():
        expected = profile(model, *data.tensors, units, signed=True, of=of)
        torch.testing.assert_close(torch.tensor(store.profiles), expected, rtol=1e-4, atol=1e-6)
        reference = Reference.fit(store)
        assert reference.check(units, of=of) is reference
        for other in stores.keys() - {of}:
            with pytest.raises(ValueError, match=f"of: reference {of}, given {other}"):
                reference.check(units, of=other)
            with pytest.raises(ValueError, match="of"):
                profile_dataset(model, data, units, tmp_path / of, progress=False, signed=True, of=other)
    for several in (("gradient", "gain"), ["gain"], None):
        with pytest.raises(ValueError, match="expected one of gradient, gain, output"):
            profile_dataset(model, data, units, tmp_path / "several", progress=False, of=several)
    with pytest.raises(ValueError, match="signed=False"):
        Reference.fit(-abs(stores["gain"].profiles[:]), scale_free=True)


def test_rank_together_by_hand():
    generator = torch.Generator().manual_seed(0)
    usual = torch.rand(200, 5, generator=generator)
    references = [Reference.fit(usual), Reference.fit(10 * usual)]
    one = torch.full((3, 5), 0.5)
    one[:, 1], one[0, 3] = torch.tensor([0.9, 0.95, 0.5]), 2.0
    other = torch.full((3, 5), 5.0)
    other[:, 4] = 30.0
    z = [r.zscore(p.double()) for r, p in zip(references, (one, other), strict=True)]
    table = rank_together(one, references[0], "zscore", k=1)
    assert table["unit"].tolist() == z[0].mean(0).argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor(table["score"].values), z[0].mean(0).sort(descending=True)[0])
    assert table.set_index("unit")["images"][[3, 1]].tolist() == pytest.approx([1 / 3, 1 / 3])
    both = rank_together([one, other], references, "zscore", k=1).set_index("unit")
    lists = [each.mean(0).argsort(descending=True).tolist() for each in z]
    named = [(unit, quantity) for turn in zip(*lists, strict=True) for quantity, unit in enumerate(turn)]
    once = {unit: (unit, quantity) for unit, quantity in reversed(named)}  # the first time that it is named
    assert list(both["quantity"].items()) == sorted(once.values(), key=named.index)
    assert both.index[:2].tolist() == [lists[0][0], 4] and both["quantity"][4] == 1
    scores = torch.stack([z[quantity].mean(0)[unit] for unit, quantity in both["quantity"].items()])
    torch.testing.assert_close(torch.tensor(both["score"].values), scores)
    two = rank_together([one, other], references, "zscore", k=2).set_index("unit")["images"]
    firsts = z[0].argmax(1).bincount(minlength=5) + z[1].argmax(1).bincount(minlength=5)
    assert (firsts > 0).sum() > 2 and two[range(5)].tolist() == pytest.approx((firsts / 3).tolist())
    dead = Reference.fit(torch.where(torch.arange(5) == 4, 1.0, 10 * usual))
    assert rank_together([other, other], [dead, dead], "zscore")["unit"].iloc[-1] == 4
    assert rank_together(one, method="raw")["unit"][0] == 3
    mixed = rank_together([one, other], references, ("raw", "zscore"))
    assert mixed["unit"][:2].tolist() == [3, 4] and mixed["score"][0] == one[:, 3].mean()
    for usual, methods in ((references[:1], "zscore"), (references, ["raw"]), (references, ("raw", "raw", "raw"))):
        with pytest.raises(ValueError, match=r"2 quantities, \d references and \d methods: give one for each"):
            rank_together([one, other], usual, methods)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("of", ["gain", ("gradient", "gain")])
def test_a_broken_gain_is_seen(of, dtype, monkeypatch, caplog):
    model = seeded(net(lambda m, x: F.silu(m.layer(x)), layer=conv(3)), dtype=dtype)
    images, labels = batch(image, 3, dtype=dtype)
    how = {"of": of, "signed": True}
    expected = profile(model, images, labels, strategy="loop", **how)
    monkeypatch.setattr(
        calls.LayerCall, "products", lambda self, x, g: self.layer.forward(x, self.weight, self.bias) * g
    )
    with caplog.at_level(logging.INFO, logger="pss"):
        got = profile(model, images, labels, **how)
    torch.testing.assert_close(got, expected)
    assert "first differs from plain autograd" in caplog.text


@pytest.mark.parametrize("of", ["gradient", "gain"])
@pytest.mark.parametrize("kind", ["rows", "heads"])
def test_sums_that_cancel_are_no_reason(of, kind, caplog):
    factory, size, _ = networks.ZOO["vit heads"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory().eval()  # whose classifier starts at zero, as no gradient comes before it
    images, labels = batch((3, size, size), 4, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="pss"):
        profile(model, images, labels, Units.of(model, kind), strategy="fast", signed=True, of=of)
    assert not caplog.text


def test_a_second_normalization_of_an_activation_is_not_what_the_layer_says():
    model = seeded(net(lambda m, x: m.second(F.relu_(m.bn(m.layer(x)))), layer=conv(3), bn=bn(), second=bn()))
    images, labels = batch(image)
    said = []
    handle = model.bn.register_forward_hook(lambda module, inputs, output: said.append(output.flatten(2).mean(2)))
    model(images)
    handle.remove()
    units = Units.of(model)
    at = units.span([layer.parameter for layer in units.layers].index("layer.weight"))
    for fold in (True, False):
        found = profile(model, images, labels, units, of="output", signed=True, fold=fold)
        torch.testing.assert_close(found[:, at], said[0])
