"""Input-space saliency against derivations by hand, by Jacobians and by finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

import pss
from pss.data.vision import torchvision  # noqa: F401
from pss.input_space import channel_map, cosine, gain_map, input_saliency, standardize


@pytest.fixture
def network():
    """Small, with all that makes a second derivative hard: BatchNorm, ReLU in place, max pooling; float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).double()
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.tensor([0, 3, 1])


@pytest.fixture
def units(network):
    return pss.Units.of(network)


@pytest.fixture
def reference(network, units, generator):
    """Fitted to profiles of 400 other images of very different contrast; some tails are heavy, some bounded."""
    contrast = torch.randn(400, 1, 1, 1, generator=generator, dtype=torch.float64).exp()
    others = contrast * torch.randn(400, 3, 8, 8, generator=generator, dtype=torch.float64)
    classes = torch.randint(4, (400,), generator=generator)
    return pss.Reference.fit(pss.profile(network, others, classes, units))


def by_jacobian(model, image, label, units, reference, ids, boost):
    """Gradient of the cosine from the Jacobian of the z-scores and the cosine's derivative written out by hand."""
    weights = {layer.parameter: model.get_parameter(layer.parameter).detach() for layer in units.layers}

    def z(x):
        def loss(parameters):
            logits = torch.func.functional_call(model, parameters, (x[None],))
            return nn.functional.cross_entropy(logits, label[None])

        gradients = torch.func.grad(loss)(weights)
        s = torch.cat([gradients[name].abs().flatten(1).mean(dim=1) for name in weights])
        return (s - reference.mean) / reference.std

    a, b = z(image), z(image).clone()
    b[ids] *= boost
    cosine_gradient = (b / b.norm() - (a @ b) / (a.norm() * b.norm()) * a / a.norm()) / a.norm()
    return torch.einsum("u,uchw->chw", cosine_gradient, torch.autograd.functional.jacobian(z, image))


def test_a_network_whose_map_can_be_derived_by_hand():
    # One channel, two filters of one weight each; L = sum (w_k x)^2 / 2, so s_k = |w_k| q with q = sum x^2.
    model = nn.Conv2d(1, 2, 1, bias=False).double()
    w, x = np.array([0.5, -2.0]), np.array([1.0, -3.0])
    mean, std, boost = np.array([1.0, 30.0]), np.array([2.0, 5.0]), 10
    model.weight.data[:] = torch.from_numpy(w)[:, None, None, None]
    z = (np.abs(w) * (x**2).sum() - mean) / std  # 2.0, -2.0: the first is the most salient
    b = z * [boost, 1]
    v = (b / np.linalg.norm(b) - z @ b / np.linalg.norm(b) / (z @ z) * z) / np.linalg.norm(z)
    by_hand = np.abs(2 * x * (v * np.abs(w) / std).sum())

    reference = pss.Reference(torch.from_numpy(mean), torch.from_numpy(std))
    loss = lambda outputs, labels: outputs.square().flatten(1).sum(dim=1) / 2  # noqa: E731
    image = torch.from_numpy(x).reshape(1, 1, 2)
    got = input_saliency(model, image, 0, pss.Units.of(model), reference, k=1, boost=boost, loss=loss)
    np.testing.assert_allclose(got.numpy()[0], by_hand, rtol=1e-12)


@pytest.mark.parametrize("boost", [10, 100])
def test_equals_the_jacobian_of_the_standardized_profile(network, images, labels, units, reference, boost):
    top = pss.rank(pss.profile(network, images, labels, units), reference, "zscore", k=3)
    wanted = torch.stack(
        [
            by_jacobian(network, *one, units, reference, ids, boost)
            for *one, ids in zip(images, labels, top, strict=True)
        ]
    )
    options = {"k": 3, "boost": boost}
    got = input_saliency(network, images, labels, units, reference, order="gradient", **options)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
    maps = input_saliency(network, images, labels, units, reference, **options)
    torch.testing.assert_close(maps, wanted.abs().amax(dim=1), rtol=1e-8, atol=1e-12)
    published = input_saliency(network, images, labels, units, reference, order="published", **options)
    torch.testing.assert_close(published, wanted.amax(dim=1).abs(), rtol=1e-8, atol=1e-12)


