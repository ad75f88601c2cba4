"""The report and the steps of notebook 11: whose image, which units, what is written, and that names are only text."""

import json
import re
import textwrap
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pss
from pss.apps import explain
from pss.apps.batch import run_notebook
from pss.apps.report import Report
from pss.models import zoo

EVIL = '<script>alert(1)</script> & "quoted" onerror=1'


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


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def is_safe(page: Page) -> bool:
    """No script, nothing that runs, nothing fetched: pictures inside, links within the page."""
    inside = all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in page.named("img"))
    links = all(a["href"].startswith("#") for a in page.named("a"))
    handlers = any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    return inside and links and not handlers and not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


@pytest.fixture
def filled(tmp_path):
    pss.plots.use_style()
    report = Report(tmp_path / "out", EVIL, EVIL + "の説明")
    report.heading(EVIL, "見出し")
    report.say(EVIL, "文．" + EVIL)
    report.table(pd.DataFrame({"unit": [3], "layer": [EVIL], EVIL: [0.5]}), EVIL, "表")
    report.show(pss.plots.top_confidences(torch.tensor([0.2, 0.8]), 0, [EVIL, "a$b$ 猫"]), "bars", EVIL, "図")
    report.settings({EVIL: EVIL})
    return report


def test_names_are_text_whatever_they_hold(filled):
    page = read(filled.write())
    assert is_safe(page) and page.text.count("<script>alert(1)</script>") > 5
    assert (
        "script-src" not in page.named("meta")[1]["content"]
        and "default-src 'none'" in page.named("meta")[1]["content"]
    )


def test_both_languages_each_with_its_own_texts(filled):
    page = read(filled.write())
    assert page.named("html") == [{"lang": "en"}]
    assert [(a["id"], a["lang"]) for a in page.named("article")] == [("en", "en"), ("ja", "ja")]
    assert [a["alt"] for a in page.named("img")] == [EVIL, "図"]
    assert page.texts["title"] == [EVIL] and page.texts["h1"] == [EVIL, EVIL + "の説明"]
    assert "ユニット" in page.text and "見出し" in page.text
    assert filled.files == ["bars.png", "report.html"]


def test_one_language(tmp_path, capsys):
    report = Report(tmp_path, "title", "題", language="ja")
    report.say("sentence", "文")
    page = read(report.write())
    assert page.named("html") == [{"lang": "ja"}] and not page.named("nav") and "sentence" not in page.text
    assert page.texts["title"] == page.texts["h1"] == ["題"]
    assert capsys.readouterr().out == "文\n"
    with pytest.raises(ValueError, match="'fr': expected one of en, ja, both"):
        Report(tmp_path, "title", "題", language="fr")


def test_text_of_a_figure_is_short_plain_and_known_to_the_font():
    assert pss.plots.plain("a$b$  c\nd") == r"a\$b\$ c d" and pss.plots.plain("猫 cat") == "? cat"
    assert len(pss.plots.plain("x" * 99)) == 28


def test_switches_take_what_papermill_passes():
    assert explain.switch("false", "x") is False and explain.switch(True, "x") is True
    with pytest.raises(ValueError, match="x is 'no': expected true or false"):
        explain.switch("no", "x")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    (tmp_path / "a.png").touch()
    given = explain.settle(
        tmp_path, model="digits", weights="random", image_path="a.png", data_to_use="", data_root="", reference=""
    )
    assert given.image_path == str(tmp_path / "a.png") and given.model == "digits" and given.reference == ""
    with pytest.raises(FileNotFoundError, match=re.escape(f"no picture 'cat.jpg' in {tmp_path}")):
        explain.locate("cat.jpg", tmp_path, "picture")


def test_an_image_of_a_set(tmp_path):
    network = zoo.load("digits")
    case = explain.take_image(network, index=658)
    own = pss.data.digits("test")
    assert (
        case.name == "digits/test: 658"
        and torch.equal(case.image[0], own.images[658])
        and case.label == own.labels[658]
    )
    assert explain.take_image(network, index="658", label="3").label == 3
    for wrong in (-1, 899, "cat"):
        with pytest.raises(ValueError, match=r"digits/test has 0\.\.898"):
            explain.take_image(network, index=wrong)
    with pytest.raises(ValueError, match="without label"):
        explain.take_image(network, image_path="a.png")


def test_table_of_units_and_a_reference_without_tail():
    units = pss.Units.of(zoo.load("digits", "random").model)
    reference = pss.Reference(mean=torch.ones(len(units)).double(), std=torch.ones(len(units)).double())
    saliency = torch.arange(len(units), dtype=torch.float32)[None]
    order = explain.ranked(saliency, reference, "zscore", units)
    table = explain.unit_table(saliency, reference, units, order)
    assert table["unit"].tolist() == order.tolist() == list(range(len(units)))[::-1] and "p" not in table
    assert table["z"].iloc[0] == len(units) - 2 and table["rank"].tolist() == list(range(1, len(units) + 1))
    assert "cannot" in explain.caution(reference)[0]
    with pytest.raises(ValueError, match="'pot' needs tail probabilities"):
        explain.ranked(saliency, reference, "pot", units)
    with pytest.raises(ValueError, match="'fisher' ranks by gradients"):
        explain.ranked(saliency, reference, "fisher", units)


