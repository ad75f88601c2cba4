"""A network and pictures of one's own, through the command line as a user types it."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pss
from pss import models
from pss.apps import explain

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
EXPLAIN, EXPERIMENT = NOTEBOOKS / "11_explain_one_image.ipynb", NOTEBOOKS / "12_experiment.ipynb"
MODULE = """
import torch

def make(width):
    layers = [torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 3))
"""
YAML = """
model: our_nets:make
arguments: {width: 8}
checkpoint: net.pth
preprocessing: {resize: [16, 16], crop: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
classes: [cat, '<b>dog', '$x$']
"""


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.texts = [], "", defaultdict(list)
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
        if self.tags and data.strip():
            self.texts[self.tags[-1][0]].append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def is_safe(page: Page) -> bool:
    """No script, nothing that runs, nothing fetched: pictures inside, links within the page."""
    inside = all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in page.named("img"))
    links = all(a["href"].startswith("#") for a in page.named("a"))
    handlers = any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    return inside and links and not handlers and not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


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
    torch.save(scope["make"](8).state_dict(), desk / "net.pth")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "<b>dog", "$x$")):
        (desk / "photos" / name).mkdir(parents=True)
        for n in range(10):
            pixels = rng.integers(0, 120, (20, 24, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(desk / "photos" / name / f"<img src=x onerror=1> {n}.png")
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
    at = int(pss.models.misclassified(network.model, tree).index[0])
    return network, str(tree.ids[at]), *tree[at]


def test_retain_images_are_without_the_explained_image(desk, mistake):
    network, name, image, label = mistake
    case = explain.take_image(network, data_root=str(desk / "photos"), index=name)
    assert torch.equal(case.image[0], image)
    retain, labels = explain.retain_images(network, case, count=30)
    assert len(retain) == len(labels) == 29 and not any(torch.equal(x, image) for x in retain)
    assert sorted([*labels.tolist(), int(label)]) == sorted([0, 1, 2] * 10)


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
    assert {p.name for p in out.glob("*.png")} == {"image.png", "profile.png", "input_saliency.png", "edits.png"}
    assert (out / EXPLAIN.name).exists() and len(list((out / "figures").glob("*.png"))) >= 4
    page = Page(Path(place).read_text("utf-8"))
    assert is_safe(page) and "<img src=x onerror=1>" in page.text and verdict in page.text
    assert len(table) == 16 and table["rank"].tolist() == list(range(1, 17)) and table["p"].between(0, 1).all()
    with np.load(out / "profile.npz") as kept:
        expected = pss.profile(network.model, image[None], torch.tensor([label]))[0]
        np.testing.assert_allclose(kept["profile"], expected.numpy(), rtol=1e-4)
        assert kept["order"].tolist() == table["unit"].tolist() and int(kept["label"]) == label
    assert verdict.startswith("A patch of") == (out / "mend.safetensors").exists()
    if (out / "mend.safetensors").exists():
        with pss.Patch.load(out / "mend.safetensors").applied(network.model) as mended:
            assert int(mended(image[None]).argmax()) == label


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
    asked = set_all(model="net.yaml", dataset_path="photos", reference_images_path="photos", n_images=3, filters=2)
    done = type_in(desk, "run", EXPERIMENT, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict, place = done.stdout.splitlines()[-2:]
    assert re.match(r"3 misread images edited: most are corrected by .*% after 2 units", verdict)
    results = pd.read_csv(Path(place).parent / "results.csv")
    assert {"scale_free_pot", "POT"} <= set(results["algo"]) and results["image"].str.endswith(".png").all()

    listed = type_in(desk, "cache").stdout
    assert "profiles" in listed and listed.splitlines()[-1].endswith(f"in {desk / 'cache'}")
    emptied = type_in(desk, "cache", "--empty")
    assert "removed" in emptied.stdout and not list((desk / "cache").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (set_all(model="net.yaml", image_path="dog.jpg"), "image_path = '.*my desk.*dog.jpg' is not there"),
        (set_all(model="nets.yaml"), "model = '.*nets.yaml' is not there; relative places are seen from"),
        (set_all(method="fisher"), "method = 'fisher': expected one of zscore, abs_zscore, pot"),
        (set_all(imgae_path="x.png"), "has no parameter imgae_path: it has model, weights"),
        (set_all(k="many"), "k = 'many' is a text, but its default 10 is a whole number"),
        (["sweep", "sweep.yaml"], "method = 'fisher': expected one of zscore, abs_zscore, pot"),
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
        (EXPLAIN, {"model": "net.yaml", "image_path": "{picture}", "label": 0}, ["give reference, .* or data_root"]),
        (EXPERIMENT, {"model": "net.yaml", "dataset_path": "photos"}, ["give reference_images_path, a folder"]),
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
    assert place.name == notebook.name and place.exists() and f"of {place})" in done.stdout
