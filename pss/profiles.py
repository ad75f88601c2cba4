r"""Saliency profiles of a whole data set, on disk.

One pass writes the profile of every image, :math:`\bar s(x, y) \in R^U`, as a row of a ``.npy`` file: the matrix from
which a reference is fitted (Levin et al. 2022, section 2.1; Wang and Sato 2023, section 3).
`pss.storage.folder` describes the folder.

A pass may be killed at any moment, and goes on where it was. Batches have fixed boundaries, since in float32 the last
bit of a row depends on the batch it was computed in: a pass that is resumed, or shared by several processes, takes
whole batches and writes the same bytes as an preserved one.

    python -m pss profile --model pss.models:digits --data pss.data:digits split=test --out runs/digits
    torchrun --nproc-per-node 2 -m pss profile --model … --data … --out …
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import pkgutil
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

import pss
from pss.engine.process import keep_freed_memory, thread_count
from pss.engine.state import preserved
from pss.saliency import Loss, check_units, profile_and_outputs
from pss.storage import folder
from pss.storage.fingerprints import fingerprint, name_of, name_of_data
from pss.storage.folder import ProfileStore, blocks
from pss.storage.places import cache_folder
from pss.units import Units

__all__ = ["ProfileStore", "blocks", "choose_batch_size", "profile_dataset"]
log = logging.getLogger(__name__)

# --- one pass over a data set -----------------------------------------------------------------------------------------


def profile_dataset(
    model: nn.Module,
    dataset: Dataset,
    units: Units | None = None,
    path: str | os.PathLike | None = None,
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

    After an error finished rows are kept; one before the first of them leaves no folder behind.

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
    path : path, optional
        Folder of the store, made if it is not there; by default one in `pss.data.cache_folder`, named by what is
        profiled, so that whoever asks for the same profiles again has them at once. Several ranks need it on a file
        system that they share.
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
        Throw away the store in the folder (also if it is damaged, or of another model) and compute it anew. Killed in
        between, a call without it goes on.
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
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1, or None for one that fits")
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError("the data set has no items (or no length): expected a map-style data set of (image, label)")
    units = Units.of(model) if units is None else units
    device = _check_device(model, device)
    check_units(model, units)
    made_of = {
        "format": folder.FORMAT,
        "pss": pss.__version__,
        "torch": torch.__version__,
        "device": device.type,
        "samples": len(dataset),
        "n_units": len(units),
        "model": fingerprint(model),
        "units": units.fingerprint,
        "data": data_name or name_of_data(dataset),
        "preprocessing": preprocessing,
        "loss": name_of(loss),
        "signed": bool(signed),
        "options": {key: name_of(options[key]) for key in sorted(options)},
    }
    path = Path(path) if path is not None else cache_folder() / "profiles" / _key(made_of)
    first, alone = _rank()[0] == 0, _rank()[1] == 1
    begins = first and (rebuild or not (path / "manifest.json").exists())
    if begins:
        size = batch_size or choose_batch_size(model, _first_image(dataset).to(device))

    def compute(images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return _compute(model, images.to(device), labels.to(device), units, loss, signed, options)

    with folder.taken_back_if_empty(path) if begins and alone else nullcontext():  # other ranks may have rows to write
        if begins:
            folder.begin(path, {**made_of, "batch_size": size, "threads": torch.get_num_threads()})
        _barrier()
        manifest = folder.read_manifest(path)
        folder.refuse_other(path, manifest, made_of)
        if not manifest["complete"]:
            _complete(path, manifest, dataset, compute, workers, on_error == "skip", progress)
    store = ProfileStore.open(path, verify=first)
    for note in path.glob("skipped-*.txt") if first else ():
        note.unlink()
    if store.skipped and on_error == "raise":
        raise ValueError(
            f"{path} leaves out items {list(store.skipped)[:10]} ({next(iter(store.skipped.values()))}): accept them "
            "with on_error='skip', or mend them and call with rebuild=True"
        )
    return store


def _key(made_of: dict) -> str:
    """Name of the folder of cached profiles: what makes them, and nothing of when or where."""
    text = json.dumps({name: made_of[name] for name in (*folder.IDENTITY, *folder.WHILE_PENDING)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _complete(path: Path, manifest: dict, dataset: Dataset, *how: Any) -> None:
    """Compute the missing rows, every rank its own, and declare the store complete."""
    first = _rank()[0] == 0
    if first:
        folder.lay_out(path, manifest)
    _barrier()
    with thread_count(manifest["threads"]):
        _fill(path, manifest, dataset, *how)
    _barrier()
    if first:
        folder.finish(path, manifest)
    _barrier()


def _fill(path: Path, manifest: dict, dataset: Dataset, compute, workers: int, skip: bool, progress: bool) -> None:
    """Compute and write the batches of this process that are not finished."""
    n, size = manifest["samples"], manifest["batch_size"]
    rank, ranks = _rank()
    batches = [slice(start, min(start + size, n)) for start in range(0, n, size)][rank::ranks]
    rows, records = folder.open_arrays(path, manifest)
    pending = [batch for batch in batches if not folder.is_done(rows[batch], records[batch])]
    loader = DataLoader(
        _Guarded(dataset, skip),
        batch_sampler=[range(batch.start, batch.stop) for batch in pending],
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # the loader would draw a seed for its workers from the global generator
    )
    total, left = (sum(batch.stop - batch.start for batch in some) for some in (batches, pending))
    bar = tqdm(total=total, initial=total - left, unit="image", desc="profiles", disable=not progress or rank > 0)
    with bar, folder.Writer(path, manifest) as writer:
        for batch, (ids, images, labels, bad) in zip(pending, loader, strict=True):
            rows, records = folder.empty_rows(batch.stop - batch.start, manifest["n_units"])
            if ids:
                at = np.asarray(ids) - batch.start
                try:
                    with _deaf_to_workers():
                        rows[at], records[at], refused = _compute_good(compute, images, labels, manifest["n_units"])
                except Exception as error:
                    error.add_note(f"this happened while profiling items {ids[0]} to {ids[-1]} of the data set")
                    raise
                bad |= {ids[i]: reason for i, reason in refused.items()}
            for index, reason in bad.items():
                if not skip:
                    raise ValueError(f"item {index} of the data set: {reason}; mend it, or pass on_error='skip'")
                log.warning("item %d of the data set is skipped: %s", index, reason)
                folder.write_whole(path / f"skipped-{index}.txt", reason)
            writer.write(batch.start, rows, records)
            bar.update(len(rows))


def _compute_good(compute, images, labels, units: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Compute a batch; where it is refused, find the images that are to blame, and compute the others."""
    try:
        rows, records = compute(images, labels)
        refused = {int(i): "its profile is NaN or infinite" for i in np.flatnonzero(~np.isfinite(rows).all(axis=1))}
        if refused:
            rows[list(refused)], records[list(refused)] = folder.empty_rows(len(refused), units)
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
    rows, records = folder.empty_rows(len(images), units)
    if good := [i for i in range(len(images)) if i not in refused]:
        rows[good], records[good] = compute(images[good], labels[good])
    return rows, records, refused


