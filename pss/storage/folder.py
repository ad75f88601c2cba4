r"""A folder of saliency profiles: its files, their checks, and how they are read. `pss.storage.passes` fills it.

=================  ====================================================================================
``profiles.npy``   (N, U) float32, one row an image
``samples.npy``    (N,) records: label, prediction, loss, confidences, status and checksum of the row
``manifest.json``  what the rows were made of, and which images were skipped and why
=================  ====================================================================================

It lies in ``<path>.partial/`` until all rows are there: one rename begins it there, one gives it its name, one takes it
away. A row is finished once its record says so *and* its checksum fits, so whoever writes may be killed at any moment.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pss.storage.whole import beside, write_whole

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
FORMAT = 2
_MANIFEST, _FILES = "manifest.json", ("profiles.npy", "samples.npy", "manifest.json")
_OURS = re.compile(r"profiles\.npy|samples\.npy|\.?(manifest\.json|skipped-\d+\.txt)(\.[0-9a-f]{32}\.partial)?")
_CHUNK = 1 << 26  # bytes of rows mapped at a time
_T = TypeVar("_T")


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
        columns = [np.ascontiguousarray(records[name]) for name in RECORD.names[:-1]]
        columns[-1] = columns[-1] == FINISHED
        for values in columns:
            values.flags.writeable = False
        self.labels, self.predictions, self.losses, self.confidences, self.true_confidences, self.finished = columns

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
        if not is_store(path) and is_store(partial := partial_of(path)):
            status = open_arrays(partial, read_manifest(partial))[1]["status"]
            done = int((status != PENDING).sum())
            raise ValueError(
                f"{path} is not finished ({done} of {len(status)} rows): call profile_dataset again, as before"
            )
        manifest = read_manifest(path)
        rows, records = open_arrays(path, manifest)
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
        return open_arrays(self.path, self.manifest)[0]

    @property
    def misclassified(self) -> np.ndarray:
        """Positions in the data set of the images that the model gets wrong."""
        known = self.finished & (self.labels >= 0) & (self.predictions >= 0)
        return np.flatnonzero(known & (self.labels != self.predictions))

    @property
    def provenance(self) -> dict[str, str]:
        """What the profiles were made of, as text, for the record of a reference."""
        made_of = self.manifest["provenance"] | {"torch": self.manifest["computed_with"]["torch"]}
        return {key: str(value) for key, value in made_of.items()}

    def columns(self, columns: slice) -> np.ndarray:
        """Some units of the finished images, shape (n, b), in memory.

        Rows are read a few at a time and only these columns kept, so memory stays near the size of the result, also
        where the file is larger than memory.
        """
        block = np.empty((len(self), len(range(self.shape[1])[columns])), np.float32)
        filled = 0
        for at, rows in _row_chunks(self.profiles):
            part = rows[:, columns] if self.finished[at].all() else rows[self.finished[at], columns]
            block[filled : filled + len(part)] = part
            filled += len(part)
        return block

    def without(self, rows: np.ndarray) -> ProfileStore:
        """The same store as if these rows had been skipped; on disk nothing changes."""
        fewer = copy.copy(self)
        fewer.finished = self.finished & ~np.isin(np.arange(len(self.finished)), rows)
        return fewer

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
            yield columns, profiles.columns(columns)
            continue
        block = profiles[:, columns]
        if isinstance(block, Tensor):
            block = block.detach().to("cpu", torch.float32 if itemsize == 4 else torch.float64)
        yield columns, np.asarray(block, np.float32 if itemsize == 4 else np.float64)


def map_blocks(function: Callable[[np.ndarray], _T], profiles: Any, max_bytes: int = 1 << 28) -> list[_T]:
    """Apply a function to every block of `blocks`; a dask array computes them on its own scheduler."""
    if not hasattr(profiles, "dask"):
        return [function(block) for _, block in blocks(profiles, max_bytes)]
    import dask

    width = max(1, max_bytes // (len(profiles) * profiles.dtype.itemsize))
    columns = profiles.rechunk({0: -1, 1: width}).to_delayed()[0]
    return list(dask.compute(*[dask.delayed(function)(block) for block in columns]))


# --- the files --------------------------------------------------------------------------------------------------------


@contextmanager
def writer(path: Path, manifest: dict) -> Iterator[Callable[[int, np.ndarray, np.ndarray], None]]:
    """Open an unfinished store; the function writes rows from a number on, then the records that call them finished.

    Plain writes, not a writable memory map: a full disk is an error here and kills the process there, and ranks on a
    network file system would overwrite each other's rows in the same page.
    """
    arrays = open_arrays(path, manifest)
    with ExitStack() as stack:
        files = [stack.enter_context(open(path / name, "r+b", buffering=0)) for name, *_ in _arrays(manifest)]

        def write(start: int, rows: np.ndarray, records: np.ndarray) -> None:
            records["checksum"] = _checksums(rows, records)
            for file, array, values in zip(files, arrays, (rows, records), strict=True):
                data = memoryview(values.tobytes())
                try:
                    file.seek(array.offset + start * array.strides[0])
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError as error:
                    kept = "the rows before are kept, call again when it can be written"
                    error.add_note(f"while writing {file.name}: {kept}")
                    raise

        yield write


def _checksums(rows: np.ndarray, records: np.ndarray) -> np.ndarray:
    """CRC-32 of every row with its record (3 GiB/s here: as fast as a disk, and enough against accidents)."""
    blank = np.array(records)
    blank["checksum"] = 0
    blank = blank.view(np.uint8).reshape(len(blank), -1)
    return np.array([zlib.crc32(b, zlib.crc32(row)) for row, b in zip(rows, blank, strict=True)], np.uint32)


def _damaged(rows: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Rows that are neither finished nor skipped, or whose bytes changed since; shape (n,)."""
    return (records["status"] == PENDING) | (_checksums(rows, records) != records["checksum"])


