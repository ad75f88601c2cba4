"""The site: built once, its files read, and its pages opened in a browser where there is one."""

import functools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from served import served

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "ja")
JAPANESE = re.compile(r"[ぁ-んァ-ヴ一-龠]")
NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
OWN = sorted(str(p.relative_to(ROOT / "docs/en").with_suffix("")) for p in (ROOT / "docs/en").rglob("*.md"))
PAGES = [*OWN, "data/README", "search", *(f"notebooks/{name}" for name in NOTEBOOKS)]

EXPLORER = ["--digits", "1", "--photographs", "0", "--jobs", "1"]  # test_explorer.py has more of it

each_page = pytest.mark.parametrize("page", PAGES)
each_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "docs/build.py", folder / "site", folder / "work"]
    made = subprocess.run([*command, *EXPLORER], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "site"


class Page(HTMLParser):
    """What the tests ask of a page: its elements, ids, and prose (no code, equations, words marked as foreign)."""

    VOID = frozenset(["br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"])

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.ids, self.prose = [], set(), []
        self.open: list[tuple[str, bool]] = []  # (tag, whether its text is prose)
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found, self.inside("article")))
        self.ids |= {found.get("id")}
        aside = tag in ("code", "pre", "script", "style") or ("lang" in found and tag != "html")
        aside = aside or "math" in (found.get("class") or "").split()
        if tag not in self.VOID:
            self.open.append((tag, not aside and all(prose for _, prose in self.open)))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.inside("article") and self.open[-1][1]:
            self.prose.append(data)

    def inside(self, tag):
        return any(name == tag for name, _ in self.open)


@pytest.fixture(scope="module")
def read(site):
    return functools.cache(lambda name: Page(site / name))


# The files


def test_both_languages_have_the_same_pages(site):
    made = {}
    for language in LANGUAGES:
        found = (p.relative_to(site / language) for p in (site / language).rglob("*.html"))
        made[language] = {str(path) for path in found if path.parts[0] != "_static"}
    assert made["en"] == made["ja"] == {f"{page}.html" for page in PAGES}


@each_language
@each_page
def test_page_is_in_its_language(read, language, page):
    found = read(f"{language}/{page}.html")
    prose = "".join(found.prose)
    assert next(a["lang"] for tag, a, _ in found.elements if tag == "html") == language
    assert page == "search" or bool(JAPANESE.search(prose)) == (language == "ja")
    assert "**" not in prose, "emphasis that Markdown did not take: " + prose[prose.index("**") - 30 :][:60]
    for tag, about, inside in found.elements:
        if tag == "img":
            assert about.get("alt") and bool(JAPANESE.search(about["alt"])) == (language == "ja"), about
        for said in (about.get("title"), about.get("aria-label"), about.get("placeholder")):
            if said and not inside and "lang" not in about:
                assert bool(JAPANESE.search(said)) == (language == "ja"), f"{tag}: {said}"


@each_language
@each_page
def test_links_lead_to_files_and_places_of_the_site(site, read, language, page):
    for tag, about, _ in read(f"{language}/{page}.html").elements:
        for link in filter(None, (about.get("href"), about.get("src"))):
            to = urlsplit(link)
            if to.scheme or link.startswith("//"):
                assert tag == "a", f"{link} is loaded from another host"
                continue
            target = (site / language / page).parent / unquote(to.path) if to.path else site / f"{language}/{page}.html"
            assert target.resolve().is_file(), link
            if to.fragment and target.suffix == ".html":
                name = str(target.resolve().relative_to(site.resolve()))
                assert unquote(to.fragment) in read(name).ids, link


@each_language
@each_page
def test_switch_and_alternates_name_the_same_page(read, language, page):
    up, other = "../" * (1 + page.count("/")), {"en": "ja", "ja": "en"}[language]
    up = up if "/" in page else f"./{up}"  # as Sphinx writes it
    found = read(f"{language}/{page}.html").elements
    switch = [a["href"] for tag, a, _ in found if tag == "a" and "language-switch" in (a.get("class") or "")]
    assert switch == [f"{up}{other}/{page}.html"]
    alternates = {a["hreflang"]: a["href"] for tag, a, _ in found if tag == "link" and a.get("rel") == "alternate"}
    assert alternates == {code: f"{up}{code}/{page}.html" for code in LANGUAGES}


