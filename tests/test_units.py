"""Units: counts, order, stages and slices against the facts of DESIGN.md and against the parameters themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from pss._vision import torchvision
from pss.units import Layer, Units

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
        return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", FACTS)
def test_counts_and_stages_of_published_models(name):
    units = Units.of(build(name))
    count, stages = FACTS[name]
    assert len(units) == count
    first = {s: int(np.argmax(units.stage_ids == i)) for i, s in enumerate(units.stages)}
    assert {s: first[s] for s in stages} == stages


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


def odd_net() -> nn.Module:
    shared = nn.Linear(6, 6)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1), shared, shared
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
    assert table.loc[4799, ["name", "stage"]].tolist() == ["layer4.1.conv2[511]", "conv5_x"]
    assert units.fingerprint == Units.of(build("resnet18")).fingerprint
    assert units.fingerprint != Units.of(build("resnet34")).fingerprint
    assert Units.of(build("resnet18"), "rows").fingerprint != units.fingerprint


def test_own_units():
    one = lambda model: [Layer("0.weight", (8, 1, 3, 3), count=2, rows=4, label="group")]  # noqa: E731
    units = Units.of(odd_net(), kind=one)
    assert len(units) == 2 and units.sizes.tolist() == [36, 36]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("filter", "unknown kind of unit 'filter'"),
        ("heads", "Sequential has no unit of kind 'heads'"),
        (lambda m: [Layer("9.weight", (8, 1, 3, 3), 8)], "'9.weight' of shape"),
        (lambda m: [Layer("0.weight", (8, 1, 3, 3), 8)] * 2, "units overlap"),
    ],
)
def test_what_cannot_be_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        Units.of(odd_net(), kind=kind)


@pytest.mark.parametrize("unit", [-1, 4800])
def test_ids_outside_are_refused(unit):
    with pytest.raises(IndexError, match=r"outside 0\.\.4799"):
        Units.of(build("resnet18")).name(unit)
