"""The report and the steps of notebook 11: whose image, which units, what is written, and that names are only text."""

import dataclasses
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.font_manager import findSystemFonts, fontManager
from served import Page, is_safe

import pss
from pss import models, patches
from pss.apps import experiment, explain, group, reading
from pss.apps.pages import in_japanese, sentence
from pss.apps.parameters import parameters_of
from pss.apps.report import Report

EVIL = '<script>alert(1)</script> & "quoted" onerror=1'


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


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
    policy = page.named("meta")[1]["content"]
    assert "script-src" not in policy and "default-src 'none'" in policy


def test_both_languages_each_with_its_own_texts(filled):
    page = read(filled.write())
    assert page.named("html") == [{"lang": "en"}]
    assert [(a["id"], a["lang"]) for a in page.named("article")] == [("en", "en"), ("ja", "ja")]
    assert [a["alt"] for a in page.named("img")] == [EVIL, "図"]
    assert page.texts["title"] == [EVIL] and page.texts["h1"] == [EVIL, EVIL + "の説明"]
    assert "ユニット" in page.text and "見出し" in page.text
    assert filled.files == ["bars.png", "report.html"]


def test_a_caption_stays_on_a_narrow_screen(tmp_path, browser):
    """A wide table is scrolled, what it shows is read without."""
    report = Report(tmp_path, "title", "題")
    report.table(pd.DataFrame([[0.5] * 20], columns=[f"column {i}" for i in range(20)]), "What it is " * 20, "表" * 100)
    page = browser.new_page(viewport={"width": 500, "height": 900})
    page.goto(report.write().as_uri())
    right = "e => e.getBoundingClientRect().right"
    assert page.locator("#en table").evaluate(right) > 900 and page.locator("#en caption").evaluate(right) <= 500
    assert page.evaluate("document.documentElement.scrollWidth") == 500
    page.close()


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
    with plt.rc_context({"font.family": ["sans-serif"]}):  # matplotlib's own style
        assert pss.plots.plain("cat") == "cat"


@pytest.mark.filterwarnings("error:Glyph")
def test_japanese_names_are_shown_where_a_font_has_them(monkeypatch):
    """And as ? where none has: on a figure they are no empty boxes."""
    files = [file for file in findSystemFonts() if "NotoSansCJK-Regular" in file]
    if not files:
        pytest.skip("no Japanese font is installed here")
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "CJK" not in font.name])
    for shown in ("? cat", "猫 cat"):
        with plt.rc_context():
            pss.plots.use_style()
            figure = plt.figure()
            figure.text(0, 0, pss.plots.plain("猫 cat"))
            figure.canvas.draw()
            plt.close(figure)
            assert pss.plots.plain("猫 cat") == shown
        fontManager.addfont(files[0])


def test_switches_take_what_papermill_passes():
    assert explain.switch("false", "x") is False and explain.switch(True, "x") is True
    with pytest.raises(ValueError, match="x is 'no': expected true or false"):
        explain.switch("no", "x")


