"""The kept tables of experiments: a row made anew is the row that is kept, and what they are made with is right."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pss
from bench import budget, correction_costs, reference_draws, tables
from pss.correction import predicts, shifted, smallest


@pytest.fixture(scope="module")
def task():
    return correction_costs.Task(0, "digits")


def test_images_of_a_task_are_apart_and_what_it_says_they_are(task):
    predicted = pss.models.predict(task.model, task.test.images).argmax(dim=1)
    assert (predicted != task.test.labels)[task.wrong].all() and len(set(task.wrong)) == correction_costs.MISTAKES
    parts = [task.test.images[task.wrong], task.retain, task.usual]
    seen = [image.numpy().tobytes() for part in parts for image in part]
    assert len(seen) == len(set(seen)) == correction_costs.MISTAKES + correction_costs.RETAIN + correction_costs.USUAL


def test_sizes_that_go_through_together_are_those_that_go_alone(task):
    """Logits along a line against the model with the weights moved, and the first size that corrects."""
    image = int(task.wrong[0])
    x, y = task.test.images[image : image + 1], task.test.labels[image : image + 1]
    at, rivals = {"gradient": task.gradient(x, y)}, task.rivals(image)
    for name in ("random 0", "last layer", "all parameters"):
        (line,) = task.lines(rivals[name], "gradient", at)
        sizes = torch.tensor([0.0, 1e-4, 1e-2])
        together = task.logits_along(x, line, sizes).detach()

        def moved(size, line=line):
            with shifted(task.model, line, size), torch.no_grad():
                return task.model(x)

        torch.testing.assert_close(together, torch.cat([moved(float(s)) for s in sizes]), rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            found = task.smallest(x, y, line)
        assert abs(np.log(found / smallest(lambda size, m=moved: bool(predicts(m(size), y).all()), 10.0))) < 0.1


def test_derivative_is_that_of_gains_and_of_the_last_layer(task):
    x = task.usual[:2]
    features = []
    handle = task.model.fc.register_forward_hook(lambda module, inputs, out: features.append(inputs[0].detach()))
    logits = pss.models.predict(task.model, x)
    handle.remove()
    found = task.derivative(x, torch.eye(10, dtype=torch.double).expand(2, -1, -1))
    scale = task.model.fc.weight.detach().square().mean().sqrt()
    weight = found[:, :, len(task.units) :].reshape(2, 10, 10, -1)  # logit, row, column
    for j in range(10):
        expected = F.pad(features[0], (0, 1), value=1.0).double() * scale
        torch.testing.assert_close(weight[:, j, j], expected, rtol=1e-5, atol=1e-8)
        assert not weight[:, j, [i for i in range(10) if i != j]].any()
    assert logits.shape == (2, 10) and found.shape == (2, 10, len(task.units) + 10 * 129)


def test_a_correction_cost_made_anew_is_the_one_that_is_kept(task):
    kept = tables.read(correction_costs.OUT).query("network == 0 and set == 'digits'")
    image = int(task.wrong[0])
    for row in task.rows(image):
        old = kept[(kept["image"] == image) & (kept["direction"] == row["direction"])]
        names = list(old.columns[4:])
        new = np.array([row[name] for name in names])
        ratio = np.abs(np.log(new / old[names].to_numpy()[0]))
        assert np.median(ratio) < 1e-3, row["direction"]
        assert (ratio < 0.2).mean() >= 0.9, (row["direction"], ratio)  # a step is known to 5%; draws may be others


def test_what_is_measured_of_references_by_hand():
    rng = torch.Generator().manual_seed(0)
    stored, new = torch.rand(40, 3, generator=rng), torch.rand(5, 3, generator=rng)
    p = reference_draws.empirical(stored, new, scale_free=False).exp()
    by_hand = [[(1 + int((stored[:, u] >= s).sum())) / 41 for u, s in enumerate(row)] for row in new]
    np.testing.assert_allclose(p, by_hand)
    free = partial(reference_draws.empirical, scale_free=True)
    torch.testing.assert_close(free(stored, new), free(stored * 5, new * 3))
    assert reference_draws.same(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 5], [4, 3]])) == 0.75


def test_a_patch_made_anew_is_the_one_that_is_kept():
    kept = tables.read(budget.OUT)
    row, first = budget.patch(budget.network(0), 0, budget.RETAIN), kept.iloc[0]
    assert {name: row[name] for name in kept.columns if name != "kl"} == first.drop("kl").to_dict()
    assert row["kl"] == pytest.approx(first["kl"], rel=0.05)
    found = kept["kl"].notna().sum()
    assert found >= 200 and f"of {found} patches are within the budget" in budget.summary(kept)


@pytest.mark.faults  # trains a network
def test_a_reference_row_made_anew_is_the_one_that_is_kept():
    kept = tables.read(reference_draws.OUT).query("network == 0 and quantity == 'gradient' and level == 0.9")
    network = reference_draws.Network(0)
    for scale_free in (False, True):
        old = kept[kept["scale_free"] == scale_free].set_index("reference")
        for row in network.rows("gradient", scale_free, 0.9):
            of = old.loc[row["reference"]]
            for name in old.columns[4:]:
                assert row[name] == pytest.approx(of[name], abs=0.02), name


def test_a_table_goes_on_where_it_was_stopped(tmp_path):
    path = tmp_path / "table.csv"
    assert tables.begin(path, "python -m bench.this", images=3).empty
    tables.add(path, {"network": 0, "cost": 0.5})
    with path.open("a") as file:
        file.write("1,0.")  # stopped in the middle of a row
    assert tables.begin(path, "python -m bench.this", images=3).to_dict("list") == {"network": [0], "cost": [0.5]}
    with pytest.raises(ValueError, match="images: 4"):
        tables.begin(path, "python -m bench.this", images=4)
