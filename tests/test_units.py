"""Units: counts, order, stages and slices against the facts of DESIGN.md and against the parameters themselves."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import assert_close, models, one_by_one
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import pss
from pss import profile
from pss.editing import edited, unit_steps
from pss.units import UnitGroup, Units, stage_names

FACTS = {  # filters, first id of each stage
    "resnet18": (4800, {"conv1": 0, "conv2_x": 64, "conv3_x": 320, "conv4_x": 960, "conv5_x": 2240}),
    "resnet50": (26560, {"conv1": 0, "conv2_x": 64, "conv3_x": 1472, "conv4_x": 5056, "conv5_x": 15296}),
    "vgg19": (5504, {"conv1": 0, "conv2": 128, "conv3": 384, "conv4": 1408, "conv5": 3456}),
    "densenet121": (10240, {"conv0": 0, "denseblock1": 64}),
    "inception_v3": (18112, {}),
    "mobilenet_v2": (17056, {}),
}


def build(name: str) -> nn.Module:
    with torch.device("meta"):  # structure only: no weights are made
        options = {"init_weights": False} if name == "inception_v3" else {}
        return models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", FACTS)
def test_counts_and_stages_of_published_models(name):
    units = Units.of(build(name))
    count, stages = FACTS[name]
    assert len(units) == count
    first = {s: int(np.argmax(units.stage_ids == i)) for i, s in enumerate(units.stages)}
    assert {s: first[s] for s in stages} == stages


@pytest.mark.parametrize(
    ("parameter", "stage"),
    [
        ("layers.2.blocks.1.attn.qkv.weight", "layers.2"),
        ("vit.encoder.layer.3.attention.query.weight", "vit.encoder.layer.3"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
        ("_blocks.12._expand_conv.weight", "blocks.12"),
        ("encoder.layers.encoder_layer_4.mlp.0.weight", "encoder_layer_4"),
        ("model.stem.conv.weight", "model.stem"),
        ("classifier.0.weight", "classifier"),
        ("net.3.weight", "net.3"),
        ("3.weight", "3"),
    ],
)
def test_stages_of_other_networks_are_their_numbered_blocks(parameter, stage):
    assert stage_names(nn.Linear(1, 1))(parameter) == stage


def test_inception_without_auxiliary_head():
    units = Units.of(build("inception_v3"))
    auxiliary = units.stage_ids == units.stages.index("AuxLogits")
    assert (~auxiliary).sum() == 17216


def test_published_statistics_have_as_many_units(peer_data):
    for file in peer_data.glob("*.pth"):
        name = file.name.removeprefix("ImageNet_val_saliency_stat_").removesuffix("_filter_wise.pth")
        held = torch.load(file, map_location="cpu", weights_only=True)
        assert len(held["mean"]) == len(Units.of(build(name)))


def test_heads_of_vit():
    units = Units.of(build("vit_b_16"), kind="heads")
    assert len(units) == 432 and len(units.layers) == 36
    assert set(units.sizes) == {64 * 768}
    assert units.name(12) == "encoder.layers.encoder_layer_0.self_attention.k[0]"
    assert units.layers[1].index(0) == (slice(768, 832), slice(None))


class Fused(nn.Module):
    """Self-attention with one linear layer for q, k and v, in timm's layout, and torch's fused kernel."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class Torchs(nn.Module):
    """The same with torch's module; with ``other`` its keys and values are of another width than its queries."""

    def __init__(self, other=12):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, kdim=other, vdim=other, batch_first=True)

    def forward(self, x):
        width = self.attention.kdim
        return self.attention(x, x[..., :width], x[..., :width], need_weights=False)[0]


class Attention(nn.Module):
    """Self-attention whose output is that of its heads, one after the other; a subclass makes q, k and v."""

    def forward(self, x):
        q, k, v = self.split(x, len(x), x.shape[1])  # (B, N, heads, size of each)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


