"""Many runs of one notebook: a grid or a table of its parameters, each run in a folder of its own, resumable.

A sweep is a YAML file::

    notebook: ../06_repair.ipynb      # seen from this file, like every relative path in it
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
import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from joblib import Parallel, delayed, parallel_config
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from pss import __version__
from pss.apps.execution import check_values, parameters_of, place, read_text, read_yaml, run_notebook
from pss.apps.sweep_page import page
from pss.storage.whole import write_whole

_KEYS = ("notebook", "out", "parameters", "grid", "table")
_FIXED = ("run", "status", "seconds", "error")
MOST = 100_000  # runs of one sweep


@dataclass(frozen=True)
class Run:
    """One run: the values that it is known by, its folder, and all parameters that its notebook gets."""

    shown: dict[str, Any]
    key: str
    folder: Path
    parameters: dict[str, Any]

    def record(self) -> dict[str, Any] | None:
        """What was written when it ended, None if it has not."""
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and record.keys() >= {*_FIXED[1:], "results", "source"}
        return record if whole and record.get("key") == self.key else None


@dataclass(frozen=True)
class Sweep:
    """The runs of one notebook, in order, and the folder that holds theirs."""

    notebook: Path
    out: Path
    runs: tuple[Run, ...]

    def summary(self) -> pd.DataFrame:
        """One row a run: folder, status (finished, failed, not run), seconds, error, parameters, results.

        A result with the name of another column is called ``results.<name>``.
        """
        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for run in self.runs:
            record = run.record() or {"status": "not run", "seconds": None, "error": "", "results": {}}
            row = {"run": run.folder.name, **{name: record[name] for name in _FIXED[1:]}} | run.shown
            rows.append(row | {f"results.{n}" if n in row else n: v for n, v in record["results"].items()})
        return rows

    def write_summary(self) -> None:
        """Write ``summary.csv`` and ``index.html`` to the folder of the runs."""
        table = pd.DataFrame(self._rows(), dtype=object)  # whole numbers stay whole beside empty cells
        plain = table.map(lambda v: json.dumps(v) if isinstance(v, (list, dict)) else v)
        write_whole(self.out / "summary.csv", plain.to_csv(index=False, lineterminator="\n"))
        write_whole(self.out / "index.html", page(self.notebook.stem, table, self.out))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_sweep(
    path: str | Path,
    out: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> Sweep:
    """The runs that a sweep file asks for, every value checked.

    Parameters
    ----------
    path : path
        The YAML file.
    out : path, optional
        Folder for the runs, in place of the file's.
    parameters : mapping, optional
        Values for every run that come before the file's ``parameters``; with ``base`` they are texts of a command
        line, whose relative places are seen from there.

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
    notebook = Path(place("path", asked["notebook"], path.parent))
    if not notebook.is_file():
        raise ValueError(f"{path.name}: there is no notebook {notebook}")
    defaults = parameters_of(notebook)
    more = dict(parameters or {})
    if base is not None:
        more = {name: place(name, read_text(text, defaults.get(name)), base) for name, text in more.items()}
    fixed = _mapping(asked, "parameters", path) | more
    rows = _rows(asked, fixed, defaults, path)
    out = out or place("path", str(asked.get("out") or f"runs/{path.stem}"), path.parent)
    return Sweep(
        notebook, Path(out).absolute(), tuple(_runs(notebook, Path(out).absolute(), rows, set(fixed), defaults))
    )


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


def _rows(asked: dict, fixed: dict, defaults: dict, path: Path) -> list[dict[str, Any]]:
    """Parameters of every run: the fixed ones, a row of the table, a combination of the grid."""
    grid, table = _mapping(asked, "grid", path), _table(asked.get("table"), defaults, path)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path.name}: grid needs a list of values for {name}, as [1, 2], not {values!r}")
    parts = {"parameters": set(fixed), "grid": set(grid), "table": {name for row in table for name in row}}
    for name in sorted(set().union(*parts.values())):
        if len(where := [part for part, names in parts.items() if name in names]) > 1:
            raise ValueError(f"{path.name}: {name} is given in {' and '.join(where)}: give it once")
    count = len(table)
    for values in grid.values():
        count *= len(values)
    if count > MOST:
        raise ValueError(f"{path.name} asks for {count} runs, more than {MOST}")
    steps = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    rows = [fixed | row | step for row in table for step in steps]
    return [{name: place(name, value, path.parent) for name, value in row.items()} for row in rows]


def _table(asked: Any, defaults: dict, path: Path) -> list[dict[str, Any]]:
    """Rows of the table; one empty row if there is none."""
    if asked is None:
        return [{}]
    if isinstance(asked, str):
        return _csv(Path(place("path", asked, path.parent)), defaults)
    if not isinstance(asked, list) or not asked or not all(isinstance(row, dict) and row for row in asked):
        raise ValueError(f"{path.name}: table must be a list of mappings, one a run, or the name of a CSV file")
    if odd := [name for row in asked for name in row if not isinstance(name, str)]:
        raise ValueError(f"{path.name}: {odd[0]!r} is no name of a parameter")
    return asked


