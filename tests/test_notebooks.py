"""The notebook contract: structure, languages and outputs of every committed notebook."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
MACHINE_PATHS = re.compile(r"/(home|root|work|tmp|Users|var|mnt)/|[A-Z]:\\\\")
PROGRESS = re.compile(r"it/s\]|\d+%\|")
POLITE = re.compile(r"(です|ます|でした|ました|ください|でしょう)[．。，、\s)」]")
KANA = re.compile(r"[ぁ-んァ-ン]")

# One word for one thing: what is not written, and the word of the glossary that stands for it.
INSTEAD = {
    r"(?<!（)標準化顕著性(?!（z得点）)": "z得点",
    r"閾値超過法": "POT",
    r"最後のステージ": "最終ステージ",
    r"チャンネル": "チャネル",
    r"バッチ正規化": "BatchNorm",
    r"(そのまま|標準化前)の顕著性": "生の顕著性",
    r"等しい長さのステップ": "等ノルムのステップ",
    r"リテイン": "保持画像",
    r"発散": "KLダイバージェンス",
}
METAPHORS = re.compile(r"台帳|台地|騒ぎ過ぎ|張り付|語[るりらっ]|報われ|釣り針|畳み込め|普段から最?も?外れ")

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in cells(path) if c.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def pairs(path: Path) -> list[tuple[str, str]]:
    """Text of each English cell and of its Japanese twin."""
    markdown = [c for c in cells(path) if c.cell_type == "markdown"]
    return [(a.source, b.source) for a, b in zip(markdown[::2], markdown[1::2], strict=True)]


def test_kernel_and_format(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"


def test_one_parameters_cell_of_plain_literals(path):
    tagged = [c for c in code(path) if "parameters" in tags(c)]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        ast.literal_eval(statement.value)


def test_full_size_parameters_are_known(path):
    import yaml

    from pss.apps.parameters import parameters_of

    full = FOLDER / "params" / "full.yaml"
    given = yaml.safe_load(full.read_text(encoding="utf-8")).get(path.stem, {})
    assert set(given) <= set(parameters_of(path))


def test_markdown_comes_in_pairs(path):
    found = cells(path)
    position = 0
    while position < len(found):
        cell = found[position]
        if cell.cell_type == "markdown":
            assert "lang-en" in tags(cell), f"cell {position} is markdown without lang-en: {cell.source[:60]}"
            twin = found[position + 1]
            assert twin.cell_type == "markdown" and "lang-ja" in tags(twin), f"cell {position} has no Japanese twin"
            assert ("solution" in tags(cell)) == ("solution" in tags(twin))
            position += 2
        else:
            assert not {"lang-en", "lang-ja"} & set(tags(cell))
            position += 1


def test_twins_have_the_same_headings_equations_links(path):
    strip = lambda s: re.sub(r"\s+", "", s)  # noqa: E731
    for english, japanese in pairs(path):
        for pattern in (r"^(#+) ", r"\]\(([^)\s]+)\)", r"\$\$(.+?)\$\$", r"`([^`]+)`"):
            flags = re.MULTILINE | re.DOTALL if "$$" in pattern else re.MULTILINE
            first, second = (sorted(map(strip, re.findall(pattern, t, flags))) for t in (english, japanese))
            if pattern.startswith("`"):  # code words may be repeated in one language and not in the other
                first, second = sorted(set(first)), sorted(set(second))
            assert first == second, f"twins differ in {pattern}: {english[:60]!r}"


def test_japanese_is_written_in_plain_style(path):
    for english, japanese in pairs(path):
        prose = re.sub(r"```.*?```", "", japanese, flags=re.DOTALL)
        assert KANA.search(prose), f"no Japanese in the twin of {english[:60]!r}"
        assert not POLITE.search(prose), f"である style is asked for: {POLITE.search(prose)[0]!r} in {prose[:60]!r}"
        assert not re.search(r"[。、]", prose), f"punctuation is ，and ．: {prose[:60]!r}"
        assert not re.search(r"[ぁ-んァ-ン一-鿿]", english), f"Japanese in an English cell: {english[:60]!r}"


def test_links_to_files_resolve(path):
    for texts in pairs(path):
        for text in texts:
            for link in re.findall(r"\]\(([^)\s]+)\)", text):
                if not link.startswith(("http", "#")):
                    assert (path.parent / link.split("#")[0]).exists(), link


def test_card_leads_to_the_notebooks_before_and_after_by_their_titles(path):
    place = NOTEBOOKS.index(path)
    for language in (0, 1):
        title = lambda p, i=language: re.match(r"# (.+)", pairs(p)[0][i])[1].strip()  # noqa: E731
        expected = [f"[← {title(p)}]({p.name})" for p in NOTEBOOKS[max(0, place - 1) : place]]
        expected += [f"[{title(p)} →]({p.name})" for p in NOTEBOOKS[place + 1 : place + 2]]
        assert pairs(path)[0][language].split("\n\n")[1] == " | ".join(expected)


def test_tour_leads_to_every_notebook_by_its_title(path):
    for number, text in enumerate(next(p for p in pairs(NOTEBOOKS[0]) if p[0].startswith("## Where to go"))):
        assert path == NOTEBOOKS[0] or f"| [{pairs(path)[0][number].splitlines()[0][2:]}]({path.name}) |" in text


def test_opens_with_a_card_and_closes_with_exercises_and_references(path):
    found = pairs(path)
    assert found[0][0].startswith("# ") and "ipynb" in "".join(a for a, _ in found[:2])
    headings = [h for text, _ in found for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    assert any("References" in h for h in headings) and any("Exercises" in h for h in headings)
    solutions = [c for c in cells(path) if "solution" in tags(c)]
    assert any(c.cell_type == "markdown" for c in solutions)


def said(some: list[nbformat.NotebookNode]) -> list[tuple[str, str]]:
    """The sentences that `pss.plots.say` left in the outputs, English and Japanese."""
    outputs = [o for c in some if c.cell_type == "code" for o in c.outputs if "lang" in o.get("metadata", {})]
    assert [o.metadata["lang"] for o in outputs] == ["en", "ja"] * (len(outputs) // 2)
    texts = ["".join(o.data["text/markdown"]) for o in outputs]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_computed_sentences_say_the_same_numbers_in_both_languages(path):
    for english, japanese in said(cells(path)):
        assert KANA.search(japanese) and not re.search(r"[。、]", japanese) and not POLITE.search(japanese), japanese
        assert not re.search(r"[ぁ-んァ-ン一-鿿]", english), english
        first, second = (sorted(re.findall(r"\d+(?:\.\d+)?%?", t.replace(",", ""))) for t in (english, japanese))
        first, second = ([number for number in found if number != "1"] for found in (first, second))  # "one": 1枚
        assert first == second, f"the languages differ in numbers: {english!r}, {japanese!r}"


def test_closes_with_findings_in_both_languages(path):
    found = cells(path)
    starts = [n for n, c in enumerate(found) if c.cell_type == "markdown" and c.source.startswith("## ")]
    first = next(n for n in starts if found[n].source.startswith("## What was shown"))
    last = next(n for n in starts if found[n].source.startswith("## Exercises"))
    assert found[first + 1].source.startswith("## まとめ") and first < last
    english, japanese = (" ".join(t) for t in zip(*said(found[first:last]), strict=True))
    assert 2 <= len(re.findall(r"[.?!](?=\s|$)", english)) <= 4, f"two to four sentences of findings: {english!r}"
    assert 2 <= len(re.findall(r"[．？](?!\d)", japanese)) <= 4, f"two to four sentences of findings: {japanese!r}"


def japanese_of(path: Path) -> list[str]:
    alts = [o.get("metadata", {}).get("image/png", {}).get("alt-ja", "") for c in code(path) for o in c.outputs]
    return [b for _, b in pairs(path)] + [b for _, b in said(cells(path))] + alts


def test_one_word_for_one_thing(path):
    glossary = (FOLDER / "glossary.md").read_text(encoding="utf-8")
    root = FOLDER.parent  # the other Japanese pages are looked at with the tour
    pages = [root / "README.ja.md", root / "data/README.ja.md", *root.glob("docs/ja/**/*.md")]
    others = [page.read_text(encoding="utf-8") for page in pages] if path == NOTEBOOKS[0] else []
    for text in japanese_of(path) + others:
        for pattern, word in INSTEAD.items():
            assert word in glossary
            assert not (found := re.search(pattern, text)), f"{word}, not {found[0]}: {text[:80]!r}"
        assert not (found := METAPHORS.search(text)), f"a plain word for {found[0]}: {text[:80]!r}"
        for sentence in re.split(r"[．？]", text):
            assert "尺度" not in sentence or re.search(r"beta|β|形状", sentence), f"尺度 is beta: {sentence!r}"


def test_card_asks_a_question_and_answers_it_in_a_sentence(path):
    rules = ((("Question", "Answer"), r"[.?](?=\s)"), (("問い", "答え"), "[．？]"))
    for card, (names, stop) in zip(pairs(path)[0], rules, strict=True):
        rows = [re.search(rf"^\| \*\*{name}\*\* \| (.+) \|$", card, re.MULTILINE) for name in names]
        assert all(rows) and all(len(re.findall(stop, row[1])) <= 1 for row in rows)


def test_cells_are_short_and_time_nothing(path):
    for cell in code(path):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        limit = 25 if "parameters" in tags(cell) else 12
        assert len(lines) <= limit, f"{len(lines)} lines: {cell.source[:60]!r}"
        assert not re.search(r"%time|perf_counter|time\.time\(|%%capture|filterwarnings", cell.source)
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), "shell and magic commands are not portable"


def test_numbers_are_asserted_and_compared(path):
    source = "\n".join(c.source for c in code(path))
    assert re.search(r"^\s*(assert |torch\.testing\.assert|np\.testing\.assert)", source, re.MULTILINE)
    assert "# NBVAL_CHECK_OUTPUT" in source


def test_committed_with_clean_outputs(path):
    counts = [c.execution_count for c in code(path)]
    assert counts == list(range(1, len(counts) + 1)), "not from one clean run: make notebooks"
    for cell in code(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text", "")[:200]
            data = output.get("data", {})
            text = output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")
            assert not MACHINE_PATHS.search(text), text[:200]
            assert not PROGRESS.search(text) and "Warning" not in text


def test_pictures_have_alternative_text_in_both_languages_and_are_small(path):
    for cell in code(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                about = output.metadata.get("image/png", {})
                assert len(about.get("alt", "")) > 20, f"no alt text: {cell.source[:60]!r}"
                assert KANA.search(about.get("alt-ja", "")), f"no Japanese alt text: {cell.source[:60]!r}"
    assert path.stat().st_size < 1_500_000
