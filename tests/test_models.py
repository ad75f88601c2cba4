import hashlib
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from artefacts import flip
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pss import data, models
from pss.__main__ import main
from pss.data.vision import torchvision
from pss.models import resnet
from pss.storage import places


@pytest.fixture(scope="module")
def shipped():
    return models.digits()


@pytest.fixture(scope="module")
def few():
    """A set small enough to train on within a test."""
    return data.mnist("validation").subset(range(60))


def _shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- the network ---


def test_width_64_is_torchvisions_resnet18():
    ours, theirs = models.resnet18(width=64, classes=1000), torchvision.models.resnet18(weights=None)
    assert list(_shapes(ours).items()) == list(_shapes(theirs).items())
    assert [type(module) for module in ours.modules()][1:] == [type(module) for module in theirs.modules()][1:]
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_width_16_is_a_quarter_everywhere():
    narrow, whole = _shapes(models.resnet18()), _shapes(models.resnet18(width=64))
    assert list(narrow) == list(whole)
    for name, shape in whole.items():
        quarter = [size if size in (1, 3, 7, 10) else size // 4 for size in shape]
        assert list(narrow[name]) == quarter, name
    filters = sum(shape[0] for shape in narrow.values() if len(shape) == 4)
    assert filters == 1200
    assert sum(p.numel() for p in models.resnet18().parameters()) == 703_386


def test_initial_weights_follow_the_seed_alone():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = models.resnet18(seed=4), models.resnet18(seed=4), models.resnet18(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert models.fingerprint(first) == models.fingerprint(again) != models.fingerprint(other)


def test_initial_weights_have_the_spread_of_torchvisions():
    ours, theirs = models.resnet18(width=64), torchvision.models.resnet18(weights=None, num_classes=10)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.ndim == 4:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.05), name


# --- the shipped model ---


def test_shipped_model_is_the_noted_one_and_does_as_well_as_noted(root, shipped):
    text = (root / "data" / "README.md").read_text()
    path = root / "data" / "resnet18-w16-mnist-seed0.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert models.fingerprint(shipped) in text
    assert f"{path.stat().st_size:,} bytes" in text
    table = models.evaluate(shipped)
    assert len(table) == sum(map(len, data.SPLITS.values()))
    for row in table.itertuples():
        noted = re.search(rf"\| `{row.set}` \| `{row.split}` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+)% \|", text)
        assert noted, f"data/README.md has no accuracy for {row.set}/{row.split}"
        assert int(noted[1].replace(",", "")) == row.images
        # Another processor may round an image on the border to the other side.
        assert int(noted[2].replace(",", "")) == pytest.approx(row.misclassified, abs=2)
        assert float(noted[3]) / 100 == pytest.approx(row.accuracy, abs=0.005)


def test_shipped_model_is_ready_to_use(shipped):
    assert not any(module.training for module in shipped.modules())
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in shipped.parameters())
    assert shipped(data.digits("test").images[:2]).shape == (2, 10)
    assert models.fingerprint(models.digits()) == models.fingerprint(shipped)


def test_record_of_the_shipped_weights(shipped):
    record = models.read_record(resnet.committed())
    assert (record["seed"], record["width"], record["threads"]) == ("0", "16", "1")
    assert record["sha256"] == models.fingerprint(shipped)
    assert record["train_set"] == data.mnist("train").fingerprint
    assert float(record["validation_accuracy"]) == pytest.approx(models.accuracy(shipped, data.mnist()), abs=0.002)


def test_installed_without_a_checkout_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(places, "checkout_data", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e \."):
        models.digits()


# --- training ---


def test_training_is_the_same_for_a_seed_whatever_the_threads(few):
    before = torch.get_num_threads()
    results = []
    try:
        for threads, seed in ((1, 0), (2, 0), (1, 1)):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)  # the global seed is not used
            model, record = models.train(seed=seed, epochs=2, train_set=few, validation_set=few)
            assert torch.get_num_threads() == threads
            results.append(models.fingerprint(model))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] != results[2]
    assert set(record) >= {"seed", "width", "epochs", "torch", "train_set", "train_accuracy", "validation_accuracy"}
    assert not model.training


def test_training_learns(few):
    model, record = models.train(width=8, epochs=60, train_set=few, validation_set=few)
    assert float(record["train_accuracy"]) == models.accuracy(model, few) > 0.9