def test_an_image_of_a_set():
    network = models.load("digits")
    case = explain.take_image(network, index=658)
    own = pss.data.digits("test")
    assert case.name == "digits/test: 658" and torch.equal(case.image[0], own.images[658])
    assert case.label == own.labels[658] == explain.take_image(network, index="digits/test: 658").label
    assert explain.take_image(network, index="658", label="3").label == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"index": -1}, r"digits/test has 0\.\.898"),
        ({"index": 899}, r"digits/test has 0\.\.898"),
        ({"index": "cat"}, r"digits/test has 0\.\.898"),
        ({"image_path": "a.png"}, "without label"),
        ({"image_path": "cat.jpg", "label": 3}, re.escape(str(Path.cwd() / "cat.jpg"))),
        ({"data_to_use": "mnits"}, "data_to_use 'mnits': expected photographs, "),
        ({"data_root": "nowhere"}, re.escape(str(Path.cwd() / "nowhere"))),
    ],
)
def test_an_image_that_is_not_there(asked, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        explain.take_image(models.load("digits"), **asked)


def test_a_network_without_images_is_told_which_parameter_takes_them():
    own = dataclasses.replace(models.load("digits", "random"), name="own")
    with pytest.raises(ValueError, match="no image: give image_path and label, or data_root"):
        explain.take_image(own)
    with pytest.raises(ValueError, match="give dataset_path"):
        experiment.images_of(own)
    assert experiment.usual_of(own, needed=False) is None


def test_the_notebook_offers_every_ranking_that_it_can_make(root):
    offered = parameters_of(root / "notebooks" / "11_explain_one_image.ipynb")["method"].choices
    units = pss.Units.of(models.load("digits", "random").model)
    saliency = torch.rand(30, len(units))
    reference = pss.Reference.fit(saliency)
    cannot = {"random_last_stage", "last_stage_raw", "scale_free_zscore", "scale_free_pot"}
    assert set(pss.RANKINGS) - set(offered) == cannot  # for few units, for another reference
    for method in offered:
        assert len(pss.rank(saliency[:1], reference, method, units=units)[0]) == len(units)


def test_table_of_units_and_a_reference_without_tail():
    units = pss.Units.of(models.load("digits", "random").model)
    reference = pss.Reference(mean=torch.ones(len(units)).double(), std=torch.ones(len(units)).double())
    saliency = torch.arange(len(units), dtype=torch.float32)[None]
    order = pss.rank(saliency, reference, "zscore")[0]
    known = reading.Usual(reference, ("", ""), None, torch.empty(0))
    table = explain.unit_table(saliency, known, units, order)
    assert table["unit"].tolist() == order.tolist() == list(range(len(units)))[::-1] and "p" not in table
    assert table["z"].iloc[0] == len(units) - 2 and table["rank"].tolist() == list(range(1, len(units) + 1))
    assert "cannot" in explain.caution(reference)[0]


@pytest.mark.parametrize(
    ("significant", "n", "right", "says"),
    [
        (None, 0, 9.0, "conv[1] stands out most (z = 4.0). How many are significant cannot be said without a tail"),
        (
            0,
            999,
            None,
            "0 of 4 units are significant at a false-discovery rate of 5%; conv[1] stands out most (z = 4.0).",
        ),
        (0, 20, None, "With 20 reference images no unit can be significant unless 4 or more stand out at once"),
        (1, 999, 0.5, "1 of 4 units is significant"),
        (3, 999, 0.5, "Most units do so (3 of 4 are significant at a false-discovery rate of 5%), because the whole"),
        (3, 999, 9.0, "How many are significant cannot be said: of 30 other images of own that are read right 30 have"),
    ],
)
def test_what_stands_out_is_said_as_far_as_the_reference_goes(significant, n, right, says):
    """Not at all without a tail; not as a number where images that are read right are significant, too."""
    usual = pss.Reference(mean=torch.ones(4).double(), std=torch.ones(4).double())
    if n:
        usual = pss.Reference.fit(torch.rand(n, 4, generator=torch.Generator().manual_seed(0)))
    table = pd.DataFrame({"unit": [1, 0, 2, 3], "name": [f"conv[{i}]" for i in (1, 0, 2, 3)], "z": [4.0, 1, 0, 0]})
    if significant is not None and right != 9.0:
        table["significant"] = np.arange(4) < significant
    known = reading.Usual(usual, ("", ""), None, torch.empty(0), reading.Reading("own", 40, 30, 3))
    if right is not None:
        known = dataclasses.replace(known, right=torch.full((30, 4), right))
    told, japanese = explain.stands_out(table, known)
    assert says in told and ("no unit can be" in told) == (n == 20)
    assert sorted(re.findall(r"\d+", told.replace("one in twenty", "20 1"))) == sorted(re.findall(r"\d+", japanese))


def test_units_are_filters_or_where_most_layers_are_no_convolutions_all():
    network = models.load("digits", "random")
    assert reading.units_of(network, "auto").kind == "filters" and reading.units_of(network, "rows").kind == "rows"
    layers = [torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(512, 8), torch.nn.Linear(8, 10)]
    mixer = dataclasses.replace(network, model=torch.nn.Sequential(*layers))
    assert len(reading.units_of(mixer, "auto")) == 26
    told = reading.ranked(mixer, reading.units_of(mixer, "filters"))[0]
    assert "8 units in one layer are ranked; they hold 8% of the network's parameters. -p units all" in told
    assert "-p units" not in reading.ranked(network, reading.units_of(network, "auto"))[0]


def test_a_patch_is_told_with_the_same_numbers_in_both_languages():
    evidence = pd.DataFrame({"part": ["mistakes", "retain", "retain held out"], "kl_mean": [9.0, 0.0012, 0.034]})
    patch = pss.Patch("0" * 64, gains=torch.tensor([0.5, 1.5]), evidence=evidence)
    english, japanese = explain.verdict(patch)
    assert "2 units" in english and "KL of 0.0012 on the retain images that chose it and 0.034 on those held" in english
    assert "2個" in japanese and re.search(r"選択に使った[^，]+で0\.0012，取り分けて[^，]+で0\.034", japanese)
    assert english.endswith("held out.")
    wide = {
        "n": [226, 58],
        "kl_mean": [0.039, np.nan],
        "still_right": [0.969, np.nan],
        "accuracy_after": [0.969, 0.845],
    }
    folder = pd.DataFrame({"part": ["others, read right", "others, misread"], **wide})
    patch = dataclasses.replace(patch, evidence=pd.concat([evidence, folder], ignore_index=True))
    english, japanese = explain.verdict(patch)
    assert "On 226 other images that are read right its KL is 0.039, and 97% of them stay so." in english
    assert "Of 58 other misread images it corrects 84%." in english and "226枚ではKLの平均は0.039で，97%" in japanese


def ends_of(*rows) -> pd.DataFrame:
    names = ["edit", "units", "repaired at"]
    return pd.DataFrame(rows, columns=names).assign(edited=9, before=0.1, after=0.2)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([3, 3], "Pruning the first 3 units repairs it (so do 7 random units)"),
        ([float("nan"), 2], "by gain: pruning the 2 that add most to the margin of the mistake repairs it (so do 7"),
        ([float("nan")] * 2, "Neither pruning nor one step of fine-tuning the top 9 units, or the 9 that add most"),
    ],
)
def test_the_opening_says_by_what_the_mistake_was_repaired(found, says):
    """By the top units where they do; else by those of the largest gains; else by none."""
    ends = ends_of(("prune", "top", found[0]), ("prune", "gains", found[1]), ("prune", "random", 7.0))
    case = explain.Case(torch.zeros(1, 3, 2, 2), torch.tensor([1]), "it")
    table = pd.DataFrame({"unit": [3], "name": ["conv[3]"], "z": [4.0]})
    known = reading.Usual(pss.Reference(torch.ones(2).double(), torch.ones(2).double()), ("", ""), None, torch.empty(0))
    network = dataclasses.replace(models.load("digits", "random"), classes=("a", "b"))
    told = explain.opening(case, torch.tensor([0.9, 0.1]), network, table, known, [], ends, None, pss.Patch("0" * 64))
    assert says in told[2][0] and not re.search("[a-z]{4}", told[2][1].replace("None", ""))