def test_a_patch_is_told_with_the_same_numbers_in_both_languages():
    evidence = pd.DataFrame({"part": ["mistakes", "retain", "retain held out"], "kl_mean": [9.0, 0.25, 0.034]})
    tried = pd.DataFrame({"k": [1, 2], "kl": [0.7, 0.0012]})
    step = (torch.zeros(1), torch.ones(1))
    patch = pss.Patch(
        "0" * 64, (1, 2), ("a", "b"), ((), ()), step, (step[1] + 1, step[1] + 2), True, evidence=evidence, tried=tried
    )
    english, japanese = explain.verdict(patch)
    assert "2 units" in english and "KL of 0.0012 on the retain images that chose it and 0.034 on those held" in english
    assert "2個" in japanese and re.search(r"選択に使った[^，]+で0\.0012，取り分けて[^，]+で0\.034", japanese)


MODULE = """
import torch

def make(width):
    layers = [torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 3))
"""
YAML = """
model: our_package.nets:make
arguments: {width: 8}
checkpoint: net.pth
preprocessing: {resize: [16, 16], crop: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
classes: [cat, '<b>dog', '$x$']
"""


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Another package with a small network, a checkpoint, a description, and pictures by class."""
    package = tmp_path / "code" / "our_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.yaml").write_text(textwrap.dedent(YAML))
    from our_package.nets import make

    torch.manual_seed(0)
    torch.save(make(8).state_dict(), tmp_path / "net.pth")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "<b>dog", "$x$")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(10):
            pixels = rng.integers(0, 120, (20, 24, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"<img src=x onerror=1> {n}.png")
    return tmp_path


def test_retain_images_are_without_the_explained_image(workshop):
    network, root = zoo.load(str(workshop / "net.yaml")), str(workshop / "photos")
    case = explain.take_image(network, data_root=root, index=7)
    retain, labels = explain.retain_images(network, case, root, count=30)
    assert len(retain) == len(labels) == 29 and not any(torch.equal(x, case.image[0]) for x in retain)
    tree = zoo.reference_set(network, root)
    others = [int(tree[i][1]) for i in range(30) if i != 7]
    assert sorted(labels.tolist()) == sorted(others)


def test_a_network_and_pictures_of_ones_own(workshop, root):
    notebook, out = root / "notebooks" / "11_explain_one_image.ipynb", workshop / "out"
    common = {"model": str(workshop / "net.yaml"), "data_root": str(workshop / "photos"), "output": str(out)}
    asked = {"method": "pot", "k": 4, "budget": 100.0, "patch": "mend.safetensors", "reference_count": 0}
    network = zoo.load(str(workshop / "net.yaml"))
    tree = zoo.reference_set(network, workshop / "photos")
    wrong = pss.models.misclassified(network.model, tree).index
    run_notebook(notebook, workshop / "run.ipynb", common | asked | {"index": int(wrong[0])})
    page, table = read(out / "report.html"), pd.read_csv(out / "ranking.csv")
    assert is_safe(page) and "<img src=x onerror=1>" in page.text
    assert len(table) == 16 and table["rank"].tolist() == list(range(1, 17)) and table["p"].between(0, 1).all()
    units = pss.Units.of(network.model)
    image, label = tree[int(wrong[0])]
    with np.load(out / "profile.npz") as kept:
        expected = pss.profile(network.model, image[None], torch.tensor([label]), units)[0]
        np.testing.assert_allclose(kept["profile"], expected.numpy(), rtol=1e-4)
        assert kept["order"].tolist() == table["unit"].tolist() and int(kept["label"]) == label
    assert {p.name for p in out.glob("*.png")} == {"image.png", "profile.png", "input_saliency.png", "edits.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["top_unit"] == table["name"][0] and summary["z"] == pytest.approx(table["z"][0], rel=1e-4)
    written = (out / "mend.safetensors").exists()
    assert written == ("A patch of" in page.text)
    if written:
        pss.Patch.load(out / "mend.safetensors").apply(network.model)
        assert int(network.model(image[None]).argmax()) == label


def test_one_picture_with_published_statistics(workshop, root):
    """Mean and deviation only: a sentence says so, no p-values; no retain images either; in Japanese."""
    notebook, out = root / "notebooks" / "11_explain_one_image.ipynb", workshop / "out"
    torch.save({"mean": torch.rand(16), "std": torch.rand(16).double()}, workshop / "stats.pth")
    picture = next((workshop / "photos" / "cat").glob("*.png"))
    given = {"model": str(workshop / "net.yaml"), "image_path": str(picture), "label": "cat", "output": str(out)}
    given |= {"reference": str(workshop / "stats.pth"), "language": "ja", "compare_random": False, "noise_iters": 2}
    run_notebook(notebook, workshop / "run.ipynb", given | {"noise_percent": 0.1, "loss": "logit_difference"})
    page = read(out / "report.html")
    assert page.named("html") == [{"lang": "ja"}] and "平均と標準偏差のみ" in page.text and is_safe(page)
    assert "保持画像がない" in page.text and "p" not in pd.read_csv(out / "ranking.csv")
