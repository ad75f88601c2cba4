"""Files of what is usual for each unit: ours, and those that the first paper published."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pss.storage.tensors import load_tensors, pack, unpack
from pss.storage.whole import write_whole


def write_reference(path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Write one safetensors file, whole or not at all, with plain values in its header."""
    write_whole(path, pack(tensors, "pss", plain))


def read_reference(path: Path, plain: Collection[str]) -> dict[str, Any]:
    """Tensors and plain values by name: what `write_reference` wrote, or the mean and deviation of published files.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or holds no such statistics.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}: make one with Reference.fit and save it there")
    if path.suffix in (".pth", ".pt"):
        return _read_published(path)
    tensors, held = unpack(path, "pss")
    if not isinstance(held, dict) or set(held) != set(plain) or not isinstance(held["provenance"], dict):
        raise ValueError(f"{path.name} is no reference of pss: expected {', '.join(plain)} in its header")
    return tensors | held


def _read_published(path: Path) -> dict[str, Any]:
    """Mean and deviation of the first paper's files."""
    held = load_tensors(path)
    if not isinstance(held, dict) or not {"mean", "std"} <= held.keys():
        raise ValueError(f"{path.name} holds no published statistics: expected a dict with 'mean' and 'std'")
    statistics = {key: held[key].double() if isinstance(held[key], Tensor) else held[key] for key in ("mean", "std")}
    return {**statistics, "provenance": {"source": path.name, "of": "gradient"}}
