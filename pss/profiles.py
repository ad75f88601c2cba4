r"""Saliency profiles of a whole data set, on disk.

One pass writes the profile of every image, :math:`\bar s(x, y) \in R^U`, as a row of a ``.npy`` file: the matrix from
which a reference is fitted (Levin et al. 2022, section 2.1; Wang and Sato 2023, section 3). A store is a folder:

=================  ====================================================================================
``profiles.npy``   (N, U) float32, one row an image
``samples.npy``    (N,) records: label, prediction, loss, confidences, status and checksum of the row
``manifest.json``  what the rows were made of; its ``complete`` becomes true last
=================  ====================================================================================

A row is finished once its record says so *and* its checksum fits, so a pass may be killed at any moment. Batches have
fixed boundaries, since in float32 the last bit of a row depends on the batch it was computed in: a pass that is
resumed, or shared by several processes, takes whole batches and writes the same bytes as an undisturbed one.

    python -m pss.profiles --model pss.models:digits --data pss.data:digits split=test --out runs/digits
    torchrun --nproc-per-node 2 -m pss.profiles --model … --data … --out …
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import os
import pkgutil
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import pss
from pss.gradients import Loss, get_loss, profile, undisturbed
from pss.models import fingerprint
from pss.units import Units

log = logging.getLogger(__name__)

RECORD = np.dtype(
    [
        ("label", "<i8"),
        ("prediction", "<i8"),
        ("loss", "<f4"),
        ("confidence", "<f4"),  # of the predicted class
        ("true_confidence", "<f4"),
        ("status", "u1"),
        ("checksum", "<u4"),  # CRC-32 of the profile and of this record
    ]
)
PENDING, FINISHED, SKIPPED = range(3)

# A store is refused if one of these differs; the last line only as long as rows are missing.
_WHAT = ("model", "units", "data", "preprocessing", "loss", "signed", "options", "pss")
_IDENTITY = (*_WHAT, "format", "samples", "n_units")
_WHILE_PENDING = ("torch", "device")
_FORMAT = 1
_CHUNK = 1 << 26  # bytes of rows mapped at a time


# --- one pass over a data set -----------------------------------------------------------------------------------------


def profile_dataset(
    model: nn.Module,
    dataset: Dataset,
    units: Units | None,
    path: str | os.PathLike,
    loss: str | Loss = "cross_entropy",
    signed: bool = False,
    batch_size: int | None = None,
    workers: int = 0,
    on_error: str = "raise",
    progress: bool = True,
    preprocessing: str = "",
    data_name: str | None = None,
    device: str | torch.device | None = None,
    rebuild: bool = False,
    **options: Any,
) -> ProfileStore:
    """Profile every image of a data set into a folder; resume what is there, and reopen what is finished.

    Under ``torch.distributed`` every rank calls this alike: rank r takes the batches whose number is r modulo the
    number of ranks, and rank 0 finishes the manifest.

    Parameters
    ----------
    model : nn.Module
        Left as it was; profiled in evaluation mode.
    dataset : Dataset
        Map-style, of ``(image, label)``, with images of one shape.
    units : Units or None
        None for the filters of the model.
    path : path
        Folder of the store, made if it is not there. Several ranks need it on a file system that they share.
    loss, signed
        As in `profile`.
    batch_size : int, optional
        By default what `choose_batch_size` says. A pass that is resumed keeps the size (and the number of threads) that
        it began with.
    workers : int
        Processes that read images ahead; 0 reads them here.
    on_error : {"raise", "skip"}
        What to do about an image that cannot be read, or whose profile is not finite: an error that gives its index,
        or leave its row NaN and list it in `ProfileStore.skipped`.
    progress : bool
        Show a progress bar.
    preprocessing : str
        Any text that names how the images were prepared; kept, and compared when the store is used again.
    data_name : str, optional
        Names the data; by default its ``fingerprint`` does, or else its length and a sample of its items.
    device : optional
        Where the model must be; by default where it is.
    rebuild : bool
        Throw away what is in the folder (also if it is damaged, or of another model) and compute it anew.
    **options
        Passed on to `profile`.

    Returns
    -------
    ProfileStore

    Raises
    ------
    ValueError
        If the folder holds profiles of something else (saying what differs) or damaged ones, or, with
        ``on_error="raise"``, an image is bad.
    FileExistsError
        If the folder holds other files.
    OSError
        If the disk is too small, or the folder cannot be written.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"unknown on_error {on_error!r}: expected 'raise' or 'skip'")
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError("the data set has no items (or no length): expected a map-style data set of (image, label)")
    path, units = Path(path), units or Units.of(model)
    device = _check_device(model, device)
    made_of = {
        "format": _FORMAT,
        "pss": pss.__version__,
        "torch": torch.__version__,
        "device": device.type,
        "samples": len(dataset),
        "n_units": len(units),
        "model": fingerprint(model),
        "units": units.fingerprint,
        "data": data_name or getattr(dataset, "fingerprint", None) or _sampled_fingerprint(dataset),
        "preprocessing": preprocessing,
        "loss": _name(loss),
        "signed": bool(signed),
        "options": {key: _name(options[key]) for key in sorted(options)},
    }
    first = _rank()[0] == 0
    exists = (path / "manifest.json").exists()
    if first and exists and rebuild:
        _remove(path)
    if first and (rebuild or not exists):
        size = batch_size or choose_batch_size(model, _first_image(dataset).to(device))
        _begin(path, {**made_of, "batch_size": size, "threads": torch.get_num_threads()})
    _barrier()
    manifest = _read_manifest(path)
    _refuse_other(path, manifest, made_of)
    if not manifest["complete"]:
        if first:
            _lay_out(path, manifest)
        _barrier()

        def compute(images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
            return _compute(model, images.to(device), labels.to(device), units, loss, signed, options)

        with _threads(manifest["threads"]):
            _fill(path, manifest, dataset, compute, workers, on_error == "skip", progress)
        _barrier()
        if first:
            _finish(path, manifest)
        _barrier()
    store = ProfileStore.open(path, verify=first)
    if store.skipped and on_error == "raise":
        raise ValueError(
            f"{path} leaves out items {list(store.skipped)[:10]} ({next(iter(store.skipped.values()))}): accept them "
            "with on_error='skip', or mend them and call with rebuild=True"
        )
    return store


def _fill(path: Path, manifest: dict, dataset: Dataset, compute, workers: int, skip: bool, progress: bool) -> None:
    """Compute and write the batches of this process that are not finished."""
    n, size = manifest["samples"], manifest["batch_size"]
    rank, ranks = _rank()
    batches = [slice(start, min(start + size, n)) for start in range(0, n, size)][rank::ranks]
    rows, records = _open_arrays(path, manifest)
    pending = [batch for batch in batches if not _done(rows[batch], records[batch])]
    loader = DataLoader(
        _Guarded(dataset, skip),
        batch_sampler=[range(batch.start, batch.stop) for batch in pending],
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # the loader would draw a seed for its workers from the global generator
    )
    total, left = (sum(batch.stop - batch.start for batch in some) for some in (batches, pending))
    bar = tqdm(total=total, initial=total - left, unit="image", desc="profiles", disable=not progress or rank > 0)
    with bar, _Writer(path, manifest) as writer:
        for batch, (ids, images, labels, bad) in zip(pending, loader, strict=True):
            rows, records = _empty_rows(batch.stop - batch.start, manifest["n_units"])
            if ids:
                at = np.asarray(ids) - batch.start
                try:
                    rows[at], records[at] = compute(images, labels)
                except Exception as error:
                    error.add_note(f"this happened while profiling items {ids[0]} to {ids[-1]} of the data set")
                    raise
                broken = at[~np.isfinite(rows[at]).all(axis=1) | ~np.isfinite(records["loss"][at])]
                rows[broken], records[broken] = _empty_rows(len(broken), manifest["n_units"])
                bad |= {batch.start + int(i): "its loss or its profile is NaN or infinite" for i in broken}
            for index, reason in bad.items():
                if not skip:
                    raise ValueError(f"item {index} of the data set: {reason}; mend it, or pass on_error='skip'")
                log.warning("item %d of the data set is skipped: %s", index, reason)
                _write_whole(path / f"skipped-{index}.txt", reason)
            writer.write(batch.start, rows, records)
            bar.update(len(rows))


def _empty_rows(count: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and records as they stay where an image is skipped."""
    records = np.zeros(count, RECORD)
    records[:] = (-1, -1, np.nan, np.nan, np.nan, SKIPPED, 0)
    return np.full((count, units), np.nan, np.float32), records


def _compute(model, images, labels, units, loss, signed, options) -> tuple[np.ndarray, np.ndarray]:
    """Profiles (B, U) of a batch, and its records."""
    if images.is_floating_point():
        images = images.to(next(model.parameters()).dtype)
    rows = profile(model, images, labels, units, loss, signed=signed, **options)
    with undisturbed(model), torch.no_grad():
        outputs = model(images)
        losses = get_loss(loss)(outputs, labels)
    _, records = _empty_rows(len(images), 0)
    records["status"], records["loss"] = FINISHED, losses.float().cpu().numpy()
    classes = labels.ndim == 1 and not labels.is_floating_point()
    if classes:
        records["label"] = labels.cpu().numpy()
    if isinstance(outputs, Tensor) and outputs.ndim == 2:  # a classifier
        probabilities = outputs.double().softmax(dim=1)
        confidence, prediction = probabilities.max(dim=1)
        records["prediction"], records["confidence"] = prediction.cpu().numpy(), confidence.cpu().numpy()
        if classes:
            records["true_confidence"] = probabilities.gather(1, labels[:, None].long())[:, 0].cpu().numpy()
    return rows.float().cpu().numpy(), records


def choose_batch_size(model: nn.Module, image: Tensor) -> int:
    """Batch size that fits: 8 at 224 pixels on a CPU, larger for small images, less where activations are large.

    Depends on the model, the image and the kind of device only, never on what memory happens to be free, so that every
    run of the same job has the same batches. A batch holds at most 1 GiB of activations for the backward pass (8 GiB on
    an accelerator), counted in a forward pass of ``image``, shape (C, H, W).
    """
    scale = 1 if image.device.type == "cpu" else 8
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = next(model.parameters()).dtype
    image = image[None].to(dtype if image.is_floating_point() else None).detach()
    if image.is_floating_point():
        image.requires_grad_()
    with undisturbed(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = model(image)
        for parameter in model.parameters():
            held.pop(parameter.untyped_storage().data_ptr(), None)
        activations = max(1, sum(held.values()))
        del outputs
    pixels = max(1, image[0, 0].numel() if image.ndim > 2 else image.numel())
    return int(np.clip(min(scale * 8 * 224 * 224 // pixels, scale * (1 << 30) // activations), 1, 256))


class _Guarded(Dataset):
    """Items of a data set as ``(index, image, label, reason)``: the reason says why an item could not be read."""

    def __init__(self, dataset: Dataset, skip: bool):
        self.dataset, self.skip = dataset, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any, Any, str]:
        try:
            image, label = self.dataset[index][:2]
            if not isinstance(image, Tensor | np.ndarray):
                raise TypeError(f"a {type(image).__name__}, not a tensor: give the data set a transform to tensors")
            image = torch.as_tensor(image)
            if not torch.isfinite(image).all():
                raise ValueError("the image holds NaN or infinities")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self.skip:
                return index, None, None, reason
            raise ValueError(
                f"item {index} of the data set could not be read ({reason}); mend it, or pass on_error='skip'"
            ) from error
        return index, image, label, ""


def _collate(items: list) -> tuple[list[int], Tensor | None, Tensor | None, dict[int, str]]:
    good = [item for item in items if not item[3]]
    bad = {index: reason for index, _, _, reason in items if reason}
    if not good:
        return [], None, None, bad
    shapes = {tuple(image.shape): index for index, image, _, _ in good}
    if len(shapes) > 1:
        raise ValueError(f"images differ in shape: {shapes} (shape: item); resize them in the data set's transform")
    ids = [index for index, *_ in good]
    images = torch.stack([image for _, image, _, _ in good])
    return ids, images, default_collate([label for _, _, label, _ in good]), bad


# --- the files --------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes rows, then the records that call them finished.

    Plain writes, not a writable memory map: a full disk is an error here and kills the process there, and ranks on a
    network file system would overwrite each other's rows in the same page.
    """

    def __init__(self, path: Path, manifest: dict):
        rows, records = _open_arrays(path, manifest)
        self.offsets, self.strides = (rows.offset, records.offset), (rows.strides[0], records.strides[0])
        self.files = [open(path / name, "r+b", buffering=0) for name in ("profiles.npy", "samples.npy")]  # noqa: SIM115

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def write(self, start: int, rows: np.ndarray, records: np.ndarray) -> None:
        records["checksum"] = _checksums(rows, records)
        for file, offset, stride, values in zip(self.files, self.offsets, self.strides, (rows, records), strict=True):
            data = memoryview(values.tobytes())
            file.seek(offset + start * stride)
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())


def _checksums(rows: np.ndarray, records: np.ndarray) -> np.ndarray:
    """CRC-32 of every row with its record (3 GiB/s here: as fast as a disk, and enough against accidents)."""
    blank = np.array(records)
    blank["checksum"] = 0
    blank = blank.view(np.uint8).reshape(len(blank), -1)
    return np.array([zlib.crc32(b, zlib.crc32(row)) for row, b in zip(rows, blank, strict=True)], np.uint32)


def _damaged(rows: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Rows that are neither finished nor skipped, or whose bytes changed since; shape (n,)."""
    return (records["status"] == PENDING) | (_checksums(rows, records) != records["checksum"])


def _done(rows: np.ndarray, records: np.ndarray) -> bool:
    return (records["status"] != PENDING).all() and not _damaged(rows, records).any()


_FILES = (
    "profiles.npy",
    "profiles.npy.partial",
    "samples.npy",
    "samples.npy.partial",
    "manifest.json.partial",
    "manifest.json",
)


def _remove(path: Path) -> None:
    """Take a store away; its manifest last, so that what is left of it is still known as one."""
    for file in [*path.glob("skipped-*.txt*"), *(path / name for name in _FILES)]:
        file.unlink(missing_ok=True)


def _begin(path: Path, manifest: dict) -> None:
    """Claim a folder for a store, which is the one whose manifest it holds."""
    path.mkdir(parents=True, exist_ok=True)
    foreign = sorted({file.name for file in path.iterdir()} - {"manifest.json.partial"})
    if foreign:
        raise FileExistsError(f"{path} holds other files ({foreign[0]}, …): give the profiles a folder of their own")
    n, count = manifest["samples"], manifest["n_units"]
    needed, free = n * (count * 4 + RECORD.itemsize), shutil.disk_usage(path).free
    if needed > free:
        what = f"{n} profiles of {count} units need {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free at"
        raise OSError(errno.ENOSPC, what, str(path))
    _write_manifest(path, {**manifest, "complete": False, "skipped": {}})


def _lay_out(path: Path, manifest: dict) -> None:
    """Make the files of a new store at their full size (sparse, all rows pending)."""
    for name, dtype, shape in _arrays(manifest):
        if not (path / name).exists():
            beside = path / f"{name}.partial"
            np.lib.format.open_memmap(beside, "w+", dtype, shape).flush()
            os.replace(beside, path / name)


def _arrays(manifest: dict) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    n, count = manifest["samples"], manifest["n_units"]
    return [("profiles.npy", np.dtype("<f4"), (n, count)), ("samples.npy", RECORD, (n,))]


def _finish(path: Path, manifest: dict) -> None:
    _, records = _open_arrays(path, manifest)
    if (missing := np.flatnonzero(records["status"] == PENDING)).size:
        raise RuntimeError(f"{path}: {len(missing)} rows from {missing[0]} on were not written: did a rank fail?")
    skipped = {str(i): (path / f"skipped-{i}.txt") for i in np.flatnonzero(records["status"] == SKIPPED)}
    reasons = {i: note.read_text("utf-8") for i, note in skipped.items()}
    _write_manifest(path, {**manifest, "complete": True, "skipped": reasons})
    for note in path.glob("skipped-*.txt"):
        note.unlink()


def _write_manifest(path: Path, manifest: dict) -> None:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    content["checksum"] = _manifest_checksum(content)
    _write_whole(path / "manifest.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        if manifest["checksum"] != _manifest_checksum({k: v for k, v in manifest.items() if k != "checksum"}):
            raise ValueError("its checksum does not fit")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no profiles: make them with profile_dataset") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damage(path / "manifest.json", error) from error
    return manifest


def _manifest_checksum(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.partial")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _open_arrays(path: Path, manifest: dict) -> tuple[np.memmap, np.memmap]:
    """Profiles and records as read-only maps; refused unless they are what the manifest says."""
    arrays = []
    for name, dtype, shape in _arrays(manifest):
        try:
            array = np.lib.format.open_memmap(path / name, "r")
            found, size = (array.dtype, array.shape), (path / name).stat().st_size
            if found != (dtype, shape) or not array.flags.c_contiguous or size != array.offset + array.nbytes:
                raise ValueError(f"it holds {found[1]} {found[0]} in {size} bytes, expected {shape} {dtype}")
        except PermissionError:
            raise
        except Exception as error:  # a damaged header can fail anywhere in NumPy's parser
            raise _damage(path / name, error) from error
        arrays.append(array)
    return tuple(arrays)


def _damage(path: Path, what: object) -> ValueError:
    return ValueError(f"{path} is damaged ({what}): compute it anew with profile_dataset(…, rebuild=True)")


def _refuse_other(path: Path, manifest: dict, made_of: dict) -> None:
    keys = _IDENTITY if manifest["complete"] else _IDENTITY + _WHILE_PENDING
    differ = [key for key in keys if manifest.get(key) != made_of[key]]
    if differ:
        what = "".join(f"\n  {key}: stored {manifest.get(key)!r}, given {made_of[key]!r}" for key in differ)
        raise ValueError(
            f"the profiles in {path} were made of something else:{what}\n"
            "give another path, or rebuild=True to compute them anew; ProfileStore.open reads finished ones as they are"
        )


# --- what the rows are made of ----------------------------------------------------------------------------------------


def _name(value: Any) -> Any:
    """A value as it stands in the manifest: functions by their qualified name."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return repr(value)


def _sampled_fingerprint(dataset: Dataset) -> str:
    """Name a data set that does not name itself: its length and 16 of its items."""
    digest = hashlib.sha256(f"{len(dataset)}".encode())
    for index in np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int)):
        try:
            for part in dataset[int(index)][:2]:
                digest.update(np.ascontiguousarray(part).tobytes())
        except Exception as error:  # a bad image: met again, and dealt with, when its turn comes
            digest.update(f"{index} {type(error).__name__}".encode())
    return f"{len(dataset)} items, sample {digest.hexdigest()[:16]}"


