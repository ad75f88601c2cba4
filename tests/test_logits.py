"""Networks that give something else than logits: wrapped once, every function takes them."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pss
from pss import models


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(x).tanh()
        return self.head((x + self.two(x).relu()).mean((2, 3)))


class Object(Plain):
    """As a network of Hugging Face: an object with the logits in it."""

    def forward(self, x):
        return SimpleNamespace(loss=None, logits=super().forward(x))


class Maps(Plain):
    """As a network of segmentation: a dictionary with a map for every class."""

    def forward(self, x):
        return {"out": super().forward(x)[:, :, None, None] + x[:, :1] * 0}


WRAPPED = {
    "object": lambda: pss.models.logits_of(Object()),
    "maps": lambda: pss.models.logits_of(Maps(), lambda out: out["out"].mean((2, 3))),
}


def margin(logits, labels):
    """An own loss, on logits."""
    return F.softplus(pss.saliency.logit_difference(logits, labels))


@pytest.fixture(params=WRAPPED)
def pair(request):
    """A plain network and the same wrapped; images of which the first six are read wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Plain().double()
    wrapped = WRAPPED[request.param]().double()
    wrapped.load_state_dict(plain.state_dict())
    images = torch.randn(36, 2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = (plain(images).argmax(dim=1) + (torch.arange(36) < 6).long()) % 3
    return plain, wrapped, images, labels


def everything(model, images, labels, loss):
    """What each function says that takes a model, by its name."""
    units, wrong, right = pss.Units.of(model, "all"), slice(0, 6), (images[6:], labels[6:])
    s = pss.profile(model, images, labels, units, loss)
    top = s[wrong].argsort(dim=1, descending=True)[:, :4]
    edit = {"units": units, "loss": loss, "lr": 0.5, "progress": False}
    steps = pss.editing.unit_steps(model, images[wrong], labels[wrong], units, top, loss, lr=0.5)
    patch = pss.fit_patch(model, (images[:1], labels[:1]), right, units, budget=9.0, progress=False)
    dataset, around = torch.utils.data.TensorDataset(images, labels), {"retain": right, "usual": images + 1e-3}
    return {
        "profile": s,
        "saliency": pss.parameter_saliency(model, images[:2], labels[:2], loss)["one.weight"],
        "curves": pss.edit_curves(model, images[wrong], labels[wrong], top, **edit),
        "in place": pss.edit_curves(model, images[wrong], labels[wrong], top, strategy="in_place", **edit),
        "side effects": pss.side_effects(model, units, top, *right, "finetune", steps, progress=False),
        "smallest": pss.smallest_correction(
            model, images[wrong], labels[wrong], units, top, 4, ["gains", "weights"], **around, progress=False
        ),
        "patch": patch.gains,
        "input": pss.input_saliency(model, images[:2], labels[:2], units, method="raw", loss=loss),
        "predicted": models.predict(model, images),
        "mistakes": models.misclassified(model, dataset),
    }


@pytest.mark.parametrize("loss", ["cross_entropy", margin])
def test_every_function_says_of_the_wrapped_network_what_it_says_of_the_plain_one(pair, loss):
    plain, wrapped, images, labels = pair
    expected, found = everything(plain, images, labels, loss), everything(wrapped, images, labels, loss)
    assert len(found["mistakes"]) == 6 and len(found["curves"]) == 30 and (found["patch"] != 1).any()
    for name, value in expected.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(found[name], value, rtol=1e-9, obj=name)
        else:
            torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_the_wrapped_network_goes_the_fast_ways(pair):
    plain, wrapped, images, labels = pair
    units = pss.Units.of(wrapped, "all")
    fast = pss.profile(wrapped, images, labels, units, strategy="fast")
    torch.testing.assert_close(fast, pss.profile(plain, images, labels, units, strategy="loop"))
    curves = [
        pss.edit_curves(model, images[:3], labels[:3], [[0, 1]] * 3, units, lr=0.5, strategy="variants", progress=False)
        for model in (wrapped, plain)
    ]
    pd.testing.assert_frame_equal(*curves)


def test_it_is_the_network_itself_which_stays_as_it_is():
    network = Object().double()
    images = torch.randn(9, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = pss.models.logits_of(network)
    assert isinstance(model(images), torch.Tensor) and isinstance(network(images), SimpleNamespace)
    assert pss.models.fingerprint(model) == pss.models.fingerprint(network)
    assert dict(model.named_parameters()) == dict(network.named_parameters()) and type(model) is Object
    labels = (model(images).argmax(dim=1) + 1) % 3
    patch = pss.fit_patch(
        model, (images[:1], labels[:1]), (images[1:], model(images[1:]).argmax(dim=1)), budget=9.0, progress=False
    )
    assert patch.left == ()
    with patch.applied(network):
        assert model(images[:1]).argmax() == labels[0] == network(images[:1]).logits.argmax()


def test_without_it_the_error_says_how():
    model = Object()
    images, labels = torch.rand(2, 2, 6, 6), torch.tensor([0, 1])
    on_logits = lambda out, labels: F.cross_entropy(out.logits, labels, reduction="none")  # noqa: E731
    assert pss.profile(model, images, labels, loss=on_logits).shape == (2, 12)
    for loss in ("cross_entropy", on_logits):
        with pytest.raises(ValueError, match=r"outputs are SimpleNamespace: expected logits .*pss\.models\.logits_of"):
            pss.edit_curves(model, images, labels, [[0], [1]], pss.Units.of(model), loss=loss)
