r"""Saliency profiles of a whole data set, on disk.

One pass writes the profile of every image, :math:`\bar s(x, y) \in R^U`, as a row of a ``.npy`` file: the matrix from
which a reference is fitted (Levin et al. 2022, section 2.1; Wang and Sato 2023, section 3).
`pss.storage.folder` describes the folder, `pss.storage.passes` the pass, which may be killed at any moment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pss
from pss.engine.checks import check_known
from pss.engine.recorder import QUANTITIES
from pss.saliency import Loss, loss_name, profile_and_outputs
from pss.storage.digests import key_of
from pss.storage.fingerprints import fingerprint, length_of, name_of, name_of_data
from pss.storage.folder import FORMAT
from pss.storage.passes import choose_batch_size, store_rows
from pss.storage.places import cache_folder
from pss.storage.records import records_of
from pss.storage.store import ProfileStore
from pss.units import Units, check_units


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
    rebuild: bool = False,
    verify: bool = True,
    of: str = "gradient",
    cache: str | os.PathLike | None = None,
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
        Map-style, of ``(image, label)``, with images of one shape. Labels are asked for also where they play no part
        (``of="output"``), because the store notes which images are misread.
    units : Units or None
        None for the filters of the model.
    path : path, optional
        Folder of the store, made if it is not there; by default one in `pss.data.cache_folder`, named by what is
        profiled, so that whoever asks for the same profiles again has them at once. Several ranks need it on a file
        system that they share.
    loss, signed, of
        As in `profile`; a store holds one quantity.
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
    rebuild : bool
        Throw away the store in the folder (also if it is damaged, or of another model) and compute it anew. Killed in
        between, a call without it goes on.
    verify : bool
        Compare an image of the first batch, and one of the last, with plain autograd of it alone, as `profile` does.
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
    units = Units.of(model) if units is None else units
    check_units(model, units)
    check_known("quantity of a store", of, QUANTITIES)
    like = next(model.parameters())
    device = like.device
    provenance = {
        "pss": pss.__version__,
        "model": fingerprint(model),
        "units": units.fingerprint,
        "data": data_name or name_of_data(dataset),
        "preprocessing": preprocessing,
        "loss": loss_name(loss),
        "signed": bool(signed),
        "of": of,
        "options": {key: name_of(options[key]) for key in sorted(options)},
    }
    computed_with = {"torch": torch.__version__, "device": device.type}
    if path is None:
        key = key_of([FORMAT, length_of(dataset), provenance, computed_with])
        path = Path(cache or cache_folder()) / "profiles" / key

    def compute(images: Tensor, labels: Tensor, last: bool = False) -> tuple[np.ndarray, np.ndarray]:
        images, labels = images.to(device, like.dtype if images.is_floating_point() else None), labels.to(device)
        how = {**options, "signed": signed, "of": (of,), "verify": verify, "verify_again": last}
        rows, outputs, losses = profile_and_outputs(model, images, labels, units, loss, **how)
        return rows.detach().float().cpu().numpy(), records_of(outputs, labels, losses)

    size = batch_size if batch_size is not None else lambda image: choose_batch_size(model, image.to(device))
    made_of = (len(units), provenance, computed_with)
    return store_rows(Path(path), dataset, compute, *made_of, size, workers, on_error, progress, rebuild)
