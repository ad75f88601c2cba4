"""One image whose gradient is transposed in memory where it reaches BatchNorm: PyTorch's own gradient is wrong there.

So what is made of it is held against finite differences.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import batch, seeded
from torch import nn

import pss
from pss.correction import gain_jacobian
from pss.editing import edit_curves, unit_steps
from pss.units import Units


class Tokens(nn.Module):
    """BatchNorm, after which positions are tokens."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(F.silu(self.conv(x)).contiguous())
        return self.head(F.silu(self.mix(x.flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture(scope="module")
def case():
    """Network, image, a label that is not predicted, filters of the first layer, and the gradient to these."""
    model = seeded(Tokens, seed=2)
    image = batch((2, 7, 7), 1)[0]
    with torch.no_grad():
        label = model(image).argmin(dim=1)
    return model, image, label, Units.of(model, "filters"), differences(model, image, label)


@torch.no_grad()
def differences(model, image, label, step=1e-5):
    """Gradient to the filters, from two losses for every weight."""
    weights, gradient = model.conv.weight.view(-1), torch.zeros_like(model.conv.weight)
    for i in range(len(weights)):
        kept, losses = weights[i].clone(), []
        for sign in (1, -1):
            weights[i] = kept + sign * step
            losses.append(F.cross_entropy(model(image), label))
        weights[i] = kept
        gradient.view(-1)[i] = (losses[0] - losses[1]) / (2 * step)
    return gradient


def changed(model, change):
    """Outputs, with a change of the filters."""
    state = {"conv.weight": model.conv.weight.detach() + change}
    return lambda image: torch.func.functional_call(model, state, (image,)).detach()


@pytest.mark.parametrize("strategy", ["variants", "in_place"])
def test_edits(case, strategy):
    model, image, label, units, gradient = case
    ids = torch.tensor([[3, 0, 5]])
    steps = unit_steps(model, image, label, units, ids, lr=1, strategy=strategy)[0]
    torch.testing.assert_close(torch.cat(steps), -gradient[ids[0]], rtol=1e-6, atol=1e-8)
    curve = edit_curves(model, image, label, ids, units, lr=2, strategy=strategy, progress=False)
    change = torch.zeros_like(gradient)
    for k, unit in enumerate(ids[0], start=1):
        change[unit] = -2 * gradient[unit]
        loss = F.cross_entropy(changed(model, change)(image), label)
        assert curve["loss"][k] == pytest.approx(float(loss), rel=1e-7)


def test_smallest_correction(case):
    model, image, label, units, gradient = case
    others = batch((2, 7, 7), 40, seed=2)[0]
    with torch.no_grad():
        retain = (others, model(others).argmax(dim=1))
    how = {"through": "weights", "retain": retain, "tolerance": 1e-4, "progress": False}
    table = pss.smallest_correction(model, image, label, units, torch.arange(6)[None], 6, **how)
    direction = -gradient / gradient.norm()
    length = table["step"][0]
    assert changed(model, 1.001 * length * direction)(image).argmax() == label
    assert changed(model, 0.999 * length * direction)(image).argmax() != label


def test_gains(case):
    model, image, _, units, _ = case
    found, weight = gain_jacobian(model, image, units)[0], model.conv.weight.detach()  # (C, U)
    for unit in range(len(units)):
        change = torch.zeros_like(weight)
        change[unit] = 1e-5 * weight[unit]
        difference = changed(model, change)(image) - changed(model, -change)(image)
        torch.testing.assert_close(found[:, unit], difference[0] / 2e-5, rtol=1e-6, atol=1e-8)


def test_input_saliency(case):
    model, image, label, units, gradient = case
    boosted = gradient.abs().flatten(1).mean(1)
    top = boosted.argmax()
    boosted[top] *= 10
    how = {"method": "raw", "boost": 10, "order": "gradient", "similarity": F.cosine_similarity}
    got = pss.input_saliency(model, image, label, units, ids=top[None], **how)
    for place in [(0, 0, 2, 3), (0, 1, 5, 0)]:
        values = []
        for sign in (1, -1):
            moved = image.clone()
            moved[place] += sign * 1e-4
            profile = differences(model, moved, label).abs().flatten(1).mean(1)
            values.append(F.cosine_similarity(profile[None], boosted[None])[0])
        assert float(got[place]) == pytest.approx(float(values[0] - values[1]) / 2e-4, rel=1e-3)
