"""The commands ``run`` and ``sweep``: what they take, and what they print.

``python -m pss run notebooks`` executes every notebook of a folder, each into a folder of its own below ``runs``;
``-p name value`` sets a parameter, read as YAML (a text stays one where the default is a text).
``python -m pss sweep sweep.yaml`` runs one notebook over a grid or a table of parameters, resumable: see
`pss.apps.sweep`. Unknown names, values of another type and places that are missing are errors before anything runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from joblib import Parallel, cpu_count, delayed
from tqdm import tqdm

from pss.apps.execution import raised, refresh
from pss.apps.sweep import Sweep, find_notebooks, read_sweep, run_sweep, single_runs

_JOBS = min(4, cpu_count())  # a run takes a gigabyte or two


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser the options of ``run`` or of ``sweep``."""
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument(
        "--jobs", type=int, default=_JOBS, help="runs at a time, sharing the processors (default: %(default)s)"
    )
    if command == "run":
        parser.add_argument("notebooks", nargs="+", help="notebooks, or folders with NN_*.ipynb")
        parser.add_argument("--out", type=Path, help="folder of the runs (default: runs)")
        parser.add_argument("--in-place", action="store_true", help="refresh the notebooks themselves, ready to commit")
    else:
        parser.add_argument("file", help="the sweep, a .yaml file")
        parser.add_argument("--out", type=Path, help="folder of the runs (default: the sweep's own)")
        parser.add_argument("--dask", default="", help="run on this Dask scheduler, or local: on one started here")
        parser.add_argument("--again", action="store_true", help="run the finished runs too")


def main(options: argparse.Namespace) -> int:
    """Run the notebooks or the sweep, say what was made and where; 1 if one failed."""
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs}: at least 1")
        if options.command == "sweep":
            sweep, how = read_sweep(options.file, options.out, dict(options.p)), (options.dask, options.again)
            return _run(sweep, options.jobs, *how)
        notebooks = find_notebooks(options.notebooks)
        if options.in_place:
            return _refresh(notebooks, options.jobs)
        return _run(single_runs(notebooks, options.out, dict(options.p)), options.jobs, again=True)
    except (ValueError, OSError) as error:  # also: no Dask, no scheduler there, a full disk
        return options.refuse(str(error))


def _run(sweep: Sweep, jobs: int, dask: str = "", again: bool = False) -> int:
    index = sweep.out / "index.html"
    try:
        table = run_sweep(sweep, jobs, dask, again, lead=int(sweep.runs[0].notebook.name.startswith("00_")))
    except KeyboardInterrupt:
        goes_on = "" if again else f": the same command goes on from here; so far in {index}"
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    print(f"{len(table)} runs: {counts}" if len(table) > 1 else table.get("verdict", [counts])[0])
    print(index if len(table) > 1 else sweep.runs[0].page)
    return 0 if (table["status"] == "finished").all() else 1


def _refresh(notebooks: list[Path], jobs: int) -> int:
    workers = Parallel(n_jobs=min(jobs, len(notebooks)), return_as="generator_unordered")
    tasks = workers(delayed(_refresh_one)(notebook) for notebook in notebooks)
    failed = 0
    for notebook, error in tqdm(tasks, total=len(notebooks), unit="notebook"):
        failed += bool(error)
        tqdm.write(f"{notebook.name} " + (f"FAILED: {error}" if error else "refreshed"))
    print(f"{len(notebooks) - failed} of {len(notebooks)} notebooks refreshed")
    return 1 if failed else 0


def _refresh_one(notebook: Path) -> tuple[Path, str]:
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    try:
        refresh(notebook)
    except Exception as error:  # whatever it is, it is this notebook's, and the others go on
        return notebook, raised(error)
    return notebook, ""
