"""Build the site, English and Japanese: ``python docs/build.py site``.

Each language gets a source folder that mirrors the repository (``notebooks/``, ``data/``, ``figures/``), so that links
between pages hold as they are, and Sphinx makes it into a site of its own. What is ours is the choice of cells.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "ja")
SOLUTION = {"en": ("Show the code of the solution", "Hide the code of the solution")}
SOLUTION["ja"] = ("解答のコードを表示", "解答のコードを隠す")


def in_one_language(notebook: nbformat.NotebookNode, language: str) -> nbformat.NotebookNode:
    """The notebook without cells and sentences of other languages; pictures described in this one, solutions folded."""
    others = {f"lang-{other}" for other in LANGUAGES if other != language}
    notebook, _ = TagRemovePreprocessor(enabled=True, remove_cell_tags=others).preprocess(notebook, {})
    notebook.metadata.setdefault("language_info", {"name": "python"})
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("metadata", {}).get("lang", language) == language]
        about = cell.metadata.setdefault("mystnb", {})
        for (
            output
        ) in cell.outputs:  # myst-nb takes the description of a picture from the cell, pss.plots.show leaves it here
            described = output.get("metadata", {}).get("image/png", {})
            alt = described.get("alt" if language == "en" else f"alt-{language}")
            if alt:
                about["image"] = {"alt": alt}
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-cell")
            about["code_prompt_show"], about["code_prompt_hide"] = SOLUTION[language]
    return notebook


def gather(folder: Path, language: str) -> None:
    """Write the sources of one language: its pages, its half of the notebooks, and what these link to."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / language, folder)
    shutil.copytree(ROOT / "docs" / "locale", folder / "locale")
    shutil.copytree(ROOT / "figures", folder / "figures", ignore=shutil.ignore_patterns("*.md"))
    (folder / "data").mkdir()
    translated = ROOT / "data" / f"README.{language}.md"
    shutil.copy(translated if translated.exists() else ROOT / "data" / "README.md", folder / "data" / "README.md")
    shutil.copy(ROOT / "notebooks" / "glossary.md", folder / "notebooks" / "terms.md")
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = in_one_language(nbformat.read(path, as_version=4), language)
        nbformat.write(notebook, folder / "notebooks" / path.name)


def build(site: Path, work: Path, *explorer: str) -> None:
    """Make ``site``, replaced only when all of it has been built without a warning; ``explorer`` are its options."""
    shutil.rmtree(work / "explorer", ignore_errors=True)
    running = {"explorer": subprocess.Popen([sys.executable, "-m", "pss", "explorer", work / "explorer", *explorer])}
    for language in LANGUAGES:
        sources, html = work / language / "sources", work / language / "html"
        shutil.rmtree(html, ignore_errors=True)
        gather(sources, language)
        options = ["-W", "--keep-going", "--quiet", "-E", "-b", "html", "-t", language, "-c", ROOT / "docs"]
        options += ["-D", f"locale_dirs={sources / 'locale'}", "-d", work / language / "doctrees"]
        running[language] = subprocess.Popen([sys.executable, "-m", "sphinx", *options, sources, html])
    failed = [part for part, process in running.items() if process.wait()]
    if failed:
        raise SystemExit(f"no site: there are faults (above) in {', '.join(failed)}")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "index.html", site / "index.html")
    for language in LANGUAGES:
        shutil.move(work / language / "html", site / language)
    shutil.move(work / "explorer", site / "explorer")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python docs/build.py SITE [WORK [options of python -m pss explorer]]; replaces SITE")
    site, *others = sys.argv[1:]
    work, *options = others or [ROOT / "build" / "site"]
    build(Path(site).resolve(), Path(work).resolve(), *options)