def test_only_the_published_order_changes_when_the_similarity_is_negated(network, images, labels, units, reference):
    def maps(similarity, order):
        return input_saliency(network, images, labels, units, reference, k=3, similarity=similarity, order=order)

    def negated(a, b):
        return -cosine(a, b)

    torch.testing.assert_close(maps(cosine, "absolute_first"), maps(negated, "absolute_first"), rtol=0, atol=0)
    differ = (maps(cosine, "published") - maps(negated, "published")).abs().flatten(1).amax(dim=1)
    assert (differ > 0.1 * maps(cosine, "published").flatten(1).amax(dim=1)).all()


def test_a_boost_of_one_gives_nothing(network, images, labels, units, reference):
    boosted = input_saliency(network, images, labels, units, reference, k=3, boost=10)
    same = input_saliency(network, images, labels, units, reference, k=3, boost=1)
    assert same.abs().max() < 1e-12 * boosted.max()


def test_a_planted_fault_is_found_in_the_units_and_in_the_image(generator):
    # Filter c sees channel c alone; the image has a bright patch in channel 7 that no reference image has.
    model = nn.Conv2d(64, 64, 1, groups=64, bias=False)
    units = pss.Units.of(model)
    loss = lambda outputs, labels: outputs.square().flatten(1).sum(dim=1)  # noqa: E731
    usual = torch.randn(100, 64, 8, 8, generator=generator)
    reference = pss.Reference.fit(pss.profile(model, usual, torch.zeros(100, dtype=torch.int64), units, loss))
    image = torch.randn(64, 8, 8, generator=generator).clamp(-2, 2)
    image[7, 2:4, 5:7] = 6
    profile = pss.profile(model, image[None], torch.tensor([0]), units, loss)
    assert pss.rank(profile, reference, "zscore", k=1).tolist() == [[7]]

    got = input_saliency(model, image, 0, units, reference, k=1, loss=loss)
    named = torch.zeros(8, 8, dtype=torch.bool)
    named[2:4, 5:7] = True
    assert got[named].min() > got[~named].max()
    torch.testing.assert_close(got, input_saliency(model, image, 0, units, reference, ids=[7], loss=loss))


def test_a_batch_gives_what_its_images_give_alone(network, images, labels, units, reference):
    together = input_saliency(network, images, labels, units, reference, k=3)
    assert together.shape == (3, 8, 8) and together.dtype == torch.float64
    for image, label, wanted in zip(images, labels, together, strict=True):
        torch.testing.assert_close(input_saliency(network, image, int(label), units, reference, k=3), wanted)
        torch.testing.assert_close(input_saliency(network, image, label, units, reference, k=3), wanted)


def test_random_units_are_those_of_rank(network, images, labels, units, reference):
    profiles = pss.profile(network, images, labels, units)
    ids = pss.rank(profiles, reference, "random", k=3, generator=7)
    given = input_saliency(network, images, labels, units, reference, ids=ids)
    drawn = input_saliency(network, images, labels, units, reference, k=3, random=True, generator=7)
    torch.testing.assert_close(drawn, given, rtol=0, atol=0)
    other = input_saliency(network, images, labels, units, reference, k=3, random=True, generator=8)
    top = input_saliency(network, images, labels, units, reference, k=3)
    assert not torch.allclose(drawn, other) and not torch.allclose(drawn, top)


def test_noise_is_averaged_over_gradients_and_seeded(network, images, labels, units, reference):
    noise = {"k": 3, "noise_iters": 2, "noise_share": 0.2}
    got = input_saliency(network, images, labels, units, reference, generator=5, **noise)
    stream, total = torch.Generator().manual_seed(5), 0
    for _ in range(2):
        noisy = 0.8 * images + 0.2 * torch.randn(images.shape, generator=stream, dtype=torch.float64)
        total = total + input_saliency(network, noisy, labels, units, reference, k=3, order="gradient")
    torch.testing.assert_close(got, (total / 2).abs().amax(dim=1))
    again = input_saliency(network, images, labels, units, reference, generator=5, **noise)
    torch.testing.assert_close(got, again, rtol=0, atol=0)
    other = input_saliency(network, images, labels, units, reference, generator=6, **noise)
    assert not torch.allclose(got, other)
    none = input_saliency(network, images, labels, units, reference, k=3, noise_iters=3)
    torch.testing.assert_close(none, input_saliency(network, images, labels, units, reference, k=3))