def is_done(rows: np.ndarray, records: np.ndarray) -> bool:
    """Whether all these rows are written and whole."""
    return (records["status"] != PENDING).all() and not _damaged(rows, records).any()


def is_store(path: Path) -> bool:
    """Whether the folder holds profiles."""
    return (path / _MANIFEST).is_file()


def partial_of(path: Path) -> Path:
    """Where a store lies until it is finished: beside its place, whence one rename moves it."""
    return Path(f"{path.resolve()}.partial")


def discard(path: Path) -> None:
    """Take a store away, finished or not, at once: first its name goes, then its files. Other files are refused."""
    _refuse_files(path, {file.name for file in path.iterdir() if not _OURS.fullmatch(file.name)})
    away = beside(path.resolve())
    os.rename(path.resolve(), away)
    shutil.rmtree(away)


def _refuse_files(path: Path, names: set[str]) -> None:
    if names:
        raise FileExistsError(f"{path} holds other files ({min(names)}, …): give the profiles a folder of their own")


def begin(path: Path, manifest: dict) -> bool:
    """Lay out an unfinished store at its full size (sparse, all rows pending); whether this process was the first.

    The manifest has ``samples``, ``n_units``, ``provenance``, ``computed_with``, ``batch_size`` and ``threads``.
    """
    if is_store(path):
        return False
    _refuse_files(path, {file.name for file in path.iterdir()} if path.exists() else set())
    if path.is_mount():
        raise ValueError(f"{path} is a disk of its own, which cannot be renamed: give a folder below it")
    partial = partial_of(path)
    if partial.exists() and not is_store(partial):
        with suppress(FileNotFoundError):  # it was finished in between
            discard(partial)
    new = beside(partial)
    n, count = manifest["samples"], manifest["n_units"]
    needed, free = n * (count * 4 + RECORD.itemsize), shutil.disk_usage(new.parent).free
    if needed > free:
        what = f"{n} profiles of {count} units need {needed / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free at"
        raise OSError(errno.ENOSPC, what, str(path))
    try:
        new.mkdir()
        for name, dtype, shape in _arrays(manifest):
            np.lib.format.open_memmap(new / name, "w+", dtype, shape).flush()
        write_manifest(new, {"format": FORMAT, **manifest, "skipped": {}})
        os.rename(new, partial)
        return True
    except OSError:
        if not is_store(partial):  # or else another process has begun the same
            raise
        return False
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Fill and finish a store in here: another process at the same waits for its turn. A lock goes with its holder."""
    lock = None
    with suppress(ImportError, OSError):  # on Windows, on a file system without locks, or the store is finished by now
        import fcntl

        lock = os.open(partial_of(path), os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a loader's worker, forked in here, has the lock open too
            os.close(lock)


@contextmanager
def taken_back_if_empty(path: Path) -> Iterator[None]:
    """Begin a store in here: an error takes it away again, unless a row is written."""
    try:
        yield
    except Exception:
        partial = partial_of(path)
        with suppress(OSError, ValueError):  # what cannot be read stays, and the error is the one from within
            if not (open_arrays(partial, read_manifest(partial))[1]["status"] != PENDING).any():
                discard(partial)
        raise


def _arrays(manifest: dict) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    n, count = manifest["samples"], manifest["n_units"]
    return [("profiles.npy", np.dtype("<f4"), (n, count)), ("samples.npy", RECORD, (n,))]


def finish(path: Path) -> None:
    """Give a store its name, and list what was skipped and why (``skipped-<item>.txt`` kept it until now)."""
    partial = partial_of(path)
    manifest = read_manifest(partial)
    _, records = open_arrays(partial, manifest)
    if (missing := np.flatnonzero(records["status"] == PENDING)).size:
        raise RuntimeError(f"{path}: {len(missing)} rows from {missing[0]} on were not written: did a rank fail?")
    notes = [(i, partial / f"skipped-{i}.txt") for i in np.flatnonzero(records["status"] == SKIPPED)]
    reasons = {str(i): note.read_text("utf-8") for i, note in notes if note.exists()}
    write_manifest(partial, {**manifest, "skipped": manifest["skipped"] | reasons})
    for file in partial.iterdir():
        if file.name not in _FILES:
            file.unlink()
    os.rename(partial, path.resolve())


def write_manifest(path: Path, manifest: dict) -> None:
    """Write the manifest with its own checksum."""
    write_whole(path / _MANIFEST, {**manifest, "checksum": _manifest_checksum(manifest)})


def read_manifest(path: Path) -> dict:
    """Read the manifest of a folder; an error if there is none, or it is damaged or of another version."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        if manifest.get("checksum") != _manifest_checksum(manifest):
            raise ValueError("its checksum does not fit")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of another version, format {manifest['format']} instead of {FORMAT}")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} holds no profiles: make them with profile_dataset") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damage(path / _MANIFEST, error) from error
    return manifest