def _compute(model, images, labels, units, loss, signed, options) -> tuple[np.ndarray, np.ndarray]:
    """Profiles (B, U) of a batch, and its records."""
    if images.is_floating_point():
        images = images.to(next(model.parameters()).dtype)
    rows, outputs, losses = profile_and_outputs(model, images, labels, units, loss, signed=signed, **options)
    _, records = folder.empty_rows(len(images), 0)
    records["status"], records["loss"] = folder.FINISHED, losses.float().cpu().numpy()
    classes = labels.ndim == 1 and not labels.is_floating_point()
    if classes:
        records["label"] = labels.cpu().numpy()
    if isinstance(outputs, Tensor) and outputs.ndim == 2:  # a classifier
        probabilities = outputs.double().softmax(dim=1)
        confidence, prediction = probabilities.max(dim=1)
        records["prediction"], records["confidence"] = prediction.cpu().numpy(), confidence.cpu().numpy()
        if classes:
            records["true_confidence"] = probabilities.gather(1, labels[:, None].long())[:, 0].cpu().numpy()
    return rows.detach().float().cpu().numpy(), records


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


# --- what the rows are made of ----------------------------------------------------------------------------------------


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
    """``python -m pss profile``; under torchrun every process takes its share."""
    parser = argparse.ArgumentParser(prog="python -m pss profile", description="Profile a data set into a folder.")
    what = {"nargs": "+", "required": True, "metavar": ("MODULE:CALLABLE", "KEY=VALUE")}
    parser.add_argument("--model", **what, help="gives the model, as pss.models:digits")
    parser.add_argument("--data", **what, help="gives the data set, as pss.data:digits split=test")
    parser.add_argument("--out", required=True, help="folder of the profiles")
    parser.add_argument("--units", type=_named, default="filters", help="filters, rows, heads, all or MODULE:CALLABLE")
    parser.add_argument("--loss", type=_named, default="cross_entropy", help="a name, or MODULE:CALLABLE")
    parser.add_argument("--signed", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the backward pass")
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
            # left out where it is the default: a manifest that does not name it is of the same job
            **({} if chosen.precision == "fp32" else {"precision": chosen.precision}),
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
    keep_freed_memory()
    raise SystemExit(main())