def test_the_map_of_gains_is_the_gradient_of_what_the_top_units_add_to_the_margin(network, images, labels, units):
    """The gain of a unit as the derivative of the margin to a factor on its weights, and back to the image."""

    def gains(x, label):
        factors = torch.ones(len(units), dtype=torch.float64, requires_grad=True)
        parts = dict(network.named_parameters())
        for number, layer in enumerate(units.layers):
            factor = factors[units.span(number)].reshape(-1, 1, 1, 1)
            parts[layer.parameter] = parts[layer.parameter].detach() * factor
        logits = torch.func.functional_call(network, parts, (x[None],))[0]
        margin = torch.cat([logits[:label], logits[label + 1 :]]).max() - logits[label]
        return torch.autograd.grad(margin, factors, create_graph=True)[0]

    found = gain_map(network, images, labels, units, k=3)
    for x, label, heat in zip(images, labels.tolist(), found, strict=True):
        x = x.clone().requires_grad_()
        top = gains(x, label).topk(3).values.sum()
        expected = (x * torch.autograd.grad(top, x)[0]).sum(dim=0).abs()
        torch.testing.assert_close(heat, expected.detach())
    assert torch.equal(gain_map(network, images[0], 0, units, k=3), found[0])
    ids = torch.stack([gains(x.clone(), int(y)).topk(3).indices for x, y in zip(images, labels, strict=True)])
    torch.testing.assert_close(gain_map(network, images, labels, units, ids=ids), found)
    with pytest.raises(ValueError, match="k"):
        gain_map(network, images, labels, units, k=len(units) + 1)


@pytest.mark.parametrize("tail", ["gpd", "exponential"])
def test_the_tail_probability_is_differentiated(reference, tail):
    """Values and slopes against the reference's own log tail probability, below and above the threshold."""
    assert (reference.xi >= 0).any() and (reference.xi < 0).any()
    low, high = reference.quantiles[:, 0], reference.threshold + 0.5 * reference.mean_excess
    profiles = torch.stack([low + part * (high - low) for part in (0.031, 0.317, 0.713, 0.999)]).requires_grad_()
    method = "pot" if tail == "gpd" else "exponential"
    score = standardize(profiles, reference, method)
    (slope,) = torch.autograd.grad(score.sum(), profiles)

    step = 1e-7 * (high - low)
    with torch.no_grad():
        p = [reference.log_tail_probability(profiles + sign * step, tail) for sign in (-1, 0, 1)]
    same = reference.xi >= 0 if tail == "gpd" else torch.ones_like(reference.fitted)  # else taken as exponential
    torch.testing.assert_close(score[:, same], -p[1][:, same], rtol=1e-9, atol=1e-12)
    finite = (-(p[2] - p[0]) / (2 * step))[:, same]
    torch.testing.assert_close(slope[:, same], finite, rtol=1e-4, atol=1e-9)
    assert (slope[profiles > reference.threshold] > 0).all()


@pytest.mark.parametrize("method", ["abs_zscore", "pot", "exponential", "raw"])
@pytest.mark.parametrize("scale_free", [False, True])
def test_every_method_follows_the_similarity(network, images, labels, units, method, scale_free, generator):
    """The derivative along a direction, against the similarity at two images on either side."""
    others = torch.randn(100, 3, 8, 8, generator=generator, dtype=torch.float64)
    classes = torch.randint(4, (100,), generator=generator)
    profiles = pss.profile(network, others, classes, units)
    reference = pss.Reference.fit(profiles, scale_free=scale_free)
    at = pss.profile(network, images, labels, units)
    top = pss.rank(at, reference, method, k=3)
    boosted = standardize(at, reference, method).clone()
    boosted.scatter_(1, top, 100 * boosted.gather(1, top))

    gradient = input_saliency(network, images, labels, units, reference, k=3, method=method, order="gradient")
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)

    def similarity(step):
        return cosine(
            standardize(pss.profile(network, images + step * direction, labels, units), reference, method), boosted
        )

    finite = (similarity(1e-6) - similarity(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * direction).flatten(1).sum(dim=1), finite, rtol=1e-4, atol=1e-7)


def test_signed_profiles(network, images, labels, units, generator):
    others = torch.randn(50, 3, 8, 8, generator=generator, dtype=torch.float64)
    classes = torch.randint(4, (50,), generator=generator)
    signed = pss.Reference.fit(pss.profile(network, others, classes, units, signed=True))
    got = input_saliency(network, images, labels, units, signed, k=3, signed=True)
    top = pss.rank(pss.profile(network, images, labels, units, signed=True), signed, "zscore", k=3)
    torch.testing.assert_close(
        got, input_saliency(network, images, labels, units, signed, ids=top, signed=True), rtol=0, atol=0
    )
    assert not torch.allclose(got, input_saliency(network, images, labels, units, signed, k=3))


