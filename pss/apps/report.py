"""A page that tells what a run found: texts, tables and pictures, in English and Japanese, in one HTML file.

The file needs nothing beside it: pictures are inside, there is no script, and nothing is fetched. Every text is escaped
where it enters the page, since names of files, classes and layers come from outside.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pss
from pss.apps.pages import in_japanese, render, sentence, words
from pss.plots import show
from pss.storage.whole import write_whole

LANGUAGES = {"en": ("en",), "ja": ("ja",), "both": ("en", "ja")}


@dataclass
class Report:
    """A page under construction; what is added is shown in the notebook too.

    Attributes
    ----------
    folder : Path
        Where the page and its pictures go; made if it is not there.
    title, ja : str
        Heading of the page in English and Japanese.
    language : {"en", "ja", "both"}
        Of the page. In the notebook a sentence is Japanese only where the page is.

    Raises
    ------
    ValueError
        For another language.
    """

    folder: Path
    title: str
    ja: str
    language: str = "both"
    blocks: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"language {self.language!r}: expected one of {', '.join(LANGUAGES)}")
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def heading(self, text: str, ja: str) -> None:
        """Begin a section."""
        self.blocks.append({"kind": "heading", "en": text, "ja": ja})

    def say(self, text: str, ja: str) -> None:
        """Print a sentence, and put it on the page."""
        print(ja if self.language == "ja" else text)
        self.blocks.append({"kind": "sentence", "en": text, "ja": ja})

    def code(self, lines: str) -> None:
        """Print lines to be pasted, and put them on the page."""
        print(lines)
        self.blocks.append({"kind": "code", "en": lines, "ja": lines})

    def table(self, frame: pd.DataFrame, text: str, ja: str) -> pd.DataFrame:
        """Put a table on the page, with a caption; returns it, for the notebook to show."""
        ours = frame.columns.intersection(["edit", "map", "part", "setting", "units"])
        japanese = frame.assign(**{name: frame[name].map(in_japanese) for name in ours})
        columns = {"en": list(frame), "ja": [words()["columns"].get(name, name) for name in frame]}
        rows = {"en": frame.map(_text).to_numpy().tolist(), "ja": japanese.map(_text).to_numpy().tolist()}
        self.blocks.append({"kind": "table", "en": text, "ja": ja, "columns": columns, "rows": rows})
        return frame

    def open_with(self, *sections: tuple[tuple[str, str], list[tuple[str, str] | str]], at: int = 0) -> None:
        """Print sections, a heading and its sentences or lines to paste; put them first, or behind ``at`` blocks."""
        self.blocks, rest = self.blocks[:at], self.blocks[at:]
        for heading, sentences in sections:
            self.heading(*heading)
            for told in sentences:
                self.code(told) if isinstance(told, str) else self.say(*told)
        self.blocks += rest

    def settings(self, values: Mapping[str, object]) -> None:
        """Put a table of names and values on the page only."""
        frame = pd.DataFrame({"setting": list(values), "value": [str(v) for v in values.values()]})
        self.table(frame, *sentence("settings"))

    def show(self, figure: Figure | Axes, name: str, alt: str, ja: str) -> None:
        """Display a picture once, write it to ``<name>.png``, and put it on the page with its alternative text."""
        figure, png = figure.figure, io.BytesIO()  # of a figure it is itself
        figure.savefig(png, format="png", dpi=110)
        self.keep(f"{name}.png", png.getvalue())
        self.blocks.append({"kind": "figure", "en": alt, "ja": ja, "png": base64.b64encode(png.getvalue()).decode()})
        show(figure, alt, ja=ja)

    def keep(self, name: str, content: str | bytes | dict[str, Any] | Callable[[BinaryIO], object]) -> Path:
        """Write a file into the folder, whole or not at all, and list it; the content, or what a function writes."""
        path = self.folder / name
        if callable(content):
            content(file := io.BytesIO())
            content = file.getvalue()
        write_whole(path, content)
        if name not in self.files:
            self.files.append(name)
        return path

    def summary(self, **values: object) -> Path:
        """Write names and plain values to ``summary.json``: the columns of this run in the summary of a sweep.

        A ``verdict`` among them is what the command line prints when the run has ended.
        """
        return self.keep("summary.json", values)

    def write(self) -> Path:
        """Write ``report.html``."""
        page: dict[str, Any] = {"languages": LANGUAGES[self.language], "blocks": self.blocks}
        page |= {"title": {"en": self.title, "ja": self.ja}}
        versions = f"pss {pss.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
        return self.keep("report.html", render("report.html", **page, versions=versions))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "✓" if value else "–"
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}"
    return str(value)
