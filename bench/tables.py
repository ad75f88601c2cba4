"""Tables that grow row by row, say how they were made, and go on where they were stopped."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pss
from pss.engine.process import thread_count

EXPERIMENTS = Path(__file__).resolve().parents[1] / "data" / "experiments"


def begin(path: Path, command: str, **parameters: Any) -> pd.DataFrame:
    """Rows that are there already; a new table gets lines on how it is made, which start with ``#``.

    Raises
    ------
    ValueError
        If the table was begun with other parameters: these would not be rows of one experiment.
    """
    asked = [f"# {name}: {value}\n" for name, value in parameters.items()]
    if not path.exists():
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, pss {pss.__version__}"
        about = [f"# made by: {command}\n", f"# begun on: {datetime.date.today()}, {versions}\n", *asked]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(about), "utf-8")
    lines = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(lines), "utf-8")  # without a row that is half written
    if others := [line.strip("# \n") for line in asked if line not in lines]:
        raise ValueError(f"{path} was not begun with {others}: name another file, or remove it")
    return pd.DataFrame() if lines[-1].startswith("#") else read(path)


def add(path: Path, row: dict[str, Any]) -> None:
    """Append a row; the first one names the columns, which are the same for all."""
    first = path.read_text("utf-8").splitlines()[-1].startswith("#")
    pd.DataFrame([row]).to_csv(path, mode="a", header=first, index=False, lineterminator="\n")


def read(path: Path) -> pd.DataFrame:
    """The rows of a table."""
    return pd.read_csv(path, comment="#")


def done(table: pd.DataFrame, key: Sequence[str]) -> set[tuple]:
    """What is there already, by these columns."""
    return set() if table.empty else set(table[list(key)].itertuples(index=False, name=None))


def command(run: Callable[..., Any], about: str | None, out: Path, **options: int | tuple[int, ...]) -> None:
    """Make or finish a table from the command line: ``run`` with these options, each a number or several."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=out, help="(default: %(default)s)")
    for name, value in options.items():
        several = {"nargs": "+"} if isinstance(value, tuple) else {}
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help="(default: %(default)s)", **several
        )
    with thread_count(1):
        run(**vars(parser.parse_args()))
