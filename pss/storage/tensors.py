"""Files of tensors that show when a bit of them has changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pss.storage.digests import digest


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's bytes in the order of its elements, also of types that NumPy lacks."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())  # a single element may have any stride
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def parts_of(tensors: Mapping[str, Tensor]) -> Iterator[str | bytes]:
    """Names, types, shapes and bytes of tensors, in the order of the names: what a digest of them is made of."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield bytes_of(tensor)


def _checksum(tensors: Mapping[str, Tensor], held: Mapping[str, Any]) -> str:
    return digest(json.dumps(held, sort_keys=True), *parts_of(tensors))


def pack(tensors: Mapping[str, Tensor], key: str, held: Mapping[str, Any]) -> bytes:
    """A safetensors file of tensors and, as JSON under ``key`` of its header, what is noted beside them.

    One key only: safetensors writes several in an order that changes from run to run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    held = json.loads(json.dumps(held))
    return save(tensors, {key: json.dumps(held | {"checksum": _checksum(tensors, held)})})


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
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except PermissionError:
        raise
    except Exception as error:  # a stranger's file can fail anywhere in the unpickler
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which PSS does not load because it could run code: save "
            f"the model's state_dict() or a safetensors file instead ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """Of what an error says; without torch's advice to load the file all the same."""
    return (str(error).splitlines() or [""])[0].partition(" This file can still be loaded")[0]


def unpack(path: Path, key: str, parse: Callable[[str], Any] = json.loads) -> tuple[dict[str, Tensor], Any]:
    """Read what `pack` wrote; of a safetensors file without that key the tensors, and None.

    ``parse`` reads the text under the key, which is ours, with a checksum, if it gives a dict.

    Raises
    ------
    ValueError
        If the file is damaged, or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
            held = None if text is None else parse(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:  # JSON of a stranger may be deep
        raise ValueError(f"{path.name} is damaged, or not a safetensors file: {error}") from error
    if isinstance(held, dict) and held.pop("checksum", None) != _checksum(tensors, held):
        raise ValueError(f"{path.name} is damaged: its checksum differs; make it again, or get the file anew")
    return tensors, held
