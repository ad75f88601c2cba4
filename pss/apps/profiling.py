"""``python -m pss profile``: profile a data set into a folder.

``python -m pss profile --model net.yaml --data photos --out runs/photos``, or with what callables give
``--model pss.models:digits --data pss.data:digits split=test``; for several processes
``torchrun --nproc-per-node 2 -m pss profile --model … --data … --out …``.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pss import models
from pss.profiles import profile_dataset
from pss.units import Units

_PASSED_ON = ["loss", "signed", "of", "batch_size", "workers", "on_error", "preprocessing", "data_name", "rebuild"]


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


def _opened(chosen: argparse.Namespace) -> tuple[torch.nn.Module, Any, str]:
    """The model, the data set, and what its pictures go through: called, or a network's and a folder's names."""
    name, *arguments = chosen.model
    model = _call(chosen.model if ":" in name else ["pss.models:load", f"name={name}", *arguments])
    if not isinstance(model, models.Network):
        return model, _call(chosen.data), chosen.preprocessing
    found = _call(chosen.data) if ":" in chosen.data[0] else models.reference_set(model, *chosen.data)
    return model.model, found, chosen.preprocessing or models.preprocessing_of(model, found)


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser the options of ``profile``."""
    what = {"nargs": "+", "required": True, "metavar": ("MODULE:CALLABLE", "KEY=VALUE")}
    parser.add_argument("--model", **what, help="gives the model, as pss.models:digits; or a name, or net.yaml")
    parser.add_argument("--data", **what, help="gives the data set, as pss.data:digits split=test; or a folder")
    parser.add_argument("--out", required=True, help="folder of the profiles")
    parser.add_argument("--units", type=_named, default="filters", help="filters, rows, heads, all or MODULE:CALLABLE")
    parser.add_argument("--loss", type=_named, default="cross_entropy", help="a name, or MODULE:CALLABLE")
    parser.add_argument("--signed", action="store_true")
    parser.add_argument("--of", choices=("gradient", "gain", "output"), default="gradient", help="which quantity")
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


def main(chosen: argparse.Namespace) -> None:
    """Profile a data set into a folder; under torchrun every process takes its share."""
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    distributed = dist.is_available() and dist.is_torchelastic_launched()
    device = chosen.device
    if distributed:
        dist.init_process_group("gloo")  # ranks only wait for each other: they exchange no tensors
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        model, images, preprocessing = _opened(chosen)
        model = model.to(device)
        how = {name: getattr(chosen, name) for name in _PASSED_ON} | {"preprocessing": preprocessing}
        if chosen.precision != "fp32":  # the default is left out: a manifest that does not name it is of the same job
            how["precision"] = chosen.precision
        units = Units.of(model, chosen.units)
        store = profile_dataset(model, images, units, chosen.out, progress=not chosen.quiet, **how)
        if not distributed or dist.get_rank() == 0:
            print(store)
            for index, reason in store.skipped.items():
                print(f"skipped item {index}: {reason}")
    finally:
        if distributed:
            dist.destroy_process_group()
