"""Figures that several pages draw, and the sentences that they print in both languages.

Most are functions that take data and an optional ``ax`` and return the ``Axes``.

The same method and the same stage have the same colour everywhere. The method colours are those of Okabe and Ito,
told apart also by readers who are colour-blind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pss.ranking import RANKINGS
from pss.units import Units

STYLE = Path(__file__).with_name("pss.mplstyle")
JAPANESE = ("Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "MS Gothic", "IPAexGothic", "IPAGothic")  # fonts
METHOD_COLORS = {name: entry.color for name, entry in RANKINGS.items()}
METHOD_LABELS = {name: entry.label for name, entry in RANKINGS.items()}


def use_style() -> None:
    """Take the style of these figures for all that follows (white background, colour-blind safe).

    Letters that its font lacks are taken from a Japanese one, if there is one.
    """
    plt.style.use(STYLE)
    there = {font.name for font in fontManager.ttflist}
    plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in JAPANESE if name in there)]


def stage_colors(stages: Sequence[str]) -> dict[str, tuple]:
    """Colour of each stage, from dark (input) to light (output)."""
    return dict(zip(stages, plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(stages))), strict=True))


def show(figure: Figure | Axes, alt: str, ja: str = "") -> None:
    """Display a figure once, with text that says what it shows, in English and Japanese."""
    from IPython.display import display

    display(figure.figure, metadata={"image/png": {"alt": alt, "alt-ja": ja}})  # of a figure it is itself
    plt.close(figure.figure)


def say(en: str, ja: str) -> None:
    """Display a sentence computed from the same values in English and in Japanese (Markdown); the site keeps one."""
    from IPython.display import display

    for lang, text in (("en", en), ("ja", ja)):
        display({"text/markdown": text, "text/plain": text}, metadata={"lang": lang}, raw=True)


def image_row(images: Tensor, titles: Sequence[str] = (), axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Images in a row; (B, 3, H, W) in 0..1, titles above."""
    if axes is None:
        _, axes = plt.subplots(1, len(images), figsize=(1.45 * len(images), 1.9), squeeze=False)
        axes = axes[0]
    for number, (ax, image) in enumerate(zip(axes, images, strict=True)):
        ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        ax.set_axis_off()
        if len(titles):
            ax.set_title(titles[number], fontsize=9, loc="center")
    return axes


def render_map(raw: Tensor, low: float = 90, high: float = 99, blur: float = 0.8) -> Tensor:
    """Prepare raw maps for display on a fixed scale from 0 to 1.

    Each map is clipped to two of its percentiles, stretched to 0..1 and blurred, as in the first paper's program.

    Parameters
    ----------
    raw : Tensor, shape (B, H, W) or (H, W)
    low, high : float
        Percentiles.
    blur : float
        Standard deviation of a Gaussian, in pixels; 0 for none. That of the program is 3 pixels across, so 0.8.

    Returns
    -------
    Tensor, as ``raw``
        A map of one value throughout becomes zero.
    """
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles {low} and {high}: expected 0 <= low < high <= 100, as 90 and 99")
    if not raw.isfinite().all():
        raise ValueError("raw maps hold NaN or infinities: input_saliency makes none, what was done to them since?")
    if raw.dim() not in (2, 3):
        raise ValueError(f"raw maps are {tuple(raw.shape)}: expected (B, H, W) or (H, W), from input_saliency")
    maps = raw.detach().cpu().numpy()
    start, stop = np.percentile(maps, [low, high], axis=(-2, -1), keepdims=True)
    maps = (maps.clip(start, stop) - start) / np.where(stop > start, stop - start, 1)
    width = blur * np.array([0, 1, 1][-maps.ndim :])
    return torch.from_numpy(gaussian_filter(maps, width, mode="mirror")).to(raw)


def overlay(image: Tensor, heat: Tensor, title: str = "", ax: Axes | None = None) -> Axes:
    """Map over its image, on a fixed colour scale from 0 (the image alone) to 1.

    Parameters
    ----------
    image : Tensor, shape (C, H, W)
        In 0..1.
    heat : Tensor, shape (H, W)
        In 0..1, as `render_map` makes it.
    """
    ax = ax or plt.subplots(figsize=(2.4, 2.6))[1]
    grey = 0.6 * image.mean(dim=0).clamp(0, 1).numpy()  # darker than the colours of the map
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
    values = heat.clamp(0, 1).numpy()
    ax.imshow(values, cmap="autumn", vmin=0, vmax=1, alpha=(1.5 * values).clip(0, 1))
    ax.set_axis_off()
    ax.set_title(title, fontsize=9, loc="center")
    return ax