class HeadByHead(Attention):
    """As EfficientFormer, LeViT and TinyViT: q, k and v of a head lie together, and v is wider."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = 3, 2, 4
        self.qkv = nn.Linear(12, 3 * (2 + 2 + 4))

    def split(self, x, batch, length):
        return self.qkv(x).reshape(batch, length, 3, -1).split([2, 2, 4], dim=3)


class HeadFirst(Attention):
    """As MaxViT, which says so in an attribute."""

    def __init__(self, head_first=True):
        super().__init__()
        self.num_heads, self.dim_head, self.head_first = 3, 4, head_first
        self.qkv = nn.Linear(12, 36)

    def split(self, x, batch, length):
        if self.head_first:
            return self.qkv(x).reshape(batch, length, 3, 12).chunk(3, dim=3)
        return self.qkv(x).reshape(batch, length, 3, 3, 4).unbind(2)


class Apart(Attention):
    """As Hugging Face's ViT and BERT: a linear layer each."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = 3, 4
        self.query, self.key, self.value = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def split(self, x, batch, length):
        return [layer(x).reshape(batch, length, 3, 4) for layer in (self.query, self.key, self.value)]


class Shared(Attention):
    """As Llama: the number of heads is in the configuration, and several queries share a key and a value."""

    def __init__(self):
        super().__init__()
        self.config, self.head_dim = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2), 3
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)

    def split(self, x, batch, length):
        return [layer(x).reshape(batch, length, -1, 3) for layer in (self.q_proj, self.k_proj, self.v_proj)]


class Reduced(Attention):
    """As PVT and Twins: q by itself, k and v by one layer."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.q, self.kv = 3, nn.Linear(12, 12), nn.Linear(12, 24)

    def split(self, x, batch, length):
        k, v = self.kv(x).reshape(batch, length, 2, 3, 4).unbind(2)
        return self.q(x).reshape(batch, length, 3, 4), k, v


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).reshape(*x.shape[:2], self.nf)


class GPT2(Attention):
    """As GPT-2: all of q, then of k, then of v, in a `Conv1D`."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.c_attn = 3, 4, Conv1D(36, 12)

    def split(self, x, batch, length):
        return [part.reshape(batch, length, 3, 4) for part in self.c_attn(x).split(12, dim=2)]


class Attending(nn.Module):
    """Sees an image as its 16 patches of 2 by 2 pixels."""

    def __init__(self, attention):
        super().__init__()
        self.embed, self.attention, self.head = nn.Conv2d(3, 12, 2, 2), attention, nn.Linear(12, 5)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(1))


def timms() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    return layers.Attention(12, num_heads=3, qkv_bias=True)


LAID_OUT = {  # what makes the attention, and the heads of q, k and v
    "torch": (lambda: bare(Torchs()), (3, 3, 3)),
    "torch, of two widths": (lambda: bare(Torchs(8)), (3, 3, 3)),
    "fused": (lambda: bare(Fused()), (3, 3, 3)),
    "timm's": (lambda: bare(timms()), (3, 3, 3)),
    "head by head": (HeadByHead, (3, 3, 3)),
    "head first": (HeadFirst, (3, 3, 3)),
    "head last": (lambda: HeadFirst(False), (3, 3, 3)),
    "Hugging Face's": (Apart, (3, 3, 3)),
    "Llama's": (Shared, (4, 2, 2)),
    "PVT's": (Reduced, (3, 3, 3)),
    "GPT-2's": (GPT2, (3, 3, 3)),
}


def bare(attention: nn.Module) -> nn.Module:
    """The same without its output layer."""
    inner = getattr(attention, "attention", attention)
    last = inner.proj if hasattr(inner, "proj") else inner.out_proj
    last.load_state_dict({"weight": torch.eye(12), "bias": torch.zeros(12)})
    return attention


