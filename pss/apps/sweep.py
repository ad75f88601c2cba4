"""Runs of notebooks, each in a folder of its own: a grid or a table of one's parameters, or a folder of notebooks.

A sweep is a YAML file::

    notebook: ../06_repair.ipynb      # seen from this file, like every place in it
    out: ../../runs/repairs           # folder of the runs; runs/<name of this file> beside it by default
    parameters: {n_images: 8}         # the same for every run
    grid:                             # every combination of these
      k: [1, 5, 25]
      method: [zscore, pot]
    table: images.csv                 # and these rows: a list of mappings, or a CSV with names in its first line

With a grid and a table every row meets every combination. A run whose notebook has a parameter ``output`` gets its
own folder as its value, and what the notebook writes to ``summary.json`` there, names and plain values, goes into the
summary. A run is finished once its ``run.json`` says so: whoever runs the sweep may be killed at any moment.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from pss import __version__
from pss.apps.execution import raised, run_notebook, source_hash
from pss.apps.pages import render
from pss.apps.parameters import Parameter, check_places, check_values, parameters_of, read_text, read_values, read_yaml
from pss.storage.digests import digest, key_of
from pss.storage.whole import write_whole

_KEYS = ("notebook", "out", "parameters", "grid", "table")
_FIXED = ("run", "status", "seconds", "error")
MOST = 100_000  # runs of one sweep


@dataclass(frozen=True)
class Run:
    """One run: its notebook, its folder, all parameters that the notebook gets, and those that it is known by."""

    notebook: Path
    folder: Path
    parameters: dict[str, Any]
    shown: dict[str, Any]
    key: str

    def record(self) -> dict[str, Any] | None:
        """What was written when it ended, None if it has not."""
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and record.keys() >= {*_FIXED[1:], "results", "source"}
        return record if whole and record.get("key") == self.key else None

    @property
    def page(self) -> Path:
        """What to open: the report that it wrote, else the executed notebook as a page."""
        report = Path(self.parameters.get("output") or self.folder) / "report.html"
        page = self.folder / f"{self.notebook.stem}.html"
        return next((path for path in (report, page) if path.is_file()), self.folder / self.notebook.name)


@dataclass(frozen=True)
class Sweep:
    """Runs in order, and the folder that holds theirs."""

    title: str
    out: Path
    runs: tuple[Run, ...]

    def summary(self) -> pd.DataFrame:
        """One row a run: folder, status (finished, failed, not run), seconds, error, parameters, results.

        A result with the name of another column is called ``results.<name>``.
        """
        rows = []
        for run in self.runs:
            record = run.record() or {"status": "not run", "seconds": None, "error": "", "results": {}}
            row = {"run": run.folder.name, **{name: record[name] for name in _FIXED[1:]}} | run.shown
            rows.append(row | {f"results.{n}" if n in row else n: v for n, v in record["results"].items()})
        return pd.DataFrame(rows, dtype=object)  # whole numbers stay whole beside empty cells

    def write_summary(self) -> None:
        """Write ``summary.csv`` and ``index.html`` to the folder of the runs."""
        table = self.summary()
        plain = table.map(lambda v: json.dumps(v) if isinstance(v, (list, dict)) else v)
        write_whole(self.out / "summary.csv", plain.to_csv(index=False, lineterminator="\n"))
        write_whole(self.out / "index.html", index_page(self.title, table, self.out))


def index_page(title: str, table: pd.DataFrame, out: Path) -> str:
    """HTML of a summary: one row a run, with its values, how it ended, and links to what it made."""
    names = [name for name in table.columns if name not in _FIXED]
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    rows = []
    for row in table.to_dict("records"):
        files, figures = _made(out, row["run"])
        name = re.sub("-[0-9a-f]{12}$", "", row["run"])
        cells = {column: _shown(value) for column, value in row.items()}
        rows.append({"name": name, "cells": cells, "files": files, "figures": figures})
    return render("sweep.html", title=title, names=names, counts=counts, rows=rows)


def _shown(value: Any) -> str:
    if value is None or value is pd.NA or isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _made(out: Path, run: str) -> tuple[list[str], list[str]]:
    """Files that a run made, pages first, and its pictures, seen from the folder of the runs."""
    visible = [p for p in sorted((out / run).rglob("*")) if p.is_file() and not p.name.startswith(".")]
    pictures = [p for p in visible if p.suffix.lower() in (".png", ".jpg", ".svg")]
    files = [p for p in visible if p.parent == out / run and p not in pictures]
    files.sort(key=lambda p: (p.suffix not in (".html", ".ipynb"), p.suffix, p.name))
    return [p.relative_to(out).as_posix() for p in files], [p.relative_to(out).as_posix() for p in pictures]


# --- what is asked for ------------------------------------------------------------------------------------------------


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


def single_runs(notebooks: Sequence[Path], out: Path | None = None, texts: Mapping[str, str] | None = None) -> Sweep:
    """A run of each notebook, with the values that texts of the command line stand for.

    Without values it goes to ``out`` (by default ``runs``) under the notebook's name, with some into a folder that is
    named by them; or, where they have ``output`` and no ``out`` is given, to that.

    Raises
    ------
    ValueError
        As `check_values`, or if two runs would go to the same folder.
    """
    runs = []
    for notebook in notebooks:
        values = read_values(notebook, texts or {})
        key = key_of([code_of(notebook), values, __version__], 12)
        folder = (out or Path("runs")).absolute() / notebook.stem
        if values:
            own = values.get("output") if out is None else None
            folder = Path(own) if own else folder.with_name(f"{notebook.stem}__{_readable(values)}-{key}")
        runs.append(Run(notebook, folder, _with_output(notebook, values, folder), values, key))
    if twice := [run.folder for run in runs if [r.folder for r in runs].count(run.folder) > 1]:
        raise ValueError(f"several notebooks would be written to {twice[0]}: run them one after the other")
    return Sweep("notebooks", runs[0].folder.parent, tuple(runs))


def read_sweep(path: str | Path, out: str | Path | None = None, texts: Mapping[str, str] | None = None) -> Sweep:
    """The runs that a sweep file asks for, every value checked.

    Parameters
    ----------
    path : path
        The YAML file.
    out : path, optional
        Folder for the runs, in place of the file's.
    texts : mapping, optional
        Values for every run as texts of a command line, which come before the file's ``parameters``. Places among
        them are seen from the current folder.

    Raises
    ------
    ValueError
        If the file cannot be read as one, has entries that are none, names a parameter that the notebook lacks or gives
        it a value of another type than its default, or asks for a run twice. Nothing has run then.
    """
    path = Path(path).absolute()
    asked = read_yaml(_text(path))
    if not isinstance(asked, dict) or "notebook" not in asked:
        raise ValueError(f"{path.name} is no sweep: expected a mapping with an entry notebook")
    if unknown := [str(key) for key in asked if key not in _KEYS]:
        raise ValueError(f"{path.name} has entries {', '.join(unknown)}: expected {', '.join(_KEYS)}")
    notebook = (path.parent / str(asked["notebook"])).resolve()
    if not notebook.is_file():
        raise ValueError(f"{path.name}: there is no notebook {notebook}")
    known = parameters_of(notebook)
    fixed = _mapping(asked, "parameters", path) | read_values(notebook, texts or {})
    rows = [check_values(notebook, row, path.parent) for row in _rows(asked, fixed, known, path)]
    folder = Path(out or path.parent / str(asked.get("out") or f"runs/{path.stem}")).resolve()
    return Sweep(notebook.stem, folder, tuple(_runs(notebook, folder, rows, set(fixed))))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _mapping(asked: dict, entry: str, path: Path) -> dict[str, Any]:
    found = asked.get(entry) or {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path.name}: {entry} must be a mapping of parameter names, not {found!r}")
    return found


def _rows(asked: dict, fixed: dict, known: Mapping[str, Parameter], path: Path) -> list[dict[str, Any]]:
    """Parameters of every run: the fixed ones, a row of the table, a combination of the grid."""
    grid, table = _mapping(asked, "grid", path), _table(asked.get("table"), known, path)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path.name}: grid needs a list of values for {name}, as [1, 2], not {values!r}")
    parts = {"parameters": set(fixed), "grid": set(grid), "table": {name for row in table for name in row}}
    for name in sorted(set().union(*parts.values())):
        if len(where := [part for part, names in parts.items() if name in names]) > 1:
            raise ValueError(f"{path.name}: {name} is given in {' and '.join(where)}: give it once")
    if (count := len(table) * math.prod(map(len, grid.values()))) > MOST:
        raise ValueError(f"{path.name} asks for {count} runs, more than {MOST}")
    steps = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [fixed | row | step for row in table for step in steps]


def _table(asked: Any, known: Mapping[str, Parameter], path: Path) -> list[dict[str, Any]]:
    """Rows of the table; one empty row if there is none."""
    if asked is None:
        return [{}]
    if isinstance(asked, str):
        return _csv(path.parent / asked, known)
    if not isinstance(asked, list) or not asked or not all(isinstance(row, dict) and row for row in asked):
        raise ValueError(f"{path.name}: table must be a list of mappings, one a run, or the name of a CSV file")
    if odd := [name for row in asked for name in row if not isinstance(name, str)]:
        raise ValueError(f"{path.name}: {odd[0]!r} is no name of a parameter")
    return asked


def _csv(path: Path, known: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Rows of a CSV file, read by the types of the defaults; an empty cell leaves the default."""
    lines = list(csv.reader(io.StringIO(_text(path), newline="")))
    names, lines = (lines or [[]])[0], [line for line in lines[1:] if any(line)]
    if not lines or len(set(names)) < len(names):
        raise ValueError(f"{path.name}: expected names of parameters, each once, and a row for each run below them")
    for number, line in enumerate(lines, 2):
        if len(line) != len(names):
            raise ValueError(f"{path.name}, row {number}: {len(line)} cells, the first row has {len(names)}")
    pairs = [[(name, cell) for name, cell in zip(names, line, strict=True) if cell] for line in lines]
    return [{name: read_text(cell, known.get(name)) for name, cell in row} for row in pairs]


