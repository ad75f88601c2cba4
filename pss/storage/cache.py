"""Tensors that take long to make are kept in the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pss.storage.places import cache_folder
from pss.storage.tensors import pack, unpack
from pss.storage.whole import write_whole


def cached(name: str, build: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Mapping[str, Tensor]:
    """Read tensors from a file of the cache, or build them, and what is to be noted beside them, and keep both.

    A damaged file is said so and made again; where none can be written, this is said too.
    """
    path = cache_folder() / name
    if path.exists():
        try:
            tensors, record = unpack(path, "record")
            if not isinstance(record, dict):
                raise ValueError("it has no record of what it holds")
            return tensors
        except (OSError, ValueError) as error:
            warnings.warn(f"the cached file {path} is damaged ({error}): making it again", stacklevel=3)
    tensors, record = build()
    try:
        write_whole(path, pack(tensors, "record", record))
    except OSError as error:
        warnings.warn(f"could not write {path} ({error}): going on without a cache", stacklevel=3)
    return tensors
