"""Files of tensors that show when a bit of them has changed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's bytes in the order of its elements, also of types that NumPy lacks."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())  # a single element may have any stride
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def checksum(tensors: Mapping[str, Tensor], held: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over what is noted beside them."""
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def pack(tensors: Mapping[str, Tensor], key: str, held: Mapping[str, Any]) -> bytes:
    """A safetensors file of tensors and, as JSON under ``key`` of its header, what is noted beside them.

    One key only: safetensors writes several in an order that changes from run to run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    held = json.loads(json.dumps(held))
    return save(tensors, {key: json.dumps(held | {"checksum": checksum(tensors, held)})})


def load_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote: tensors, numbers and text in plain containers. Code in the file never runs.

    Raises
    ------
    ValueError
        If the file is damaged, or holds more.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions, which are read all the same, or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a stranger's file can fail anywhere in the unpickler
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which PSS does not load because it could run code: save "
            f"the model's state_dict() or a safetensors file instead ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def unpack(path: Path, key: str) -> tuple[dict[str, Tensor], Any]:
    """Read what `pack` wrote; of a safetensors file without that key the tensors, and None.

    Raises
    ------
    ValueError
        If the file is damaged, or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            held = json.loads((file.metadata() or {}).get(key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:  # JSON of a stranger may be deep
        raise ValueError(f"{path.name} is damaged, or not a safetensors file: {error}") from error
    if isinstance(held, dict) and held.pop("checksum", None) != checksum(tensors, held):
        raise ValueError(f"{path.name} is damaged: its checksum differs; make it again, or get the file anew")
    return tensors, held