def _csv(path: Path, defaults: dict) -> list[dict[str, Any]]:
    """Rows of a CSV file, read by the types of the defaults; an empty cell leaves the default."""
    lines = list(csv.reader(io.StringIO(_text(path), newline="")))
    names, lines = (lines or [[]])[0], [line for line in lines[1:] if any(line)]
    if not lines or len(set(names)) < len(names):
        raise ValueError(f"{path.name}: expected names of parameters, each once, and a row for each run below them")
    for number, line in enumerate(lines, 2):
        if len(line) != len(names):
            raise ValueError(f"{path.name}, row {number}: {len(line)} cells, the first row has {len(names)}")
    pairs = [[(name, cell) for name, cell in zip(names, line, strict=True) if cell] for line in lines]
    return [{name: read_text(cell, defaults.get(name)) for name, cell in row} for row in pairs]


def _runs(notebook: Path, out: Path, rows: Sequence[dict], fixed: set[str], defaults: dict) -> Iterator[Run]:
    """Give each row its key and folder. A folder made under another name (a grid that grew) keeps it."""
    code = code_of(notebook)
    made = {folder.name[-12:]: folder for folder in sorted(out.glob("*-????????????")) if folder.is_dir()}
    seen: dict[str, int] = {}
    outputs: set[str] = set()
    for number, row in enumerate(rows, 1):
        values = check_values(notebook, row)
        text = json.dumps([code, values, __version__], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        if key in seen:
            raise ValueError(f"runs {seen[key]} and {number} have the same parameters: {row}")
        seen[key] = number
        shown = {name: value for name, value in values.items() if name not in fixed}
        folder = made.get(key, out / f"{_readable(shown)}-{key}")
        if "output" in defaults:
            values = {"output": str(folder)} | values
            if values["output"] in outputs:
                raise ValueError(f"several runs would write to output = {values['output']}: leave it to the sweep")
            outputs.add(values["output"])
        yield Run(shown or values, key, folder, values)


def code_of(notebook: Path) -> str:
    """Hash of a notebook's code: text and outputs may change, and its runs stay finished."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [(c.source, c.metadata.get("tags", [])) for c in cells if c.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def source() -> str:
    """Hash of the package's own source, recorded with every run."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def _readable(values: Mapping[str, Any]) -> str:
    """Name of a folder that works on every file system."""
    parts = [f"{name}={Path(v).name if isinstance(v, str) else v}" for name, v in values.items()]
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", ",".join(parts).replace(",", "__"))[:80].strip("._") or "run"


# --- running ----------------------------------------------------------------------------------------------------------


def run_sweep(sweep: Sweep, jobs: int = 2, dask: str = "", again: bool = False, progress: bool = True) -> pd.DataFrame:
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

    Raises
    ------
    ValueError
        If there is no Dask.
    """
    to_do, older = [], 0
    for run in sweep.runs:
        record = run.record()
        if again or record is None or record["status"] != "finished":
            to_do.append(run)
        else:
            older += record["source"] != source()
    if done := len(sweep.runs) - len(to_do):
        note = f", {older} of them by other source of pss {__version__}" if older else ""
        tqdm.write(f"{done} of {len(sweep.runs)} runs are finished already{note}")
    sweep.out.mkdir(parents=True, exist_ok=True)
    write_now = _sparing(sweep.write_summary)
    write_now()
    try:
        with _workers(jobs, dask) as workers, tqdm(total=len(to_do), unit="run", disable=not progress) as bar:
            for name, error in workers(delayed(run_one)(sweep.notebook, run) for run in to_do):
                tqdm.write(f"{name} " + (f"FAILED: {error}" if error else "finished"))
                bar.update()
                write_now()
    finally:
        sweep.write_summary()
    return sweep.summary()


def _sparing(act: Callable[[], None]) -> Callable[[], None]:
    """The same, but left out where it would take more than a twentieth of the time."""
    due = 0.0

    def spared() -> None:
        nonlocal due
        started = time.monotonic()
        if started >= due:
            act()
            due = time.monotonic() + 20 * (time.monotonic() - started)

    return spared


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


def run_one(notebook: Path, run: Run) -> tuple[str, str]:
    """Run one and record how it ended; name of its folder, and the error, empty if there was none."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    run.folder.mkdir(parents=True, exist_ok=True)
    error, results, started = "", {}, time.time()
    (run.folder / "run.json").unlink(missing_ok=True)
    (run.folder / "summary.json").unlink(missing_ok=True)
    try:
        run_notebook(notebook, run.folder / notebook.name, run.parameters)
        results = _results(run.folder / "summary.json")
    except PapermillExecutionError as raised:
        error = f"{raised.ename}: {raised.evalue} (cell {raised.exec_count})"
    except Exception as raised:  # whatever it is, it is this run's, and the others go on
        error = f"{type(raised).__name__}: {raised}"
    record = {
        "key": run.key,
        "status": "failed" if error else "finished",
        "seconds": round(time.time() - started, 1),
        "error": error,
        "parameters": run.parameters,
        "results": results,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "pss": __version__,
        "source": source(),
    }
    write_whole(run.folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False))
    return run.folder.name, error


def _results(path: Path) -> dict[str, Any]:
    """Plain values that the notebook left."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("summary.json must hold a mapping of names to plain values")
    return {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