def overlay_grid(images: Tensor, heats: Mapping[str, Tensor], rows: Sequence[str] = ()) -> Figure:
    """Images in the first column, and beside each its maps, one column a kind, all on the scale of `overlay`.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
        In 0..1.
    heats : mapping of str to Tensor
        Title of each column, and its rendered maps (B, H, W).
    rows : sequence of str
        What stands to the left of each image.
    """
    columns = len(heats) + 1
    figure, axes = plt.subplots(len(images), columns, figsize=(1.4 * columns + 0.6, 1.42 * len(images) + 0.4))
    axes = np.reshape(axes, (len(images), columns))
    for row, image in enumerate(images):
        overlay(image, torch.zeros(image.shape[1:]), "image" if row == 0 else "", axes[row, 0])
        for column, (title, maps) in enumerate(heats.items(), start=1):
            overlay(image, maps[row], title if row == 0 else "", axes[row, column])
        if len(rows):
            axes[row, 0].annotate(rows[row], (-0.08, 0.5), None, "axes fraction", rotation=90, ha="right", va="center")
    bar = figure.colorbar(axes[0, 1].images[1], ax=axes, shrink=0.8, aspect=30, pad=0.01, ticks=[0, 0.5, 1])
    bar.solids.set_alpha(1)
    return figure


def profile_by_layer(
    values: Tensor,
    units: Units,
    top: Sequence[int] | Tensor = (),
    sort: bool = False,
    ylabel: str = "saliency",
    ax: Axes | None = None,
    label: str = "",
) -> Axes:
    """One value per unit, (U,), in the order of the network, coloured by stage.

    Parameters
    ----------
    values : Tensor, shape (U,)
    units : Units
    top : sequence of int
        Unit ids to mark with a ring.
    sort : bool
        Sort descending within each layer, as in the first paper's Figure 1 (``top`` is then not marked).
    label : str
        What the rings are, for the legend; by default ``top k``.
    """
    ax = ax or plt.subplots(figsize=(7.2, 2.8))[1]
    values = np.asarray(values, dtype=float).copy()
    if sort:
        for layer in range(len(units.layers)):
            values[units.span(layer)] = np.sort(values[units.span(layer)])[::-1]
    for number, (stage, color) in enumerate(stage_colors(units.stages).items()):
        at = np.flatnonzero(units.stage_ids == number)
        ax.plot(at, values[at], ".", ms=2.5, color=color, label=stage.lstrip("_"))  # "_blocks" would be left out
    if len(top) and not sort:
        ids = np.asarray(top)
        ax.plot(ids, values[ids], "o", ms=6, mfc="none", mec="#D55E00", mew=1.3, label=label or f"top {len(ids)}")
    ax.set(xlabel="unit (in the order of the network)", ylabel=ylabel, xlim=(-0.01 * len(units), 1.01 * len(units)))
    ax.legend(ncols=len(units.stages) + 1, loc="lower center", bbox_to_anchor=(0.5, 1), markerscale=2, handletextpad=0)
    return ax