def _first_image(dataset: Dataset) -> Tensor:
    for index in range(len(dataset)):
        try:
            return torch.as_tensor(dataset[index][0])
        except Exception as error:
            failure = error
    raise ValueError(f"none of the {len(dataset)} images can be read; the last says: {failure}") from failure


def _check_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    own = next((p.device for p in model.parameters()), None)
    if own is None:
        raise ValueError(f"{type(model).__name__} has no parameters: nothing to profile")
    wanted = own if device is None else torch.device(device)
    if wanted.type != own.type or wanted.index not in (None, own.index):
        raise ValueError(f"the model is on {own}, but device is {wanted}: move it first, model.to({str(wanted)!r})")
    return own


# --- several processes ------------------------------------------------------------------------------------------------


def _rank() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _barrier() -> None:
    if _rank()[1] > 1:
        dist.barrier()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums depend on the number of threads in their last bit: go on with the number that a store began with."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- reading ----------------------------------------------------------------------------------------------------------


class ProfileStore:
    """Profiles of a data set on disk, finished and read-only. Use `ProfileStore.open` or `profile_dataset`.

    The arrays have one row for every item of the data set, in its order. Where an image was skipped `finished` is
    False, the profile is NaN, and the label is -1. ``len`` and ``shape`` count finished rows only, which are those
    that `blocks`, and so a reference, sees.

    Attributes
    ----------
    path : Path
    manifest : dict
        What the profiles were made of.
    skipped : dict of int to str
        Items that were left out, and why.
    labels, predictions : ndarray of int64, shape (N,)
        Predictions are -1 if the model's output is not (B, classes).
    losses, confidences, true_confidences : ndarray of float32, shape (N,)
        Loss of each image; softmax probability of the predicted and of the true class.
    finished : ndarray of bool, shape (N,)
    """

    def __init__(self, path: Path, manifest: dict, records: np.ndarray):
        self.path, self.manifest = path, manifest
        self.skipped = {int(index): reason for index, reason in manifest["skipped"].items()}
        columns = {name: np.ascontiguousarray(records[name]) for name in RECORD.names}
        columns["finished"] = columns.pop("status") == FINISHED
        for values in columns.values():
            values.flags.writeable = False
        self.labels, self.predictions, self.losses = columns["label"], columns["prediction"], columns["loss"]
        self.confidences, self.true_confidences = columns["confidence"], columns["true_confidence"]
        self.finished = columns["finished"]

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = True) -> ProfileStore:
        """Open a finished store; nothing is computed.

        Parameters
        ----------
        path : path
        verify : bool
            Read every row and compare its checksum (at the speed of the disk).

        Raises
        ------
        FileNotFoundError
            If there is no store.
        ValueError
            If it is not finished, truncated, or a byte of it has changed; the message names the file and the rows.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        rows, records = _open_arrays(path, manifest)
        if not manifest["complete"]:
            done, n = int((records["status"] != PENDING).sum()), len(records)
            raise ValueError(f"{path} is not finished ({done} of {n} rows): call profile_dataset again, as before")
        if verify:
            bad = [_damaged(part, records[at]) for at, part in _row_chunks(rows)]
            if (bad := np.flatnonzero(np.concatenate(bad))).size:
                raise _damage(path / "profiles.npy", f"{len(bad)} rows are not as written, the first is {bad[0]}")
        return cls(path, manifest, records)

    def __len__(self) -> int:
        return int(self.finished.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """Finished rows and units."""
        return len(self), self.manifest["n_units"]

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    @property
    def profiles(self) -> np.memmap:
        """All rows, as a read-only memory map, shape (N, U)."""
        return _open_arrays(self.path, self.manifest)[0]

    @property
    def misclassified(self) -> np.ndarray:
        """Positions in the data set of the images that the model gets wrong."""
        known = self.finished & (self.labels >= 0) & (self.predictions >= 0)
        return np.flatnonzero(known & (self.labels != self.predictions))

    @property
    def about(self) -> dict[str, str]:
        """What the profiles were made of, as text, for the record of a reference."""
        return {key: str(self.manifest[key]) for key in (*_WHAT, "torch")}

    def columns(self, columns: slice, finished: bool = False) -> np.ndarray:
        """Some units of all images, shape (N, b), in memory.

        Rows are read a few at a time and only these columns kept, so memory stays near the size of the result, also
        where the file is larger than memory. With ``finished`` the rows of skipped images are left out.
        """
        keep = self.finished if finished else np.ones(len(self.finished), bool)
        block = np.empty((int(keep.sum()), len(np.arange(self.shape[1])[columns])), np.float32)
        filled = 0
        for at, rows in _row_chunks(self.profiles):
            part = rows[:, columns] if keep[at].all() else rows[keep[at], columns]
            block[filled : filled + len(part)] = part
            filled += len(part)
        return block

    def table(self) -> pd.DataFrame:
        """One row an image: label, prediction, loss, confidences, and whether it is finished and misclassified."""
        wrong = np.zeros(len(self.finished), bool)
        wrong[self.misclassified] = True
        return pd.DataFrame(
            {
                "label": self.labels,
                "prediction": self.predictions,
                "loss": self.losses,
                "confidence": self.confidences,
                "true_confidence": self.true_confidences,
                "misclassified": wrong,
                "finished": self.finished,
            }
        )

    def __repr__(self) -> str:
        n, count = self.shape
        return f"ProfileStore({n} images × {count} units, {len(self.misclassified)} misclassified, {self.path})"


def _row_chunks(rows: np.memmap) -> Iterator[tuple[slice, np.memmap]]:
    """Rows in order, a few megabytes at a time, each in a map of its own: pages of the last one can go."""
    step = max(1, _CHUNK // max(1, rows.strides[0]))
    for start in range(0, len(rows), step):
        count = min(step, len(rows) - start)
        offset = rows.offset + start * rows.strides[0]
        part = np.memmap(rows.filename, rows.dtype, "r", offset, (count, *rows.shape[1:]))
        yield slice(start, start + count), part


def blocks(profiles: Any, max_bytes: int = 1 << 28) -> Iterator[tuple[slice, np.ndarray]]:
    """Go through profiles by blocks of units that fit in memory.

    Parameters
    ----------
    profiles : ProfileStore, ndarray, memmap, Tensor, or anything alike (dask), shape (N, U)
        Rows that a store skipped are left out.
    max_bytes : int
        Size of a block, at most (but at least one column).

    Yields
    ------
    units : slice
    block : ndarray, shape (N, b)
        float32 where the profiles are, otherwise float64. Of an array in memory it may be a view: do not write to it.

    Raises
    ------
    ValueError
        If the profiles are not a matrix, or max_bytes is not positive.
    """
    if len(profiles.shape) != 2:
        raise ValueError(f"profiles of shape {tuple(profiles.shape)}: expected (N, U)")
    if max_bytes < 1:
        raise ValueError(f"max_bytes {max_bytes} must be positive")
    n, count = profiles.shape
    itemsize = 4 if str(profiles.dtype).removeprefix("torch.") == "float32" else 8
    width = max(1, max_bytes // max(1, n * itemsize))
    for start in range(0, count, width):
        columns = slice(start, min(start + width, count))
        if isinstance(profiles, ProfileStore):
            yield columns, profiles.columns(columns, finished=True)
            continue
        block = profiles[:, columns]
        if isinstance(block, Tensor):
            block = block.detach().to("cpu", torch.float32 if itemsize == 4 else torch.float64)
        yield columns, np.asarray(block, np.float32 if itemsize == 4 else np.float64)


# --- command line -----------------------------------------------------------------------------------------------------


def _call(reference: list[str]) -> Any:
    """Call ``package.module:callable`` with ``key=value`` arguments; values are JSON, otherwise text."""
    name, *pairs = reference
    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"{pair!r} is no argument of {name}: expected key=value")
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
    return pkgutil.resolve_name(name)(**arguments)


def _named(text: str) -> str | Callable:
    """A built-in name as it is, or ``package.module:callable``."""
    return pkgutil.resolve_name(text) if ":" in text else text


def main(arguments: list[str] | None = None) -> int:
    """``python -m pss.profiles``; under torchrun every process takes its share."""
    parser = argparse.ArgumentParser(prog="python -m pss.profiles", description="Profile a data set into a folder.")
    what = {"nargs": "+", "required": True, "metavar": ("MODULE:CALLABLE", "KEY=VALUE")}
    parser.add_argument("--model", **what, help="gives the model, as pss.models:digits")
    parser.add_argument("--data", **what, help="gives the data set, as pss.data:digits split=test")
    parser.add_argument("--out", required=True, help="folder of the profiles")
    parser.add_argument("--units", type=_named, default="filters", help="filters, rows, heads, all or MODULE:CALLABLE")
    parser.add_argument("--loss", type=_named, default="cross_entropy", help="a name, or MODULE:CALLABLE")
    parser.add_argument("--signed", action="store_true")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise")
    parser.add_argument("--preprocessing", default="")
    parser.add_argument("--data-name")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (each process its own), cuda:1, …")
    parser.add_argument("--threads", type=int, help="threads of each process (torchrun gives each one)")
    parser.add_argument("--rebuild", action="store_true", help="throw away what is in the folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    distributed = dist.is_available() and dist.is_torchelastic_launched()
    device = chosen.device
    if distributed:
        dist.init_process_group("gloo")  # ranks only wait for each other: they exchange no tensors
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        model = _call(chosen.model).to(device)
        store = profile_dataset(
            model,
            _call(chosen.data),
            Units.of(model, chosen.units),
            chosen.out,
            loss=chosen.loss,
            signed=chosen.signed,
            batch_size=chosen.batch_size,
            workers=chosen.workers,
            on_error=chosen.on_error,
            progress=not chosen.quiet,
            preprocessing=chosen.preprocessing,
            data_name=chosen.data_name,
            rebuild=chosen.rebuild,
        )
        if _rank()[0] == 0:
            print(store)
            for index, reason in store.skipped.items():
                print(f"skipped item {index}: {reason}")
    finally:
        if distributed:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
