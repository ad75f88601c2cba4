"""A fault with a known place in a vision transformer: break one attention head and see whether mistakes point at it.

A small transformer is trained on the built-in digits. The fault is a gain, as in test_planted_fault.py: the part of
the output layer that belongs to one head is multiplied by 10. The images are those that were right before and are
wrong now, the reference is that of the healthy network. Faults inside a head's own weights do not show in the gradient;
those of values show in the gain, those of queries and keys in what they say alone (the last tests).
"""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pss
from pss.data.vision import torchvision
from pss.editing import edit_curves, edited
from pss.engine.process import thread_count

HEADS, WIDTH, IMAGES = 4, 48, 48
PLANTED = [(layer, head) for layer in range(3) for head in (0, 2)]


class Bench:
    """A trained transformer, its heads and their reference, and what breaking one of them spoils."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = torchvision.models.VisionTransformer(32, 8, 3, HEADS, WIDTH, 2 * WIDTH, num_classes=10)
        with thread_count(1):  # the same network on any number of cores
            train(self.model, *pss.data.mnist("train").tensors)
        self.images, self.labels = pss.data.mnist("validation").tensors
        self.units = pss.Units.of(self.model, "heads")
        profiles = pss.profile(self.model, self.images, self.labels, self.units)
        self.reference = pss.Reference.fit(profiles, scale_free=True)
        self.right = self.predict(self.model) == self.labels

    def predict(self, model, at=slice(None)):
        return pss.models.predict(model, self.images[at]).argmax(1)

    def attention(self, model, layer):
        return model.encoder.layers[layer].self_attention

    def unit(self, layer, head, part="v"):
        return layer * 3 * HEADS + "qkv".index(part) * HEADS + head

    def spoiled(self, broken):
        return (self.right & (self.predict(broken) != self.labels)).nonzero()[:IMAGES, 0]

    def places(self, broken, at, unit, method):
        """Place of the unit in each image's ranking, 0 for the first, and in that of the images' mean z-score."""
        profiles = pss.profile(broken, self.images[at], self.labels[at], self.units)
        together = self.reference.zscore(profiles).mean(0)
        each = (pss.rank(profiles, self.reference, method) == unit).nonzero()[:, 1]
        return each, int((together > together[unit]).sum())

    def restored_by_pruning(self, broken, at, unit):
        with edited(broken, self.units, [unit]):
            return (self.predict(broken, at) == self.labels[at]).double().mean().item()


def train(model, images, labels, epochs=8, rate=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(images) // 100)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(100):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module", params=PLANTED, ids=lambda at: f"layer {at[0]} head {at[1]}")
def planted(request, bench):
    layer, head = request.param
    broken = copy.deepcopy(bench.model)
    columns = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
    with torch.no_grad():
        bench.attention(broken, layer).out_proj.weight[:, columns] *= 10
    return broken, bench.spoiled(broken), bench.unit(layer, head)


def test_the_transformer_works_before_the_fault(bench):
    assert bench.right.double().mean() > 0.85 and len(bench.units) == 36
    assert bench.units.name(bench.unit(1, 2)) == "encoder.layers.encoder_layer_1.self_attention.v[2]"


@pytest.mark.parametrize("method", ["zscore", "pot"])
def test_mistakes_point_at_the_broken_head(bench, planted, method):
    broken, at, unit = planted
    each, together = bench.places(broken, at, unit, method)
    print(f"{bench.units.name(unit)} {method}: first for {(each == 0).double().mean():.2f} of {len(at)}, {together=}")
    assert len(at) >= 20 and together == 0, "not first over the images that the fault spoils"
    assert (each == 0).double().mean() > 0.4 and each.median() <= 1


def test_pruning_the_broken_head_restores_what_it_spoiled_and_no_other_does(bench, planted):
    broken, at, unit = planted
    restored = np.asarray([bench.restored_by_pruning(broken, at, u) for u in range(36)])
    others = np.delete(restored, unit)
    print(f"{bench.units.name(unit)}: pruning it restores {restored[unit]:.2f}, the best other {others.max():.2f}")
    assert restored[unit] > 0.8 and restored[unit] > others.max() + 0.1


def test_one_step_on_the_broken_head_corrects_more_than_on_another(bench, planted):
    broken, at, unit = planted
    at, others = at[:12], [u for u in range(1, 36, 5) if u != unit]

    def corrected(u):
        ids = torch.full((len(at), 1), u)
        how = {"step_norm": 0.3, "strategy": "in_place", "progress": False}
        curves = edit_curves(broken, bench.images[at], bench.labels[at], ids, bench.units, **how)
        return curves.query("k == 1")["corrected"].mean()

    own, mean = corrected(unit), np.mean([corrected(u) for u in others])
    print(f"{bench.units.name(unit)}: a step of length 0.3 corrects {own:.2f}, through others {mean:.2f}")
    assert own >= 0.4 and own > mean + 0.1


INSIDE = {
    "weights x10": lambda w: w.mul_(10),
    "noise": lambda w: w.copy_(10 * w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))),
    "sign": lambda w: w.neg_(),
}


@pytest.fixture(scope="module")
def suspects(bench):
    """Places of a unit over the images that a fault inside its weights spoils, by each of the quantities."""

    def quantities(model, at=slice(None)):
        of = bench.images[at], bench.labels[at], bench.units
        both = pss.profile(model, *of, of=("gradient", "gain"), verify=False)
        return [*both, pss.profile(model, *of, of="output", signed=True)]

    of = {"gradient": ("zscore", True), "gain": ("zscore", True), "output": ("layer_relative_zscore", False)}
    usual = zip(quantities(bench.model), of.values(), strict=True)
    references = [pss.Reference.fit(s, scale_free=free) for s, (_, free) in usual]

    def places(broken, at, unit):
        found = {}
        for s, reference, (name, (method, _)) in zip(quantities(broken, at), references, of.items(), strict=True):
            table = pss.rank_together(s, reference, method, units=bench.units)
            found[name] = int(table.index[table["unit"] == unit][0])
        return found

    return places


def broken_inside(bench, kind, unit):
    broken = copy.deepcopy(bench.model)
    with torch.no_grad():
        INSIDE[kind](bench.units.view(broken, unit))
    return broken, bench.spoiled(broken)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("kind", INSIDE)
def test_a_broken_head_of_values_is_found_by_what_it_contributes(bench, suspects, kind, layer):
    unit = bench.unit(layer, 0, "v")
    broken, at = broken_inside(bench, kind, unit)
    found = suspects(broken, at, unit)
    assert len(at) >= 20 and found["gain"] <= 2 and found["output"] == 0
    assert kind == "sign" or found["gradient"] > 20  # of 36


@pytest.mark.parametrize("part", ["q", "k"])
def test_queries_and_keys_out_of_scale_are_found_by_what_they_say_alone(bench, suspects, part):
    """Attention that is all on one place has no gradient, so the head contributes nothing to first order."""
    unit = bench.unit(0, 0, part)
    broken, at = broken_inside(bench, "weights x10", unit)
    found = suspects(broken, at, unit)
    assert len(at) >= 10 and found["output"] == 0 and min(found["gradient"], found["gain"]) > 5
    assert bench.restored_by_pruning(broken, at, unit) > 0.6
