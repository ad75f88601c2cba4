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


def test_say_displays_a_sentence_in_each_language_and_names_the_language(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **about: shown.append((data, about)))
    pss.plots.say("Three **filters**.", "フィルタは**三つ**．")
    assert [about["metadata"]["lang"] for _, about in shown] == ["en", "ja"]
    assert [data["text/markdown"] for data, _ in shown] == ["Three **filters**.", "フィルタは**三つ**．"]
    assert all(about["raw"] and data["text/plain"] == data["text/markdown"] for data, about in shown)
