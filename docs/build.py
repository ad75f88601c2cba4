"""Build the site, English and Japanese: ``python docs/build.py site``.

Each language gets a source folder that mirrors the repository (``notebooks/``, ``data/``, ``figures/``), so that links
between pages hold as they are, and Sphinx makes it into a site of its own. What is ours is the choice of cells.
"""

import ast
import filecmp
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "ja")
SOLUTION = {"en": ("Show the code of the solution", "Hide the code of the solution")}
SOLUTION["ja"] = ("解答のコードを表示", "解答のコードを隠す")
FIGURE = {"en": ("Show the code of the figure", "Hide the code of the figure")}
FIGURE["ja"] = ("図のコードを表示", "図のコードを隠す")
SENTENCE = {"en": ("Show the code of the sentence", "Hide the code of the sentence")}
SENTENCE["ja"] = ("文のコードを表示", "文のコードを隠す")


def in_one_language(notebook: nbformat.NotebookNode, language: str) -> nbformat.NotebookNode:
    """The notebook without cells and sentences of other languages; pictures described in this one, solutions folded."""
    others = {f"lang-{other}" for other in LANGUAGES if other != language}
    notebook, _ = TagRemovePreprocessor(enabled=True, remove_cell_tags=others).preprocess(notebook, {})
    notebook.metadata.setdefault("language_info", {"name": "python"})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for place, cell in enumerate(code):
        cell.outputs = [o for o in cell.outputs if o.get("metadata", {}).get("lang", language) == language]
        about = cell.metadata.setdefault("mystnb", {})
        for output in cell.outputs:  # pss.plots.show leaves a description there, myst-nb takes the cell's
            described = output.get("metadata", {}).get("image/png", {})
            alt = described.get("alt" if language == "en" else f"alt-{language}")
            if alt:
                about["image"] = {"alt": alt}
        tags = cell.metadata.setdefault("tags", [])
        if "solution" in tags:
            tags.append("hide-cell")
            about["code_prompt_show"], about["code_prompt_hide"] = SOLUTION[language]
        elif only_shows(cell, code[place + 1 :]):
            tags.append("hide-input")
            said = any("lang" in output.get("metadata", {}) for output in cell.outputs)
            about["code_prompt_show"], about["code_prompt_hide"] = (SENTENCE if said else FIGURE)[language]
    return notebook


def only_shows(cell: nbformat.NotebookNode, later: Sequence[nbformat.NotebookNode]) -> bool:
    """Whether a cell shows a picture or a sentence, measures nothing, and makes nothing that a later cell takes."""
    if not any("image/png" in o.get("data", {}) or "lang" in o.get("metadata", {}) for o in cell.outputs):
        return False
    if re.search(r"\bassert|\bprint\(|\bpss\.(?!plots\b)", cell.source):  # it measures, too
        return False
    nodes = list(ast.walk(ast.parse(cell.source)))
    made = _names(nodes, ast.Store)
    for other in later:
        nodes = list(ast.walk(ast.parse(other.source)))
        own = _names(nodes, ast.Store)
        if made & (_names(nodes, ast.Load) - own):
            return False
        made -= own
    return True


def _names(nodes: Iterable[ast.AST], context: type[ast.expr_context]) -> set[str]:
    """Names that are read or, with those of functions and imports, made."""
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    if context is ast.Store:
        found |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        found |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return found


def gather(folder: Path, language: str) -> None:
    """Write the sources of one language: its pages, its half of the notebooks, and what these link to."""
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


def update(folder: Path, language: str) -> None:
    """Bring the sources up to date, and touch none that is: Sphinx reads again those that are newer than its pages.

    What stands on every page (titles, templates, settings) makes all of them out of date, which Sphinx does not see.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        gather(Path(fresh, "sources"), language)
        files = {p.relative_to(f"{fresh}/sources"): p for p in sorted(Path(fresh, "sources").rglob("*")) if p.is_file()}
        titles = [re.search(r"# .+", p.read_text("utf-8"))[0] for p in files.values() if p.suffix in (".md", ".ipynb")]
        pages = [ROOT / "docs" / name for name in LANGUAGES]
        everywhere = [p for p in sorted((ROOT / "docs").rglob("*")) if p.suffix and not set(pages) & set(p.parents)]
        state = folder.with_name("state.txt")
        key = key_of(everywhere, *map(str, files), *titles)
        if not state.is_file() or state.read_text() != key:
            for stale in ("doctrees", "html", "sources"):
                shutil.rmtree(folder.with_name(stale), ignore_errors=True)
        for name, path in files.items():
            if not (folder / name).is_file() or not filecmp.cmp(path, folder / name, shallow=False):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / name)
        state.write_text(key)


def key_of(files: Iterable[Path], *others: object) -> str:
    """Hash of files and values."""
    parts = [*(path.read_bytes() for path in files), *(str(other).encode() for other in others)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def build(site: Path, work: Path, *explorer: str) -> None:
    """Make ``site``, replaced only when all of it has been built without a warning; ``explorer`` are its options.

    ``work`` keeps what need not be made again the next time.
    """
    running, made_with = {}, work / "explorer.txt"
    made_by = [p for folder in ("pss", "data") for p in sorted((ROOT / folder).glob("**/*.*")) if p.is_file()]
    key = key_of([p for p in made_by if p.suffix in (".py", ".safetensors", ".mplstyle")], *explorer)
    if not made_with.is_file() or made_with.read_text() != key:
        made_with.unlink(missing_ok=True)
        shutil.rmtree(work / "explorer", ignore_errors=True)
        command = [sys.executable, "-m", "pss", "explorer", work / "explorer", *explorer]
        running["explorer"] = subprocess.Popen(command)
    for language in LANGUAGES:
        sources, html = work / language / "sources", work / language / "html"
        sources.parent.mkdir(parents=True, exist_ok=True)
        update(sources, language)
        options = ["-W", "--keep-going", "--quiet", "-b", "html", "-t", language, "-c", ROOT / "docs"]
        options += ["-D", f"locale_dirs={sources / 'locale'}", "-d", work / language / "doctrees"]
        running[language] = subprocess.Popen([sys.executable, "-m", "sphinx", *options, sources, html])
    failed = [part for part, process in running.items() if process.wait()]
    for language in {*failed} & {*LANGUAGES}:
        (work / language / "state.txt").unlink()  # or else the next time would not read, nor warn of, what is faulty
    if "explorer" in running and "explorer" not in failed:
        made_with.write_text(key)
    if failed:
        raise SystemExit(f"no site: there are faults (above) in {', '.join(failed)}")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "index.html", site / "index.html")
    for language in LANGUAGES:
        shutil.copytree(work / language / "html", site / language)
    shutil.copytree(work / "explorer", site / "explorer")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python docs/build.py SITE [WORK [options of python -m pss explorer]]; replaces SITE")
    site, *others = sys.argv[1:]
    work, *options = others or [ROOT / "build" / "site"]
    build(Path(site).resolve(), Path(work).resolve(), *options)