def stage_bars(shares: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of each stage among the top units, a group of bars a stage, with the prior as a line across.

    Parameters
    ----------
    shares : DataFrame
        Columns ``method``, ``stage``, ``share``, ``prior`` and optionally ``error`` (0..1).
    """
    ax = ax or plt.subplots(figsize=(7.2, 3))[1]
    stages, methods = list(dict.fromkeys(shares["stage"])), list(dict.fromkeys(shares["method"]))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        part = shares[shares["method"] == method].set_index("stage").loc[stages]
        x = np.arange(len(stages)) - 0.4 + width * (number + 0.5)
        label, color = METHOD_LABELS.get(method, method), METHOD_COLORS.get(method)
        ax.bar(x, part["share"], width * 0.92, yerr=part.get("error"), color=color, label=label, error_kw={"lw": 0.8})
    prior = shares.drop_duplicates("stage").set_index("stage").loc[stages, "prior"]
    ax.hlines(prior, np.arange(len(stages)) - 0.45, np.arange(len(stages)) + 0.45, color="black", lw=1.2, label="prior")
    ax.set_xticks(range(len(stages)), stages, rotation=90 if sum(map(len, stages)) > 60 else 0)
    ax.set(xlabel="stage", ylabel="share of the top units")
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax


def method_curves(summary: pd.DataFrame, value: str = "mean", ylabel: str = "", ax: Axes | None = None) -> Axes:
    """One line a method over the number of edited units, with a band for its confidence interval.

    Parameters
    ----------
    summary : DataFrame
        Columns ``method``, ``k``, the value and, for a band, ``low`` and ``high``.
    """
    ax = ax or plt.subplots(figsize=(6, 3.4))[1]
    for method, part in summary.groupby("method", sort=False):
        color = METHOD_COLORS.get(method)
        ax.plot(part["k"], part[value], color=color, label=METHOD_LABELS.get(method, method))
        if "low" in part:
            ax.fill_between(part["k"], part["low"], part["high"], color=color, alpha=0.15, lw=0)
    ax.set(xlabel="number of edited units k", ylabel=ylabel)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def difference_bars(table: pd.DataFrame, by: str, ax: Axes | None = None) -> Axes:
    """Differences from each other method with their intervals, a row a method, side by side what ``by`` tells apart.

    Parameters
    ----------
    table : DataFrame
        Columns ``than`` (the other method), ``mean``, ``low``, ``high`` and the one named by ``by``.
    """
    ax = ax or plt.subplots(figsize=(4.8, 3.4))[1]
    methods = list(dict.fromkeys(table["than"]))
    groups = list(table.groupby(by, sort=False))
    for number, (name, part) in enumerate(groups):
        rows = np.array([methods.index(m) for m in part["than"]]) + 0.28 * (number - (len(groups) - 1) / 2)
        bars = [part["mean"] - part["low"], part["high"] - part["mean"]]
        color, marker = ("#0072B2", "#D55E00", "#009E73")[number % 3], "osD"[number % 3]
        ax.errorbar(part["mean"], rows, xerr=bars, fmt=marker, ms=5, capsize=2, color=color, label=name)
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks(range(len(methods)), [METHOD_LABELS.get(m, m) for m in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    return ax


def edit_panels(summary: pd.DataFrame, bands: Sequence[str] = ()) -> Figure:
    """Three panels of `method_curves`, wrong confidence, true confidence and share corrected, with one legend.

    Parameters
    ----------
    summary : DataFrame
        From `pss.statistics.summarize`, with a column ``method``.
    bands : sequence of str
        Methods whose confidence interval is drawn; more than two or three hide the lines.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.7), sharex=True)
    labels = {
        "change_wrong": "change of confidence, wrong class",
        "change_true": "change of confidence, true class",
        "corrected": "share corrected",
    }
    known = {method: number for number, method in enumerate(METHOD_COLORS)}  # the legend follows this order
    place = summary["method"].map(known).fillna(len(known))
    summary = summary.loc[place.sort_values(kind="stable").index]
    banded = summary["method"].isin(bands)
    for ax, (value, label) in zip(axes, labels.items(), strict=True):
        ends = {end: summary[f"{value}_{end}"].where(banded) for end in ("low", "high")}
        method_curves(summary.assign(**ends), value, label, ax)
        ax.get_legend().remove()
        for line in ax.lines:
            if line.get_label() in (METHOD_LABELS["abs_zscore"], METHOD_LABELS["ratio"]):
                line.set_linestyle((0, (2, 2)))  # often on top of another line, which then shows through
        ax.axhline(0, color="black", lw=0.8, zorder=0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="outside upper center")
    return figure


def confidence_bars(before: Tensor, after: Tensor, label: int, ax: Axes | None = None) -> Axes:
    """Confidence in every class before and after an edit, (C,) each; the true class is named in green.

    The class predicted before is named in orange if it was wrong.
    """
    ax = ax or plt.subplots(figsize=(3.4, 3))[1]
    at = np.arange(len(before))
    ax.barh(at - 0.2, before.numpy(), 0.4, color="#B8B8B8", label="before")
    ax.barh(at + 0.2, after.numpy(), 0.4, color="#0072B2", label="after")
    ax.set_yticks(at)
    ax.yaxis.grid(False)
    for place, color in ((int(before.argmax()), "#D55E00"), (int(label), "#00795A")):
        ax.get_yticklabels()[place].set(color=color, fontweight="bold")
    ax.invert_yaxis()
    ax.set(xlabel="confidence", xlim=(0, 1))
    ax.legend(loc="best")
    return ax


