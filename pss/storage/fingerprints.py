"""Names for what numbers were made of: weights, data sets, functions."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from pss.storage.tensors import bytes_of


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's state dict: names the exact weights."""
    return hash_state(model.state_dict())


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def name_of(value: Any) -> Any:
    """A value as it stands in the manifest: functions by their qualified name."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, functools.partial):
        return f"{name_of(value.func)} with {value.args} {value.keywords}"
    if hasattr(value, "__qualname__"):
        if "<lambda>" in value.__qualname__:
            raise ValueError("a lambda has no name to know the profiles by: write it as a function with def")
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if " at 0x" not in repr(value) else f"{type(value).__module__}.{type(value).__qualname__}"


def name_of_data(dataset: Dataset) -> str:
    """What the record of profiles calls a data set: its ``fingerprint``, or its length and a sample of its items."""
    return getattr(dataset, "fingerprint", None) or _sampled_fingerprint(dataset)


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
