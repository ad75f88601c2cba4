"""Run notebooks through papermill: the tutorials on the built-in data, or one notebook with parameters of one's own.

``python -m pss.batch --out runs notebooks`` executes every notebook of a folder and writes the executed copies and
their figures; ``-p name value`` sets a parameter, read as YAML. Unknown names are an error (papermill only warns).
"""

from __future__ import annotations

import argparse
import base64
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from joblib import Parallel, delayed
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets.config import Config

KERNEL = "python3"
# Where kernels and their managers know how, what they say to each other is encrypted (newer ones warn if it is not).
ENCRYPTED = Config(KernelManager={"transport_encryption": "auto"})


def parameters_of(notebook: str | os.PathLike) -> dict[str, Any]:
    """Names and default values in the cell tagged ``parameters``.

    Raises
    ------
    ValueError
        If there is not exactly one such cell.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{Path(notebook).name} has {len(tagged)} cells tagged 'parameters': expected one")
    return {name: spec["default"] for name, spec in papermill.inspect_notebook(str(notebook)).items()}


def _refuse_unknown(notebook: Path, parameters: Mapping[str, Any]) -> None:
    known = parameters_of(notebook)
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{notebook.name} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")


def run_notebook(
    notebook: str | os.PathLike, output: str | os.PathLike, parameters: Mapping[str, Any] | None = None
) -> list[Path]:
    """Execute a notebook in its own folder and write the executed copy, with its figures in a folder beside it.

    Parameters
    ----------
    notebook, output : path
    parameters : mapping, optional
        Values for names in the notebook's parameters cell.

    Returns
    -------
    list of Path
        The figures.

    Raises
    ------
    ValueError
        For a parameter that the notebook lacks.
    papermill.exceptions.PapermillExecutionError
        If a cell raises; the copy up to there is kept at ``output``.
    """
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    _refuse_unknown(notebook, parameters or {})
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(notebook),
        str(output),
        dict(parameters or {}),
        kernel_name=KERNEL,
        cwd=str(notebook.parent),
        progress_bar=False,
        config=ENCRYPTED,
    )
    return _write_figures(output)


def _write_figures(executed: Path) -> list[Path]:
    """Write every picture among the outputs to ``<stem>/NN.png`` beside the notebook."""
    folder = executed.with_suffix("")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    written = []
    for cell in nbformat.read(executed, as_version=4).cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                written.append(folder / f"{len(written) + 1:02d}.png")
                written[-1].write_bytes(base64.b64decode(data["image/png"]))
    return written


def refresh(notebook: str | os.PathLike) -> None:
    """Execute a notebook in place, ready to commit: with its outputs, without times, progress bars and messages."""
    path = Path(notebook)
    beside = path.with_name(f".{path.stem}.running.ipynb")
    try:
        papermill.execute_notebook(
            str(path), str(beside), kernel_name=KERNEL, cwd=str(path.parent), progress_bar=False, config=ENCRYPTED
        )
        executed = nbformat.read(beside, as_version=4)
        original = nbformat.read(path, as_version=4)
        for cell, source in zip(executed.cells, original.cells, strict=True):
            cell.metadata = source.metadata
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        executed.metadata = _plain_metadata()
        nbformat.write(executed, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _plain_metadata() -> nbformat.NotebookNode:
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": KERNEL}
    return nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})


def find_notebooks(paths: Sequence[str]) -> list[Path]:
    """Notebooks named, and the numbered ones (``NN_*.ipynb``) of folders named, in order."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.glob("*.ipynb") if re.match(r"\d\d_", p.name))
        elif path.suffix == ".ipynb" and path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} is neither a notebook nor a folder of notebooks")
    if not found:
        raise ValueError(f"no notebook NN_*.ipynb in {', '.join(map(str, paths))}")
    return found


def _task(notebook: Path, out: Path, values: Mapping[str, Any], in_place: bool) -> tuple[Path, int, str]:
    """Run one notebook: its path, how many figures it made, and what went wrong (nothing: an empty text)."""
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        if in_place:
            refresh(notebook)
            return notebook, 0, ""
        return notebook, len(run_notebook(notebook, out / notebook.name, values)), ""
    except (PapermillExecutionError, ValueError) as error:
        return notebook, 0, str(error).strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: run the notebooks, say what was made and where; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m pss.batch", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", help="notebooks, or folders with NN_*.ipynb")
    parser.add_argument("--out", default="runs", help="folder for the executed copies and figures (default: runs)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time, sharing the processors (default: 2)")
    parser.add_argument("--in-place", action="store_true", help="refresh the notebooks themselves, ready to commit")
    options = parser.parse_args(arguments)
    try:
        notebooks = find_notebooks(options.notebooks)
        values = {name: yaml.safe_load(value) for name, value in options.p}
        for notebook in notebooks if values else []:
            _refuse_unknown(notebook, values)
    except (ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    out, failed, started = Path(options.out), 0, time.monotonic()
    workers = Parallel(n_jobs=min(options.jobs, len(notebooks)), return_as="generator_unordered")
    tasks = workers(delayed(_task)(notebook, out, values, options.in_place) for notebook in notebooks)
    for notebook, figures, error in tqdm(tasks, total=len(notebooks), desc="notebooks", unit="notebook"):
        failed += bool(error)
        made = (
            "refreshed"
            if options.in_place
            else f"-> {out / notebook.name}, {figures} figures in {out / notebook.stem}/"
        )
        tqdm.write(f"{notebook.name} " + (f"FAILED: {error}" if error else made))
    done, seconds = len(notebooks) - failed, time.monotonic() - started
    where = "in place" if options.in_place else f"to {out.resolve()}"
    print(f"{done} of {len(notebooks)} notebooks executed in {seconds:.0f} s, written {where}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
