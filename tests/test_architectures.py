"""Profiles of other people's architectures against plain autograd: `make test-zoo` installs timm and sweeps them.

Random weights, no downloads, images of 64 pixels, batches of three, float64. The reference takes one image at a time
and computes BatchNorm as the affine map that it is in evaluation mode, where torch's own gradient is not always right.
Gradients are compared for every kind of unit, gains for all units, and what units say with that of images alone.
"""

import importlib.util
import logging
import time

import pytest
import torch
import torch.nn.functional as F
from networks import batch, seeded
from torch.overrides import TorchFunctionMode

from pss import Units, profile
from pss.data.vision import torchvision  # noqa: F401  (timm imports it too)
from pss.engine.attention import count_heads

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("default")]
if not all(importlib.util.find_spec(name) for name in ("timm", "transformers", "efficientnet_pytorch")):
    pytest.skip("timm, transformers and efficientnet_pytorch are not installed: make test-zoo", allow_module_level=True)

TIMM = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny coat_tiny coatnet_pico_rw_224 convit_tiny
    convmixer_768_32 convnext_atto convnextv2_atto crossvit_9_240 cs3darknet_s cspresnet50 davit_tiny
    deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 densenet121 dla34 dla46_c
    dpn48b eca_resnext26ts edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
    efficientnet_b0_gn efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fastvit_t8
    fbnetc_100 focalnet_tiny_srf gcresnext26ts gcvit_xxtiny ghostnet_050 ghostnetv2_100 gmlp_ti16_224 halonet26t
    hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto inception_v3 inception_v4 lambda_resnet26t lcnet_050
    levit_128s mambaout_femto maxvit_nano_rw_256 maxvit_tiny_tf_224 maxxvit_rmlp_nano_rw_256 mixer_s32_224 mixnet_s
    mnasnet_050 mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nfnet_l0 pit_ti_224 poolformer_s12
    poolformerv2_s12 pvt_v2_b0 pvt_v2_b2_li rdnet_tiny regnetx_002 regnety_002 regnetz_b16 repghostnet_050
    repvgg_a0 repvit_m0_9 res2net50_14w_8s resmlp_12_224 resnest14d resnet18 resnetblur50 resnetv2_18 resnetv2_50x1_bit
    resnext50_32x4d rexnet_100 selecsls42b sequencer2d_s seresnet18 shvit_s1 skresnet18 starnet_s050
    swin_tiny_patch4_window7_224 swiftformer_xs swinv2_cr_tiny_224 swinv2_tiny_window8_256 tf_efficientnet_lite0
    tinynet_e tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small visformer_tiny
    vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 volo_d1_224 xception41 xcit_nano_12_p16_224
