"""One pass over a data set: equal to `profile`, whole after every kill, shared by ranks, refused if it does not fit."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from artefacts import contents, flip
from kills import UNFINISHED, ended, forked, killed_again_and_again
from networks import PIXELS, N, make_data, make_model
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import pss
from pss import profiles
from pss.__main__ import main
from pss.profiles import profile_dataset
from pss.saliency import cross_entropy, logit, profile_and_outputs
from pss.storage import passes
from pss.storage.folder import partial_of, read_manifest, write_manifest
from pss.storage.passes import choose_batch_size
from pss.storage.store import ProfileStore, blocks
from pss.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")


class Faulty(Dataset):
    """The same data, but some items raise, are slow, or kill the process that reads them."""

    def __init__(self, bad=(), nan=(), delay=0.0, deadly=None, data=None):
        self.data = make_data() if data is None else data
        self.bad, self.nan, self.delay, self.deadly = bad, nan, delay, deadly

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        time.sleep(self.delay)
        if i in self.bad:
            raise OSError("image file is truncated")
        if i == self.deadly:
            os.kill(os.getpid(), 9)
        image, label = self.data[i]
        return (image * np.nan if i in self.nan else image), label


def run(path, model=None, data=None, units=None, **options):
    options = {"batch_size": 4, "progress": False, "data_name": "test", **options}
    return profile_dataset(model or make_model(), data or make_data(), units, path, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> dict[str, bytes]:
    """The files of a pass that nothing interrupts."""
    return contents(run(tmp_path_factory.mktemp("profiles") / "whole").path)


# --- one pass ---------------------------------------------------------------------------------------------------------


def test_equals_profile_and_the_model_itself(tmp_path):
    model, data = make_model(), make_data()
    images, labels = data.tensors
    store = run(tmp_path / "new" / "store", model, data)
    # smooth activations: the batch that a row was computed in shows in the last bits only
    torch.testing.assert_close(
        torch.tensor(store.profiles), pss.profile(model, images, labels), rtol=1e-5, atol=1e-9, check_dtype=True
    )
    logits = model(images).detach()
    probabilities = logits.double().softmax(1).numpy()
    np.testing.assert_array_equal(store.labels, labels)
    np.testing.assert_array_equal(store.predictions, logits.argmax(1))
    np.testing.assert_allclose(store.losses, nn.functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-5)
    np.testing.assert_allclose(store.confidences, probabilities.max(1), rtol=1e-5)
    np.testing.assert_allclose(store.true_confidences, probabilities[np.arange(N), labels], rtol=1e-5)
    np.testing.assert_array_equal(store.misclassified, np.flatnonzero(logits.argmax(1) != labels))
    assert len(store) == N and store.shape == (N, 9) and store.profiles.dtype == np.float32 and store.finished.all()


def test_signed_loss_and_units_reach_profile(tmp_path):
    model, data = make_model(), make_data(5)
    units = Units.of(model, "all")
    store = run(tmp_path, model, data, units, signed=True, loss="logit")
    expected = pss.profile(model, *data.tensors, units, loss="logit", signed=True)
    np.testing.assert_allclose(store.profiles, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(store.losses, model(data.tensors[0]).detach()[range(5), data.tensors[1]], rtol=1e-5)
    assert (store.profiles < 0).any()
    assert store.provenance["units"] == units.fingerprint and store.provenance["signed"] == "True"


def test_finished_store_reopens_without_reading_an_image(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    unreadable = Faulty(bad=range(N))
    store = run(tmp_path, data=unreadable)
    assert contents(tmp_path) == before and len(store) == N
    with pytest.raises(ValueError, match="read-only"):
        store.losses[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        store.profiles[0, 0] = 1


def test_double_model_and_loss_callable(tmp_path):
    def twice(outputs, labels):
        return 2 * cross_entropy(outputs, labels)

    model, data = make_model().double(), make_data(6)
    images, labels = data.tensors
    store = run(tmp_path, model, data, loss=twice)
    np.testing.assert_allclose(store.profiles, 2 * pss.profile(model, images.double(), labels), rtol=1e-6)
    assert store.provenance["loss"].endswith("twice")
    with pytest.raises(ValueError, match="a lambda has no name"):
        run(tmp_path / "b", model, data, loss=lambda outputs, labels: outputs[:, 0])


def test_workers_write_the_same_bytes(tmp_path, whole):
    assert contents(run(tmp_path, workers=2).path) == whole


def test_a_loss_is_the_same_by_name_and_as_a_function(tmp_path):
    store = run(tmp_path / "store", data=make_data(20), loss=logit)
    assert store.provenance["loss"] == "logit" and len(run(tmp_path / "store", data=make_data(20), loss="logit")) == 20
    reference, units = pss.Reference.fit(store), Units.of(make_model())
    assert reference.check(units, loss="logit") is reference.check(units, loss=logit) is reference
    with pytest.raises(ValueError, match="loss: reference logit, given cross_entropy"):
        reference.check(units, loss=cross_entropy)


def test_batch_size_that_fits():
    model = make_model()

    class Big(nn.Module):  # 224 pixels and 1,000 channels: 192 MiB of activations an image
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1000, 1)

        def forward(self, x):
            return self.conv(x).tanh().mean((2, 3))

    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert choose_batch_size(model, torch.zeros(3, PIXELS, PIXELS)) == 256
    assert choose_batch_size(conv, torch.zeros(3, 224, 224)) == 8
    assert choose_batch_size(conv, torch.zeros(1000, 3, 224, 224)[0]) == 8  # a view of many
    assert choose_batch_size(conv, torch.zeros(3, 448, 448)) == 2
    assert choose_batch_size(Big(), torch.zeros(3, 224, 224)) == 5
    assert choose_batch_size(nn.Linear(100, 100_000), torch.zeros(100)) == 256  # 40 MB of weights are no activations
    assert choose_batch_size(nn.Linear(7, 3), torch.zeros(7)) == 256


# --- bad images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_an_error_that_names_it(tmp_path, workers):
    with pytest.raises(ValueError, match=r"item 9 of the data set could not be read \(OSError: image file is trunc"):
        run(tmp_path, data=Faulty(bad=[9]), workers=workers)
    with pytest.raises(ValueError, match=r"not finished \(8 of 26 rows\)"):
        ProfileStore.open(tmp_path)
    assert len(run(tmp_path)) == N  # mended: goes on
    with pytest.raises(ValueError, match=r"item 4 of the data set could not be read .*NaN"):
        run(tmp_path / "nan", data=Faulty(nan=[4]))


def test_bad_images_are_skipped_and_listed(tmp_path, caplog):
    whole = run(tmp_path / "whole")
    bad = Faulty(bad=[0, 9, 12, 13, 14, 15], nan=[25])  # 12..15 is a batch of its own
    store = run(tmp_path / "part", data=bad, on_error="skip")
    assert sorted(store.skipped) == [0, 9, 12, 13, 14, 15, 25]
    assert store.skipped[9] == "OSError: image file is truncated" and "NaN" in store.skipped[25]
    assert "item 9 of the data set is skipped" in caplog.text
    kept = np.setdiff1d(np.arange(N), list(store.skipped))
    assert len(store) == len(kept) == store.shape[0]
    np.testing.assert_array_equal(np.flatnonzero(store.finished), kept)
    np.testing.assert_allclose(store.profiles[kept], whole.profiles[kept], rtol=1e-5)
    assert np.isnan(store.profiles[9]).all() and store.labels[9] == -1 and np.isnan(store.losses[9])
    assert not set(store.misclassified) & set(store.skipped)
    np.testing.assert_array_equal(np.concatenate([b for _, b in blocks(store, 300)], 1), store.profiles[kept])
    with pytest.raises(ValueError, match=r"leaves out items \[0, 9, 12"):
        run(tmp_path / "part", data=bad)
    assert [f.name for f in sorted((tmp_path / "part").iterdir())] == ["manifest.json", "profiles.npy", "samples.npy"]


def test_profile_that_is_not_finite(tmp_path):
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    model, data = nn.Sequential(nn.Conv2d(3, 4, 8), Square(), nn.Flatten()), make_data(6)
    data.tensors[0][3] *= 1e30  # finite, but not its square
    with pytest.raises(ValueError, match="item 3 of the data set: the loss is not finite"):
        run(tmp_path / "a", model, data)
    store = run(tmp_path / "b", model, data, on_error="skip")
    assert list(store.skipped) == [3] and np.isfinite(store.profiles[store.finished]).all()
    assert list(run(tmp_path / "e", model, data, on_error="skip", batch_size=1).skipped) == [3]
    data.tensors[0][3], data.tensors[1][3] = 1, 9
    with pytest.raises(ValueError, match=r"item 3 of the data set: label 9 is outside 0\.\.3 of this model"):
        run(tmp_path / "c", model, data)
    data.tensors[1][:] = 9  # then it is not the fault of one image
    with pytest.raises(ValueError, match=r"^label 9 is outside 0\.\.3 of this model") as caught:
        run(tmp_path / "d", model, data, on_error="skip")
    assert caught.value.__notes__ == ["this happened while profiling items 0 to 3 of the data set"]


# --- other profiles in the folder -------------------------------------------------------------------------------------


def test_refuses_profiles_of_something_else_and_says_what(tmp_path, monkeypatch):
    run(tmp_path)
    before = contents(tmp_path)
    other_units = Units.of(make_model(), "rows")
    cases = {
        "model": {"model": make_model(seed=1)},
        "units": {"units": other_units},
        "n_units": {"units": other_units},
        "samples": {"data": make_data(N - 1)},
        "data: stored 'test', given 'train'": {"data_name": "train"},
        "preprocessing: stored '', given 'crop'": {"preprocessing": "crop"},
        "loss: stored 'cross_entropy', given 'logit'": {"loss": "logit"},
        "signed: stored False, given True": {"signed": True},
        "options": {"precision": "bf16"},
    }
    for field, options in cases.items():
        with pytest.raises(ValueError, match=f"made of something else:(.|\n)*{field}(.|\n)*rebuild=True"):
            run(tmp_path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(pss, "__version__", "0.0.0")
        with pytest.raises(ValueError, match=f"pss: stored '{pss.__version__}', given '0.0.0'|stored .* given '0.0.0'"):
            run(tmp_path)
    assert contents(tmp_path) == before
    run(tmp_path, model=make_model(seed=1), rebuild=True)
    assert contents(tmp_path)["profiles.npy"] != before["profiles.npy"]


def test_unfinished_store_keeps_torch_version_and_batches(tmp_path, monkeypatch, whole):
    run(tmp_path / "whole")
    with pytest.raises(ValueError, match="item 9"):
        run(tmp_path / "part", data=Faulty(bad=[9]))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        run(tmp_path / "whole")  # a finished one may be read by another torch
        with pytest.raises(ValueError, match=r"torch: stored .* given '1.0'"):
            run(tmp_path / "part")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run(tmp_path / "part", batch_size=7)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "part") == whole


def test_data_identity(tmp_path):
    class Named(TensorDataset):
        fingerprint = "digits 1"

    named = Named(*make_data().tensors)
    assert run(tmp_path / "a", data=named, data_name=None).provenance["data"] == "digits 1"
    run(tmp_path / "b", data_name=None)
    with pytest.raises(ValueError, match="data: stored '26 items, sample"):
        run(tmp_path / "b", data=make_data(seed=1), data_name=None)


def test_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "profiles.npy").write_text("mine")
    for rebuild in (False, True):
        with pytest.raises(FileExistsError, match="holds other files"):
            run(tmp_path, rebuild=rebuild)
    assert contents(tmp_path) == {"profiles.npy": b"mine"}
    with pytest.raises(FileNotFoundError, match="holds no profiles"):
        ProfileStore.open(tmp_path)


def test_disk_too_small(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"26 profiles of 9 units need 0.0 MB, but 0.0 MB are free"):
        run(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_error_before_the_first_row_leaves_nothing(tmp_path):
    wrong = make_data()
    wrong.tensors[1][0] = 12
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine", tmp_path / "new"):
        with pytest.raises(ValueError, match=r"item 0 of the data set: label 12 is outside 0\.\.3 of this model"):
            run(path, data=wrong)
    assert [file.name for file in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(ValueError, match="item 0"):
        run(tmp_path / "new", data=wrong, rebuild=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["mine"]


def test_error_after_rows_keeps_them(tmp_path):
    """Also if this call only went on, and was the first to fail at its own first item."""
    with pytest.raises(ValueError, match="item 9"):
        run(tmp_path, data=Faulty(bad=[9]))
    begun = contents(partial_of(tmp_path))
    with pytest.raises(ValueError, match="item 8"):
        run(tmp_path, data=Faulty(bad=[8]))
    assert contents(partial_of(tmp_path)) == begun
    run(tmp_path, data=Faulty(bad=range(8)))  # two batches were kept
    with pytest.raises(ValueError, match="item 4"):
        run(tmp_path, data=Faulty(bad=[4]), rebuild=True)
    with pytest.raises(ValueError, match=r"not finished \(4 of 26 rows\)"):
        ProfileStore.open(tmp_path)


def test_rebuild_keeps_a_store_among_other_files_and_one_that_cannot_be_begun(tmp_path, whole):
    run(tmp_path)
    (tmp_path / "profiles.npy.mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files \(profiles.npy.mine"):
        run(tmp_path, rebuild=True)
    with pytest.raises(ValueError, match="none of the 26 images can be read"):
        run(tmp_path, data=Faulty(bad=range(N)), batch_size=None, rebuild=True)
    assert contents(tmp_path) == whole | {"profiles.npy.mine": b"mine"}


def test_a_store_of_another_version_is_refused_by_name(tmp_path, whole):
    run(tmp_path)
    write_manifest(tmp_path, read_manifest(tmp_path) | {"format": 1})
    for read in (ProfileStore.open, run):
        with pytest.raises(ValueError, match=r"manifest.json .*another version, format 1 instead of 2.*rebuild=True"):
            read(tmp_path)
    run(tmp_path, rebuild=True)
    assert contents(tmp_path) == whole


def test_a_link_to_a_folder_and_a_disk_of_its_own(tmp_path, monkeypatch, whole):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(tmp_path / "link")
    assert contents(tmp_path / "real") == whole and sorted(f.name for f in tmp_path.iterdir()) == ["link", "real"]
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(ValueError, match="new is a disk of its own, which cannot be renamed: give a folder below it"):
        run(tmp_path / "new")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profiles.npy", "samples.npy", "manifest.json"])
def test_every_damage_is_found(tmp_path, name, whole):
    run(tmp_path)
    file, original = tmp_path / name, whole[name]
    for position in range(0, len(original) - 1, max(1, len(original) // 60)):
        file.write_bytes(flip(original, 8 * position + 4))
        if file.read_text("latin-1").split() != original.decode("latin-1").split():  # other white space does no harm
            with pytest.raises(ValueError, match=rf"({name}|profiles.npy) is damaged .*rebuild=True|is not finished"):
                ProfileStore.open(tmp_path)
        file.write_bytes(original)
    for damaged in (original[:100], original[:-2], original + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            ProfileStore.open(tmp_path)
    file.unlink()
    if name != "manifest.json":
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            run(tmp_path)
        assert contents(run(tmp_path, rebuild=True).path) == whole


def test_damage_names_the_row_and_resuming_mends_it(tmp_path, whole):
    run(tmp_path)
    header = len(whole["profiles.npy"]) - N * 9 * 4
    (tmp_path / "profiles.npy").write_bytes(flip(whole["profiles.npy"], 8 * (header + 17 * 9 * 4 + 3) + 4))
    with pytest.raises(ValueError, match="1 rows are not as written, the first is 17"):
        run(tmp_path)
    assert len(ProfileStore.open(tmp_path, verify=False)) == N
    tmp_path.rename(partial_of(tmp_path))  # as if it had been found in time
    run(tmp_path, data=Faulty(bad=[*range(16), *range(20, N)]))  # reads that row's batch only
    assert contents(tmp_path) == whole


# --- killed, and resumed ----------------------------------------------------------------------------------------------


def test_killed_at_random_moments(tmp_path, whole):
    path, said = tmp_path / "part", []
    for _ in killed_again_and_again(lambda: run(path, data=Faulty(delay=0.02))):
        with pytest.raises((ValueError, FileNotFoundError), match=UNFINISHED) as refused:
            ProfileStore.open(path)
        said.append(str(refused.value))
    assert len(set(said)) >= 3  # it went on from where it was
    assert contents(path) == whole


def test_a_folder_in_the_cache_by_default(tmp_path, monkeypatch):
    """Named by what is profiled: who asks for the same finds it, and nobody else."""
    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "usual"))
    store = run(None, cache=tmp_path / "given")
    assert store.path.parent == tmp_path / "given" / "profiles"
    assert run(None).path == tmp_path / "usual" / "profiles" / store.path.name
    made, other = os.stat(store.path / "profiles.npy").st_mtime_ns, make_model()
    assert run(None, cache=tmp_path / "given").path == store.path
    assert os.stat(store.path / "profiles.npy").st_mtime_ns == made
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    fewer = torch.utils.data.Subset(make_data(), range(N - 1))
    changed = ({"model": other}, {"data": fewer}, {"signed": True}, {"of": "gain"}, {"loss": "logit"}, {"fold": False})
    assert len({store.path, *(run(None, cache=tmp_path / "given", **what).path for what in changed)}) == 7
    names = "pss model units data preprocessing loss signed of options"
    assert sorted(read_manifest(store.path)["provenance"]) == sorted(names.split())
    assert read_manifest(store.path)["computed_with"] == {"torch": torch.__version__, "device": "cpu"}


def test_the_first_and_the_last_batch_are_verified_by_default(tmp_path, monkeypatch):
    asked = []

    def computed(*given, verify, verify_again, **how):
        asked.append((verify, verify_again))
        return profile_and_outputs(*given, verify=verify, verify_again=verify_again, **how)

    monkeypatch.setattr(profiles, "profile_and_outputs", computed)
    run(tmp_path)
    assert asked == [(True, False)] * 6 + [(True, True)]


def test_processes_that_begin_at_once_make_one_store(tmp_path, whole):
    """As the runs of a sweep do that find no profiles in the cache."""
    for number in range(4):
        path = tmp_path / str(number)
        data = Faulty(delay=0.001, bad=[3] if number % 2 else [])
        children = [forked(lambda p=path, d=data: run(p, data=d, on_error="skip")) for _ in range(3)]
        assert [ended(child) for child in children] == [0, 0, 0]
        if number % 2:
            assert ProfileStore.open(path).skipped == {3: "OSError: image file is truncated"}
        else:
            assert contents(path) == whole
        assert not partial_of(path).exists()


def test_killed_loader(tmp_path, whole):
    assert ended(forked(lambda: run(tmp_path / "part", data=Faulty(deadly=14), workers=1))) == 1  # not a hang
    with pytest.raises(ValueError, match="not finished"):
        ProfileStore.open(tmp_path / "part")
    assert contents(run(tmp_path / "part").path) == whole


def test_death_of_a_worker_does_not_raise_within_the_kernel(tmp_path, monkeypatch):
    """It would be taken for a model that the fast path cannot take, and the rows would be rounded differently."""
    raised, real = [], profiles.profile_and_outputs

    def handler(number, frame):
        raised.append(number)
        raise RuntimeError("DataLoader worker is killed")

    def profile(*args, **options):
        os.kill(os.getpid(), signal.SIGCHLD)
        return real(*args, **options)

    monkeypatch.setattr(profiles, "profile_and_outputs", profile)
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        run(tmp_path)
        assert signal.getsignal(signal.SIGCHLD) is handler and not raised
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_disk_that_fills_up(tmp_path, monkeypatch, whole):
    real = os.fsync
    left = iter(range(9))  # synchronizations until the disk is full: within the rows, or within the records

    def full(file):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(tmp_path / "part")
    assert "the rows before are kept" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="not finished"):
        ProfileStore.open(tmp_path / "part")
    run(tmp_path / "part")
    assert contents(tmp_path / "part") == whole


# --- command line and ranks -------------------------------------------------------------------------------------------

ARGUMENTS = [
    *("--model", "test_profiles:make_model", "width=3", "--data", "test_profiles:make_data", "n=23"),
    *("--batch-size", "4", "--quiet", "--preprocessing", "as it is", "--threads", "1"),
]


def test_command_line(tmp_path, capsys):
    assert main(["profile", *ARGUMENTS, "--out", str(tmp_path), "--units", "all", "--loss", "pss.saliency:logit"]) == 0
    assert "ProfileStore(23 images × 12 units" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "manifest.json").read_text())["provenance"]
    assert provenance["preprocessing"] == "as it is" and provenance["loss"] == "logit" and provenance["options"] == {}
    main(["profile", *ARGUMENTS, "--out", str(tmp_path / "bf16"), "--precision", "bf16"])
    assert read_manifest(tmp_path / "bf16")["provenance"]["options"] == {"precision": "bf16"}
    with pytest.raises(SystemExit, match="'oops' is no argument"):
        main(["profile", "--model", "test_profiles:make_model", "oops", "--data", "x:y", "--out", str(tmp_path)])


def test_a_rank_takes_every_other_batch(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="item 4"):
        run(tmp_path, data=Faulty(bad=[4]))
    monkeypatch.setattr(passes, "rank", lambda: (1, 2))
    monkeypatch.setattr(passes, "barrier", lambda: None)
    with pytest.raises(ValueError, match=r"not finished \(16 of 26 rows\)"):  # three of seven batches, and the first
        run(tmp_path)


def test_two_ranks_equal_one(tmp_path):
    main(["profile", *ARGUMENTS, "--out", str(tmp_path / "one")])
    module = [*ARGUMENTS, "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "pss", "profile", *module], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ProfileStore(23 images × 8 units") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_against_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pss.storage.store._CHUNK", 5 * 9 * 4)  # five rows at a time
    store = run(tmp_path)
    whole = np.array(store.profiles)
    for source in (store, store.profiles, whole, torch.tensor(whole), torch.tensor(whole, requires_grad=True)):
        for max_bytes in (1, N * 4 * 2, N * 4 * 5 + 1, 10**9):
            parts = list(blocks(source, max_bytes))
            assert [i for columns, _ in parts for i in range(9)[columns]] == list(range(9))
            for columns, block in parts:
                assert block.dtype == np.float32 and block.nbytes <= max(max_bytes, N * 4)
                np.testing.assert_array_equal(block, whole[:, columns])
    np.testing.assert_array_equal(store.columns(slice(2, 7)), whole[:, 2:7])
    np.testing.assert_array_equal(store.columns(slice(None, None, 3)), whole[:, ::3])
    assert next(blocks(whole.astype(np.float64)))[1].dtype == np.float64
    assert next(blocks(torch.tensor(whole).to(torch.bfloat16)))[1].dtype == np.float64
    with pytest.raises(ValueError, match=r"expected \(N, U\)"):
        next(blocks(whole[0]))
    with pytest.raises(ValueError, match="must be positive"):
        next(blocks(whole, 0))


def test_blocks_of_a_dask_array():
    dask = pytest.importorskip("dask.array")
    whole = np.arange(60, dtype=np.float32).reshape(10, 6)
    parts = [block for _, block in blocks(dask.from_array(whole, chunks=(3, 2)), 10 * 4 * 4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_the_callers_autocast_does_not_reach_the_store(tmp_path, whole):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contents(run(tmp_path).path) == whole
