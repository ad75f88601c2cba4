"""A network and pictures of one's own, through the command line as a user types it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from served import Page, is_safe

import pss
from pss import data, models
from pss.apps import explain, group, reading

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
EXPLAIN, EXPERIMENT = NOTEBOOKS / "11_explain_one_image.ipynb", NOTEBOOKS / "12_experiment.ipynb"
MODULE = """
import torch

class Gate(torch.nn.Module):  # of a hard sigmoid, as MobileNetV3 has, here always open
    def forward(self, x):
        return x.relu() * torch.nn.functional.hardsigmoid(x.relu() + 4)

def make(width):
    layers = [torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3), Gate()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 3))
"""
YAML = """
model: our_nets:make
arguments: {width: 8}
checkpoint: net.pth
preprocessing: {resize: [16, 16], crop: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
classes: [cat, '<b>dog', '$x$']
"""


CLASSES = ("cat", "<b>dog", "$x$")


def train(network, folder, path):
    """A few steps until the images of the folder are read right; the weights go to the path."""
    tree = models.reference_set(network, folder)
    images, labels = torch.stack([tree[i][0] for i in range(len(tree))]), tree.labels
    optimizer = torch.optim.Adam(network.model.parameters(), 0.02)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(network.model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network.model(images).argmax(dim=1) == labels).all()
    torch.save(network.model.state_dict(), path)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a module, a checkpoint, a description of the network, and pictures by class."""
    desk = tmp_path_factory.mktemp("my desk")
    (desk / "our_nets.py").write_text(MODULE)
    (desk / "net.yaml").write_text(YAML)
    (desk / "broken.yaml").write_text(YAML.replace("width: 8", "width: 9"))
    scope: dict = {}
    exec(MODULE, scope)
    torch.manual_seed(0)
    model, rng = scope["make"](8), np.random.default_rng(0)
    for folder, odd, count, noise in (("photos", 3, 16, 120), ("training", 0, 16, 120), ("fitted", 0, 40, 12)):
        for label, name in enumerate(CLASSES):
            (desk / folder / name).mkdir(parents=True)
            for n in range(count):
                shows = (label + 1) % 3 if n < odd else label  # the first are as bright as another class
                pixels = rng.integers(60 - noise // 2, 60 + noise // 2, (20, 24, 3)) + 60 * shows
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(desk / folder / name / f"<img src=x onerror=1> {n}.png")
    for name, source, count in (("cat", "fitted", 40), ("<b>dog", "training", 10)):  # all of them show a cat
        (desk / "lopsided" / name).mkdir(parents=True)
        for picture in sorted((desk / source / "cat").glob("*.png"))[:count]:
            shutil.copy(picture, desk / "lopsided" / name)
    torch.save(model.state_dict(), desk / "net.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(desk)
        train(models.load(str(desk / "net.yaml")), desk / "training", desk / "net.pth")
    (desk / "swapped.yaml").write_text(YAML.replace("[cat, '<b>dog', '$x$']", "['<b>dog', '$x$', cat]"))
    pss.Reference.fit(torch.rand(30, 16), provenance={"model": "another"}).save(desk / "other.safetensors")
    torch.save({"mean": torch.rand(16), "std": torch.rand(16).double()}, desk / "stats.pth")
    (desk / "sweep.yaml").write_text(f"notebook: {EXPLAIN}\ngrid: {{method: [zscore, fisher]}}\n")
    return desk


@pytest.fixture(scope="module")
def mistake(desk):
    """The network, and one of the pictures that it misreads: its name, its image and its label."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(desk)
        network = models.load(str(desk / "net.yaml"))
    tree = models.reference_set(network, desk / "photos")
    at = int(models.misclassified(network.model, tree).index[0])
    return network, str(tree.ids[at]), *tree[at]


def test_retain_images_are_without_the_explained_image(desk, mistake):
    network, name, image, label = mistake
    case = explain.take_image(network, data_root=str(desk / "photos"), index=name)
    assert torch.equal(case.image[0], image)
    retain, labels = explain.retain_images(network, case)
    assert len(retain) == len(labels) == 47 and not any(torch.equal(x, image) for x in retain)
    assert sorted([*labels.tolist(), int(label)]) == sorted([0, 1, 2] * 16)


def test_a_picture_and_a_folder_of_others(desk, mistake):
    """What is usual comes from the folder; the picture is left out of it, and of what is to stay as it is."""
    network, name, image, label = mistake
    case = explain.take_image(network, str(desk / "photos" / name), int(label), data_root=str(desk / "photos"))
    assert (
        torch.equal(case.image[0], image) and case.label == label and len(explain.retain_images(network, case)[0]) == 47
    )
    units = pss.Units.of(network.model)
    explained = (pss.profile(network.model, case.image, case.labels, units), case.label)
    known = reading.usual(network, units, "", case.tree, explained)
    assert "Of 48 images the explained one and 8 more that are misread" in known.told[0] and known.reference.n == 39


def test_usual_leaves_out_misread_images_and_the_explained_one(desk, mistake):
    """By what name it comes; the training images are taken where they are named; the sentence says which and why."""
    network = mistake[0]
    units = pss.Units.of(network.model)
    tree, right = models.reference_set(network, desk / "photos"), 13 * 3
    wrong = set(models.misclassified(network.model, tree).index)
    for at, left in ((int(next(iter(wrong))), right), (next(i for i in range(48) if i not in wrong), right - 1)):
        x, y = tree[at]
        explained = (pss.profile(network.model, x[None], torch.tensor([y]), units), int(y))
        known = reading.usual(network, units, tree=str(desk / "photos"), explained=explained)
        kept = [i for i in range(48) if i not in wrong | {at}]
        s = pss.profile(network.model, torch.stack([tree[i][0] for i in kept]), tree.labels[kept], units)
        assert known.reference.n == len(kept) == left
        torch.testing.assert_close(known.reference.mean, s.double().mean(dim=0), rtol=1e-4, atol=1e-9)
        assert f"Of 48 images the explained one and {9 - (at in wrong)} more that are misread were" in known.told[0]
        assert len(known.mistakes) == 9 - (at in wrong) and known.reading.right == 39
    named = reading.usual(network, units, str(desk / "training"), str(desk / "photos"), explained)
    assert named.reference.n == 48 and named.told[0].endswith("because you named it as reference.")
    assert reading.usual(network, units, str(desk / "training"), count=30).reference.n == 30
    folder = reading.usual(network, units, tree=str(desk / "photos"))
    assert "39 images of photos itself" in folder.told[0] and "Of 48 images 9 that are misread were" in folder.told[0]


def test_more_images_are_advised_where_there_are_some(desk, mistake):
    """A larger reference_count takes no more of a folder of which all were taken, and more crops are no new scenes."""
    network, name, image, label = mistake
    units, tree = pss.Units.of(network.model), str(desk / "photos")
    case = explain.Case(image[None], torch.tensor([int(label)]), name)
    table = pd.DataFrame({"p": [0.5], "significant": [True]})
    for count, says in ((40, "8 were not drawn, -p reference_count 0 takes all."), (200, "-p reference FOLDER -p ref")):
        known = reading.usual(network, units, tree=tree, count=count)
        told = str(explain.what_next(network, case, int(label), table, known, pss.Patch("0" * 64), [], 0, 1))
        assert says in told and ("not drawn" in told) == (count == 40)
    digits, photographs = (reading.pictures(models.load(name), "", 60) for name in ("digits", "efficientnet_lite0"))
    assert digits.undrawn == len(data.mnist("validation")) - 60 > 0 and photographs.undrawn == 0
    with pytest.raises(
        ValueError, match=r"20 images are needed, of photos there would be \d+. Of 20 images .* larger reference_count$"
    ):
        reading.usual(network, units, tree=tree, count=20)


def test_a_folder_of_complaints_takes_what_is_to_stay_from_the_reference(desk, mistake, tmp_path):
    """None of its images is read right: nothing to retain is there, and nothing to measure an edit on."""
    network, units = mistake[0], pss.Units.of(mistake[0].model)
    tree, training = models.reference_set(network, desk / "photos"), str(desk / "training")
    for at in models.misclassified(network.model, tree).index:
        (tmp_path / "complaints" / tree.ids[at]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(desk / "photos" / tree.ids[at], tmp_path / "complaints" / tree.ids[at])
    found = group.find(network, units, tmp_path / "complaints", training, k=3)
    assert len(found.table) == 9 and len(found.rest[1]) == 48
    assert (models.predict(network.model, found.rest[0]).argmax(dim=1) == found.rest[1]).all()
    images, labels = explain.retain_images(network, found.typical, training)
    assert len(labels) == 48 and (models.predict(network.model, images).argmax(dim=1) == labels).all()
    ids = torch.tensor([0, 1])
    assert group.repairs(found, network, units, {"shared": ids})["rest after"].notna().all()
    table = pd.DataFrame({"p": [0.5], "significant": [False]})
    told = explain.what_next(network, found.typical, 0, table, found.known, pss.Patch("0" * 64), [], 0, 1)
    assert "unless they were chosen as mistakes, look at their labels" in told[0][0]


def test_a_picture_in_two_folders_is_named_and_no_image_to_retain(desk, mistake, tmp_path):
    """One of its labels is wrong: no repair reads both right."""
    shutil.copytree(desk / "photos", tmp_path / "photos")
    network, units = mistake[0], pss.Units.of(mistake[0].model)
    tree = models.reference_set(network, desk / "photos")
    right = next(str(tree.ids[i]) for i in range(48) if i not in models.misclassified(network.model, tree).index)
    shutil.copy(desk / "photos" / right, tmp_path / "photos" / CLASSES[0] / "twin.png")
    found = group.find(network, units, tmp_path / "photos", k=3)
    assert found.twins == ("cat/twin.png",) and len(found.table) == 10 and len(found.rest[1]) == 38
    assert not any(torch.equal(x, y) for x in found.rest[0] for y in found.images)
    page = group.Report(tmp_path / "page", "title", "題")
    said = str(group.tell(found, network, units, page)["opening"])
    assert "One of these mistakes is the very picture of an image of another class" in said and "(cat/twin.png)" in said


def test_damaged_files_are_left_out_and_named(desk, mistake, tmp_path):
    shutil.copytree(desk / "photos", tmp_path / "some photos")
    broken = next((tmp_path / "some photos" / "cat").glob("* 9.png"))
    broken.write_bytes(broken.read_bytes()[:300])
    network = mistake[0]
    units, tree = pss.Units.of(network.model), str(tmp_path / "some photos")
    known, found = reading.usual(network, units, tree=tree), group.find(network, units, tree, str(desk / "training"))
    for told in (known.reading.told(), found.reading.told()):
        assert (
            "38 of 47 images" in told[0] and f"1 file that cannot be read was left out: cat/{broken.name}." in told[0]
        )
    retain = explain.retain_images(network, explain.take_image(network, data_root=tree, index=0))
    assert len(retain[0]) == 46
    for file in Path(tree).glob("*/*.png"):
        file.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"none of the 48 files of some photos can be read as a picture, as .* 0.png"):
        reading.usual(network, units, str(desk / "training"), tree)


def test_pictures_are_decoded_once(desk, mistake, monkeypatch):
    """However often a run looks at them, if they stay as they are; an error of the preprocessing is one of the run."""
    network, opened = dataclasses.replace(mistake[0], preprocess=models.Preprocessing(resize=(16, 16))), []
    counted = lambda path: opened.append(path) or data.read_image(path)  # noqa: E731
    monkeypatch.setattr(data.folders, "read_image", counted)
    images = reading.pictures(network, str(desk / "photos"), 20)
    every = [images[i] for i in range(20)] + [images.subset([3])[0]]
    assert len(opened) == len(set(opened)) == 20
    assert len(reading.pictures(network, str(desk / "photos"))) == len(opened) == len(set(opened)) == 48
    Path(images.samples[5][0]).touch()
    assert torch.equal(reading.pictures(network, str(desk / "photos"), 20)[5][0], images[5][0]) and len(opened) == 49
    x = network.preprocess(data.read_image(images.samples[3][0]))
    assert torch.equal(every[3][0], x) and torch.equal(every[-1][0], x) and every[3][1] == images.labels[3]
    odd = dataclasses.replace(network, preprocess=lambda picture: picture.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        reading.pictures(odd, str(desk / "photos"))


def test_near_chance_nothing_is_ranked(desk):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(desk)
        network = models.load(str(desk / "swapped.yaml"))
    units, tree = pss.Units.of(network.model), str(desk / "photos")
    with pytest.raises(ValueError, match=r"Only . of 48 .* Nothing is ranked.*resize .16, 16.*allow_chance"):
        reading.usual(network, units, tree=tree)
    known = reading.usual(network, units, tree=tree, allow_chance=True)
    assert known.reference.n == 48 and "misread ones among them" in known.told[0]
    found = reading.Reading("some", 24, 20, 3)
    assert not found.near_chance and found.interval == pytest.approx((0.6415, 0.9332), abs=1e-4)


def test_folders_that_are_taken_in_order_are_said_to_be(desk, mistake, tmp_path):
    """As train and val would be for a network of two classes."""
    for own, name in zip("abc", CLASSES, strict=True):
        shutil.copytree(desk / "training" / name, tmp_path / "photos" / own)
    told = reading.measure(mistake[0], reading.pictures(mistake[0], str(tmp_path / "photos"), 40)).told()
    assert "taken in the order of these: a = cat, b = <b>dog, c = $x$." in told[0] and "b = <b>dog" in told[1]


def test_one_answer_to_all_images_is_no_better_than_chance(desk, mistake):
    """However many of the images it fits; those that it does not fit are no part of what is usual."""
    network, units, tree = mistake[0], pss.Units.of(mistake[0].model), str(desk / "lopsided")
    says = (
        r"40 of 50 .*80% \(95% interval 67% to 89%\), but dealt to .* up to 80% right.* Nothing is .* of each class, or"
    )
    with pytest.raises(ValueError, match=says):
        reading.usual(network, units, tree=tree)
    known = reading.usual(network, units, tree=tree, allow_chance=True)
    assert known.reference.n == 40 and "50枚のうち40枚が正しく分類される（80%" in known.reading.told()[1]


@pytest.mark.parametrize(
    ("labels", "answers", "near"),
    [
        ([90, 10], [[81, 9], [1, 9]], False),  # less than always the first, but both are told apart
        ([90, 10], [[90, 0], [10, 0]], True),
        ([90, 10], [[88, 2], [10, 0]], True),
        ([90, 10], [[90, 0], [7, 3]], False),
        ([60, 2], [[60, 0], [2, 0]], False),  # two images of another class could not tell
        ([60, 0], [[50, 10], [0, 0]], False),
    ],
)
def test_answers_are_compared_with_themselves_dealt_at_random(labels, answers, near):
    true = np.repeat([0, 1], labels)
    said = np.concatenate([np.repeat([0, 1], row) for row in answers])
    dealt = reading.dealt_at_random(true, said, 2)
    assert reading.Reading("x", len(true), int((true == said).sum()), 2, dealt=dealt).near_chance == near
    rng = np.random.default_rng(0)
    many = [(true == rng.permutation(said)).mean() for _ in range(4000)]
    if min(labels) >= 5:
        assert dealt == pytest.approx(np.mean(many) + 1.96 * np.std(many), abs=2e-3)
    else:
        assert dealt == 0


def test_masked_pixels_are_compared_with_those_of_random_units(mistake):
    network, name, image, label = mistake
    units, case = pss.Units.of(network.model), explain.Case(image[None], torch.tensor([int(label)]), name)
    top = torch.tensor([3, 9])
    heat = torch.zeros(16, 16)
    heat[2:5, 2:5] = 1.0
    lost = explain.masking_test(
        network, case, {"mine": heat, "10 random": 1 - heat}, top, units, "cross_entropy", False
    )
    hidden = image.clone()
    hidden.flatten(1)[:, heat.flatten().topk(13).indices] = image.mean(dim=(1, 2))[:, None]
    before, after = (pss.profile(network.model, x[None], case.labels, units)[0, top].mean() for x in (image, hidden))
    assert lost["lost"][0] == pytest.approx(float(1 - after / before), rel=1e-4)
    sure = models.predict(network.model, hidden[None]).softmax(dim=1)[0, int(label)]
    assert lost["true class"][0] == pytest.approx(float(sure), rel=1e-4)
    table = pd.DataFrame({"map": ["top", "random"], "lost": [0.2, 0.3]})
    assert (
        'by -20.0%; those of the map "random" change it by -30.0%' in explain.map_verdict(table, "top", ["random"])[0]
    )
    assert "says nothing about these units" in explain.map_verdict(table, "top", ["random"])[0]
    assert (
        'no other map takes more of it. Those of the map "top" take less of it (-20.0%)'
        in explain.map_verdict(table, "random", ["top"])[0]
    )


def type_in(desk, *arguments):
    """What a user sees who types ``python -m pss …`` in that folder."""
    environment = os.environ | {"PSS_CACHE": str(desk / "cache")}
    command = [sys.executable, "-m", "pss", *map(str, arguments)]
    return subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=400)


def set_all(**values):
    """-p for each of them."""
    return [part for name, value in values.items() for part in ("-p", name, str(value))]


def test_one_image_ends_with_its_verdict_and_the_place_of_its_report(desk, mistake):
    """The module is found in the folder, places are seen from it, names stay names, and all files lie in one place."""
    network, name, image, label = mistake
    asked = set_all(model="net.yaml", data_root="photos", index=f"photos: {name}", method="pot", k=4, budget=100.0)
    done = type_in(desk, "run", EXPLAIN, *asked, *set_all(patch="mend.safetensors", reference_count=0))
    assert done.returncode == 0, done.stdout + done.stderr
    verdict, place = done.stdout.splitlines()[-2:]
    out = Path(place).parent
    assert Path(place).name == "report.html" and out.parent == desk / "runs"
    summary, table = json.loads((out / "summary.json").read_text()), pd.read_csv(out / "ranking.csv")
    assert summary["verdict"] == verdict and summary["image"] == f"photos: {name}"
    assert summary["top_unit"] == table["name"][0] and summary["z"] == pytest.approx(table["z"][0], rel=1e-4)
    assert (summary["images"], summary["accuracy"], summary["significant"]) == (48, 39 / 48, table["significant"].sum())
    assert (
        summary["accuracy_low"] < 39 / 48 < summary["accuracy_high"] and "resize (16, 16)" in summary["preprocessing"]
    )
    edited = {"prune_repaired_at", "prune_gains_repaired_at", "finetune_random_kl"}
    assert edited | {"confidence_before", "patch_units"} <= summary.keys()
    units, first = pss.Units.of(network.model), summary["prune_gains_repaired_at"]
    case = explain.Case(image[None], torch.tensor([label]), name, str(desk / "photos"))
    ids, retain = explain.by_gain(network, case, units, first)[None], explain.retain_images(network, case)
    cost = pss.side_effects(network.model, units, ids, *retain, progress=False)
    assert first != 4 and summary["prune_gains_kl"] == pytest.approx(cost["kl_mean"][0], rel=1e-3), (
        "at that k, not at 4"
    )
    assert {p.name for p in out.glob("*.png")} == {"image.png", "profile.png", "input_saliency.png", "edits.png"}
    assert (out / EXPLAIN.name).exists() and len(list((out / "figures").glob("*.png"))) >= 4
    page = Page(Path(place).read_text("utf-8"))
    assert is_safe(page) and "<img src=x onerror=1>" in page.text and verdict in page.text
    assert page.texts["h2"][:2] == ["In short", "What to do next"] and table["name"][0] in "".join(page.texts["p"][:3])
    assert (
        "39 of 48 images of photos are read right" in page.text
        and "the explained one and 8 more that are misread" in page.text
    )
    assert "random units" in page.text and str(desk / "cache") in page.text
    assert len(table) == 16 and table["rank"].tolist() == list(range(1, 17)) and table["p"].between(0, 1).all()
    with np.load(out / "profile.npz") as kept:
        expected = pss.profile(network.model, image[None], torch.tensor([label]))[0]
        np.testing.assert_allclose(kept["profile"], expected.numpy(), rtol=1e-4)
        assert kept["order"].tolist() == table["unit"].tolist() and int(kept["label"]) == label
    assert verdict.startswith("A patch of") == (out / "mend.safetensors").exists()
    if (out / "mend.safetensors").exists():
        lines = f"x = pss.models.load('net.yaml').read('photos/{name}')\nprint(model(x[None]).argmax())"
        pasted = [sys.executable, "-c", f"{page.texts['code'][0]}\n{lines}"]
        pasted = subprocess.run(pasted, cwd=desk, capture_output=True, text=True, timeout=100)
        assert pasted.stdout.strip() == f"tensor({int(label)})", pasted.stderr


def test_a_folder_without_an_index_gives_the_report_of_its_mistakes(desk):
    """The reference is of images that are read more surely, as those are that a network was fitted to."""
    asked = set_all(
        model="net.yaml", data_root="photos", reference="fitted", k=3, patch="mend.safetensors", budget=100.0
    )
    done = type_in(desk, "run", EXPLAIN, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    out = Path(done.stdout.splitlines()[-1]).parent
    summary, mistakes = json.loads((out / "summary.json").read_text()), pd.read_csv(out / "mistakes.csv")
    assert summary["mistakes"] == len(mistakes) == 9 and summary["accuracy"] == 39 / 48
    assert set(mistakes["id"].str[-5]) == {"0", "1", "2"}, "the odd ones"
    assert (out / "cluster_1.png").exists() and summary["clusters"] == mistakes["cluster"].max() >= 1
    page = Page((out / "report.html").read_text("utf-8"))
    assert (
        is_safe(page)
        and summary["shared_unit"] in page.text
        and "9 misread images of photos were looked at" in page.text
    )
    order = ["In short", "What to do next", "The mistakes of the folder", "An example", "The image"]
    assert page.texts["h2"][:5] == order
    assert "because you named it as reference" in page.text and "as many random units" in page.text
    short, advice = page.text.split("What to do next")[0], page.text.split("What to do next")[1].split(order[2])[0]
    assert "pictures of each cluster" in advice and "without index" not in page.text, "it is the group's report already"

    assert re.search(r"of 39 other images of photos that are read right 1\d have significant units, too", page.text)
    assert (
        "120 of 120 images of fitted" in page.text and "Its own images (fitted) are read better, 100% agai" in page.text
    )
    assert "units are significant at" not in page.text and summary["significant"] is None
    assert "significant" not in pd.read_csv(out / "ranking.csv")
    assert "that took no part in training; or leave reference out" in advice

    cluster = int(re.search(r"mend\.safetensors is the patch of cluster (\d)", short)[1])
    mend, own = (pss.Patch.load(out / name) for name in ("mend.safetensors", f"cluster_{cluster}.safetensors"))
    assert torch.equal(mend.gains, own.gains) and len(mend.gains) == summary[f"patch_{cluster}_units"]


def test_one_picture_with_published_statistics(desk):
    """Mean and deviation only: a sentence says so, no p-values; no retain images either; in Japanese."""
    picture = next((desk / "photos" / "cat").glob("*.png")).relative_to(desk)
    asked = set_all(model="net.yaml", image_path=picture, label="cat", reference="stats.pth", output="mine")
    more = set_all(language="ja", compare_random="false", noise_iters=2, noise_percent=0.1, loss="logit_difference")
    done = type_in(desk, "run", EXPLAIN, *asked, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(desk / "mine" / "report.html")
    page = Page((desk / "mine" / "report.html").read_text("utf-8"))
    assert page.named("html") == [{"lang": "ja"}] and "平均と標準偏差のみ" in page.text and is_safe(page)
    assert "保持画像がない" in page.text and "p" not in pd.read_csv(desk / "mine" / "ranking.csv")


def test_the_experiment_by_its_defaults_on_a_tree_of_pictures(desk):
    asked = set_all(model="net.yaml", dataset_path="photos", n_images=3)
    done = type_in(desk, "run", EXPERIMENT, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict, place = done.stdout.splitlines()[-2:]
    assert re.match(r"3 misread images edited: most are corrected by .*% after 8 units; what that does to", verdict)
    results = pd.read_csv(Path(place).parent / "results.csv")
    summary = json.loads((Path(place).parent / "summary.json").read_text())
    assert "resize (16, 16)" in summary["preprocessing"] and 0 < summary["accuracy"] < summary["accuracy_high"] <= 1
    after = results[(results["algo"] == "raw") & (results["edit"] == "prune")].set_index("k")["confidence_true"]
    assert summary["confidence raw prune"] == pytest.approx(after[8].mean() - after[0].mean())
    assert {"scale_free_pot", "POT"} <= set(results["algo"]) and results["image"].str.endswith(".png").all()
    page = next((desk / "runs").glob(f"{EXPERIMENT.stem}__*/*.html")).read_text("utf-8")
    assert "comes from 39 images. Of 48 images 9 that are misread were left out" in page and str(desk / "cache") in page

    listed = type_in(desk, "cache").stdout
    assert "profiles" in listed and listed.splitlines()[-1].endswith(f"in {desk / 'cache'}")
    emptied = type_in(desk, "cache", "--empty")
    assert "removed" in emptied.stdout and not list((desk / "cache").iterdir())


def test_profiles_by_the_names_of_a_network_and_a_folder(desk, mistake):
    done = type_in(desk, "profile", "--model", "net.yaml", "--data", "photos", "--out", "profiles", "--quiet")
    assert done.returncode == 0, done.stderr
    network = mistake[0]
    tree, store = models.reference_set(network, desk / "photos"), pss.ProfileStore.open(desk / "profiles")
    assert store.misclassified.tolist() == models.misclassified(network.model, tree).index.tolist()
    assert "resize=(16, 16)" in store.manifest["provenance"]["preprocessing"]


def test_folders_named_by_numbers_may_have_been_counted_in_the_order_of_their_names(tmp_path):
    """As torchvision's ImageFolder counts them: 0, 1, 10, 2. Some are read right all the same."""
    names = sorted(str(n) for n in range(11))
    for place, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (4, 6), (20 * place,) * 3).save(tmp_path / "photos" / name / f"{n}.png")
    grey, levels = torch.nn.Conv2d(3, 1, 1, bias=False), 20 / 255 * torch.arange(11.0)
    nearest = torch.nn.Linear(1, 11)
    grey.weight.data[:], nearest.weight.data[:, 0], nearest.bias.data[:] = 1 / 3, 2 * levels, -(levels**2)
    model = torch.nn.Sequential(grey, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nearest)
    plain = models.Network("mine", model, models.Preprocessing(), tuple(map(str, range(11))), "as they are")
    told = reading.measure(plain, models.reference_set(plain, tmp_path / "photos")).told()
    assert "10 of 55" in told[0] and "(0, 1, 10, 2, 3, …)" in told[0] and "100% would be right" in told[0]
    assert "Not one image is read right of these classes: 2, 3, 4" in told[0] and "（0, 1, 10, 2, 3, …）" in told[1]
    listed = dataclasses.replace(plain, classes=tuple(names))
    shutil.rmtree(tmp_path / "photos" / "0")  # and with some of them the names count, not the numbers
    found = reading.measure(listed, models.reference_set(listed, tmp_path / "photos"))
    assert found.right == 50 and found.told()[0].endswith("%).")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (set_all(model="net.yaml", image_path="dog.jpg"), "image_path = '.*my desk.*dog.jpg' is not there"),
        (set_all(model="nets.yaml"), "model = '.*nets.yaml' is not there; relative places are seen from"),
        (set_all(method="fisher"), "method = 'fisher': expected one of zscore, abs_zscore, "),
        (set_all(imgae_path="x.png"), "has no parameter imgae_path: it has model, weights"),
        (set_all(k="many"), "k = 'many' is a text, but its default 10 is a whole number"),
        (["sweep", "sweep.yaml"], "method = 'fisher': expected one of zscore, abs_zscore, "),
    ],
)
def test_what_a_run_lacks_is_said_before_it_starts(desk, arguments, says):
    command = arguments if arguments[0] == "sweep" else ["run", EXPLAIN, "--out", "none", *arguments]
    done = type_in(desk, *command)
    assert done.returncode == 2 and re.search(says, done.stderr.replace("\n", " ")), done.stderr
    assert not (desk / "none").exists() and not (desk / "runs" / "sweep").exists()