def _manifest_checksum(manifest: dict) -> int:
    return zlib.crc32(json.dumps({**manifest, "checksum": None}, sort_keys=True).encode())


def open_arrays(path: Path, manifest: dict) -> tuple[np.memmap, np.memmap]:
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


def refuse_other(path: Path, made_of: dict) -> dict:
    """Raise ValueError if the store, finished or not, was made of something else; otherwise its manifest.

    ``made_of`` is a manifest as `begin` takes it. What it is computed with matters only as long as rows are missing.
    """
    finished = is_store(path)
    manifest = read_manifest(path if finished else partial_of(path))
    groups = ("provenance",) if finished else ("provenance", "computed_with")
    stored, given = (
        {"samples": m["samples"], "n_units": m["n_units"]} | {k: v for group in groups for k, v in m[group].items()}
        for m in (manifest, made_of)
    )
    if differ := [key for key in given if stored.get(key) != given[key]]:
        what = "".join(f"\n  {key}: stored {stored.get(key)!r}, given {given[key]!r}" for key in differ)
        raise ValueError(
            f"the profiles in {path} were made of something else:{what}\n"
            "give another path, or rebuild=True to compute them anew; ProfileStore.open reads finished ones as they are"
        )
    return manifest


def empty_rows(count: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and records as they stay where an image is skipped."""
    records = np.zeros(count, RECORD)
    records[:] = (-1, -1, np.nan, np.nan, np.nan, SKIPPED, 0)
    return np.full((count, units), np.nan, np.float32), records
