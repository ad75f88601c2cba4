"""Tables that grow row by row, say how they were made, and go on where they were stopped."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pss


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