def story(
    picture: np.ndarray,
    unusual: Tensor,
    units: Units,
    top: Tensor,
    before: Tensor,
    after: Tensor,
    label: int,
    heat: Tensor | None = None,
) -> Figure:
    """A misclassified image, the units that stand out on it, and the confidences before and after their edit.

    Parameters
    ----------
    picture : ndarray, shape (H, W, 3)
        0..255, or floating point in 0..1.
    unusual : Tensor, shape (U,)
        Z-score of every unit.
    top : Tensor of int, shape (k,)
        The edited units, marked with a ring.
    before, after : Tensor, shape (C,)
        Confidences.
    label : int
        The true class.
    heat : Tensor, shape (H, W), optional
        The pixels behind these units, in 0..1: a panel of its own, as `overlay` draws it.
    """
    if heat is None:
        figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.3), width_ratios=[1.3, 2.7, 1.45])
    else:  # two rows: side by side the four would be too small to read on a page
        figure, axes = plt.subplots(2, 2, figsize=(8.2, 5.8), width_ratios=[1.25, 2.2])
        axes = axes.flat
    axes[0].imshow(picture)
    axes[0].set_axis_off()
    wrong = int(before.argmax())
    axes[0].set_title(f"a {label}, read as {wrong}", loc="center", fontsize=13)
    profile_by_layer(unusual, units, top, ylabel="z-score of the saliency", ax=axes[1])
    axes[1].legend(ncols=3, loc="upper left", markerscale=1.5, handletextpad=0.2, columnspacing=1, fontsize=8)
    axes[1].set_ylim(top=float(unusual.max()) * 1.35)
    axes[1].set_title(f"the {len(top)} of {len(units):,} filters that stand out", loc="left")
    if heat is not None:
        scale = 255 if np.issubdtype(picture.dtype, np.integer) else 1
        overlay(torch.from_numpy(picture / scale).permute(2, 0, 1), heat, ax=axes[2])
        axes[2].set_title("the pixels behind them", loc="center", fontsize=13)
    confidence_bars(before, after, label, ax=axes[-1])
    axes[-1].set_title(f"now read as {int(after.argmax())}", loc="left")
    return figure


def plain(text: str, longest: int = 28) -> str:
    """Text that a figure can show as it stands: shortened, no mathematics, glyphs that the fonts lack as ``?``."""
    known = [get_font(findfont(FontProperties(family=[name]))).get_charmap() for name in plt.rcParams["font.family"]]
    text = "".join(letter if any(ord(letter) in font for font in known) else "?" for letter in " ".join(text.split()))
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")


def top_confidences(
    confidences: Tensor, label: int, classes: Sequence[str], count: int = 5, ax: Axes | None = None
) -> Axes:
    """Largest confidences, (C,), with the true class added below if it is not among them; the true class in green."""
    ax = ax or plt.subplots(figsize=(4.6, 2.6))[1]
    order = confidences.argsort(descending=True)[:count].tolist()
    order += [] if label in order else [label]
    values = [float(confidences[c]) for c in order]
    ax.barh(range(len(order)), values, color=["#00795A" if c == label else "#D55E00" for c in order])
    ax.set_yticks(range(len(order)), [f"{plain(classes[c])} ({c})" for c in order])
    ax.get_yticklabels()[order.index(label)].set(color="#00795A", fontweight="bold")
    for place, value in enumerate(values):
        ax.text(value + 0.01, place, f"{value:.2g}", va="center", fontsize=9)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlabel="confidence", xlim=(0, 1.12))
    return ax


def edit_lines(curves: pd.DataFrame) -> Figure:
    """One image under each edit: confidence in its true class and in the one predicted at first, over the edits made.

    Parameters
    ----------
    curves : DataFrame
        From `pss.edit_curve`, with a column ``edit``; a panel for each. Dots mark where the true class is predicted.
    """
    edits = list(dict.fromkeys(curves["edit"]))
    figure, axes = plt.subplots(1, len(edits), figsize=(4.4 * len(edits), 3), sharey=True, squeeze=False)
    for ax, edit in zip(axes[0], edits, strict=True):
        own = curves[curves["edit"] == edit]
        if (own["label"] != own["predicted0"]).all():
            ax.plot(own["k"], own["confidence_wrong"], color="#D55E00", label="class predicted at first")
        ax.plot(own["k"], own["confidence_true"], color="#00795A", label="true class")
        right = own[own["corrected"]]
        if len(right):
            ax.plot(right["k"], right["confidence_true"], "o", ms=5, color="#00795A", label="predicted: the true class")
        ax.set(title=edit, xlabel="number of edited units k", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("confidence")
    shown = {line.get_label(): line for ax in axes[0] for line in ax.lines}
    figure.legend(shown.values(), shown.keys(), ncols=3, loc="outside upper center")
    return figure
