r"""One pass over a data set: what a function makes of every image becomes a row of a store on disk.

A pass may be killed at any moment, and goes on where it was. Batches have fixed boundaries, since in float32 the last
bit of a row depends on the batch it was computed in: a pass that is resumed, or shared by several processes, takes
whole batches and writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from pss.engine.checks import check_known
from pss.engine.process import thread_count
from pss.engine.state import preserved
from pss.storage import folder
from pss.storage.fingerprints import length_of
from pss.storage.records import empty_rows, is_done
from pss.storage.store import ProfileStore
from pss.storage.whole import write_whole

log = logging.getLogger(__name__)

Compute = Callable[..., tuple[np.ndarray, np.ndarray]]  # of images, labels and last: rows and records


def store_rows(
    path: Path,
    dataset: Dataset,
    compute: Compute,
    n_units: int,
    provenance: dict[str, Any],
    computed_with: dict[str, Any],
    batch_size: int | Callable[[Tensor], int],
    workers: int = 0,
    on_error: str = "raise",
    progress: bool = True,
    rebuild: bool = False,
) -> ProfileStore:
    """Compute the rows of a store that are missing, and open it; see `pss.profile_dataset`, whose pass it is.

    Parameters
    ----------
    path : Path
        Folder of the store.
    dataset : Dataset
    compute : function
        Images (B, …), labels, and whether it is the last batch, to rows (B, ``n_units``) and their records (see
        `pss.storage.records`). A ValueError is the fault of an image, if one of them alone raises it too.
    n_units : int
        Length of a row.
    provenance, computed_with : dict of str to plain values
        What the rows are made of, and what decides on their last bits: a store of another is refused, for the second
        only as long as rows are missing.
    batch_size : int or function
        The function gets the first image. A pass that is resumed keeps the size that it began with.

    Raises
    ------
    ValueError, FileExistsError, OSError
        As `pss.profile_dataset` says.
    """
    check_known("on_error", on_error, ("raise", "skip"))
    if not callable(batch_size) and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1, or None for one that fits")
    made_of: dict[str, Any] = {"samples": length_of(dataset), "n_units": n_units}
    made_of |= {"provenance": provenance, "computed_with": computed_with}
    partial, first, alone = folder.partial_of(path), rank()[0] == 0, rank()[1] == 1
    begins = first and (rebuild or not (folder.is_store(path) or folder.is_store(partial)))
    if begins:
        made_of["batch_size"] = batch_size(_first_image(dataset)) if callable(batch_size) else batch_size
        made_of["threads"] = torch.get_num_threads()
        for old in (partial, path) if rebuild else ():
            if folder.is_store(old):
                folder.discard(old)
    begun = begins and folder.begin(path, made_of)
    with folder.taken_back_if_empty(path) if begun and alone else nullcontext():  # other ranks may have rows to write
        barrier()
        if not folder.is_store(path):
            _complete(path, made_of, dataset, compute, workers, on_error == "skip", progress)
    folder.refuse_other(path, made_of)
    store = ProfileStore.open(path, verify=first)
    if store.skipped and on_error == "raise":
        raise ValueError(
            f"{path} leaves out items {list(store.skipped)[:10]} ({next(iter(store.skipped.values()))}): accept them "
            "with on_error='skip', or mend them and call with rebuild=True"
        )
    return store


def _complete(path: Path, made_of: dict, dataset: Dataset, *how: Any) -> None:
    """Compute the missing rows, every rank its own, and finish the store."""
    first = rank()[0] == 0
    with folder.held(path) if first else nullcontext():
        manifest = folder.refuse_other(path, made_of)
        if not folder.is_store(path):  # or else another process, at the same pass, was faster
            with thread_count(manifest["threads"]):
                _fill(folder.partial_of(path), manifest, dataset, *how)
        barrier()
        if first and not folder.is_store(path):
            folder.finish(path)
    barrier()


def _fill(
    path: Path, manifest: dict, dataset: Dataset, compute: Compute, workers: int, skip: bool, progress: bool
) -> None:
    """Compute and write the batches of this process that are not finished."""
    n, size = manifest["samples"], manifest["batch_size"]
    number, ranks = rank()
    batches = [slice(start, min(start + size, n)) for start in range(0, n, size)][number::ranks]
    rows, records = folder.open_arrays(path, manifest)
    pending = [batch for batch in batches if not is_done(rows[batch], records[batch])]
    loader = DataLoader(
        _Guarded(dataset, skip),
        batch_sampler=[range(batch.start, batch.stop) for batch in pending],
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # the loader would draw a seed for its workers from the global generator
    )
    total, left = (sum(batch.stop - batch.start for batch in some) for some in (batches, pending))
    bar = tqdm(total=total, initial=total - left, unit="image", desc="profiles", disable=not progress or number > 0)
    with bar, folder.writer(path, manifest) as write:
        for batch, (ids, images, labels, bad) in zip(pending, loader, strict=True):
            rows, records = empty_rows(batch.stop - batch.start, manifest["n_units"])
            if ids:
                at = np.asarray(ids) - batch.start
                try:
                    this = functools.partial(compute, last=batch is pending[-1])
                    with _deaf_to_workers():
                        rows[at], records[at], refused = _compute_good(this, images, labels, manifest["n_units"])
                except Exception as error:
                    error.add_note(f"this happened while profiling items {ids[0]} to {ids[-1]} of the data set")
                    raise
                bad |= {ids[i]: reason for i, reason in refused.items()}
            for index, reason in bad.items():
                if not skip:
                    raise ValueError(f"item {index} of the data set: {reason}; mend it, or pass on_error='skip'")
                log.warning("item %d of the data set is skipped: %s", index, reason)
                write_whole(path / f"skipped-{index}.txt", reason)
            write(batch.start, rows, records)
            bar.update(len(rows))


def _compute_good(
    compute: Compute, images: Tensor, labels: Tensor, units: int
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Compute a batch; where it is refused, find the images that are to blame, and compute the others."""
    try:
        rows, records = compute(images, labels)
        refused = {int(i): "its profile is NaN or infinite" for i in np.flatnonzero(~np.isfinite(rows).all(axis=1))}
        rows[list(refused)], records[list(refused)] = empty_rows(len(refused), units)
        return rows, records, refused
    except ValueError:
        refused = {}
        for i in range(len(images)):
            try:
                compute(images[i : i + 1], labels[i : i + 1])
            except ValueError as error:
                refused[i] = str(error)
        if not refused or len(refused) == len(images) > 1:  # not the fault of an image
            raise
    rows, records = empty_rows(len(images), units)
    if good := [i for i in range(len(images)) if i not in refused]:
        rows[good], records[good] = compute(images[good], labels[good])
    return rows, records, refused


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
    image = image.detach()[None].clone()  # a view would count the whole data set that it is a view of
    if image.is_floating_point():
        image = image.to(dtype).requires_grad_()
    with preserved(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
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
        some = ", ".join(f"{shape} (item {index})" for shape, index in list(shapes.items())[:3])
        where = "in the data set's transform, or under preprocessing in the network's YAML file"
        some += ", …" * (len(shapes) > 3)
        raise ValueError(f"images differ in shape: {some}; resize them {where}, as resize: [height, width]")
    ids = [index for index, *_ in good]
    images = torch.stack([image for _, image, _, _ in good])
    return ids, images, default_collate([label for _, _, label, _ in good]), bad


@contextmanager
def _deaf_to_workers() -> Iterator[None]:
    """Keep the death of a loader's worker from raising in the middle of `profile`.

    torch raises RuntimeError wherever the main thread happens to be; within `profile` that looks like a model that the
    fast path cannot take, and its general path rounds differently. The loader itself finds out soon after.
    """
    child = getattr(signal, "SIGCHLD", None)  # not on Windows, where nothing is raised
    if child is None or threading.current_thread() is not threading.main_thread() or signal.getsignal(child) is None:
        yield
        return
    handler = signal.signal(child, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(child, handler)


def _first_image(dataset: Dataset) -> Tensor:
    for index in range(len(dataset)):
        try:
            return torch.as_tensor(dataset[index][0])
        except Exception as error:
            failure = error
    raise ValueError(f"none of the {len(dataset)} images can be read; the last says: {failure}") from failure


# --- several processes ------------------------------------------------------------------------------------------------


def rank() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for the other processes."""
    if rank()[1] > 1:
        dist.barrier()
