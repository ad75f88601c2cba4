"""Sphinx configuration of the site; ``docs/build.py`` runs it once for each language, with the tag of the language."""

import re
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.search import SearchLanguage

language = "ja" if tags.has("ja") else "en"  # noqa: F821  (Sphinx provides `tags`)


def say(english: str, japanese: str) -> str:
    """The text in the language of this build."""
    return japanese if language == "ja" else english


project = "PSS"
html_title = say("Parameter-space saliency", "パラメータ空間の顕著性")
extensions = ["myst_nb", "sphinx-mathjax-offline"]
exclude_patterns = ["locale", "notebooks/terms.md"]

# Notebooks: as committed, never executed here.
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # these would come from another host
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "dollarmath", "substitution"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_use_index = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": html_title},
    "toc_title": say("On this page", "このページの内容"),
    "search_bar_text": say("Search", "検索"),
    "article_header_end": ["language.html", "article-header-buttons.html"],
    "article_footer_items": ["downloads.html"],
    "footer_content_items": ["licence.html"],
    "navbar_persistent": [],
    "use_fullscreen_button": False,
    "back_to_top_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

# What a reader gets through in a minute, of prose and of code, and the seconds for a look at a picture.
WORDS, CHARACTERS, LINES, PICTURE = 200, 450, 15, 20


def reading_minutes(notebook: nbformat.NotebookNode, code: bool = True) -> int:
    """Minutes that reading takes, to the nearest five: without solutions and what is folded, or without any code."""
    minutes = 0.0
    for cell in notebook.cells:
        if "solution" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "code":
            if code and "hide-input" not in cell.metadata.get("tags", []):
                minutes += len(cell.source.splitlines()) / LINES
            minutes += sum("image/png" in output.get("data", {}) for output in cell.outputs) * PICTURE / 60
        elif language == "ja":
            minutes += len(re.sub(r"\s|\]\(\S+\)", "", cell.source)) / CHARACTERS
        else:
            minutes += len(cell.source.split()) / WORDS
    return max(5, 5 * round(minutes / 5))


# Ways through the notebooks, by their numbers.
ROUTES = {"story": ("00", "03", "06", "13"), "own": ("11", "12", "14")}


def contents(app: Sphinx, config: Config) -> None:
    """Give the landing page ``{{ notebooks }}``, title, goal and reading time, from the notebooks themselves.

    And for each route links to its notebooks, ``{{ story }}``, with ``{{ story_minutes }}``; ``{{ course_hours }}``.
    """
    entries, links, times, times_of_story = [], {}, {}, {}
    for path in sorted(Path(app.srcdir, "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook, number = nbformat.read(path, as_version=4), path.name[:2]
        title = re.match(r"# (.+)", notebook.cells[0].source)[1]
        goal = re.search(r"^\| *\**(?:Goal|目標)\** *\| *(.+?) *\|$", notebook.cells[0].source, re.MULTILINE)[1]
        goal = goal[0].upper() + goal[1:] + say(".", "．") * (goal[-1] not in ".?．？")
        times[number], times_of_story[number] = reading_minutes(notebook), reading_minutes(notebook, code=False)
        links[number] = f"[{title}](notebooks/{path.name})"
        minutes = say("about {} minutes", "約{}分").format(times[number])
        entries.append(f"- {links[number]} <span class='minutes'>{minutes}</span><br>\n  {goal}")
    given = config.myst_substitutions
    given["notebooks"] = "\n".join(entries)
    given["course_hours"] = round(sum(times.values()) / 60)
    for name, minutes_of in (("story", times_of_story), ("own", times)):
        there = [number for number in ROUTES[name] if number in links]
        given[name] = say(", ", "，").join(links[number] for number in there)
        given[f"{name}_minutes"] = sum(minutes_of[number] for number in there)


def bilingual_table(app: Sphinx, doctree: nodes.document) -> None:
    """In the table of the glossary: the head in the language of the page, and marks on the words of the other one."""
    if app.env.docname != "notebooks/glossary":
        return
    for row in doctree.findall(nodes.row):
        row[2 if language == "en" else 1]["classes"].append(say("language-ja", "language-en"))
        if language == "ja" and isinstance(row.parent, nodes.thead):
            for entry, name in zip(row, ("記号", "英語", "日本語", "コード"), strict=True):
                entry.children = [nodes.paragraph("", name)]


class SearchJapanese(SearchLanguage):
    """Words are found by any part of a run of kanji, katakana or Latin letters, the same in the index and in the query.

    Sphinx's own splitter segments the text but not the query, so that a compound is found only by the cut that it made.
    """

    lang = "ja"
    language_name = "Japanese"
    runs = "[一-龠々〆]+|[ァ-ヴー]+|[ぁ-ん]+|[a-zａ-ｚ0-9０-９_]+"
    js_splitter_code = f"""
var splitQuery = (query) => {{
  const runs = query.match(/{runs}/giu) || [];
  const words = runs.filter((run) => run.length > 1 || !/[ぁ-ん]/.test(run));
  const content = words.filter((run) => !/^[ぁ-ん]+$/.test(run));  // without particles and endings
  return content.length ? content : words;
}};
"""

    def split(self, text: str) -> list[str]:
        """Every run, and every part of the runs in kanji and katakana."""
        found = set(re.findall(self.runs, text, re.IGNORECASE))
        for run in [r for r in found if re.match("[一-龠々〆ァ-ヴー]", r)]:
            found |= {run[i:j] for i in range(len(run)) for j in range(i + 1, min(len(run), i + 12) + 1)}
        return sorted(found)

    def word_filter(self, word: str) -> bool:
        """Numbers alone are not looked up."""
        return not word.isdigit()


def setup(app: Sphinx) -> None:
    """Tell Sphinx what is ours."""
    app.add_search_language(SearchJapanese)
    app.connect("config-inited", contents)
    app.connect("doctree-read", bilingual_table)