def attending(name, generator):
    """The network, its heads, and two images with labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attending(LAID_OUT[name][0]()).eval().double()
    images = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model, Units.of(model, "heads"), images, torch.tensor([1, 3])


@pytest.mark.parametrize("name", LAID_OUT)
def test_changing_a_head_changes_its_output_and_no_others(name, generator):
    model, units, *_ = attending(name, generator)
    attention, counts = model.requires_grad_(False).attention, LAID_OUT[name][1]
    assert {layer.label: layer.count for layer in units.layers} == dict(zip("qkv", counts, strict=True))
    x = torch.rand(2, 5, 12, generator=generator, dtype=torch.float64)
    before, heads = attention(x), counts[0]
    for number, layer in enumerate(units.layers):
        for j, unit in enumerate(range(len(units))[units.span(number)]):
            with edited(model, units, [unit]):
                changed = (attention(x) != before).any(dim=1).unflatten(1, (heads, -1)).all(dim=2)
            sharing = heads // layer.count
            assert changed.tolist() == [[head // sharing == j for head in range(heads)]] * 2, units.name(unit)


@pytest.mark.parametrize("name", LAID_OUT)
@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_profile_of_heads_is_the_mean_over_their_weights(name, strategy, generator):
    model, units, images, labels = attending(name, generator)
    got = profile(model, images, labels, units, strategy=strategy)
    assert_close(got, one_by_one(model, images, labels, units), units)


class Strange(Attention):
    """One whose attributes do not say how its rows are laid out."""

    def __init__(self, rows=36, **attributes):
        super().__init__()
        self.qkv = nn.Linear(12, rows)
        vars(self).update(attributes)


def spectral(attention: nn.Module) -> nn.Module:
    nn.utils.parametrizations.spectral_norm(attention.qkv)
    return attention


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (Strange(), "how many heads it has is not known: set num_heads"),
        (Strange(30, num_heads=3), "qkv.weight has 30 rows, but by its attributes 3 heads of 12 for qkv"),
        (
            Strange(num_heads=3, head_dim=2),
            "36 rows, but by its attributes 3 heads of 6 for qkv: set num_heads and head_",
        ),
        (Strange(num_heads=3, key_dim=2, val_dim=4), "36 rows, but by its attributes 3 heads of 8 for qkv"),
        (nn.ModuleDict({"query_key_value": nn.Linear(12, 36)}), "how many heads"),
        (spectral(Fused()), "its qkv is made by qkv.parametrizations.weight.original: expected one linear layer"),
    ],
)
def test_heads_of_an_unknown_layout_are_refused_with_a_reason(attention, reason):
    with pytest.raises(ValueError, match=f"the heads of Attending are not known; attention: .*{reason}"):
        Units.of(Attending(attention), "heads")


@pytest.mark.parametrize("name", ["query_key_value", "qkv"])
def test_a_layout_that_is_met_either_way_must_be_said(name):
    attention = nn.Module()
    attention.add_module(name, nn.Linear(12, 36) if name == "query_key_value" else nn.Conv2d(12, 36, 1))
    attention.num_heads = 3
    with pytest.raises(
        ValueError, match=r"how the rows of .* are laid out is not known: set head_first, True or False"
    ):
        Units.of(Attending(attention), "heads")
    for attention.head_first in (True, False):
        units = Units.of(Attending(attention), "heads")
        assert units.layers[1].index(2)[0] == (slice(28, 32) if attention.head_first else slice(20, 24))


class Unsaid(HeadFirst):
    """Without an attribute that says how it is laid out."""

    def __init__(self, together):
        super().__init__()
        self.together = together
        del self.head_first

    def split(self, x, batch, length):
        if self.together:
            return self.qkv(x).reshape(batch, length, 3, 12).chunk(3, dim=3)
        return self.qkv(x).reshape(batch, length, 3, 3, 4).unbind(2)


@pytest.mark.parametrize("together", [True, False])
def test_the_layout_of_heads_that_no_attribute_says_is_seen(together, caplog):
    """Rows that lie head by head were read as queries, then keys, then values, without a word."""
    model = Attending(Unsaid(together)).eval()
    before = {name: (value.clone(), value._version) for name, value in model.state_dict().items()}
    units = Units.of(model, "heads")
    assert not caplog.text
    assert units.layers[1].index(2)[0] == (slice(28, 32) if together else slice(20, 24))
    assert all(value.equal(before[n][0]) and value._version == before[n][1] for n, value in model.state_dict().items())


def test_a_layout_of_heads_that_cannot_be_seen_is_not_taken_silently(caplog):
    attention = Unsaid(False)
    attention.forward = lambda x, height, width: x
    units = Units.of(Attending(attention), "heads")
    assert units.layers[1].index(2)[0] == slice(20, 24)
    assert "attention.qkv.weight in 1 layers are taken for queries of all heads" in caplog.text
    assert "set head_first" in caplog.text


def test_heads_that_are_left_out_are_said(caplog):
    model = nn.ModuleList([Fused(), Strange(30, num_heads=3), nn.Bilinear(2, 2, 2)])
    model.num_heads = model[2].num_heads = 2  # the first is around heads that are known
    units = Units.of(model, "heads")
    assert len(units) == 9 and {layer.parameter for layer in units.layers} == {"0.qkv.weight"}
    assert "heads left out of ModuleList; 1: qkv.weight has 30 rows" in caplog.text
    assert "2: it has heads, but no queries, keys and values by a name that is known" in caplog.text
    assert "ModuleList: it has heads" not in caplog.text and "more" not in caplog.text


OURS = ["fused", "torch", "torch, of two widths", "timm's"]  # q, then k, then v, each head after head


@pytest.mark.parametrize("name", OURS)
def test_heads_are_the_slices_of_q_k_and_v(name, generator):
    model, units, *_ = attending(name, generator)
    assert [layer.label for layer in units.layers] == ["q", "k", "v"] and len(units) == 9
    whole = torch.cat([model.get_parameter(p).flatten() for p in dict.fromkeys(g.parameter for g in units.layers)])
    views = torch.cat([units.view(model, unit).flatten() for unit in range(9)])
    assert torch.equal(views, whole) and units.name(4).endswith(".k[1]")


@pytest.mark.parametrize("edit", ["prune", "finetune"])
@pytest.mark.parametrize("name", OURS)
def test_editing_heads_changes_their_rows_and_nothing_else(name, edit, generator):
    model, units, images, labels = attending(name, generator)
    before, (order,) = copy.deepcopy(model.state_dict()), profile(model, images[:1], labels[:1], units).argsort()
    top = order.flip(0)[:2]
    steps = None if edit == "prune" else unit_steps(model, images[:1], labels[:1], units, top[None], lr=2.0)[0]
    expected, by_hand = copy.deepcopy(model), copy.deepcopy(before)
    for k, unit in enumerate(top.tolist()):  # rows by arithmetic of their own: 3 heads of 4 rows, q then k then v
        part, head = divmod(unit, 3)
        parameter = units.layers[part].parameter
        weight, start = by_hand[parameter], head * 4 + (0 if len(by_hand[parameter]) == 12 else part * 12)
        weight[start : start + 4] = 0 if edit == "prune" else weight[start : start + 4] + steps[k]
    expected.load_state_dict(by_hand)
    with edited(model, units, top, edit, steps):
        for key, value in model.state_dict().items():
            assert torch.equal(value, by_hand[key]), key
        inside = model(images)
    assert torch.equal(inside, expected(images)) and not torch.allclose(inside, model(images))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    curve = pss.edit_curve(model, images[0], labels[0], top, units, edit, lr=2.0)
    np.testing.assert_allclose(curve["loss"].iloc[-1], F.cross_entropy(inside[:1], labels[:1]).item(), rtol=1e-9)


def test_heads_of_timms_vision_transformer():
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, img_size=32).eval().double()
    units = Units.of(model, "heads")
    assert len(units) == 2 * 9 and units.stages == ("blocks.0", "blocks.1") and set(units.sizes) == {64 * 192}
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([2])
    assert_close(profile(model, images, labels, units), one_by_one(model, images, labels, units), units)


def odd_net() -> nn.Module:
    shared = nn.Linear(6, 6)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(8, 6, (2, 1), groups=2), nn.Conv2d(6, 2, 1), shared, shared
    )


def test_every_parameter_of_a_weight_belongs_to_exactly_one_unit():
    model = odd_net().requires_grad_(False)
    units = Units.of(model, kind="all")
    assert [layer.parameter for layer in units.layers] == ["0.weight", "1.weight", "2.weight", "3.weight"]
    for unit in range(len(units)):
        view = units.view(model, unit)
        assert view.numel() == units.sizes[unit]
        view.fill_(unit)
    for number, layer in enumerate(units.layers):
        weight, ids = model.get_parameter(layer.parameter), range(len(units))[units.span(number)]
        assert weight.unique().tolist() == list(ids)
        counts = [(weight == u).sum().item() for u in ids]
        assert counts == [layer.size] * layer.count


def test_reduce_is_the_mean_over_each_view(generator):
    model = odd_net()
    units = Units.of(model, kind="all")
    values = {n: torch.rand(3, *p.shape, generator=generator) for n, p in model.named_parameters()}
    reduced = units.reduce(values)
    for b in range(3):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(values[name][b])
        expected = torch.stack([units.view(model, u).mean() for u in range(len(units))])
        torch.testing.assert_close(reduced[b], expected)


def test_grouped_transposed_convolution_unit_is_what_makes_one_output_channel(generator):
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False)).requires_grad_(False)
    image = torch.rand(1, 8, 5, 5, generator=generator)
    before = model(image)
    Units.of(model).view(model, 4).zero_()
    changed = (model(image) != before).flatten(2).any(dim=2)[0]
    assert changed.tolist() == [False, False, False, False, True, False]


def test_table_and_fingerprint():
    units = Units.of(build("resnet18"))
    table = units.table()
    assert len(table) == 4800 and table["unit"].is_monotonic_increasing
    assert list(table) == ["unit", "name", "layer", "index", "stage", "label", "parameter", "size"]
    assert table.loc[4799, ["name", "stage"]].tolist() == ["layer4.1.conv2[511]", "conv5_x"]
    assert units.fingerprint == Units.of(build("resnet18")).fingerprint
    assert units.fingerprint != Units.of(build("resnet34")).fingerprint
    assert Units.of(build("resnet18"), "rows").fingerprint != units.fingerprint


def test_own_units():
    one = lambda model: [UnitGroup("0.weight", (8, 1, 3, 3), count=2, rows=4, label="group")]  # noqa: E731
    units = Units.of(odd_net(), kind=one)
    assert len(units) == 2 and units.sizes.tolist() == [36, 36]
    tied = Units.of(odd_net(), lambda model: [UnitGroup("4.weight", (6, 6), 6)])  # by its second name
    assert len(tied) == 6 and Units.of(odd_net(), "rows").kind == "rows"
    assert units.kind == "own" and repr(tied) == "Units(6 own in 1 layers, stages 4)"
    assert repr(Units.of(build("resnet18"))).endswith(", stages conv1, conv2_x, conv3_x, conv4_x, conv5_x)")


COMPUTED = {  # how a weight comes to be computed from others, and what the error advises
    "weight_norm": (nn.utils.weight_norm, r"torch.nn.utils.remove_weight_norm\(module\)"),
    "spectral_norm": (nn.utils.spectral_norm, r"torch.nn.utils.remove_spectral_norm\(module\)"),
    "parametrized weight_norm": (nn.utils.parametrizations.weight_norm, "parametrize.remove_parametrizations"),
    "parametrized spectral_norm": (nn.utils.parametrizations.spectral_norm, "parametrize.remove_parametrizations"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 3), r"torch.nn.utils.prune.remove\(module, 'weight'\)"),
    "a network": (lambda m: delattr(m, "weight"), "computed from others: give units of your own"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("kind", ["filters", "all", "rows"])
def test_computed_weights_are_refused_and_left_as_they_are(how, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).train()
    number = 2 if kind == "rows" else 0
    COMPUTED[how][0](model[number])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{number}\.weight is no parameter, .*{COMPUTED[how][1]}"):
        Units.of(model, kind)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert len(Units.of(model, "filters" if kind == "rows" else "rows")) == (4 if kind == "rows" else 5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("how", [how for how in COMPUTED if how != "a network"])
def test_the_advice_on_computed_weights_works(how, generator):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    COMPUTED[how][0](model[0])
    images = torch.rand(2, 3, 4, 4, generator=generator)
    expected = model.eval()(images)
    with pytest.raises(ValueError, match="make it one by") as error:
        Units.of(model)
    advice = re.search(r"torch\.nn\.utils\.\S+\(module(, 'weight')?\)", str(error.value))[0]
    eval(advice, {"torch": torch, "module": model[0]})
    torch.testing.assert_close(model(images), expected)
    units = Units.of(model)
    assert units.layers[0].parameter == "0.weight" and profile(model, images, torch.tensor([0, 1]), units).any()


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(1, 3, 4, 4))])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_traced_modules_are_named(make, part):
    scripted = make(nn.Conv2d(3, 4, 3))
    model, name = (nn.Sequential(nn.Conv2d(3, 3, 1), scripted), "1") if part else (scripted, type(scripted).__name__)
    with pytest.raises(ValueError, match=f"{name} is scripted or traced: give the model as it was before"):
        Units.of(model, "all")


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_quantized_modules_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    model[2].weight = nn.Parameter(model[2].weight.detach().to(torch.int8), requires_grad=False)
    for quantized, message in ((dynamic, "2 is quantized"), (model, "2.weight is quantized to torch.int8")):
        with pytest.raises(ValueError, match=f"{message}.*give the model as it was before"):
            Units.of(quantized, "rows")


@pytest.mark.parametrize("other", [None, 10])
def test_rows_of_attention_that_has_no_layers_for_its_queries_keys_and_values(other, generator):
    model = nn.Sequential(nn.Linear(12, 12), attention := nn.MultiheadAttention(12, 3, kdim=other, vdim=other))
    units = Units.of(model, "rows")
    listed = {layer.parameter: layer.count for layer in units.layers}
    own = {"1.in_proj_weight": 36} if other is None else {f"1.{part}_proj_weight": 12 for part in "qkv"}
    assert listed == {"0.weight": 12, **own, "1.out_proj.weight": 12} and units.name(12) == "1[0]"
    assert torch.equal(units.view(model, 13)[0], getattr(attention, next(iter(own))[2:])[1])


def test_rows_of_gpt2s_linear_layer_lie_along_its_second_dimension(generator):
    model = Attending(GPT2()).double()
    units = Units.of(model, "rows")
    assert len(units) == 36 + 5 and units.name(7) == "attention.c_attn[7]" and units.sizes[7] == 12
    x = torch.rand(1, 4, 12, generator=generator, dtype=torch.float64)
    before = model.attention.c_attn(x)
    with edited(model, units, [7]):
        changed = (model.attention.c_attn(x) != before).flatten(0, 1).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [7]
    images, labels = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([1, 3])
    whole = pss.parameter_saliency(model, images, labels)["attention.c_attn.weight"]
    torch.testing.assert_close(profile(model, images, labels, units)[:, :36], whole.mean(dim=1))
    curves = pss.edit_curves(model, images, labels, [[7, 2], [8, 40]], units, "prune", progress=False)
    assert len(curves) == 6