def test_an_edit_after_which_all_is_one_class_is_said_to_repair_nothing():
    """Where most images are of that class the accuracy falls by little."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    model[1].weight.data[:] = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    network = models.Network("mine", model, models.Preprocessing(), ("a", "b"), "")
    images = torch.zeros(10, 1, 2, 2)
    images[:9, 0, 0, 0] = images[9, 0, 0, 1] = 1
    retain, case = (images, torch.tensor([0] * 9 + [1])), explain.Case(images[9:], torch.tensor([0]), "it")
    units, chosen = pss.Units.of(model, "rows"), {"top": torch.tensor([1, 0]), "random": torch.tensor([0, 1])}
    ends = ends_of(("prune", "top", 2.0), ("prune", "random", float("nan")))
    harm = explain.damage(network, case, retain, chosen, ends, 1, units, 0.1, "cross_entropy")
    assert harm["classes answered"].tolist() == [1, 2]
    table = pd.DataFrame({"unit": [1], "name": ["1[1]"], "z": [4.0]})
    known = reading.Usual(pss.Reference(torch.ones(2).double(), torch.ones(2).double()), ("", ""), None, torch.empty(0))
    before, none = torch.tensor([0.1, 0.9]), pss.Patch("0" * 64)
    told = explain.opening(case, before, network, table, known, [], ends, harm, none)
    assert "from 100% to 90%; of those read right before, 90% stay so. After it all" in told[2][0]
    assert "破壊" in told[2][1]
    for still, said in ((0.4, True), (0.5, False)):
        most = harm.assign(**{"still right": still, "classes answered": 2})
        told = explain.opening(case, before, network, table, known, [], ends, most, none)
        assert ("It breaks far more images than it repairs." in told[2][0]) == said


def test_units_by_gain_are_those_that_pruning_moves_the_margin_with():
    network, test = models.load("digits"), pss.data.digits("test")
    at = int(models.misclassified(network.model, test).index[0])
    case, units = explain.take_image(network, index=at), pss.Units.of(network.model)
    ids = explain.by_gain(network, case, units, 3)
    gains = pss.profile(network.model, case.image, case.labels, units, "logit_difference", signed=True, of="gain")[0]
    assert ids.tolist() == gains.topk(3).indices.tolist() and (gains[ids] > 0).all()


def test_the_cost_of_editing_is_that_of_as_many_as_repair_the_image():
    """Of k where none do, or the image is read right."""
    network, some = models.load("digits"), pss.data.digits("test").subset(range(40))
    case, units = explain.take_image(network, index=0), pss.Units.of(network.model)
    ends = ends_of(("prune", "top", 2.0), ("prune", "random", float("nan")), ("finetune", "top", 0.0))
    chosen, retain = {"top": torch.arange(5), "random": torch.arange(7, 12)}, (some.images, some.labels)
    found = explain.damage(network, case, retain, chosen, ends, 3, units, 0.1, "cross_entropy")
    assert found[["edit", "units", "k"]].to_numpy().tolist() == [
        ["prune", "top", 2],
        ["prune", "random", 3],
        ["finetune", "top", 3],
    ]
    expected = pss.side_effects(network.model, units, torch.tensor([[0, 1]]), *retain, progress=False)
    assert found["mean KL"][0] == expected["kl_mean"][0]


def test_mistakes_are_alike_if_the_same_units_add_to_their_margins():
    """However much; the largest cluster is the first, and what is like no two others belongs to none."""
    gains = torch.tensor([[1, 0.1], [-5, 0.2], [-1, 0], [1, -0.1], [3, 0], [9, 0.2], [-2, -0.2], [0, -1], [0, 0]])
    assert group._clusters(gains).tolist() == [1, 2, 2, 1, 1, 1, 2, 0, 0]


def test_a_group_of_images_in_memory():
    network, some = models.load("digits"), pss.data.digits("test").subset(range(120))
    units, wrong = pss.Units.of(network.model), models.misclassified(network.model, some)
    usual = models.reference(network, units, count=60, progress=False)
    found = group.gather(network, units, some, usual, k=5)
    assert found.table["id"].tolist() == wrong["id"].tolist() and len(found.rest[0]) == 120 - len(wrong)
    expected = pss.rank(pss.profile(network.model, found.images, found.labels, units), usual, "zscore", 5)
    assert torch.equal(found.top, expected) and found.reading.right == 120 - len(wrong)
    shared, clusters = group.shared(found, units, 3), group.clusters(found, network, units)
    assert shared["mistakes"].is_monotonic_decreasing and shared["mistakes"][0] <= len(wrong)
    assert clusters["images"].sum() == (found.table["cluster"] > 0).sum() and clusters["images"].min() >= 3
    assert len(group.contact_sheet(found, network, 1).axes) == min(8, clusters["images"][0])
    with pytest.raises(ValueError, match="none of the 60 images of digits is misread"):
        group.gather(network, units, some.subset(np.setdiff1d(np.arange(120), wrong.index)[:60]), usual)


@pytest.mark.parametrize(
    "label, predicted, says",
    [
        ([0, 0, 0, 1], [2, 2, 2, 2], "a → c (3)"),
        ([0, 0, 1, 3, 4], [2, 2, 2, 2, 0], "… → c (4)"),  # what is on them makes it c, whatever they show
        ([0, 1, 2, 3], [1, 2, 3, 4], "a → b (1)"),
    ],
)
def test_a_cluster_is_named_by_what_its_images_are_read_as(label, predicted, says):
    table = pd.DataFrame({"label": label, "predicted": predicted, "cluster": 1})
    network, zeros = models.load("digits", "random"), torch.zeros(len(label), 2, dtype=torch.int64)
    found = group.Group(table, zeros, zeros, zeros, zeros, (zeros, zeros), reading.Reading("x", 9, 5, 5), "", "x")
    named = dataclasses.replace(network, classes=tuple("abcdefghij"))
    assert group.clusters(found, named, pss.Units.of(network.model))["most frequent"].tolist() == [says]


def test_no_more_units_are_pruned_than_are_to_blame():
    """The first unit reads a mark as class 1, where each class has a unit of its own."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2))
    model[1].weight.data[:] = torch.eye(4)
    model[2].weight.data[:] = torch.tensor([[0.0, 1, 0, 0], [3, 0, 1, 0]])
    model[2].bias.data[:] = torch.tensor([0.0, 0.5])
    network = models.Network("mine", model, models.Preprocessing(), ("a", "b"), "")
    one, two = torch.eye(4)[1].reshape(1, 1, 2, 2), torch.eye(4)[2].reshape(1, 1, 2, 2)
    marked = one + torch.eye(4)[0].reshape(1, 1, 2, 2)
    rest, labels = torch.cat([one, two]), torch.tensor([0, 1])
    table = pd.DataFrame({"label": [0], "predicted": [1], "cluster": [0]})
    top, read = torch.zeros(1, 1, dtype=torch.int64), reading.Reading("x", 3, 2, 2)
    found = group.Group(table, marked, labels[:1], top, torch.zeros(1, 4), (rest, labels), read, "", "x")
    units = pss.Units.of(model, "rows")
    tried, best = group._fewest(found, network, units, torch.tensor([0, 1, 3, 2]))
    assert tried["k"].tolist() == [1, 2, 4] and best["k"] == 1
    assert tried["mistakes read right"].tolist() == [1, 0, 0] and tried["rest after"].tolist() == [1, 0.5, 0.5]


