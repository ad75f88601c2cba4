"""The explorer: what is written equals what pss computes, and the page in a browser shows it and answers."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from served import served

import pss
from pss.apps import explorer

PAGE = """<!doctype html><html lang="{language}"><head><meta charset="utf-8"><title>Explorer</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="static/explorer.css"></head>
<body><main><h1>Explorer</h1><div id="pss-explorer" data-root="../explorer/"></div></main>
<script src="static/explorer.js" defer></script></body></html>"""


@pytest.fixture(scope="module")
def collection():
    return explorer.digits(count=2, retain=8)


@pytest.fixture(scope="module")
def site(tmp_path_factory, collection, root):
    """A folder with the page in both languages, the data of a few digits under two names, and the library."""
    folder = tmp_path_factory.mktemp("a site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "cache_folder", lambda: folder / "cache")
        second = replace(collection, name="photographs", images=collection.images[:1], ids=["9"], views=["cropped"])
        explorer.write(folder / "explorer", [collection, second], jobs=1)
    for language in ("en", "ja"):
        shutil.copytree(root / "docs" / "_static" / "explorer", folder / language / "static")
        (folder / language / "explorer.html").write_text(PAGE.format(language=language))
    return folder


def unpack(packed):
    """Numbers that `explorer.pack` kept, NaN where missing: what the page does."""
    levels = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).astype(float)
    return np.where(levels == explorer.LEVELS, np.nan, packed["low"] + packed["step"] * levels)


def read_script(path):
    """The JSON inside a file that `explorer.write` wrote."""
    return json.loads(path.read_text(encoding="utf-8").split(", ", 1)[1].removesuffix(");\n"))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1.0, 2.5, 1e3], [np.nan, 1.0, -np.inf, 2.0], [np.nan]])
def test_packed_numbers_come_back_within_half_a_step(values):
    values = np.array(values)
    packed = explorer.pack(values)
    back, finite = unpack(packed), np.isfinite(values)
    assert np.isnan(back[~finite]).all()
    np.testing.assert_allclose(back[finite], values[finite], atol=packed["step"] / 2 * (1 + 1e-9))


def test_written_numbers_equal_what_pss_computes(site, collection):
    written = read_script(site / "explorer" / "data" / f"digits-{collection.ids[1]}.js")
    model, units, c = collection.model, collection.units, collection
    x, y = c.images[1:2], c.labels[1:2]
    profile = pss.profile(model, x, y, units)
    before = model(x).softmax(dim=1)[0]
    assert (written["label"], written["predicted"]) == (int(y), int(before.argmax()))
    np.testing.assert_allclose(written["confidence"], before[[int(y), int(before.argmax())]].detach(), rtol=1e-3)
    gain = pss.profile(model, x, y, units, of="gain", signed=True, loss="logit_difference")
    ranked = {"zscore": c.plain.zscore(profile)[0], "raw": profile[0], "gain": gain[0]}
    for method, score in ranked.items():
        own = written["methods"][method]
        assert own["top"] == score.argsort(descending=True)[: explorer.K].tolist()
        np.testing.assert_allclose(own["z"], c.plain.zscore(profile)[0, own["top"]], rtol=1e-3)
        log_p = c.plain.log_tail_probability(profile)[0, own["top"]] / math.log(10)
        np.testing.assert_allclose(own["log10_p"], log_p, rtol=1e-3)
        np.testing.assert_allclose(own["saliency"], (gain if method == "gain" else profile)[0, own["top"]], rtol=1e-3)
    np.testing.assert_allclose(
        np.sinh(unpack(written["heights"]["zscore"])),
        c.plain.zscore(profile)[0],
        atol=0.05,
        rtol=written["heights"]["zscore"]["step"],
    )


def test_written_repair_equals_editing_by_hand(site, collection):
    c, k = collection, 10
    written = read_script(site / "explorer" / "data" / f"digits-{c.ids[0]}.js")["methods"]["pot"]
    x, y = c.images[:1], c.labels[:1]
    for edit in explorer.EDITS:
        steps = pss.editing.unit_steps(c.model, x, y, c.units, [written["top"][:k]], lr=c.learning_rate)[0]
        with pss.edited(c.model, c.units, written["top"][:k], edit, steps if edit == "finetune" else None):
            after, others = c.model(x).softmax(dim=1)[0], c.model(c.retain[0]).argmax(dim=1)
        np.testing.assert_allclose(written[edit]["true"][k], after[int(y)].detach(), rtol=2e-3, atol=1e-5)
        assert written[edit]["predicted"][k] == int(after.argmax())
        share = (others == c.retain[1]).double().mean()
        assert written[edit]["still_right"][c.elsewhere.index(k)] == pytest.approx(float(share), abs=1e-3)


def test_pictures_are_the_images(site, collection):
    from io import BytesIO

    from PIL import Image

    written = read_script(site / "explorer" / "data" / f"digits-{collection.ids[0]}.js")
    opened = Image.open(BytesIO(base64.b64decode(written["picture"].split(",")[1])))
    np.testing.assert_array_equal(np.asarray(opened), collection.pixels(collection.images[0]))
    size = Image.open(BytesIO(base64.b64decode(written["methods"]["zscore"]["map"].split(",")[1]))).size
    assert size == opened.size


def test_a_second_run_reads_the_cache_and_writes_the_same(tmp_path, site, collection, monkeypatch):
    monkeypatch.setattr(explorer, "cache_folder", lambda: site / "cache")
    monkeypatch.setattr(explorer, "describe", lambda *_: pytest.fail("computed again"))
    for path in explorer.write(tmp_path, [collection], jobs=1):
        if path.name != "index.js":
            assert path.read_bytes() == (site / "explorer" / path.relative_to(tmp_path)).read_bytes()
    with pytest.raises(pytest.fail.Exception):
        explorer.write(tmp_path, [replace(collection, learning_rate=0.1)], jobs=1)


def test_command_line_writes_with_several_processes(tmp_path):
    command = [
        sys.executable,
        *["-W", "error", "-m", "pss", "explorer", "--digits", "2", "--photographs", "0"],
        tmp_path / "out",
    ]
    cached = {**os.environ, "PSS_CACHE": str(pss.data.cache_folder())}
    done = subprocess.run(command, cwd=tmp_path, env=cached, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_script(tmp_path / "out" / "data" / "index.js")["sets"]["digits"]["retain"] == 200


def test_files_are_small_and_complete(site, collection):
    files = {p.name: p.stat().st_size for p in (site / "explorer" / "data").iterdir()}
    assert set(files) == {"index.js", "photographs-9.js", *[f"digits-{i}.js" for i in collection.ids]}
    assert max(files.values()) < 100_000
    assert (site / "explorer" / "vendor" / "LICENSE.txt").exists()


def test_digits_are_misclassified_and_of_every_class():
    chosen = explorer.digits(count=24, retain=4)
    assert (pss.models.predict(chosen.model, chosen.images).argmax(dim=1) != chosen.labels).all()
    wrong = pss.models.misclassified(chosen.model, pss.data.digits("test"))
    assert len(set(chosen.ids)) == 24 and set(chosen.labels.tolist()) == set(wrong["label"])
    assert (pss.models.predict(chosen.model, chosen.retain[0]).argmax(dim=1) == chosen.retain[1]).all()


def test_methods_of_the_page_are_named_in_both_languages(root):
    source = (root / "docs" / "_static" / "explorer" / "explorer.js").read_text(encoding="utf-8")
    for method in explorer.METHODS:
        assert len(re.findall(rf"\b{method}:", source)) == 6, method  # names, notes and axes, twice
    english, japanese = source.split("    ja: {")
    keys = lambda text: re.findall(r"^      (\w+):", text, re.MULTILINE)  # noqa: E731
    assert keys(english) == keys(japanese.split("\n    },")[0])


# --- the widget -------------------------------------------------------------------------------------------------------


def test_widget_reacts(collection):
    pytest.importorskip("ipywidgets")
    box = explorer.widget(collection)
    seen = [(box.text.value, box.picture.value)]
    for control, value in ((box.k, 3), (box.method, "raw"), (box.edit, "prune"), (box.image, 1)):
        control.value = value
        seen.append((box.text.value, box.picture.value))
    assert len({text for text, _ in seen}) == len({bytes(picture) for _, picture in seen}) == len(seen)
    assert all(bytes(picture[:4]) == b"\x89PNG" for _, picture in seen)
    c, y = collection, int(collection.labels[1])
    profile = pss.profile(c.model, c.images[1:2], c.labels[1:2], c.units)
    top = pss.rank(profile, c.plain, "raw", 3)[0]
    with pss.edited(c.model, c.units, top, "prune"):
        after = torch.softmax(c.model(c.images[1:2]).detach(), dim=1)[0, y]
    assert f"{float(after):.3f} after" in box.text.value and c.units.name(int(top[0])) in box.text.value


# --- the page, in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(site):
    """The folder over http."""
    with served(site) as url:
        yield f"{url}/"


@pytest.fixture
def open_page(browser, site):
    """Open the page; afterwards: no console error, nothing missing, no other host asked."""
    faults, pages = [], []

    def open_one(language="en", width=1280, root=None):
        root = root or f"{site.as_uri()}/"  # from disk
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        own = (root, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
        page.goto(f"{root}{language}/explorer.html")
        page.wait_for_selector("#pss-explorer[data-shown]")
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not faults


def shown(page) -> str:
    return page.get_attribute("#pss-explorer", "data-shown")


def test_page_shows_the_written_numbers(open_page, site, collection):
    page = open_page()
    written = read_script(site / "explorer" / "data" / f"digits-{collection.ids[0]}.js")
    own = written["methods"]["zscore"]
    rows = page.locator("#pss-top tbody tr")
    assert rows.count() == 10
    for i in range(10):
        cells = rows.nth(i).locator("th, td").all_inner_texts()
        assert cells[1] == collection.units.name(own["top"][i])
        assert float(cells[4]) == pytest.approx(own["z"][i], rel=0.01)
        assert float(cells[5]) == pytest.approx(10 ** own["log10_p"][i], rel=0.05)
    said = page.inner_text("#pss-result")
    assert f"read as {written['predicted']}" in said and f"{own['finetune']['true'][10]:.2f}" in said
    assert f"{written['significant']} of {len(collection.units):,} filters" in said
    drawn = page.evaluate(
        "Bokeh.documents.flatMap(d => d.roots()).map(f => f.renderers.map(r => r.data_source.data.x.length))"
    )
    assert drawn[0] == [len(collection.units), 10]  # a dot a filter, a ring for each edited one


def test_page_answers_to_clicks_and_keys(open_page, collection):
    page = open_page()
    first, second = collection.ids[:2]
    assert shown(page) == f"digits-{first} zscore 10"
    before = page.inner_text("#pss-result")
    page.locator("#pss-k").focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == f"digits-{first} zscore 11" and page.locator("#pss-top tbody tr").count() == 11
    page.locator("input[name=pss-method]:checked").focus()
    page.keyboard.press("ArrowDown")
    assert shown(page) == f"digits-{first} pot 11"
    page.locator("input[name=pss-image]:checked").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"#pss-explorer[data-shown='digits-{second} pot 11']")
    page.locator("input[name=pss-method][value=raw]").click()
    page.locator("input[name=pss-image]").nth(0).click()
    page.wait_for_selector(f"#pss-explorer[data-shown='digits-{first} raw 11']")
    page.locator("input[name=pss-set][value=photographs]").click()
    page.wait_for_selector("#pss-explorer[data-shown='photographs-9 raw 11']")
    assert page.inner_text("#pss-result") != before and "cropped" in page.inner_text("#pss-result")


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_is_accessible(open_page, address, language, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(language, width, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("summary").click()
    faults = axe.run(page).response["violations"]
    serious = [
        (f["id"], [n["html"][:120] for n in f["nodes"]]) for f in faults if f["impact"] in ("serious", "critical")
    ]
    assert not serious
    for image in page.locator("#pss-explorer figure img").all():
        assert len(image.get_attribute("alt")) > 8
    for chart in page.locator("[role=img]").all():
        assert len(chart.get_attribute("aria-label")) > 20
    assert ("枝刈り" in page.inner_text("#pss-explorer")) == (language == "ja")


def test_missing_data_is_said(browser, site, tmp_path):
    shutil.copytree(site / "en", tmp_path / "en")
    page = browser.new_page()
    page.goto((tmp_path / "en" / "explorer.html").as_uri())
    page.wait_for_selector("#pss-explorer [role=alert]")
    assert "data/index.js" in page.inner_text("#pss-explorer")
    page.close()