@pytest.fixture
def quick(monkeypatch, tmp_path, few):
    """Other seeds train on a few images, into an empty cache."""
    calls, real = [], models.train

    def train(seed, width):
        calls.append(seed)
        return real(seed, width, epochs=1, train_set=few, validation_set=few)

    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resnet, "train", train)
    return calls, tmp_path / "cache"


def test_other_seeds_are_trained_once(quick, shipped):
    calls, cache = quick
    first, again = models.digits(seed=1), models.digits(seed=1)
    assert calls == [1]
    assert models.fingerprint(first) == models.fingerprint(again) != models.fingerprint(shipped)
    assert not again.training
    assert models.fingerprint(models.digits(seed=2)) != models.fingerprint(first)
    assert len(list(cache.iterdir())) == 2


def test_other_widths_are_trained_once(quick):
    calls, _ = quick
    first, again = models.digits(0, width=8), models.digits(0, width=8)
    assert calls == [0]  # not the committed weights, which are of another width
    assert first.conv1.weight.shape[0] == 8
    assert models.fingerprint(first) == models.fingerprint(again)


def test_damaged_cached_weights_are_trained_again_with_a_warning(quick):
    calls, cache = quick
    first = models.digits(seed=1)
    (path,) = cache.iterdir()
    for content in (path.read_bytes()[:1000], flip(path.read_bytes(), -80)):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged"):
            again = models.digits(seed=1)
        assert models.fingerprint(again) == models.fingerprint(first)
    assert calls == [1, 1, 1]