def test_repairs_that_cost_as_much_as_random_ones_are_no_better(tmp_path, monkeypatch):
    """Without most of its units a network gives one answer, which is right for some of the mistakes."""
    network, some = models.load("digits"), pss.data.digits("test").subset(range(60))
    units = pss.Units.of(network.model)
    found = group.gather(network, units, some, models.reference(network, units, count=60, progress=False))
    monkeypatch.setattr(group, "patches", lambda *_: {})
    for rest in (0.35, 0.9):
        ends = {"gains": (0.68, rest), "shared": (0.27, 0.6), "random": (0.55, 0.52)}
        rows = [
            {"units": n, "k": 5, "mistakes read right": a, "rest before": 1.0, "rest after": b, "classes answered": 1}
            for n, (a, b) in ends.items()
        ]
        of = lambda *given, rows=rows: pd.DataFrame([row for row in rows if row["units"] in given[-1]])  # noqa: E731
        monkeypatch.setattr(group, "repairs", of)
        report = Report(tmp_path, "title", "題")
        group.tell(found, network, units, report)
        said = [block["en"] for block in report.blocks]
        assert any("no better than pruning random units" in text for text in said) == (rest == 0.35)
        assert any("3 of these edits leave a single class" in text for text in said)
    heads = [block["columns"]["ja"] for block in report.blocks if block["kind"] == "table"]
    assert heads[0][:2] == ["ユニット", "誤分類画像の枚数"] and heads[0][3].startswith("クラスタ1")