def test_dead_units_are_not_boosted_and_break_nothing(network, images, labels, units, reference):
    std = reference.std.clone()
    std[:5] = 0
    dead = pss.Reference(reference.mean * 0, std)
    got = input_saliency(network, images, labels, units, dead, k=len(units) - 5)
    alive = torch.arange(5, len(units))
    torch.testing.assert_close(got, input_saliency(network, images, labels, units, dead, ids=alive))


def test_sizes_of_1e_minus_12_lose_nothing():
    rows = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-12
    assert cosine(rows, rows).tolist() == pytest.approx([1, 1])
    assert cosine(rows * 0, rows).tolist() == [0, 0]


ZOO = [  # untrained, as small as each model allows: constructor, options, kind of unit, image size
    ("resnet18", {}, "filters", 32),
    ("resnet50", {}, "filters", 32),
    ("vgg19", {"init_weights": False}, "filters", 32),
    ("densenet121", {}, "filters", 32),
    ("inception_v3", {"init_weights": False, "aux_logits": True}, "filters", 75),
    ("mobilenet_v2", {}, "filters", 32),
    ("mobilenet_v3_small", {}, "filters", 32),
    ("convnext_tiny", {}, "filters", 32),
    ("convnext_tiny", {}, "rows", 32),
    ("vit_b_16", {"image_size": 32}, "heads", 32),
    ("vit_b_16", {"image_size": 32}, "rows", 32),
]


@pytest.mark.parametrize(("name", "options", "kind", "size"), ZOO)
def test_models_of_the_zoo(name, options, kind, size, generator):
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(models, name)(num_classes=10, **options).eval()
        for module in model.modules():  # an untrained transformer's last layer is zero, and with it all gradients
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight)
    units = pss.Units.of(model, kind)
    image = torch.randn(1, 3, size, size, generator=generator)
    saliency = pss.profile(model, image, torch.tensor([3]), units).double()[0]
    reference = pss.Reference(0.8 * saliency, saliency * torch.rand(len(units), generator=generator))
    got = input_saliency(model, image, torch.tensor([3]), units, reference)
    assert got.shape == (1, size, size)
    assert got.isfinite().all() and (got > 0).float().mean() > 0.5


def test_runs_where_gradients_are_off(network, images, labels, units, reference):
    wanted = input_saliency(network, images, labels, units, reference, k=3)
    with torch.no_grad():
        torch.testing.assert_close(input_saliency(network, images, labels, units, reference, k=3), wanted)
    with torch.inference_mode():
        inside = images + 0, labels + 0
        torch.testing.assert_close(input_saliency(network, *inside, units, reference, k=3), wanted)
    asking = images.clone().requires_grad_()
    assert not input_saliency(network, asking, labels, units, reference, k=3).requires_grad


def test_a_reference_without_a_tail_says_so(network, images, labels, units, reference):
    published = pss.Reference(reference.mean, reference.std)
    input_saliency(network, images, labels, units, published, k=3)
    with pytest.raises(ValueError, match="no tail"):
        input_saliency(network, images, labels, units, published, k=3, method="pot")


def test_order_of_channels():
    gradient = torch.tensor([[-3.0, 1.0], [2.0, -1.0]]).reshape(1, 2, 1, 2)
    assert channel_map(gradient).tolist() == [[[3, 1]]]
    assert channel_map(gradient, "published").tolist() == [[[2, 1]]]
    assert channel_map(-gradient, "published").tolist() == [[[3, 1]]]
    assert channel_map(gradient, "gradient") is gradient


def test_rendered_maps_are_on_one_scale(generator):
    raw = torch.rand(2, 16, 16, generator=generator) * torch.tensor([1e-9, 1e3]).reshape(2, 1, 1)
    sharp = pss.plots.render_map(raw, blur=0)
    for one, rendered in zip(raw.numpy(), sharp.numpy(), strict=True):
        low, high = np.percentile(one, [90, 99])
        np.testing.assert_allclose(rendered, (np.clip(one, low, high) - low) / (high - low), atol=1e-5)
    assert sharp.amin() == 0 and sharp.amax() == 1
    soft = pss.plots.render_map(raw)
    assert soft.min() >= 0 and soft.max() < 1
    assert not soft.equal(sharp) and soft.mean().item() == pytest.approx(sharp.mean().item(), rel=0.2)
    torch.testing.assert_close(pss.plots.render_map(raw[1]), soft[1])
    assert pss.plots.render_map(torch.full((5, 5), 3.0)).eq(0).all()
