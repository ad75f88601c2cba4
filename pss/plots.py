"""The figures: functions that take data and an optional ``ax`` and return the ``Axes``.

The same method and the same stage have the same colour everywhere. The method colours are those of Okabe and Ito,
told apart also by readers who are colour-blind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pss.units import Units

STYLE = Path(__file__).with_name("pss.mplstyle")
METHOD_COLORS = {
    "zscore": "#0072B2",
    "abs_zscore": "#56B4E9",
    "pot": "#D55E00",
    "exponential": "#E69F00",
    "raw": "#CC79A7",
    "ratio": "#009E73",
    "stage": "#8C6D31",
    "random": "#777777",
    "layer_matched_random": "#333333",
    "least": "#B8B8B8",
}
METHOD_LABELS = {
    "zscore": "z-score",
    "abs_zscore": "|z-score|",
    "pot": "POT (GPD)",
    "exponential": "exponential tail",
    "raw": "raw saliency",
    "ratio": "ratio to mean",
    "stage": "last stage, random",
    "random": "random",
    "layer_matched_random": "random, same layers",
    "least": "least salient",
}


def use_style() -> None:
    """Take the style of these figures for all that follows (white background, colour-blind safe)."""
    plt.style.use(STYLE)


def stage_colors(stages: Sequence[str]) -> dict[str, tuple]:
    """Colour of each stage, from dark (input) to light (output)."""
    return dict(zip(stages, plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(stages))), strict=True))


def show(figure: Figure | Axes, alt: str, ja: str = "") -> None:
    """Display a figure once, with text that says what it shows, in English and Japanese."""
    from IPython.display import display

    figure = figure if isinstance(figure, Figure) else figure.figure
    display(figure, metadata={"image/png": {"alt": alt, "alt-ja": ja}})
    plt.close(figure)


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
        ax.plot(at, values[at], ".", ms=2.5, color=color, label=stage)
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
    ax.set_xticks(range(len(stages)), stages)
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
