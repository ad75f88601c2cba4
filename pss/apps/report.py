"""A page that tells what a run found: texts, tables and pictures, in English and Japanese, in one HTML file.

The file needs nothing beside it: pictures are inside, there is no script, and nothing is fetched. Every text is escaped
where it enters the page, since names of files, classes and layers come from outside.
"""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import BinaryIO

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pss
from pss.plots.figures import show
from pss.storage.whole import write_whole

LANGUAGES = {"en": ("en",), "ja": ("ja",), "both": ("en", "ja")}
STYLE = Path(__file__).with_name("report.css")
# What the columns of our tables are called in Japanese; others keep their names.
JAPANESE = {
    "rank": "順位",
    "unit": "ユニット",
    "layer": "層",
    "stage": "ステージ",
    "saliency": "顕著性",
    "z": "z得点",
    "p": "裾確率 p",
    "significant": "有意",
    "class": "クラス",
    "confidence": "確信度",
    "edit": "編集",
    "retain images": "保持画像",
    "accuracy before": "編集前の正解率",
    "accuracy after": "編集後の正解率",
    "still right": "正解のままの割合",
    "mean KL": "KLの平均",
    "worst KL": "KLの最大値",
    "setting": "設定",
    "value": "値",
    "part": "画像",
    "n": "枚数",
}
# Words in the columns `edit`, `part` and `setting`, which are ours and never a user's.
_WORDS = {
    "prune": "枝刈り",
    "finetune": "ファインチューニング",
    "mistakes": "誤分類画像",
    "retain": "保持画像",
    "retain held out": "保持画像（取り分け分）",
    "model": "モデル",
    "weights": "重み",
    "image": "画像",
    "label": "正解クラス",
    "units": "ユニット",
    "reference": "基準統計量",
    "method": "順位付け",
    "loss": "損失",
    "signed": "符号付き",
    "boost": "強調の倍率",
    "noise": "ノイズ",
    "learning rate": "学習率",
    "budget of the patch": "パッチの予算",
}
_NAMES = {"en": "English", "ja": "日本語"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_Block = Callable[[str], str]  # language -> HTML


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
    blocks: list[_Block] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"language {self.language!r}: expected one of {', '.join(LANGUAGES)}")
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def heading(self, text: str, ja: str) -> None:
        """Begin a section."""
        self.blocks.append(lambda language: f"<h2>{escape(_in(language, text, ja))}</h2>")

    def say(self, text: str, ja: str) -> None:
        """Print a sentence, and put it on the page."""
        print(ja if self.language == "ja" else text)
        self.blocks.append(lambda language: f"<p>{escape(_in(language, text, ja))}</p>")

    def table(self, frame: pd.DataFrame, text: str, ja: str) -> pd.DataFrame:
        """Put a table on the page, with a caption; returns it, for the notebook to show."""

        def block(language: str) -> str:
            shown = _japanese(frame) if language == "ja" else frame
            html = shown.to_html(index=False, escape=True, border=0, na_rep="–", float_format=lambda v: f"{v:.3g}")
            caption = escape(_in(language, text, ja))
            html = html.replace("<thead>", f"<caption>{caption}</caption><thead>", 1).replace(
                "<th>", '<th scope="col">'
            )
            return f'<div class="wide" role="region" tabindex="0" aria-label="{caption}">{html}</div>'

        self.blocks.append(block)
        return frame

    def settings(self, values: Mapping[str, object]) -> None:
        """Put a table of names and values on the page only."""
        frame = pd.DataFrame({"setting": list(values), "value": [str(v) for v in values.values()]})
        self.table(frame, "Settings", "設定")

    def show(self, figure: Figure | Axes, name: str, alt: str, ja: str) -> None:
        """Display a picture once, write it to ``<name>.png``, and put it on the page with its alternative text."""
        figure = figure if isinstance(figure, Figure) else figure.figure
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        self.keep(f"{name}.png", png.getvalue())
        data = base64.b64encode(png.getvalue()).decode()
        text = lambda language: escape(_in(language, alt, ja))  # noqa: E731
        source = f"data:image/png;base64,{data}"
        self.blocks.append(
            lambda language: f'<figure class="wide" tabindex="0"><img src="{source}" alt="{text(language)}"></figure>'
        )
        show(figure, alt, ja=ja)
        plt.close(figure)

    def keep(self, name: str, content: str | bytes | Callable[[BinaryIO], object]) -> Path:
        """Write a file into the folder, whole or not at all, and list it."""
        path = self.folder / name
        write_whole(path, content)
        if name not in self.files:
            self.files.append(name)
        return path

    def summary(self, **values: object) -> Path:
        """Write names and plain values to ``summary.json``: the columns of this run in the summary of a sweep."""
        text = json.dumps(values, ensure_ascii=False, indent=1)
        return self.keep("summary.json", text)

    def write(self) -> Path:
        """Write ``report.html``."""
        languages = LANGUAGES[self.language]
        articles = "\n".join(self._article(language) for language in languages)
        links = " · ".join(f'<a href="#{each}" lang="{each}">{_NAMES[each]}</a>' for each in languages)
        switch = f'<nav aria-label="Language · 言語">{links}</nav>' if len(languages) > 1 else ""
        page = (
            f'<!doctype html>\n<html lang="{languages[0]}">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(_in(languages[0], self.title, self.ja))}</title>\n"
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n{switch}\n"
            f"<main>\n{articles}\n</main>\n</body>\n</html>\n"
        )
        return self.keep("report.html", page)

    def _article(self, language: str) -> str:
        parts = "\n".join(block(language) for block in self.blocks)
        versions = f"pss {pss.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
        title = escape(_in(language, self.title, self.ja))
        return (
            f'<article id="{language}" lang="{language}">\n<h1>{title}</h1>\n{parts}\n'
            f"<footer>{escape(versions)}</footer>\n</article>"
        )


def _in(language: str, text: str, ja: str) -> str:
    return ja if language == "ja" else text


def _japanese(frame: pd.DataFrame) -> pd.DataFrame:
    ours = frame.columns.intersection(["edit", "part", "setting"])
    return frame.assign(**{name: frame[name].replace(_WORDS) for name in ours}).rename(columns=JAPANESE)