def test_a_group_says_that_it_was_drawn_and_keeps_no_patch_that_chance_would_match(tmp_path, monkeypatch):
    network, some = models.load("digits"), pss.data.digits("test").subset(range(120))
    units, wrong = pss.Units.of(network.model), models.misclassified(network.model, some)
    monkeypatch.setattr(group, "_MOST", len(wrong) - 2)
    found = group.gather(network, units, some, models.reference(network, units, count=60, progress=False))
    parts = {"mistakes": 0.9, "retain": 1, "retain held out": 1, explain.OTHERS: 1, "mistakes held out": 0.5}
    evidence = pd.DataFrame({"part": [*parts, "mistakes held out, shuffled"], "accuracy_after": [*parts.values(), 0.5]})
    evidence = evidence.assign(n=8, kl_mean=0.001, kl_upper=0.002)
    tried = pd.DataFrame({"corrected": [8], "kl_upper": [0.5]})  # a larger budget would correct more of the fitted ones
    patch = pss.Patch("0" * 64, units.layers, torch.ones(len(units)) / 2, evidence=evidence, tried=tried)
    monkeypatch.setattr(group, "patches", lambda *_: {1: patch})
    told = group.tell(found, network, units, Report(tmp_path, "title", "題"), name="mend.safetensors")
    opening, advice = str(told["opening"]), str(told["next"])
    assert f"They were drawn at random from {len(wrong)}." in opening and len(found.table) == len(wrong) - 2
    assert "no better than chance, so it is not written" in opening and "mend.safetensors was not written" in opening
    assert not list(tmp_path.glob("*.safetensors")) and "budget" not in advice