@each_language
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_download_is_the_notebook_in_one_language(site, language, name):
    whole = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    book = nbformat.read(site / language / "_sources/notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    other = {"en": "lang-ja", "ja": "lang-en"}[language]
    assert [c.source for c in book.cells] == [c.source for c in whole if other not in c.metadata.get("tags", [])]


@each_language
def test_landing_page_names_every_notebook_with_a_time(read, language):
    page = read(f"{language}/index.html")
    links = [a.get("href") for tag, a, inside in page.elements if inside and tag == "a"]
    links = [link for link in links if "/0" in link or "/1" in link]
    assert links[-len(NOTEBOOKS) :] == [f"notebooks/{name}.html" for name in NOTEBOOKS]
    routes = [[n for n in NOTEBOOKS if n[:2] in route] for route in (("00", "03", "06", "13"), ("11", "12", "14"))]
    assert links[: -len(NOTEBOOKS)] == [f"notebooks/{name}.html" for route in routes for name in route]
    assert len(re.findall(r"about \d+ minutes|約\d+分", "".join(page.prose))) == len(NOTEBOOKS) + len(routes)
    assert re.search(r"about [1-9]\d* hours|約[1-9]\d*時間", "".join(page.prose))


@each_language
def test_code_of_figures_and_sentences_is_folded_and_what_measures_is_not(site, language):
    hidden = {"en": r"Show the code of the (figure|sentence)", "ja": r"(図|文)のコードを表示"}[language]
    for name in NOTEBOOKS:
        book = nbformat.read(site / language / "_sources/notebooks" / f"{name}.ipynb", as_version=4)
        folded = [c for c in book.cells if "hide-input" in c.metadata.get("tags", [])]
        assert folded, name
        page = (site / language / "notebooks" / f"{name}.html").read_text("utf-8")
        assert len(re.findall(hidden, page)) >= len(folded)
        for cell in folded:
            shown = [(o.get("data", {}).keys(), o.get("metadata", {}).get("lang")) for o in cell.outputs]
            assert any("image/png" in kinds or lang == language for kinds, lang in shown)
            assert not re.search(r"\bassert|\bprint\(|pss\.(rank|profile|edit)", cell.source), cell.source


def test_a_page_that_changed_is_built_again_and_no_other(site, tmp_path):
    work = site.parent / "work"
    changed = work / "en" / "sources" / "about.md"
    changed.write_text(changed.read_text("utf-8") + "\nNo line of ours.\n", "utf-8")
    dates = {path: path.stat().st_mtime_ns for path in [*work.rglob("*.html"), *work.rglob("explorer/*")]}
    command = [sys.executable, ROOT / "docs/build.py", tmp_path / "site", work]
    subprocess.run([*command, *EXPLORER], cwd=tmp_path, capture_output=True, text=True, check=True)
    again = {str(path.relative_to(work)) for path, date in dates.items() if path.stat().st_mtime_ns != date}
    assert "en/html/about.html" in again and not any("explorer/" in name or "notebooks/0" in name for name in again)
    assert "No line of ours" not in (tmp_path / "site" / "en" / "about.html").read_text("utf-8")


def test_japanese_page_of_the_data_holds_the_same_names_files_and_checksums():
    english, japanese = ((ROOT / "data" / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))
    for pattern in (r"`([^`\n]+)`", r"\b\d[\d,.]*%", r"https?://[^>\s]+"):
        assert set(re.findall(pattern, english)) == set(re.findall(pattern, japanese, re.ASCII))


# The browser


@pytest.fixture(scope="module")
def address(site):
    with served(site) as url:
        yield url


@pytest.fixture(scope="module")
def window(browser):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield context


@pytest.fixture
def tab(window, address):
    """A page of the browser; what it complained of, or asked of another host, fails the test."""
    faults = []
    page = window.new_page()
    page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    left = "net::ERR_ABORTED"  # the page was left while this was loading; what is missing answers 404
    page.on("requestfailed", lambda r: r.failure == left or faults.append(f"failed: {r.url}, {r.failure}"))
    page.on("response", lambda r: r.status >= 400 and faults.append(f"{r.status}: {r.url}"))
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or faults.append(f"elsewhere: {r.url}"))
    yield page
    page.close()
    assert not faults


