"""The page of a sweep: one row a run, with its values, how it ended, and links to what it made."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; } th, td { padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: left;
vertical-align: top; } th { position: sticky; top: 0; background: #fff; } img { max-height: 6rem; max-width: 12rem; }
.finished { color: #14692f; } .failed { color: #a3160e; } .error { max-width: 24rem; overflow-wrap: anywhere; }
td ul { margin: 0; padding: 0; list-style: none; } th[scope=row] { font-weight: normal; }
"""


def page(title: str, table: pd.DataFrame, out: Path) -> str:
    """HTML of the summary of a sweep, whose runs have their folders in ``out``; every name and value escaped."""
    counts = ", ".join(f"{count} {escape(status)}" for status, count in table["status"].value_counts().items())
    names = [name for name in table.columns if name not in ("run", "status", "seconds", "error")]
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in ["run", *names, "seconds", "status", "made", "figure"])
    body = "\n".join(_row(row, names, out) for row in table.to_dict("records"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: runs</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1>\n"
        f'<p>{len(table)} runs: {counts}. <a href="summary.csv">summary.csv</a></p>\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></main></body></html>\n"
    )


def _row(row: dict[str, Any], names: list[str], out: Path) -> str:
    files, figures = _made(out / row["run"])
    made = "".join(f"<li>{_link(out, file)}</li>" for file in files)
    values = "".join(f"<td>{_shown(row[name])}</td>" for name in names)
    status = f'<span class="{escape(row["status"].split()[0])}">{escape(row["status"])}</span>'
    if isinstance(row["error"], str) and row["error"]:
        status += f'<div class="error">{escape(row["error"])}</div>'
    seconds = "" if pd.isna(row["seconds"]) else f"{row['seconds']:.1f}"
    picture = _thumbnail(out, figures) if figures else ""
    name = f'<th scope="row">{escape(row["run"].rpartition("-")[0])}</th>'
    return f"<tr>{name}{values}<td>{seconds}</td><td>{status}</td><td><ul>{made}</ul></td><td>{picture}</td></tr>"


def _made(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files that a run made, pages first, and its pictures."""
    visible = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    pictures = [p for p in visible if p.suffix.lower() in (".png", ".jpg", ".svg")]
    files = [p for p in visible if p.parent == folder and p not in pictures]
    return sorted(files, key=lambda p: (p.suffix not in (".html", ".ipynb"), p.suffix, p.name)), pictures


def _thumbnail(out: Path, figures: list[Path]) -> str:
    first = quote(figures[0].relative_to(out).as_posix())
    text = f"first of {len(figures)} figures of {figures[0].relative_to(out).parts[0]}"
    rest = " ".join(f'<a href="{quote(f.relative_to(out).as_posix())}">{i}</a>' for i, f in enumerate(figures[1:], 2))
    return f'<a href="{first}"><img src="{first}" alt="{escape(text)}" loading="lazy"></a><div>{rest}</div>'


def _link(out: Path, file: Path) -> str:
    return f'<a href="{quote(file.relative_to(out).as_posix())}">{escape(file.name)}</a>'


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.6g}"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
