"""Every kind of file that PSS writes, made small: what the tests of faults and of provenance go through.

Each kind writes one of two versions into a folder, reads it back, and knows its files. Reading gives plain values,
which `same` compares to the bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from networks import make_data, make_model

from pss import models
from pss.apps.execution import write_figures
from pss.apps.sweep import Run, Sweep
from pss.patches import Patch
from pss.profiles import ProfileStore, profile_dataset
from pss.reference import Reference
from pss.storage.cache import cached
from pss.storage.tensors import pack
from pss.storage.whole import write_whole
from pss.units import Units


@dataclass(frozen=True)
class Kind:
    """A kind of artefact. ``write(folder, version)`` and ``read(folder)``; whether damage is refused or made anew."""

    name: str
    files: tuple[str, ...]
    write: Callable[[Path, int], object]
    read: Callable[[Path], dict]
    rebuilt: bool = False
    replaces: bool = True  # whether writing puts a new version in the place of an old one at once

    def digest(self, folder: Path) -> str:
        """What reading gives, to the bit."""
        total = hashlib.sha256()
        for name, value in sorted(self.read(folder).items()):
            total.update(name.encode())
            if isinstance(value, torch.Tensor | np.ndarray):
                value = np.asarray(value)
                total.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
            else:
                total.update(json.dumps(value, sort_keys=True, default=str).encode())
        return total.hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(content: bytes, bit: int) -> bytes:
    """The same with one bit flipped."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# --- the kinds --------------------------------------------------------------------------------------------------------


def _write_store(folder: Path, version: int) -> None:
    options = {"batch_size": 9, "progress": False, "data_name": f"data {version}"}
    arguments = (make_model(), make_data(seed=version), None, folder / "store")
    try:
        profile_dataset(*arguments, **options)  # goes on where a pass was cut off
    except ValueError as error:
        if "made of something else" not in str(error):
            raise
        profile_dataset(*arguments, rebuild=True, **options)


def _read_store(folder: Path) -> dict:
    store = ProfileStore.open(folder / "store")
    values = {name: getattr(store, name) for name in ("labels", "predictions", "losses", "confidences", "finished")}
    return values | {"profiles": store.profiles, **store.manifest}


def saliencies(version: int) -> np.ndarray:
    """(200, 40), heavy tails."""
    return np.random.default_rng(version).lognormal(sigma=2.0, size=(200, 40)).astype(np.float32)


def _write_reference(folder: Path, version: int) -> None:
    Reference.fit(saliencies(version), provenance={"model": f"model {version}"}).save(folder / "reference.safetensors")


def _read_reference(folder: Path) -> dict:
    reference = Reference.load(folder / "reference.safetensors")
    return {f.name: getattr(reference, f.name) for f in fields(reference)}


def _write_weights(folder: Path, version: int) -> None:
    models.save_weights(models.resnet18(4, seed=version), folder / "weights.safetensors", {"seed": str(version)})


def _read_weights(folder: Path) -> dict:
    path = folder / "weights.safetensors"
    model = models.load_weights(models.resnet18(4, seed=9), path)
    return model.state_dict() | {"record": models.read_record(path)}


def patch(version: int) -> Patch:
    """A patch of every filter."""
    model = make_model()
    units = Units.of(model)
    gains = torch.linspace(0.5, 1.5 + version, len(units))
    return Patch(models.fingerprint(model), units.layers, gains, about={"pss": "x", "retain": str(version)})


def _write_patch(folder: Path, version: int) -> None:
    patch(version).save(folder / "patch.safetensors")


def _read_patch(folder: Path) -> dict:
    found = Patch.load(folder / "patch.safetensors")
    return {n: getattr(found, n) for n in ("model", "groups", "gains", "left", "reason", "about")}


def _digits(version: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(version)
    images, labels = rng.integers(0, 255, (50, 28, 28), np.uint8), rng.integers(0, 9, 50)
    return {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}


def _write_cache(folder: Path, version: int) -> None:
    write_whole(folder / "digits.safetensors", pack(_digits(version), "record", {}))


def _read_cache(folder: Path) -> dict:
    with mock.patch.dict(os.environ, PSS_CACHE=str(folder)):
        return dict(cached("digits.safetensors", lambda: (_digits(0), {})))


STORE = ("store/profiles.npy", "store/samples.npy", "store/manifest.json")
KINDS = [
    Kind("profiles", STORE, _write_store, _read_store, replaces=False),
    Kind("reference", ("reference.safetensors",), _write_reference, _read_reference),
    Kind("weights", ("weights.safetensors",), _write_weights, _read_weights),
    Kind("patch", ("patch.safetensors",), _write_patch, _read_patch),
    Kind("cached data", ("digits.safetensors",), _write_cache, _read_cache, rebuilt=True),
]


# --- what notebooks and sweeps write: nothing reads it back, so damage to it is seen by people only -------------------


def _write_sweep(folder: Path, version: int) -> None:
    places = [folder / "sweep" / f"k={k}-{k:012d}" for k in range(3)]
    runs = [Run(Path("06_repair.ipynb"), p, {"k": k}, {"k": k}, f"{k:012d}") for k, p in enumerate(places)]
    for run in runs[: 2 + version]:
        run.folder.mkdir(parents=True, exist_ok=True)
        plain = {"key": run.key, "status": "finished", "seconds": 1.5, "error": "", "source": "x", "pss": "x"}
        record = plain | {"parameters": run.parameters, "results": {"accuracy": run.parameters["k"] + version}}
        write_whole(run.folder / "run.json", json.dumps(record))
    Sweep("06_repair", folder / "sweep", tuple(runs[: 2 + version])).write_summary()


def _write_figures(folder: Path, version: int) -> None:
    rng = np.random.default_rng(version)
    pictures = [base64.b64encode(rng.bytes(40_000)).decode() for _ in range(2)]
    outputs = [new_output("display_data", {"image/png": picture}) for picture in pictures]
    book = new_notebook(cells=[new_code_cell("plot()", outputs=outputs, id="plot")])
    write_whole(folder / "executed.ipynb", nbformat.writes(book))
    write_figures(folder / "executed.ipynb")


def _read_files(folder: Path) -> dict:
    return {name: content.hex() for name, content in contents(folder).items()}


FIGURES = ("executed.ipynb", "figures/01.png", "figures/02.png")
SHOWN = [
    Kind("sweep", ("sweep/summary.csv", "sweep/index.html"), _write_sweep, _read_files),
    Kind("figures", FIGURES, _write_figures, _read_files),
]
BY_NAME = {kind.name: kind for kind in KINDS}


def read_quietly(kind: Kind, folder: Path) -> tuple[str, list[str]]:
    """Digest of what is read, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return kind.digest(folder), [str(warning.message) for warning in caught]
