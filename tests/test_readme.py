"""The READMEs: short, alike in both languages, and saying nothing that a notebook or the folder does not."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "README.ja.md")}
OUTCOMES = {
    "README.md": ("## What came out", "## What is known not to work"),
    "README.ja.md": ("## わかったこと", "## うまくいかないとわかっていること"),
}
NUMBER = r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?%?"

each = pytest.mark.parametrize("name", TEXTS)


def bullets(name: str, of: int) -> list[str]:
    """What came out, a bullet each; or what is known not to work."""
    section = TEXTS[name].split(OUTCOMES[name][of])[1].split("\n## ")[0]
    return [" ".join(bullet.split()) for bullet in section.split("\n- ")[1:]]


def numbers(text: str) -> set[str]:
    """Numbers of a text, without those in names (ResNet-18) and links; shares as percentages."""
    text = re.sub(r"\[.*?\]\(.*?\)", "", text)
    return {number.replace(",", "") for number in re.findall(NUMBER, text)}


def printed(notebook: Path) -> set[str]:
    """Numbers in a notebook's stored outputs, shares also as percentages."""
    texts = []
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += [output.get("text", []), data.get("text/plain", []), data.get("text/markdown", [])]
    found = numbers("\n".join("".join(text) for text in texts))
    return found | {f"{float(share):.0%}" for share in found if re.fullmatch(r"[01]\.\d\d", share)}


@each
def test_every_number_of_what_is_claimed_is_in_the_notebook_that_is_named(name):
    assert 1 <= len(bullets(name, 0)) <= 6
    for of in (0, 1):
        for bullet in bullets(name, of):
            names = re.findall(r"\[\d\d\]\((notebooks/\w+\.ipynb)\)", bullet)
            said = numbers(re.sub(r"(\d)(?=[^\W\d_a-zA-Z])", r"\1 ", bullet))  # a counter follows at once in Japanese
            assert names or (of and not said), f"no notebook is named: {bullet}"
            shown = set().union(*(printed(ROOT / notebook) for notebook in names))
            assert said <= shown, f"{said - shown} not in the outputs of {names}: {bullet}"


def test_english_is_short_and_both_are_wrapped_alike():
    assert len(TEXTS["README.md"].split()) <= 900
    long = [line for line in TEXTS["README.md"].split("\n") if len(line) > 120 and not line.startswith(("|", "!"))]
    assert not long


def test_both_languages_have_the_same_commands_headings_links_and_places():
    english, japanese = TEXTS.values()
    translated = {"README.ja.md": "README.md", "data/README.ja.md": "data/README.md"}
    links = lambda text: sorted(  # noqa: E731
        translated.get(link, link.replace("docs/ja/", "docs/en/")) for link in re.findall(r"\]\(([^)]+)\)", text)
    )
    code = lambda text: [line.split("#")[0].strip() for line in re.findall(r"^    (.+)", text, re.MULTILINE)]  # noqa: E731
    assert links(english) == links(japanese) and code(english) == code(japanese)
    assert re.findall("^#+ ", english, re.MULTILINE) == re.findall("^#+ ", japanese, re.MULTILINE)
    assert [len(bullets("README.md", of)) for of in (0, 1)] == [len(bullets("README.ja.md", of)) for of in (0, 1)]


@each
def test_links_and_places_are_there(name):
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    for place in re.findall(r"`(\w+(?:/|\.py))`", TEXTS[name]):
        assert any((ROOT / folder / place).exists() for folder in ("pss", "pss/storage")), place


@each
def test_commands_name_notebooks_and_parameters_that_are_there(name):
    from pss.apps.parameters import parameters_of

    commands = re.findall(r"^    python -m pss run (\S+)(.*)$", TEXTS[name], re.MULTILINE)
    assert len(commands) == 3
    for notebook, options in commands:
        assert set(re.findall(r"-p (\w+)", options)) <= set(parameters_of(ROOT / notebook))


@each
def test_a_patch_is_used_as_its_module_says(name):
    import pss

    block = TEXTS[name].split("```python")[1].split("```")[0].replace('"fix.safetensors"', "path")
    lines = [line.split("  #")[0].strip() for line in block.strip().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert f">>> {line}" in pss.patches.__doc__, line