def test_command_trains_and_evaluates(tmp_path, monkeypatch, capsys, few):
    real = models.train
    monkeypatch.setattr(
        models, "train", lambda *a, threads: real(*a, train_set=few, validation_set=few, threads=threads)
    )
    out = tmp_path / "new" / "my.safetensors"
    assert main(["train", "--out", str(out), "--seed", "3", "--width", "8", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    model = models.load_weights(models.resnet18(8), out)
    assert f"sha256={models.fingerprint(model)}" in printed
    assert models.read_record(out)["seed"] == "3"
    monkeypatch.setattr(data, "SPLITS", {"noise": ("test",)})
    assert main(["evaluate", str(out)]) == 0
    assert f"{models.accuracy(model, data.load('noise')):.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path / "my.pth")])
    assert "ends in .safetensors" in capsys.readouterr().err


def test_command_line_without_warnings(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "pss", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    assert done.stderr == ""


# --- weights ---


def test_saving_is_the_same_bytes_and_round_trips(tmp_path):
    model = models.resnet18(8)
    for name in ("a", "b"):
        models.save_weights(model, tmp_path / f"{name}.safetensors", {"seed": "0", "width": "8"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = models.load_weights(models.resnet18(8, seed=1), tmp_path / "a.safetensors")
    assert models.fingerprint(loaded) == models.fingerprint(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"model": state},
        lambda state: {"module." + name: tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {"module.model." + name: tensor for name, tensor in state.items()}},
        lambda state: {"model." + name: tensor for name, tensor in state.items()},
        lambda state: {"model": {"module._orig_mod." + name: tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {"net." + name: tensor for name, tensor in state.items()}},
        lambda state: {name: tensor.double() for name, tensor in state.items()},
    ],
    ids=[
        "plain",
        "state_dict",
        "model_state_dict",
        "model",
        "module.",
        "state_dict module.model.",
        "model.",
        "of torch.compile",
        "of Lightning",
        "float64",
    ],
)
def test_checkpoints_of_others(tmp_path, wrap):
    model = models.resnet18(4)
    torch.save(wrap(model.state_dict()), tmp_path / "checkpoint.pth")
    loaded = models.load_weights(models.resnet18(4, seed=1), tmp_path / "checkpoint.pth")
    assert models.fingerprint(loaded) == models.fingerprint(model)


def test_a_prefix_of_the_models_own_stays(tmp_path):
    wrapped = nn.Sequential()
    wrapped.add_module("model", nn.Linear(2, 3))  # its names are model.weight, model.bias
    torch.save(wrapped.state_dict(), tmp_path / "own.pth")
    other = nn.Sequential()
    other.add_module("model", nn.Linear(2, 3))
    assert models.fingerprint(models.load_weights(other, tmp_path / "own.pth")) == models.fingerprint(wrapped)


def test_plain_safetensors_of_others(tmp_path):
    model = nn.Linear(2, 3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    assert models.read_record(tmp_path / "plain.safetensors") == {}
    assert torch.equal(models.load_weights(nn.Linear(2, 3), tmp_path / "plain.safetensors").weight, model.weight)


def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(tmp_path):
    model = nn.Linear(2, 3)
    before = models.fingerprint(model)
    torch.save({"weight": torch.zeros(4, 2), "extra": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError,
        match=r"weight is \(4, 2\), in the model \(3, 2\); bias is missing.*; extra is \(1,\), in the model missing",
    ):
        models.load_weights(model, tmp_path / "other.pth")
    torch.save({"stem.weight": torch.zeros(4, 2), "head.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"no name in common; the file.s are stem.weight, .*model.s weight, bias"):
        models.load_weights(model, tmp_path / "foreign.pth")
    torch.save({"net": model.state_dict(), "epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"no state dict: expected names and tensors, .*; it has net, epoch"):
        models.load_weights(model, tmp_path / "odd.pth")
    assert models.fingerprint(model) == before


def test_damaged_weights_are_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    models.save_weights(nn.Linear(2, 3), path)
    path.write_bytes(flip(path.read_bytes(), -80))
    with pytest.raises(ValueError, match="checksum"):
        models.load_weights(nn.Linear(2, 3), path)


def test_fingerprint_sees_names_shapes_types_and_values():
    class Holder(nn.Module):
        def __init__(self, name, tensor):
            super().__init__()
            self.register_buffer(name, tensor)

    tensor = torch.arange(6.0)
    kinds = [
        Holder("a", tensor),
        Holder("b", tensor),
        Holder("a", tensor.view(2, 3)),
        Holder("a", tensor.view(torch.int32)),
        Holder("a", tensor + 1),
    ]
    assert len({models.fingerprint(model) for model in kinds}) == len(kinds)
    assert models.fingerprint(Holder("a", tensor.clone())) == models.fingerprint(kinds[0])
    assert models.fingerprint(Holder("a", torch.tensor(3)))  # no dimension, as BatchNorm's num_batches_tracked


# --- what a model says ---


def test_predict_is_the_eval_mode_model_in_batches(shipped):
    images = data.digits("test").images[:70]
    with torch.no_grad():
        expected = shipped(images)
    torch.testing.assert_close(models.predict(shipped, images, batch_size=32), expected, rtol=1e-4, atol=1e-4)
    from_set = models.predict(shipped, data.digits("test").subset(range(70)), batch_size=32)
    torch.testing.assert_close(from_set, expected, rtol=1e-4, atol=1e-4)
    assert not from_set.requires_grad


def test_predict_follows_the_models_dtype(few):
    assert models.predict(models.resnet18(4).double(), few.images[:3]).dtype == torch.float64


def test_misclassified_against_a_plain_loop(shipped):
    dataset = data.digits("test").subset(range(0, 899, 9))
    expected = []
    for i in range(len(dataset)):
        image, label = dataset[i]
        with torch.no_grad():
            p = shipped(image[None])[0].double().softmax(0)
        if p.argmax() != label:
            expected.append((i, dataset.ids[i], int(label), int(p.argmax()), p.max().item(), p[label].item()))
    found = models.misclassified(shipped, dataset)
    assert 5 < len(found) < 50
    assert list(found.columns) == ["id", "label", "predicted", "confidence", "label_confidence"]
    assert found.index.tolist() == [row[0] for row in expected]
    for column, values in zip(("id", "label", "predicted"), list(zip(*expected, strict=True))[1:4], strict=True):
        assert found[column].tolist() == list(values)
    np.testing.assert_allclose(found.confidence, [row[4] for row in expected], rtol=1e-4)
    np.testing.assert_allclose(found.label_confidence, [row[5] for row in expected], rtol=1e-3)
    assert models.accuracy(shipped, dataset) == pytest.approx(1 - len(found) / len(dataset))


def test_misclassified_of_any_data_set(shipped):
    dataset = data.digits("test").subset(range(60))
    plain = TensorDataset(*dataset.tensors)  # has no ids
    ours, theirs = models.misclassified(shipped, dataset), models.misclassified(shipped, plain)
    assert theirs.index.tolist() == ours.index.tolist()
    assert theirs.id.tolist() == [str(i) for i in ours.index]
    assert len(DataLoader(dataset, batch_size=20)) == 3
    none = models.misclassified(shipped, data.mnist("train").subset(range(20)))
    assert len(none) == 0
    assert list(none.columns) == list(ours.columns)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_kept():
    code = """
import resource, sys, torch
from pss.engine.process import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for number in range(28):
    if number == 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True).stdout)
        for how in ("keep", "free")
    }
    assert 2 * faults["keep"] < faults["free"]  # of 20 tensors of 64 MiB; the heap may grow a few times more