@pytest.mark.parametrize(
    ("notebook", "asked", "says"),
    [
        (EXPLAIN, {"model": "broken.yaml"}, ["does not fit Sequential: 0.weight is (8, 3, 3, 3)", "in .*broken.yaml"]),
        (EXPLAIN, {"model": "net.yaml", "image_path": "{picture}", "label": 0}, ["give reference or data_root"]),
        (EXPLAIN, {"model": "swapped.yaml", "data_root": "photos", "index": 0}, ["Nothing is ranked, .* allow_chance"]),
        (
            EXPLAIN,
            {"model": "net.yaml", "data_root": "photos", "index": 0, "reference": "other.safetensors"},
            ["reference /other.safetensors: the reference was fitted .*-p reference FOLDER"],
        ),
        (EXPLAIN, {"model": "net.yaml", "data_root": "lopsided"}, ["40 of 50 images .* Nothing is ranked, .* of each"]),
        (EXPERIMENT, {"model": "net.yaml"}, ["give dataset_path, a folder"]),
        (
            EXPERIMENT,
            {"model": "swapped.yaml", "dataset_path": "photos", "reference_images_path": "training"},
            ["Only 0 of 48 images of photos .* Nothing is ranked, .* allow_chance"],
        ),
    ],
)
def test_a_run_that_fails_says_why_and_where(desk, notebook, asked, says):
    """The error, its notes, and the notebook with the cell; every message names a parameter of that page."""
    picture = next((desk / "photos" / "cat").glob("*.png")).relative_to(desk)
    asked = {name: str(value).format(picture=picture) for name, value in asked.items()}
    done = type_in(desk, "run", notebook, "--out", "failed", *set_all(**asked))
    assert done.returncode == 1 and "FAILED: " in done.stdout
    told = done.stdout.replace(str(desk), "")
    assert all(re.search(text if ".*" in text else re.escape(text), told) for text in says), done.stdout
    place = Path(done.stdout.splitlines()[-1])
    assert place.name == f"{notebook.stem}.html" and place.exists()
    assert f"of {place.with_suffix('.ipynb')})" in done.stdout
