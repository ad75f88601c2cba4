"""One notebook through papermill: the executed copy in a folder of its own, with its figures, or refreshed in place."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from pss.apps.kernels import BACKEND, ForkingManager, Manager
from pss.apps.parameters import check_values
from pss.engine.process import KEEPS
from pss.storage.digests import digest
from pss.storage.whole import write_whole

KERNEL = "python3"
_OFFLINE = """<script>addEventListener("load", () => window.MathJax || document.body.insertAdjacentHTML("afterbegin",
  "<p><em>Formulas stay as TeX, because MathJax could not be fetched; make site has pages that need no network. · \
  MathJaxを取得できないので，数式はTeXのままである．make siteで作るページはネットワークなしで読める．</em></p>"))
</script>"""
# Where kernels and their managers know how, what they say to each other is encrypted (newer ones warn if it is not).
ENCRYPTED = Config(KernelManager={"transport_encryption": "auto"})


class _Engine(NBClientEngine):
    """Writes the notebook when it has ended, whatever ended it; papermill's own writes all of it twice a cell."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, many: bool = False, **options: Any) -> None:
        place, nb_man.output_path = nb_man.output_path, None
        options["kernel_manager_class"] = ForkingManager if many else Manager
        try:
            super().execute_managed_notebook(nb_man, kernel_name, **options)
        finally:
            nb_man.output_path = place


papermill_engines.register("pss", _Engine)


def run_notebook(
    notebook: str | os.PathLike,
    folder: str | os.PathLike,
    parameters: Mapping[str, Any] | None = None,
    caller: Path | None = None,
    many: bool = False,
) -> list[Path]:
    """Execute a notebook in its own folder; the copy, as a page too, and ``figures/NN.png`` go to another.

    Parameters
    ----------
    notebook : path
    folder : path
        For the executed copy, of the same name.
    parameters : mapping, optional
        Values for names in the notebook's parameters cell, see `pss.apps.parameters`.
    caller : path, optional
        Folder whose modules the notebook can import; by default the current one.
    many : bool
        This process runs more of them: their kernels are forked from one that has imported PSS.

    Returns
    -------
    list of Path
        The figures.

    Raises
    ------
    ValueError
        As `pss.apps.parameters.check_values`, or if the folder is the notebook's own.
    papermill.exceptions.PapermillExecutionError
        If a cell raises; the copy and the figures up to there are kept.
    """
    notebook, output = Path(notebook).resolve(), Path(folder).resolve() / Path(notebook).name
    parameters = check_values(notebook, parameters or {}, caller)
    if output == notebook:
        raise ValueError(f"the executed copy would take the place of {notebook}: give another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _executed(notebook, output, parameters, caller, many) as beside:
        return _keep(beside, output)


def refresh(notebook: str | os.PathLike) -> None:
    """Execute a notebook in place, ready to commit: with its outputs, without times, progress bars and messages."""
    path = Path(notebook)
    with _executed(path.resolve(), path.resolve(), {}, None, many=True, failed=False) as beside:
        executed, original = nbformat.read(beside, as_version=4), nbformat.read(path, as_version=4)
        for cell, source in zip(executed.cells, original.cells, strict=True):
            cell.metadata = source.metadata
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": KERNEL}
        executed.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
        write_whole(path, nbformat.writes(executed).rstrip("\n") + "\n")


@contextmanager
def _executed(
    notebook: Path, output: Path, parameters: Mapping[str, Any], caller: Path | None, many: bool, failed: bool = True
) -> Iterator[Path]:
    """Path of the executed notebook beside its place; where a cell raises, what there is is kept if ``failed``."""
    beside = output.with_name(f".{output.stem}.running.ipynb")
    try:
        execute(notebook, beside, parameters, caller or Path.cwd(), many)
        yield beside
    except Exception:
        if failed and beside.exists():
            _keep(beside, output)
        raise
    finally:
        beside.unlink(missing_ok=True)


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any], caller: Path, many: bool = False) -> None:
    """Let papermill execute it, with the kernel of this environment and the caller's modules."""
    before = dict(os.environ)
    path = os.pathsep.join([str(caller), *filter(None, [before.get("PYTHONPATH")])])
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}  # of captum's progress bar, on pages for people
    os.environ.update(KEEPS | BACKEND | quiet | before | {"PYTHONPATH": path})  # which the kernel inherits
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            dict(parameters),
            engine_name="pss",
            kernel_name=KERNEL,
            language="python",  # for notebooks that do not say
            cwd=str(notebook.parent),
            progress_bar=False,
            config=ENCRYPTED,
            many=many,
        )
    finally:
        os.environ.clear()
        os.environ.update(before)


def _keep(beside: Path, output: Path) -> list[Path]:
    """Put the executed notebook in its place, and beside it as a page that a browser opens, and its figures."""
    write_whole(output, beside.read_bytes())  # papermill's own file may not be on the disk yet
    exporter = HTMLExporter(preprocessors=[CoalesceStreamsPreprocessor(enabled=True)])  # bars of progress as they ended
    page = exporter.from_filename(str(output))[0].replace("</body>", f"{_OFFLINE}</body>")
    write_whole(output.with_suffix(".html"), page)
    return write_figures(output)


def write_figures(executed: Path) -> list[Path]:
    """Write every picture among the outputs to ``figures/NN.png`` beside the notebook."""
    folder = executed.with_name("figures")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    written: list[Path] = []
    for cell in nbformat.read(executed, as_version=4).cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                written.append(folder / f"{len(written) + 1:02d}.png")
                write_whole(written[-1], base64.b64decode(data["image/png"]))
    return written


def raised(error: Exception) -> str:
    """What went wrong, with the notes that were added to it."""
    if not isinstance(error, PapermillExecutionError):
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    told, whole = f"{error.ename}: {error.evalue}", str(error)
    return whole[whole.rfind(told) :].strip() if told in whole else told


def source_hash() -> str:
    """Hash of the package's own source, recorded with what it made."""
    return digest(*sorted(Path(__file__).parents[1].rglob("*.py")))[:12]
