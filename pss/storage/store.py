"""Profiles on disk, or anything alike, as they are read: a few rows or a block of units at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pss.storage.folder import damage, is_store, open_arrays, partial_of, read_manifest
from pss.storage.records import FINISHED, PENDING, RECORD, damaged

_CHUNK = 1 << 26  # bytes of rows mapped at a time
_T = TypeVar("_T")


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
            done, n = int((status != PENDING).sum()), len(status)
            raise ValueError(f"{path} is not finished ({done} of {n} rows): call profile_dataset again, as before")
        manifest = read_manifest(path)
        rows, records = open_arrays(path, manifest)
        if verify:
            bad = [damaged(part, records[at]) for at, part in _row_chunks(rows)]
            if (bad := np.flatnonzero(np.concatenate(bad))).size:
                raise damage(path / "profiles.npy", f"{len(bad)} rows are not as written, the first is {bad[0]}")
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
        if isinstance(block, torch.Tensor):
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