def settle(page):
    """Wait until the equations are set."""
    page.wait_for_function("!document.querySelector('script[src*=mathjax]') || window.MathJax?.startup?.promise")
    page.evaluate("window.MathJax?.startup?.promise.then(() => true)")


# What the style sheets decide, for all pages alike, and what takes axe-core most of its time: checked on a few pages,
# in light and dark, by `test_colours_are_legible_in_light_and_dark`.
COLOURS = ["color-contrast", "link-in-text-block"]


def violations(page, **options) -> list[tuple]:
    """Rule, place and HTML of what axe-core calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"preload": False, "resultTypes": ["violations"], **options}).response["violations"]
    hard = [v for v in found if v["impact"] in ("serious", "critical")]
    return [(v["id"], node["target"], node["html"][:200]) for v in hard for node in v["nodes"]]


@each_language
@each_page
def test_page_opens_without_fault_fits_and_is_accessible(tab, address, language, page):
    tab.goto(f"{address}/{language}/{page}.html")
    settle(tab)
    assert not tab.evaluate("document.querySelectorAll('mjx-merror, .MathJax_Error').length")
    assert not violations(tab, rules={rule: {"enabled": False} for rule in COLOURS})
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= width, f"wider than {width} pixels"


@pytest.mark.parametrize("page", ["index", "explorer", "search", f"notebooks/{NOTEBOOKS[-1]}"])
def test_switch_leads_to_the_same_page_and_back(tab, address, page):
    tab.goto(f"{address}/en/{page}.html")
    for language in ("ja", "en"):
        tab.click(".language-switch")
        assert tab.url.split("?")[0] == f"{address}/{language}/{page}.html"
        assert tab.get_attribute("html", "lang") == language


@pytest.mark.parametrize(
    ("language", "word", "hit"),
    [
        ("en", "zymurgy", None),
        ("en", "pruning", "06_repair"),
        ("ja", "顕著性", "02_filter_aggregation"),
        ("ja", "裾", "04_heavy_tails"),
        ("ja", "裾確率", "05_pot_scoring"),
        ("ja", "ファインチューニング", "06_repair"),
        ("ja", "重い裾", "04_heavy_tails"),
        ("ja", "GPD", "05_pot_scoring"),
        ("ja", "該当なき語", None),
    ],
)
def test_search_finds(tab, address, language, word, hit):
    tab.goto(f"{address}/{language}/index.html")
    tab.locator(".search-button-field:visible").click()
    tab.locator("#pst-search-dialog input").fill(word)
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('.search-summary')?.innerText")
    links = tab.eval_on_selector_all("#search-results li a", "found => found.map(a => a.getAttribute('href'))")
    tab.wait_for_load_state("networkidle")  # the lines around each hit
    assert any(hit in link for link in links) if hit else not links
    said = tab.inner_text(".search-summary")
    assert bool(JAPANESE.search(said)) == (language == "ja")


@each_language
def test_front_door_opens_in_the_readers_language(browser, address, language):
    with browser.new_context(locale={"en": "en-GB", "ja": "ja-JP"}[language]) as context:
        page = context.new_page()
        page.goto(address)
        page.wait_for_url(f"**/{language}/index.html")


@each_language
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_legible_in_light_and_dark(browser, address, language, scheme):
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        for name in ("index", "explorer", "notebooks/glossary", f"notebooks/{NOTEBOOKS[0]}"):
            page.goto(f"{address}/{language}/{name}.html")
            settle(page)
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 64) == (scheme == "dark")
            assert not violations(page, runOnly=COLOURS)


@each_language
def test_solutions_are_folded_and_open_by_keyboard(tab, address, language):
    tab.goto(f"{address}/{language}/notebooks/{NOTEBOOKS[0]}.html")
    folded = tab.locator("article details")
    assert folded.count() and not any(folded.nth(i).get_attribute("open") for i in range(folded.count()))
    folded.first.locator("summary").focus()
    tab.keyboard.press("Enter")
    assert folded.first.get_attribute("open") is not None
