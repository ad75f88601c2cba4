r"""A folder of profiles: its files, and how it is begun, written, checked, finished and taken away.

=================  ====================================================================================
``profiles.npy``   (N, U) float32, one row an image
``samples.npy``    (N,) records: label, prediction, loss, confidences, status and checksum of the row
``manifest.json``  what the rows were made of, and which images were skipped and why
=================  ====================================================================================

It lies in ``<path>.partial/`` until all rows are there: one rename begins it there, one gives it its name, one takes it
away. A row is finished once its record says so *and* its checksum fits, so whoever writes may be killed at any moment.
`pss.storage.passes` fills it, `pss.storage.store` reads it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from pss.storage.records import PENDING, RECORD, SKIPPED, checksums
from pss.storage.whole import beside, write_whole

FORMAT = 2
_MANIFEST, _FILES = "manifest.json", ("profiles.npy", "samples.npy", "manifest.json")
_OURS = re.compile(r"profiles\.npy|samples\.npy|\.?(manifest\.json|skipped-\d+\.txt)(\.[0-9a-f]{32}\.partial)?")


def is_store(path: Path) -> bool:
    """Whether the folder holds profiles."""
    return (path / _MANIFEST).is_file()


def partial_of(path: Path) -> Path:
    """Where a store lies until it is finished: beside its place, whence one rename moves it."""
    return Path(f"{path.resolve()}.partial")


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
            records["checksum"] = checksums(rows, records)
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


def discard(path: Path) -> None:
    """Take a store away, finished or not, at once: first its name goes, then its files. Other files are refused."""
    _refuse_files(path, {file.name for file in path.iterdir() if not _OURS.fullmatch(file.name)})
    away = beside(path.resolve())
    os.rename(path.resolve(), away)
    shutil.rmtree(away)


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
        raise damage(path / _MANIFEST, error) from error
    return manifest


def _manifest_checksum(manifest: dict) -> int:
    return zlib.crc32(json.dumps({**manifest, "checksum": None}, sort_keys=True).encode())


def _arrays(manifest: dict) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    n, count = manifest["samples"], manifest["n_units"]
    return [("profiles.npy", np.dtype("<f4"), (n, count)), ("samples.npy", RECORD, (n,))]


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
            raise damage(path / name, error) from error
        arrays.append(array)
    return tuple(arrays)


def damage(path: Path, what: object) -> ValueError:
    """The error to raise of a damaged file."""
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
            "give another path, or rebuild=True (--rebuild) to compute them anew; ProfileStore.open reads finished "
            "ones as they are"
        )
    return manifest
