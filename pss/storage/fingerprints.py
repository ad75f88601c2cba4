"""Names for what numbers were made of: weights, data sets, functions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from pss.storage.digests import digest
from pss.storage.tensors import parts_of


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's state dict: names the exact weights."""
    return hash_state(model.state_dict())


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors."""
    return digest(*parts_of(state))


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
    """What a record calls a data set: its ``fingerprint``, or its length and a sample of 16 of its items."""
    if named := getattr(dataset, "fingerprint", None):
        return named
    count = length_of(dataset)
    parts: list[Any] = [str(count)]
    for index in np.unique(np.linspace(0, count - 1, 16).astype(int)):
        try:
            parts += [np.ascontiguousarray(part) for part in dataset[int(index)][:2]]
        except Exception as error:  # a bad image: met again, and dealt with, when its turn comes
            parts.append(f"{index} {type(error).__name__}")
    return f"{count} items, sample {digest(*parts)[:16]}"


def length_of(dataset: Dataset) -> int:
    """Number of items of a map-style data set, which has some."""
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError("the data set has no items (or no length): expected a map-style data set of (image, label)")
    return len(dataset)