def test_advice_for_a_group_does_not_send_to_the_group(tmp_path):
    """Of a single image whose units all stand out, or none, it does."""
    case, network = explain.Case(torch.zeros(1, 3, 2, 2), torch.tensor([1]), "it"), models.load("digits", "random")
    known = reading.Usual(pss.Reference(torch.ones(2).double(), torch.ones(2).double()), ("", ""), None, torch.empty(0))
    for significant in (True, False):
        table = pd.DataFrame({"significant": [significant] * 3})
        given = (network, case, 0, table, known, pss.Patch("0" * 64), [], 0.1, 1e-3)
        alone, all_ = (explain.what_next(*given, group=asked) for asked in (None, [("look", "見る")]))
        assert "went in as they are" not in str(alone)
        plain = dataclasses.replace(network, preprocess=models.Preprocessing())
        assert "went in as they are" in str(explain.what_next(plain, *given[1:]))
        assert "without index" in alone[-1][0] and "0.1 would" in str(alone)
        assert all_[0] == ("look", "見る") and "without index" not in str(all_) and "more reference" in str(all_)


def test_a_large_change_is_not_advised():
    """Of the budgets that would correct more the largest that is small is; where none is that is said."""
    case, network = explain.Case(torch.zeros(1, 3, 2, 2), torch.tensor([1]), "it"), models.load("digits", "random")
    known = reading.Usual(pss.Reference(torch.ones(2).double(), torch.ones(2).double()), ("", ""), None, torch.empty(0))
    tried = pd.DataFrame({"corrected": [0, 1, 2], "kl_upper": [0.01, 0.04, 0.9]})
    for most, budget in ((3, 1.05 * 0.04), (1, 0.0)):
        patch = pss.Patch("0" * 64, tried=tried[tried["corrected"] != 1] if most == 1 else tried)
        assert explain.larger_budget(patch) == pytest.approx(budget)
        table = pd.DataFrame({"significant": [True]})
        told = str(explain.what_next(network, case, 0, table, known, patch, [], 0, 1))
        assert ("-p budget 0.042" in told) == (budget > 0) == ("of a KL of at most 0.1, repairs it" not in told)


def test_tails_that_are_only_rough_are_told():
    usual = pss.Reference.fit(torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)).log().neg())
    told = explain.caution(dataclasses.replace(usual, fitted=torch.tensor([True, False, True, True])))
    assert "One unit has too little above the threshold" in told[0] and "1個のユニットでは" in told[1]
    assert explain.caution(usual)[0] == "The reference is made of 2,000 images."


def test_names_of_maps_are_japanese_where_the_report_is(tmp_path):
    names = ["gains of 10", "top 10", "gains of random units", "random units", "integrated gradients"]
    lost = pd.DataFrame({"map": names, "lost": [0.2, 0.3, 0.1, 0.05, 0.4]})
    report = Report(tmp_path, "title", "題")
    report.table(lost, "maps", "マップ")
    cells = [row[0] for row in report.blocks[0]["rows"]["ja"]]
    assert cells[0] == "ゲイン（10個）" and not re.search("[a-z]", "".join(cells)) and len(set(cells)) == 5
    for best in (0.1, 0.4):
        told = explain.map_verdict(lost.assign(lost=[0.2, 0.3, 0.1, 0.05, best]), names[0], names[2:3])
        assert "gains of 10" in told[0] and not re.search("[a-z]", told[1])


def test_names_of_rankings_are_japanese_where_the_report_is(root):
    for method in parameters_of(root / "notebooks" / "11_explain_one_image.ipynb")["method"].choices:
        assert re.search("[^ -~]", in_japanese(pss.plots.METHOD_LABELS[method])), method


