"""The figures draw what they were given."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import pss


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def units():
    return pss.Units.of(pss.models.resnet18(width=4))


def drawn(ax):
    """Points of all lines drawn with markers and no line, (points, 2)."""
    return np.concatenate([line.get_xydata() for line in ax.lines if line.get_linestyle() == "None"])


def test_stage_strip_draws_each_unit_in_the_column_of_its_stage(units):
    values = torch.arange(len(units)).double()
    values[3] = torch.nan
    ax = pss.plots.stage_strip(values, units, torch.ones(len(units)))
    points = drawn(ax)
    kept = np.flatnonzero(~np.isnan(values.numpy()))
    dots = {y: round(x) for x, y in points if y in kept}
    assert dots == {float(u): units.stage_ids[u] for u in kept}
    medians = [
        segment[0][1] for bars in ax.collections for segment in bars.get_segments() if np.ptp(segment[:, 1]) == 0
    ]
    for number in range(len(units.stages)):
        assert np.nanmedian(values[units.stage_ids == number]) in medians


def test_stage_strip_leaves_a_stage_of_nan_empty(units):
    values = torch.full((len(units),), torch.nan)
    values[0] = 1
    assert len(drawn(pss.plots.stage_strip(values, units, values))) >= 1


@pytest.mark.parametrize("log", [False, True])
def test_qq_panel_draws_the_pairs_and_the_line_of_equality(log):
    model, observed = torch.tensor([1.0, 2, 4]), torch.tensor([1.0, 3, 9])
    ax = pss.plots.qq_panel(model, observed, log)
    assert drawn(ax).tolist() == [[1, 1], [2, 3], [4, 9]]
    (line,) = [line for line in ax.lines if line.get_linestyle() == "-"]
    assert (line.get_xdata() == line.get_ydata()).all()
    assert ax.get_xscale() == ("log" if log else "linear")


def test_calibration_ratio_divides_by_the_nominal_rate_and_keeps_zero_in_sight():
    rows = [(model, rate, rate * 2, rate, rate * 4) for model in ("normal", "gpd") for rate in (0.1, 0.01)]
    rows.append(("exponential", 0.1, 0.0, 0.0, 0.2))
    table = pd.DataFrame(rows, columns=["model", "rate", "mean", "min", "max"])
    ax = pss.plots.calibration_ratio(table, floor=0.05)
    heights = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert heights["normal"] == pytest.approx([2, 2]) and heights["gpd"] == pytest.approx([2, 2])
    assert heights["exponential"] == pytest.approx([0.05])
    assert ax.xaxis_inverted()


def test_parameter_ranges_draws_medians_of_what_is_not_zero_and_the_share_of_zeros(units):
    saliency = {layer.parameter: torch.zeros(1, *layer.shape) for layer in units.layers}
    first = saliency[units.layers[0].parameter].flatten(1)
    first[0, :5] = torch.tensor([1.0, 2, 3, 4, 50])
    saliency[units.layers[0].parameter] = first.reshape(1, *units.layers[0].shape)
    axes = pss.plots.parameter_ranges(saliency, units)
    assert drawn(axes[0]).tolist() == [[0, 3]]
    heights = [bar.get_height() for bar in axes[1].patches]
    assert heights == pytest.approx([1 - 5 / first.numel()] + [1] * (len(units.layers) - 1))


@pytest.mark.parametrize("signed", [False, True])
def test_filter_grid_draws_every_kernel_on_one_scale(signed):
    kernels = torch.arange(5 * 9.0).view(5, 3, 3) - 20
    figure = pss.plots.filter_grid(kernels if signed else kernels.abs(), list("abcde"), signed, columns=3)
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert [image.axes.get_title() for image in images] == list("abcde")
    wanted = kernels if signed else kernels.abs()
    for image, kernel in zip(images, wanted, strict=True):
        assert image.get_array().tolist() == kernel.tolist()
        assert image.get_clim() == ((-24, 24) if signed else (0, 24))


def test_confidence_bars_draw_both_and_mark_the_true_and_the_wrong_class():
    before, after = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.1, 0.8, 0.1])
    ax = pss.plots.confidence_bars(before, after, label=1)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([*before.tolist(), *after.tolist()])
    bold = [tick.get_text() for tick in ax.get_yticklabels() if tick.get_fontweight() == "bold"]
    assert bold == ["1", "2"]


def test_story_rings_the_edited_units(units):
    unusual, top = torch.linspace(-1, 9, len(units)), torch.tensor([3, 7])
    before, after = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    figure = pss.plots.story(np.zeros((4, 4, 3)), unusual, units, top, before, after, label=1)
    rings = figure.axes[1].lines[-1].get_xydata()
    assert rings == pytest.approx(np.stack([[3, 7], unusual[[3, 7]].numpy()], axis=1))
    assert figure.axes[0].get_title() == "a 1, read as 0" and figure.axes[2].get_title(loc="left") == "now read as 1"


@pytest.mark.parametrize("picture", [np.full((4, 4, 3), 51, np.uint8), np.full((4, 4, 3), 0.2)])
def test_story_draws_the_map_over_the_picture_whatever_its_scale(units, picture):
    heat, confidences = torch.linspace(0, 1, 16).reshape(4, 4), torch.tensor([0.9, 0.1])
    figure = pss.plots.story(
        picture, torch.ones(len(units)), units, torch.tensor([3]), confidences, confidences, 1, heat
    )
    grey, drawn = (image.get_array() for image in figure.axes[2].images)
    np.testing.assert_allclose(grey, 0.6 * 0.2, rtol=1e-5)
    np.testing.assert_allclose(drawn, heat)


def test_neighbor_rows_draws_each_query_before_its_neighbours(generator):
    images = torch.rand(5, 3, 4, 4, generator=generator)
    titles = [["a", "b", "c"], ["d", "e", "f"]]
    figure = pss.plots.neighbor_rows(images, titles, torch.tensor([0, 3]), torch.tensor([[1, 2], [4, 0]]), ["x", "y"])
    drawn = [ax.images[0].get_array() for ax in figure.axes]
    for shown, at in zip(drawn, [0, 1, 2, 3, 4, 0], strict=True):
        np.testing.assert_allclose(shown, images[at].permute(1, 2, 0))
    assert [ax.get_title() for ax in figure.axes] == list("abcdef")
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["x", "y"]


def test_pair_map_colours_the_most_frequent_pairs():
    points = np.arange(12.0).reshape(6, 2)
    ax = pss.plots.pair_map(points, ["b", "a", "a", "c", "b", "a"], top=2)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["other (1)", "a (3)", "b (2)"]
    rest, first, second = ax.collections
    np.testing.assert_array_equal(rest.get_offsets(), points[[3]])
    np.testing.assert_array_equal(first.get_offsets(), points[[1, 2, 5]])
    np.testing.assert_array_equal(second.get_offsets(), points[[0, 4]])


def test_edit_panels_draws_every_method_and_only_the_bands_asked_for():
    rows = [("new", k) for k in range(3)] + [("pot", k) for k in range(3)] + [("zscore", k) for k in range(3)]
    summary = pd.DataFrame(rows, columns=["method", "k"])
    for number, value in enumerate(("change_wrong", "change_true", "corrected")):
        summary[value] = summary["k"] * 0.1 + number
        summary[f"{value}_low"], summary[f"{value}_high"] = summary[value] - 0.1, summary[value] + 0.1
    figure = pss.plots.edit_panels(summary, bands=["pot"])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["z-score", "POT (GPD)", "new"]
    for number, ax in enumerate(figure.axes):
        assert ax.get_legend() is None
        np.testing.assert_allclose(ax.lines[0].get_ydata(), np.arange(3) * 0.1 + number)
        bands = [len(c.get_paths()[0]) if c.get_paths() else 0 for c in ax.collections]
        assert [b > 0 for b in bands] == [False, True, False]


def test_overlay_has_one_colour_scale_whatever_the_map():
    image = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    for heat in (torch.zeros(6, 6), torch.full((6, 6), 0.2), torch.linspace(0, 1, 36).reshape(6, 6)):
        below, above = pss.plots.overlay(image, heat).images
        assert below.get_clim() == above.get_clim() == (0, 1)
        np.testing.assert_allclose(above.get_array(), heat)
        assert (np.asarray(above.get_alpha())[heat == 0] == 0).all()


def test_overlay_grid_has_a_column_for_each_kind_of_map():
    images, heat = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6)
    figure = pss.plots.overlay_grid(images, {"a": heat, "b": 1 - heat}, ["first", "second"])
    maps = [ax.images[1].get_array() for ax in figure.axes[:6]]
    for found, wanted in zip(maps, [0 * heat[0], heat[0], 1 - heat[0], 0 * heat[1], heat[1], 1 - heat[1]], strict=True):
        np.testing.assert_allclose(found, wanted)
    assert [ax.get_title() for ax in figure.axes[:6]] == ["image", "a", "b", "", "", ""]


def test_marks_and_curves_of_masks_draw_means():
    table = pd.DataFrame({"rule": ["top units"] * 4 + ["x"] * 4, "k": [1, 1, 2, 2] * 2, "v": np.arange(8.0)})
    curves = pss.plots.mask_curves(table, "v")
    np.testing.assert_allclose(curves.lines[0].get_xydata(), [[1, 0.5], [2, 2.5]])
    marks = pss.plots.paired_marks(table, {"top units": ["top units", "x"]}, "v")
    middles = [line.get_xdata()[0] for line in marks.lines if line.get_marker() in ("o", "D")]
    assert middles == [1.5, 5.5]
