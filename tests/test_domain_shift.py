"""Notebook 09 on files of the users' own: the same calls on a small tree with a folder of pictures per class."""

import gzip
import struct

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pss
from pss import data
from pss.data.vision import torchvision

SPLITS = ("train", "validation", "reference", "test")


def write_tree(root, images):
    """Pictures of an `ImageSet` as PNG files, in a folder per class."""
    for number, (picture, label) in enumerate(zip(images.to_image(images.images), images.labels, strict=True)):
        folder = root / images.classes[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number:04}.png")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_tree(root / "mnist" / "validation", data.mnist("validation").subset(range(60)))  # a folder per split
    write_tree(root / "digits" / "3", data.digits("test").subset(range(160)))  # one that is not split
    return root


def test_a_folder_per_split_is_read_as_it_is(tree):
    found, built_in = data.open_set("mnist", "validation", tree), data.mnist("validation").subset(range(60))
    at = np.argsort([int(name.split("/")[1][:4]) for name in found.ids])
    torch.testing.assert_close(found.images[at], built_in.images)
    assert torch.equal(found.labels[at], built_in.labels)
    assert found.classes == built_in.classes


def test_a_folder_without_splits_is_divided(tree):
    sets = {split: data.open_set("digits/3", split, tree) for split in SPLITS}
    assert [len(sets[split]) for split in SPLITS] == [128, 32, 80, 80]
    for first, second in (("train", "validation"), ("reference", "test")):
        assert len({*sets[first].ids, *sets[second].ids}) == 160
    other = data.open_set("digits/3", "test", tree, seed=1)
    assert list(other.ids) != list(sets["test"].ids)
    few = data.open_set("digits/3", "test", tree, count=7)
    assert list(few.ids) == list(sets["test"].ids[:7])


def test_a_folder_takes_a_transform_and_the_order_of_the_classes(tree):
    steps = torchvision.transforms
    crop = steps.Compose([steps.CenterCrop(20), steps.PILToTensor(), lambda x: x.float()])
    reversed_ = data.open_set("mnist", "validation", tree, transform=crop, classes=data.DIGITS[::-1])
    plain = data.open_set("mnist", "validation", tree)
    assert reversed_.images.shape[1:] == (3, 20, 20)
    assert torch.equal(9 - reversed_.labels, plain.labels)


def test_built_in_sets_need_no_root():
    assert data.open_set("noise", "test").fingerprint == data.load("noise").fingerprint


def test_mnist_on_disk_gives_its_training_images_as_reference(tmp_path):
    rng = np.random.default_rng(0)
    raw, counts = tmp_path / "MNIST" / "raw", {"train": 12, "t10k": 9}
    raw.mkdir(parents=True)
    for part, count in counts.items():
        pixels, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        for name, array, head in (
            ("images-idx3", pixels, struct.pack(">4i", 2051, count, 28, 28)),
            ("labels-idx1", labels, struct.pack(">2i", 2049, count)),
        ):
            (raw / f"{part}-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
            (raw / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(b""))
    found = {split: data.open_set("MNIST", split, tmp_path) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [12, 9, 12, 9]
    assert len(data.open_set("MNIST", "test", tmp_path, count=4)) == 4


def test_wrong_names_are_refused(tree):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        data.open_set("photo", "test", tree)
    with pytest.raises(ValueError, match="unknown split 'all'"):
        data.open_set("digits/3", "all", tree)
    with pytest.raises(ValueError, match="unknown set"):
        data.open_set("photo", "test")


def test_tables_and_edit_curves_of_a_folder(tree):
    """The calls of the notebook, from files to shares and edit curves."""
    model = pss.models.digits()
    units, k = pss.Units.of(model), 5
    target = data.open_set("digits/3", "test", tree)
    wrong = np.array(pss.models.misclassified(model, target).index)
    assert len(wrong) >= 5  # about a quarter of these digits
    images, labels = target.images[wrong], target.labels[wrong]
    profiles = pss.profile(model, images, labels, units)
    prior = np.bincount(units.stage_ids) / len(units)
    for split, name in (("validation", "mnist"), ("reference", "digits/3")):
        reference_set = data.open_set(name, split, tree)
        store = pss.profile_dataset(model, reference_set, units, tree / f"profiles {split}", progress=False)
        reference = pss.Reference.fit(store, 0.8)
        for method in ("zscore", "pot", "exponential"):
            ids = pss.rank(profiles, reference, method, k)
            shares = pss.stage_shares(ids, units)
            by_hand = np.bincount(units.stage_ids[ids.flatten()], minlength=5) / ids.numel()
            np.testing.assert_allclose(shares["share"], by_hand)
            np.testing.assert_allclose(shares["prior"], prior)
    curves = pss.edit_curves(model, images[:4], labels[:4], ids[:4], units, step_norm=0.1, progress=False)
    assert len(curves) == 4 * (k + 1)
    assert not curves.query("k == 0")["corrected"].any()
    after = curves.query("k == @k")["confidence_true"].to_numpy()
    assert (after > curves.query("k == 0")["confidence_true"].to_numpy()).mean() > 0.5


def test_difference_bars_draw_every_interval_in_the_row_of_its_method():
    table = pd.DataFrame(
        {"than": ["raw", "zscore"] * 2, "statistics": ["a", "a", "b", "b"], "mean": [0.1, 0.2, 0.3, 0.4]}
    )
    table = table.assign(low=table["mean"] - 0.05, high=table["mean"] + 0.1)
    ax = pss.plots.difference_bars(table, "statistics")
    for container, means in zip(ax.containers, ([0.1, 0.2], [0.3, 0.4]), strict=True):
        points, _, (bars,) = container.lines
        np.testing.assert_allclose(points.get_xdata().astype(float), means)
        assert [round(y) for y in points.get_ydata()] == [0, 1]
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.add.outer(means, [-0.05, 0.1]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["raw saliency", "z-score"]
    plt.close("all")