@pytest.mark.parametrize("budget", [1e-6, 10.0])
def test_a_patch_over_its_budget_on_the_folder_is_taken_back(budget):
    network, images = models.load("digits"), pss.data.mnist("test").subset(range(40))
    units = pss.Units.of(network.model)
    gains = 1 + 0.1 * torch.randn(len(units), generator=torch.Generator().manual_seed(0))
    own = patches.base_fingerprint(network.model)
    patch = pss.Patch(own, units.layers, gains, about={"budget": str(budget)})
    patch = patch.measured(network.model, {"mistakes": (images.images[:5], images.labels[:5])})
    found = explain.with_evidence(network, patch, {explain.OTHERS: (images.images[5:], images.labels[5:])})
    kl, upper = found.evidence.set_index("part").loc[explain.OTHERS, ["kl_mean", "kl_upper"]]
    assert 1e-6 < kl < 10
    if budget > kl:
        assert torch.equal(found.gains, gains) and not found.reason
    else:
        assert not len(found.gains) and f"its KL is {kl:.2g}, up to {upper:.2g}" in found.reason
        assert explain.larger_budget(found) == pytest.approx(1.05 * upper) and upper > kl
        with pytest.raises(ValueError, match="more than the budget of 1e-06"):
            found.apply(network.model)


def test_numbers_agree_with_their_nouns():
    one, two = (sentence("group", name="x", unit="u", k=3, chance=1.0, n=n, hits=n, count=n)[0] for n in (1, 2))
    assert "1 misread image of x was looked at" in one and "u: 1 has it" in one and "One unit is there in" in one
    assert "2 misread images of x were looked at" in two and "u: 2 have it" in two and "2 units are there in" in two
    left = [sentence(f"left out {who}", n=9, itself=n, misread=n) for n in (1, 2) for who in ("itself", "misread")]
    assert "the explained one was left" in left[0][0] and "one that is misread was left" in left[1][0]
    assert "2 copies of the explained one were" in left[2][0] and "2 that are misread were left" in left[3][0]
    assert "No three of them" in sentence("group unlike")[0]
    assert "make one cluster, with one image in all" in sentence("group alike", clusters=1, inside=1)[0]
    assert "説明の対象は除いた" in left[0][1] and "説明の対象と同じ2枚は除いた" in left[2][1]
    assert "1 of 24 images of x is read right" in reading.Reading("x", 24, 1, 3).told()[0]


@pytest.mark.parametrize(
    "best, more",
    [
        ({"left": [1], "corrected": 0}, None),
        ({"left": [1, 2], "corrected": 0}, {"corrected": 1, "kl": 0.001, "kl_upper": 0.027}),
        ({"left": [1], "corrected": 3}, None),
        ({"left": [1], "corrected": 0}, {"corrected": 1, "kl": 0.0074, "kl_upper": 0.027}),
        ({"left": [1], "corrected": 0}, {"corrected": 1, "kl": 0.001, "kl_upper": 0.027}),
        ({"left": [1], "corrected": 0}, {"corrected": 1, "kl": 0.0045, "kl_upper": 0.027}),
        ({"left": [1], "corrected": 0}, {"corrected": 1, "kl": 0.001, "kl_upper": 0.2}),
        ({"left": [1], "corrected": 0}, {"corrected": 1, "kl": 0.3, "kl_upper": 0.9}),
    ],
)
def test_a_patch_that_was_not_found_says_why_in_both_languages(best, more):
    reason = patches.reason_of(best, more, 8, 0.01)
    english, japanese = explain.verdict(pss.Patch("0" * 64, reason=reason))
    assert reason in english and not re.search(r"[a-z]{4}", japanese)
    assert sorted(re.findall(r"[\d.]*\d%?", english)) == sorted(re.findall(r"[\d.]*\d%?", japanese))
    assert ("times as many retain images" in english) == (
        more is not None and more["kl"] == 0.001 and more["kl_upper"] < 0.1
    )  # hundreds of times are no advice
    assert ("a budget of that" in english) == (more is not None and more["kl_upper"] < 0.1)
    assert ("that is known to be small does that" in english) == (more is not None and more["kl_upper"] > 0.1)