"""
SIZES = {"crossvit_9_240": 120, "efficientformer_l1": 224, "halonet26t": 256, "inception_v3": 96, "inception_v4": 96}
SIZES |= {"convmixer_768_32": 28}  # of which depth and width cannot be said
OPTIONS = {"beit_base_patch16_224": {"depth": 2}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL_IMAGES = SMALL | {"image_size": 64}
STAGES = {"depths": [1, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4, "image_size": 64}
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
SMALL_TEXT = SMALL | TEXT | {"max_position_embeddings": 16}
TRANSFORMERS = {  # Hugging Face: from configurations, for images and for text
    "ViTForImageClassification": SMALL_IMAGES,
    "DeiTForImageClassification": SMALL_IMAGES,
    "BeitForImageClassification": SMALL_IMAGES | {"use_relative_position_bias": True},
    "Dinov2ForImageClassification": SMALL_IMAGES,
    "SwinForImageClassification": STAGES,
    "Swinv2ForImageClassification": STAGES,
    "ConvNextForImageClassification": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]},
    "ResNetForImageClassification": {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8},
    "SegformerForImageClassification": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]},
    "BertForSequenceClassification": SMALL_TEXT,
    "RobertaForSequenceClassification": SMALL_TEXT,
    "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64} | TEXT,
    "GPT2ForSequenceClassification": {"n_embd": 32, "n_layer": 2, "n_head": 4} | TEXT,
    "LlamaForSequenceClassification": SMALL_TEXT,
}


def network(name):
    """A small model by name in float64, and a batch of three for it."""
    if name in TRANSFORMERS:
        import transformers

        kind = getattr(transformers, name)
        config = kind.config_class(num_labels=10, **TRANSFORMERS[name])
        images, labels = batch((3, 64, 64), 3)
        if "vocab_size" in TRANSFORMERS[name]:
            images = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(0))
        return seeded(lambda: kind(config)), images, labels
    size = SIZES.get(name, 64)
    if name == "efficientnet_pytorch":
        from efficientnet_pytorch import EfficientNet

        return seeded(lambda: EfficientNet.from_name("efficientnet-b0", num_classes=10)), *batch((3, size, size), 3)
    import timm

    def factory():
        options = {"num_classes": 10} | OPTIONS.get(name, {})
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError:  # one that takes every size
            return timm.create_model(name, **options)

    return seeded(factory), *batch((3, size, size), 3)


def cross_entropy(outputs, labels):
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels, reduction="none")


class ExplicitBatchNorm(TorchFunctionMode):
    """BatchNorm in evaluation mode as multiplication and addition."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.batch_norm:
            return self.affine(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def affine(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if training or running_mean is None:  # as in weight standardization
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        y = (x - running_mean.view(per_channel)) / (running_var + eps).sqrt().view(per_channel)
        y = y if weight is None else y * weight.view(per_channel)
        return y if bias is None else y + bias.view(per_channel)


def wrong_layers(got, expected, units, tolerance=1e-8, rounding=1e-12):
    """The layers with an error above this share of their largest value, or of what rounding leaves where all is 0."""
    layers, floor = [], rounding * expected.abs().max()
    for number, layer in enumerate(units.layers):
        a, b = got[:, units.span(number)], expected[:, units.span(number)]
        if not (a - b).abs().max() <= tolerance * b.abs().max() + floor:
            layers.append(f"{layer.parameter} ({float((a - b).abs().max() / b.abs().max()):.0e})")
    return layers


def single_gradients(model, images, labels):
    """The second source: gradients of every parameter by plain autograd, one image at a time."""
    names, parameters = zip(*model.named_parameters(remove_duplicate=False), strict=True)
    rows = []
    with ExplicitBatchNorm():
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            model.train().eval()  # some keep their position biases, with a graph that is used up
            rows.append(torch.autograd.grad(cross_entropy(model(image), label).sum(), parameters, allow_unused=True))
    model.train().eval()
    columns = zip(parameters, zip(*rows, strict=True), strict=True)
    whole = [torch.zeros(3, *p.shape) if row[0] is None else torch.stack(row) for p, row in columns]
    return dict(zip(names, whole, strict=True))


class Products(TorchFunctionMode):
    """Operands of every product of activations, (…, heads, …, tokens, width): of attention, or as it is written out."""

    def __enter__(self):
        self.operands = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("scaled_dot_product_attention", "matmul", "__matmul__", "bmm"):
            self.operands += [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 2]
        return function(*args, **(kwargs or {}))


def wrong_heads(model, images, units):
    """Units whose change first moves anything but their own head, or what a unit of another label moves first."""
    owners = {layer.parameter: owner_of(model, layer.parameter) for layer in units.layers}
    inputs, labels, wrong = {}, {}, []
    hooks = [
        owner.register_forward_pre_hook(lambda *call: inputs.setdefault(call[0], call[1:]), with_kwargs=True)
        for owner in set(owners.values())
    ]

    def operands(owner):
        args, kwargs = inputs[owner]
        with Products() as seen:
            owner(*args, **kwargs)
        return seen.operands

    with torch.no_grad():
        model(images[:1])
        for hook in hooks:
            hook.remove()
        for number, layer in enumerate(units.layers):
            owner = owners[layer.parameter]
            before = operands(owner)
            for j in {0, 1, layer.count - 1} & set(range(layer.count)):
                weights = units.view(model, units.span(number).start + j)
                weights.neg_()
                after = operands(owner)
                weights.neg_()
                pairs = enumerate(zip(before, after, strict=True))
                first = next((i for i, (x, y) in pairs if not x.equal(y)), None)
                moved = None if first is None else moved_heads(before[first], after[first], layer.count)
                if moved != [j] or labels.setdefault((owner, first), layer.label) != layer.label:
                    wrong.append(f"{layer.parameter} {layer.label}[{j}] moves {moved} of operand {first}")
    return wrong


def owner_of(model, parameter):
    """The attention module of a weight: the innermost around it that says how many heads it has."""
    path = parameter.split(".")[:-1]
    around = (model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1))
    return next(m for m in around if count_heads(m) or count_heads(getattr(m, "config", None)))


def moved_heads(before, after, count):
    """Which of so many heads differ; fewer keys than queries are repeated. Windows may lie before or behind the heads.

    All windows are made by the same weights: where as many lie there as heads, the heads are where fewer differ.
    """
    found = []
    for dim in range(before.dim() - 2):
        moved = (before != after).movedim(dim, 0).flatten(1).any(dim=1)
        if len(moved) % count == 0:
            found.append((moved.nonzero()[:, 0] // (len(moved) // count)).unique().tolist())
    return min(found, key=len, default=[])


@pytest.mark.parametrize("name", [*TIMM.split(), "efficientnet_pytorch", *TRANSFORMERS])
def test_profiles_are_those_of_single_images(name, record_property, caplog):
    caplog.set_level(logging.WARNING, "pss")
    model, images, labels = network(name)
    record_property("table row", row := {"architecture": name})
    gradients, wrong = single_gradients(model, images, labels), {}
    sizes = {name: g.abs() for name, g in gradients.items()}

    def compare(what, got, expected, units, **tolerances):
        wrong[what] = wrong_layers(got, expected, units, **tolerances)
        row[what] = f"{len(units.layers) - len(wrong[what])}/{len(units.layers)}"

    for kind in ("filters", "rows", "heads", "all"):
        try:
            units = Units.of(model, kind)
        except ValueError as error:  # it has none, or none that is known
            row[kind] = "" if "has no unit" in str(error) else "refused"
            continue
        expected = units.reduce(sizes)
        compare(kind, profile(model, images, labels, units, cross_entropy), expected, units)
        if kind == "heads":
            wrong["layout of heads"] = wrong_heads(model, images, units)
    compare("one image", profile(model, images[:1], labels[:1], units, cross_entropy), expected[:1], units)
    products = {name: g * model.get_parameter(name).detach() for name, g in gradients.items()}
    gains = units.reduce(products) * torch.as_tensor(units.sizes)
    got, both = profile(model, images, labels, units, cross_entropy, signed=True, of=("gain", "gradient"))
    compare("gain", got, gains, units, rounding=1e-9)  # of the largest: where a normalization follows, c is zero
    compare("both", both, units.reduce(gradients), units)
    compare("output", *outputs(model, images, labels, units))
    slow, reason = left_by_fast(model, images, labels, units)
    row["fast"] = f"{len(units.layers) - slow}/{len(units.layers)}"
    row["of loop"] = relative_time(model, images, labels, units)
    said = [reason, *(r.getMessage() for r in caplog.records if r.name.startswith("pss"))]
    row["why not fast"] = " ".join(said)[:100]
    assert not any(wrong.values()), {kind: layers[:5] for kind, layers in wrong.items() if layers}


def outputs(model, images, labels, units):
    """What units say of a batch, and of images alone: of those that are not refused."""

    def of(units):
        parts = [(images, labels)], zip(images.split(1), labels.split(1), strict=True)
        how = {"signed": True, "of": "output"}
        return *(torch.cat([profile(model, *xy, units, cross_entropy, **how) for xy in some]) for some in parts), units

    try:
        return of(units)
    except RuntimeError as error:
        unseen = str(error).partition("the outputs of ")[2].partition(" are not seen: leave these units out")[0]
        kept = [number for number, layer in enumerate(units.layers) if layer.parameter not in unseen.split(", ")]
        return of(Units([units.layers[n] for n in kept], [units.layer_stages[n] for n in kept]))


def left_by_fast(model, images, labels, units):
    """How many layers one pass over the batch cannot do, and why."""
    try:
        profile(model, images, labels, units, cross_entropy, strategy="fast")
        return 0, ""
    except RuntimeError as error:
        names, _, reason = str(error).partition("cannot do ")[2].partition(": ")
        return len(names.split(", ")) if names else len(units.layers), reason or str(error)


def relative_time(model, images, labels, units):
    """Shortest process time with strategy auto, of one image after the other the share: of two, or more if in doubt."""
    times = {"auto": [], "loop": []}
    while len(times["auto"]) < 2 or (min(times["auto"]) > 0.9 * min(times["loop"]) and len(times["auto"]) < 6):
        for strategy, of_each in times.items():
            start = time.process_time()
            profile(model, images, labels, units, cross_entropy, strategy=strategy)
            of_each.append(time.process_time() - start)
    return min(times["auto"]) / min(times["loop"])