def _runs(notebook: Path, out: Path, rows: Sequence[dict], fixed: set[str]) -> Iterator[Run]:
    """Give each row its key and folder. A folder made under another name (a grid that grew) keeps it."""
    code = code_of(notebook)
    made = {folder.name[-12:]: folder for folder in sorted(out.glob("*-????????????")) if folder.is_dir()}
    seen: dict[str, int] = {}
    outputs: set[str] = set()
    for number, values in enumerate(rows, 1):
        key = key_of([code, values, __version__], 12)
        if (other := seen.setdefault(key, number)) != number:
            raise ValueError(f"runs {other} and {number} have the same parameters: {values}")
        shown = {name: value for name, value in values.items() if name not in fixed}
        folder = made.get(key, out / f"{_readable(shown)}-{key}")
        values = _with_output(notebook, values, folder)
        if (place := values.get("output")) in outputs:
            raise ValueError(f"several runs would write to output = {place}: leave it to the sweep")
        outputs |= {place} - {None}
        yield Run(notebook, folder, values, shown or values, key)


def _with_output(notebook: Path, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values, and the run's folder as ``output``; not where that is empty by default and nothing else is asked."""
    own = parameters_of(notebook).get("output")
    return {"output": str(folder)} | values if own and (values or own.default) else values


def code_of(notebook: Path) -> str:
    """Hash of a notebook's code: text and outputs may change, and its runs stay finished."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [(c.source, c.metadata.get("tags", [])) for c in cells if c.cell_type == "code"]
    return digest(json.dumps(code))


def _readable(values: Mapping[str, Any]) -> str:
    """Name of a folder that works on every file system."""
    parts = [f"{name}={Path(v).name if isinstance(v, str) else v}" for name, v in values.items()]
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", ",".join(parts).replace(",", "__"))[:80].strip("._") or "run"


# --- running ----------------------------------------------------------------------------------------------------------


def run_sweep(
    sweep: Sweep, jobs: int = 2, dask: str = "", again: bool = False, progress: bool = True, lead: int = 0
) -> pd.DataFrame:
    """Run what is not finished, a failed run among it, and return the summary; it is written after every run.

    Parameters
    ----------
    sweep : Sweep
    jobs : int
        Runs at a time, sharing the processors.
    dask : str
        Address of a Dask scheduler, whose workers see the same files, or ``local`` for ``jobs`` workers here.
    again : bool
        Run the finished ones too.
    lead : int
        So many come first: what a reader opens while the others run. These begin with the last, since later pages of a
        tutorial take longer: all processors end at about the same time.

    Raises
    ------
    ValueError
        If there is no Dask, or a place that a run is to read is not there; nothing has run then.
    """
    for run in sweep.runs:
        check_places(run.notebook, run.parameters)
    records = {run.key: run.record() for run in sweep.runs}
    finished = {key: r for key, r in records.items() if r and r["status"] == "finished" and not again}
    to_do = [run for run in sweep.runs if run.key not in finished]
    if finished:
        older = sum(record["source"] != source_hash() for record in finished.values())
        note = f", {older} of them by other source of pss {__version__}" if older else ""
        tqdm.write(f"{len(finished)} of {len(sweep.runs)} runs are finished already{note}")
    sweep.out.mkdir(parents=True, exist_ok=True)
    write, due = sweep.write_summary if len(sweep.runs) > 1 else lambda: None, 0.0
    write()
    many = len(to_do) > 2 * jobs and "import pss" in to_do[-1].notebook.read_text(encoding="utf-8")
    order = [*to_do[:lead], *reversed(to_do[lead:])] if lead else to_do
    try:
        with _workers(jobs, dask) as workers, tqdm(total=len(to_do), unit="run", disable=not progress) as bar:
            for name, error in workers(delayed(run_one)(run, Path.cwd(), many) for run in order):
                tqdm.write(f"{name} " + (f"FAILED: {error}" if error else "finished"))
                bar.update()
                if (now := time.monotonic()) >= due:  # the summary is to take a twentieth of the time at most
                    write()
                    due = now + 21 * (time.monotonic() - now)
    finally:
        write()
    return sweep.summary().infer_objects()


@contextmanager
def _workers(jobs: int, dask: str) -> Iterator[Parallel]:
    """Processes here, or those of a Dask cluster: for joblib the one is as good as the other."""
    with ExitStack() as stack:
        if dask:
            try:
                from distributed import Client, LocalCluster
            except ImportError as error:
                raise ValueError("dask= needs the extra: pip install 'pss[dask]'") from error
            address = dask
            if dask == "local":
                address = stack.enter_context(LocalCluster(jobs, threads_per_worker=1, dashboard_address=None))
            client = stack.enter_context(Client(address))
            stack.enter_context(parallel_config(backend="dask", client=client, wait_for_workers_timeout=60))
        yield Parallel(n_jobs=-1 if dask else jobs, return_as="generator_unordered", batch_size=1)


def run_one(run: Run, caller: Path | None = None, many: bool = False) -> tuple[str, str]:
    """Run one and record how it ended; name of its folder, and the error, empty if there was none."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    run.folder.mkdir(parents=True, exist_ok=True)
    error, results, started = "", {}, time.time()
    summary = Path(run.parameters.get("output") or run.folder) / "summary.json"
    (run.folder / "run.json").unlink(missing_ok=True)
    summary.unlink(missing_ok=True)
    try:
        run_notebook(run.notebook, run.folder, run.parameters, caller, many)
        results = _results(summary)
    except Exception as failure:  # whatever it is, it is this run's, and the others go on
        cell = getattr(failure, "exec_count", None)
        error = raised(failure) + (f"\n(cell {cell} of {run.folder / run.notebook.name})" if cell else "")
    record = {
        "key": run.key,
        "status": "failed" if error else "finished",
        "seconds": round(time.time() - started, 1),
        "error": error,
        "parameters": run.parameters,
        "results": results,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "pss": __version__,
        "source": source_hash(),
    }
    write_whole(run.folder / "run.json", record)
    return run.folder.name, error


def _results(path: Path) -> dict[str, Any]:
    """Plain values that the notebook left."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("summary.json must hold a mapping of names to plain values")
    return {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
