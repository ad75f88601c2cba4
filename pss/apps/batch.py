"""Run notebooks through papermill: the tutorials on the built-in data, one notebook with parameters, or a sweep.

``python -m pss run --out runs notebooks`` executes every notebook of a folder and writes the executed copies and
their figures; ``-p name value`` sets a parameter, read as YAML (a text stays one where the default is a text).
``python -m pss run sweep.yaml`` runs one notebook over a grid or a table of parameters, resumable: see
`pss.apps.sweep`. Unknown names and values of another type are errors before anything runs. Relative
places in ``-p`` are seen from where the command is given, those in a sweep from its file.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from pss.apps.execution import check_values, parameters_of, place, read_text, refresh, run_notebook
from pss.apps.sweep import Sweep, read_sweep, run_sweep

__all__ = ["Sweep", "find_notebooks", "main", "parameters_of", "read_sweep", "refresh", "run_notebook", "run_sweep"]


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


def _given(pairs: Sequence[tuple[str, str]], notebook: Path) -> dict[str, Any]:
    """Values of the command line for a notebook, checked; relative places seen from the current folder."""
    defaults = parameters_of(notebook) if pairs else {}
    values = {name: place(name, read_text(text, defaults.get(name)), Path.cwd()) for name, text in pairs}
    return check_values(notebook, values)


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
    """Command line: run the notebooks or the sweep, say what was made and where; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m pss run", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", help="notebooks, folders with NN_*.ipynb, or one sweep: a .yaml file")
    parser.add_argument("--out", help="folder for the executed copies and figures (default: runs, or the sweep's own)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time, sharing the processors (default: 2)")
    parser.add_argument("--in-place", action="store_true", help="refresh the notebooks themselves, ready to commit")
    parser.add_argument("--dask", default="", help="sweep: run on this Dask scheduler, or local: on one started here")
    parser.add_argument("--again", action="store_true", help="sweep: run the finished runs too")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    is_sweep = any(Path(name).suffix in (".yaml", ".yml") for name in options.notebooks)
    if is_sweep and (len(options.notebooks) > 1 or options.in_place):
        parser.error("a sweep is run alone, and not in place")
    if not is_sweep and (options.dask or options.again):
        parser.error("--dask and --again are for a sweep: a .yaml file")
    return _sweep(options, parser) if is_sweep else _notebooks(options, parser)


def _sweep(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        sweep = read_sweep(options.notebooks[0], options.out, dict(options.p), Path.cwd())
    except ValueError as error:
        parser.error(str(error))
    try:
        table = run_sweep(sweep, options.jobs, options.dask, options.again)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from here; so far in {sweep.out / 'index.html'}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # no Dask, no scheduler there, a full disk
        parser.error(str(error))
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    print(f"{len(table)} runs: {counts}; see {sweep.out / 'index.html'}, summary.csv beside it")
    return 0 if (table["status"] == "finished").all() else 1


def _notebooks(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        notebooks = find_notebooks(options.notebooks)
        values = [_given(options.p, notebook) for notebook in notebooks]
    except ValueError as error:
        parser.error(str(error))
    out, failed, started = Path(options.out or "runs"), 0, time.monotonic()
    workers = Parallel(n_jobs=min(options.jobs, len(notebooks)), return_as="generator_unordered")
    pairs = zip(notebooks, values, strict=True)
    tasks = workers(delayed(_task)(notebook, out, given, options.in_place) for notebook, given in pairs)
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
