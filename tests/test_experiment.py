"""Whole experiments: statistics kept and refused, resuming, tidy tables, and the second paper's frames and bands."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from artefacts import flip
from PIL import Image
from torch.nn import functional as F

import pss
from pss import models
from pss.apps import experiment, reading

ALGO = ("baseline", "POT", "conv5", "random", "raw", "layer_matched_random")
NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "12_experiment.ipynb"


@pytest.fixture(scope="module")
def network():
    return models.load("digits")


@pytest.fixture(scope="module")
def units(network):
    return pss.Units.of(network.model)


@pytest.fixture(scope="module")
def digits(network):
    """Forty misread digits and eight others."""
    whole = pss.data.digits("test")
    wrong = pss.models.misclassified(network.model, whole).index.to_numpy()
    return whole.subset([*wrong[:40], *np.setdiff1d(np.arange(60), wrong)[:8]])


@pytest.fixture(scope="module")
def usual():
    return pss.data.mnist("validation").subset(range(200))


def write_tree(dataset, root):
    for x, y, name in zip(dataset.images, dataset.labels, dataset.ids, strict=True):
        file = root / str(int(y)) / f"{name.replace('/', '-')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.to_image(x)).save(file)
    return root


@pytest.fixture(scope="module")
def trees(digits, usual, tmp_path_factory):
    root = tmp_path_factory.mktemp("my pictures")
    return write_tree(digits, root / "test"), write_tree(usual, root / "reference")


@pytest.fixture(scope="module")
def kept(network, units, usual, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    experiment.statistics(network, units, folder, usual, algo=ALGO, progress=False)
    return folder


@pytest.fixture(scope="module")
def given(network, units, kept):
    return experiment.statistics(network, units, kept, make=False, algo=ALGO)


def run(network, dataset, units, given, folder, *plan, **more):
    return experiment.run(network, dataset, units, given, experiment.Plan(*plan, **more), folder, progress=False)


@pytest.fixture(scope="module")
def done(network, digits, units, given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    edits = ("finetune", "prune")
    return run(network, digits, units, given, folder, ALGO, edits, 3)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_made_once(network, units, usual, kept, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in kept.rglob("*") if file.is_file()}
    assert {file.name for file in before} >= {"reference-0.9.safetensors", "profiles.npy"}
    monkeypatch.setattr(models, "profiles_of", None)
    again = experiment.statistics(network, units, kept, usual, algo=ALGO)
    assert before == {file: file.stat().st_mtime_ns for file in kept.rglob("*") if file.is_file()}
    profiles = pss.profile(network.model, usual.images, usual.labels, units).double()
    right = pss.models.predict(network.model, usual.images).argmax(dim=1) == usual.labels
    assert 0 < (~right).sum() == int(again.plain.provenance["left_out"]) == len(usual) - again.plain.n
    torch.testing.assert_close(again.plain.mean, profiles[right].mean(dim=0), rtol=1e-5, atol=1e-12)
    assert again.scale_free is None
    with pytest.raises(ValueError, match="misread: reference left out, given kept"):
        experiment.statistics(network, units, kept, usual, algo=ALGO, misread=True)


def test_misread_images_are_kept_on_request_and_own_networks_stay_out_of_the_checkout(
    network, digits, units, tmp_path, monkeypatch
):
    monkeypatch.delenv("PSS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = dataclasses.replace(network, name="own")
    how = {"algo": ("raw", "baseline"), "misread": True, "allow_chance": True, "progress": False}
    found = experiment.statistics(own, units, "", digits, **how)
    assert found.plain.n == len(digits) == 48
    profiles = pss.profile(network.model, digits.images, digits.labels, units).double()
    torch.testing.assert_close(found.plain.mean, profiles.mean(dim=0), rtol=1e-5, atol=1e-12)
    done = run(own, digits, units, found, "", ("raw",), ("prune",), 1, count=2)
    assert {p.name for p in (tmp_path / "pss").iterdir()} == {"profiles", "statistics", "experiments"}
    assert done.folder.is_relative_to(tmp_path) and done.provenance["network"] == "own"
    [(english, _)] = reading.kept(own)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) / 1e6
    assert str(tmp_path / "pss") in english and f"({size:.1f} MB" in english and not reading.kept(network)


def test_missing_statistics_are_made_on_request_only(network, units, usual, tmp_path):
    with pytest.raises(FileNotFoundError, match="do_stats = True"):
        experiment.statistics(network, units, tmp_path, usual, make=False)
    with pytest.raises(ValueError, match="no reference images"):
        experiment.statistics(network, units, tmp_path)
    assert not list(tmp_path.iterdir())
    small = usual.subset(range(24))
    names = ("baseline", "scale_free_pot")
    found = experiment.statistics(network, units, tmp_path, small, algo=names, progress=False)
    assert found.scale_free.scale_free and not found.plain.scale_free and found.plain.n == 24


def test_statistics_of_something_else_are_refused(network, units, usual, kept):
    other = dataclasses.replace(network, model=copy.deepcopy(network.model))
    with torch.no_grad():
        other.model.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"something else .*model"):
        experiment.statistics(other, units, kept, usual)
    with pytest.raises(ValueError, match=r"something else .*data"):
        experiment.statistics(network, units, kept, usual.subset(range(50)))
    with pytest.raises(ValueError, match=r"something else .*loss"):
        experiment.statistics(network, units, kept, usual, loss="logit")


def test_run_refuses_statistics_of_another_model(network, digits, units, given, tmp_path):
    other = dataclasses.replace(network, model=pss.models.resnet18(seed=5))
    with pytest.raises(ValueError, match=r"something else .*model"):
        run(other, digits, units, given, tmp_path, ("baseline",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("what", "other"), [("of", "gain"), ("loss", "logit"), ("signed", True)])
def test_run_refuses_statistics_of_other_profiles(network, digits, units, given, tmp_path, what, other):
    changed = dataclasses.replace(given.plain, provenance=given.plain.provenance | {what: other})
    with pytest.raises(ValueError, match=f"{what}: reference {other}, given"):
        run(network, digits, units, dataclasses.replace(given, plain=changed), tmp_path / "x")


def test_published_statistics_have_no_tail(network, digits, units, given, tmp_path):
    file = tmp_path / "ImageNet_val_saliency_stat_digits_filter_wise.pth"
    torch.save({"mean": given.plain.mean.float(), "std": given.plain.std}, file)
    with pytest.warns(UserWarning, match="published for torchvision's IMAGENET1K_V1"):
        read = experiment.statistics(network, units, file, algo=("baseline",))
    arguments = (network, digits, units, read, tmp_path / "run")
    with pytest.raises(ValueError, match="no tail"):
        run(*arguments, ("POT",), filters=2)
    assert not (tmp_path / "run").exists()
    ranked = run(*arguments, ("baseline",), (), 2, count=3).ranking
    assert ranked["image"].nunique() == 3 and ranked["k"].max() == 2


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_are_tidy(done, digits, units, network):
    wrong = pss.models.misclassified(network.model, digits)
    assert sorted(done.images["image"]) == sorted(digits.ids)
    assert set(done.images.loc[done.images["edited"], "image"]) == set(wrong["id"]) == set(done.results["image"])
    assert not done.results.duplicated(["image", "algo", "edit", "k"]).any()
    assert len(done.results) == 40 * len(ALGO) * 2 * 4 and set(done.results["k"]) == {0, 1, 2, 3}
    assert len(done.ranking) == 40 * len(ALGO) * 3 and set(done.ranking["k"]) == {1, 2, 3}
    assert {"confidence_true", "confidence_wrong", "corrected", "predicted", "loss"} <= set(done.results)
    both = done.results.merge(done.ranking, on=["image", "algo", "k"], suffixes=("", "_ranked"))
    assert (both["unit"] == both["unit_ranked"]).all() and len(both) == 2 * len(done.ranking)
    assert (done.ranking["stage"].map(units.stages.index) == units.stage_ids[done.ranking["unit"]]).all()
    first = done.results.query("k == 0").merge(wrong, left_on="image", right_on="id")
    np.testing.assert_allclose(first["confidence_true"], first["label_confidence"], atol=1e-5)
    assert (first["predicted_x"] == first["predicted_y"]).all()


def test_rankings_are_those_of_the_methods(done, digits, units, network, given):
    profiles = pss.profile(network.model, digits.images, digits.labels, units)
    at = {name: number for number, name in enumerate(digits.ids)}
    for algo, method in (("baseline", "zscore"), ("POT", "pot"), ("raw", "raw")):
        table = done.ranking[done.ranking["algo"] == algo].pivot(index="image", columns="k", values="unit")  # noqa: PD010
        expected = pss.rank(profiles[[at[name] for name in table.index]], given.plain, method, 3)
        assert (table.to_numpy() == expected.numpy()).mean() > 0.98  # near ties may swap with the batch
    conv5 = done.ranking[done.ranking["algo"] == "conv5"]
    assert set(conv5["stage"]) == {"conv5_x"}
    start = int(np.flatnonzero(units.stage_ids == units.stages.index("conv5_x"))[0])
    for name, own in conv5.groupby("image"):
        values = profiles[at[name], start:]
        torch.testing.assert_close(values[own["unit"].to_numpy() - start], values.topk(3).values, rtol=1e-4, atol=0)
    drawn = done.ranking[done.ranking["algo"] == "random"]
    assert drawn["unit"].nunique() > 80  # each image has its own


def test_curves_are_those_of_a_plain_loop(done, digits, network, units):
    name = done.results["image"].iloc[0]
    x, y = digits[list(digits.ids).index(name)]
    for (algo, edit), own in done.results[done.results["image"] == name].groupby(["algo", "edit"]):
        model = copy.deepcopy(network.model)
        F.cross_entropy(model(x[None]), y[None]).backward()
        gradients = {layer.parameter: model.get_parameter(layer.parameter).grad for layer in units.layers}
        for unit, confidence in zip(own["unit"][1:], own["confidence_true"][1:], strict=True):
            number, j = units.locate(unit)
            layer = units.layers[number]
            with torch.no_grad():
                weight = model.get_parameter(layer.parameter)[layer.index(j)]
                weight -= weight.clone() if edit == "prune" else 1e-3 * gradients[layer.parameter][layer.index(j)]
                assert abs(model(x[None]).softmax(1)[0, y].item() - confidence) < 1e-4, (algo, edit)


def test_published_frames(done):
    own = done.results.query("algo == 'POT' and edit == 'prune'")
    df_i, df_c, df_f = experiment.published_frames(own)
    assert df_i.shape == df_c.shape == df_f.shape == (40, 4) and not df_f[0].any()
    for name, curve in own.groupby("image"):
        np.testing.assert_allclose(df_c.loc[name], curve["confidence_true"] - curve["confidence_true"].iloc[0])
        np.testing.assert_allclose(df_i.loc[name], curve["confidence_wrong"] - curve["confidence_wrong"].iloc[0])
        assert (df_f.loc[name] == (curve["predicted"] == curve["label"]).to_numpy()).all()
    with pytest.raises(ValueError, match="one algo and one edit"):
        experiment.published_frames(done.results)


def test_bands_resample_as_many_images_as_there_are(done):
    table = pss.statistics.summarize(done.results, ["algo", "edit"], resamples=4000)
    assert (table["n"] == 40).all()
    one = done.results.query("algo == 'raw' and edit == 'finetune'")
    values, rng = experiment.published_frames(one)[1].to_numpy(), np.random.default_rng(0)
    means = [values[rng.integers(40, size=40)].mean(axis=0) for _ in range(4000)]
    mine = table.query("algo == 'raw' and edit == 'finetune'")
    np.testing.assert_allclose(mine["change_true_low"], np.quantile(means, 0.025, axis=0), atol=1e-9)


def test_summary_is_of_the_last_edit(network, digits, units, given, tmp_path):
    few = digits.subset(range(12))
    edits = ("finetune", "prune")
    mine = run(network, few, units, given, tmp_path, ("raw",), edits, 3, step_norm=0.3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["looked_at"] == summary["edited"] == 12
    for edit in edits:
        share = mine.results.query("edit == @edit").groupby("k")["corrected"].mean()
        assert summary[f"corrected raw {edit}"] == share[3] != share[2], edit


def test_random_rankings_are_drawn_by_the_seed(network, digits, units, given, tmp_path):
    names, few = ("random", "layer_matched_random"), digits.subset(range(6))
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        mine = run(network, few, units, given, folder, names, (), 20, seed=seed)
        drawn.append(mine.ranking.sort_values(["algo", "image", "k"], ignore_index=True))
    pd.testing.assert_frame_equal(drawn[0], drawn[1])
    for name in names:
        first, other = (table.loc[table["algo"] == name, "unit"].to_numpy() for table in drawn[1:])
        assert len(first) == 6 * 20 and (first == other).mean() < 0.2, name


def test_shares(done, units):
    table = experiment.shares(done.ranking, units, k=2)
    assert table.groupby("algo")["share"].sum().round(9).eq(1).all()
    own = done.ranking.query("algo == 'POT' and k <= 2")["stage"].value_counts(normalize=True)
    pot = table[table["algo"] == "POT"].set_index("stage")["share"]
    assert all(abs(pot[stage] - own.get(stage, 0)) < 1e-9 for stage in units.stages)


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_killed_and_run_again_equals_run_whole(done, network, digits, units, given, tmp_path, monkeypatch):
    arguments = (network, digits, units, given, tmp_path, ALGO, ("finetune", "prune"), 3)
    part, calls = experiment.Job.part, []

    def killed(self, dataset, positions, left):
        calls.append(positions[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return part(self, dataset, positions, left)

    monkeypatch.setattr(experiment.Job, "part", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["00000.json"]
    with pytest.raises(ValueError, match="not finished"):
        experiment.Experiment.open(tmp_path)
    again = run(*arguments)
    assert len(calls) == 3 and calls[1] == calls[2] != calls[0]
    for name in ("images", "ranking", "results"):
        assert (tmp_path / f"{name}.csv").read_bytes() == (done.folder / f"{name}.csv").read_bytes()
    run(*arguments)
    assert len(calls) == 3 and again.provenance["complete"] and not (tmp_path / "parts").exists()


def test_a_damaged_part_is_made_again(network, digits, units, given, tmp_path, monkeypatch):
    arguments = (network, digits, units, given, tmp_path, ("raw",), ("prune",), 1)
    finish = experiment.finish
    monkeypatch.setattr(experiment, "finish", lambda *_: None)
    run(*arguments)
    file = tmp_path / "parts" / "00001.json"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], flip(whole, 480), b""):
        file.write_bytes(damaged)
        assert experiment.read_part(file) is None
    monkeypatch.setattr(experiment, "finish", finish)
    assert run(*arguments).provenance["edited"] == 40


def test_another_experiment_or_a_changed_table_is_refused(done, network, digits, units, given, tmp_path):
    arguments = (network, digits, units, given)
    with pytest.raises(ValueError, match=r"another experiment \(filters: there 3, given 2\)"):
        run(*arguments, done.folder, ALGO, ("finetune", "prune"), 2)
    mine = run(*arguments, tmp_path, ("raw",), ("prune",), 1, count=2)
    assert mine.provenance["pss"] == pss.__version__ and mine.provenance["model"] == pss.models.fingerprint(
        network.model
    )
    assert (
        mine.provenance["edited"] == 2 == mine.results["image"].nunique()
        and mine.provenance["data"] == digits.fingerprint
    )
    table = tmp_path / "results.csv"
    table.write_text(table.read_text().replace("prune", "prUne", 1))
    with pytest.raises(ValueError, match="not as it was written"):
        experiment.Experiment.open(tmp_path)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_names_of_rankings(network, digits, units, given, tmp_path):
    assert [experiment.method_of(name) for name in ("baseline", "POT", "raw")] == ["zscore", "pot", "raw"]
    with pytest.raises(ValueError, match="unknown algo 'pot5'"):
        experiment.method_of("pot5")
    arguments = (network, digits, units, given, tmp_path)
    with pytest.raises(ValueError, match="same ranking"):
        run(*arguments, ("baseline", "zscore"))
    with pytest.raises(ValueError, match="needs scale-free statistics"):
        run(*arguments, ("scale_free_pot",))
    right = digits.subset(range(40, 48))
    with pytest.raises(ValueError, match="misreads none of the 8 images"):
        run(network, right, units, given, tmp_path, ("raw",))


def test_one_misread_image_is_as_among_others(done, network, digits, units, given, tmp_path):
    one = digits.subset([40, 7, 41])
    mine = run(network, one, units, given, tmp_path, ALGO, ("prune",), 3)
    assert mine.provenance["edited"] == 1 and len(mine.results) == len(ALGO) * 4
    drawn = mine.ranking["algo"].isin(["random", "layer_matched_random"])  # of the place in the set
    both = mine.ranking[~drawn].merge(done.ranking, on=["image", "algo", "k"])
    assert len(both) == 12 and (both["unit_x"] == both["unit_y"]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count 0"),
        ({"algo": ()}, "at least one ranking"),
        ({"filters": 0}, r"filters = 0 is outside 1..1200"),
        ({"edits": ("finetuning",)}, "unknown edit 'finetuning'"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"algo": ("conv5",), "filters": 641}, "conv5_x, has 640 units"),
    ],
)
def test_wrong_requests_leave_nothing(network, digits, units, given, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(network, digits, units, given, tmp_path, **{"algo": ("raw",), **wrong})
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_nan_are_no_class(network, digits, units, given, tmp_path):
    """Finite pixels that overflow: all outputs NaN, whose largest is the first, and here that is the label."""
    broken = digits.subset(range(8))  # a copy
    broken.images[5], broken.labels[5] = 3e38, 0
    assert pss.models.predict(network.model, broken.images)[5].isnan().all()
    name = re.escape(broken.ids[5])
    with pytest.raises(ValueError, match=rf"outputs for 1 images \({name}\) are NaN or infinite.*Mend these images"):
        run(network, broken, units, given, tmp_path, ("baseline",), filters=2)


def test_a_tree_of_pictures_gives_what_the_set_gives(done, trees, network, units, given, tmp_path):
    tree = experiment.images_of(network, trees[0])
    mine = run(network, tree, units, given, tmp_path, ("baseline", "raw"), filters=3)
    results = mine.results.assign(image=mine.results["image"].map(lambda name: Path(name).stem.replace("-", "/")))
    both = results.merge(done.results, on=["image", "algo", "edit", "k"])
    assert len(both) == len(results) == 40 * 2 * 4
    assert (both["unit_x"] == both["unit_y"]).mean() > 0.98
    np.testing.assert_allclose(both["confidence_true_x"], both["confidence_true_y"], atol=1e-3)


def test_imagenet_sweep_names_parameters_of_the_notebook():
    from pss.apps.sweep import read_sweep

    runs = read_sweep(NOTEBOOK.parent / "params" / "imagenet.yaml").runs
    assert [run.parameters["level"] for run in runs] == [0.85, 0.95]
    assert all(experiment.method_of(name) for run in runs for name in run.parameters["algo"])
