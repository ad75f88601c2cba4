"""Files of weights: written whole, read without running what is in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import pss
from pss.storage.fingerprints import fingerprint, hash_state
from pss.storage.tensors import load_tensors, pack, unpack
from pss.storage.whole import write_whole

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")  # torchvision's files still have norm.1


def save_weights(model: nn.Module, path: str | os.PathLike, record: Mapping[str, str] | None = None) -> None:
    """Write a model's weights as safetensors, whole or not at all, with its `fingerprint` and a record beside them."""
    write_whole(Path(path), pack(model.state_dict(), "record", record_of(model, record or {})))


def record_of(model: nn.Module, record: Mapping[str, str]) -> dict[str, str]:
    """What is noted beside a model's weights: a record, the version of PSS, and the model's `fingerprint`."""
    return {"pss": pss.__version__, **record, "sha256": fingerprint(model)}


def read_record(path: str | os.PathLike) -> dict[str, str]:
    """What `save_weights` noted beside the weights: version, seed, width, epochs, accuracies, sha256; may be empty.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    return _read_weights(Path(path))[1]


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a safetensors file, and the record beside them: strangers have none, the shipped file has lines."""
    state, record = unpack(path, "record", lambda text: json.loads(text) if text.startswith("{") else text)
    if not isinstance(record, dict):
        record = dict(line.partition("=")[::2] for line in (record or "").splitlines())
        if record.get("sha256", "") not in ("", hash_state(state)):
            raise ValueError(f"{path} is damaged: its weights do not have the checksum that was noted in it")
    return state, record


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a checkpoint into a model; code in the file is never run.

    Parameters
    ----------
    model : nn.Module
        Changed in place, and only if everything fits.
    path : path
        safetensors, or what ``torch.save`` wrote and ``torch.load(weights_only=True)`` reads: a state dict, or a dict
        that holds one as ``state_dict``, ``model_state_dict`` or ``model``. What every name begins with, as
        ``module.`` or ``_orig_mod.``, is taken off where the model's names have it not.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, holds anything but tensors, or does not fit the model; the message names what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    state = _unprefixed(_read_state(path), set(model.state_dict()))
    _check_fits(model, state, path)
    model.load_state_dict(state)
    return model


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return _read_weights(path)[0]
    content = load_tensors(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        held = ", ".join(list(map(str, content))[:5]) if isinstance(content, Mapping) else type(content).__name__
        kept = "state_dict, model_state_dict or model"
        raise ValueError(
            f"{path} holds no state dict: expected names and tensors, or these under {kept}; it has {held or 'nothing'}"
        )
    return dict(content)


def _unprefixed(state: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """Without what every name begins with, if that leaves names of the model.

    DistributedDataParallel, Lightning and `torch.compile` put there what they call the network in it.
    """
    short = state
    while short and not names & set(short):
        parts = [name.partition(".") for name in short]
        alike = len({first for first, _, _ in parts}) == 1 and all(rest for *_, rest in parts)
        short = {rest: tensor for (*_, rest), tensor in zip(parts, short.values(), strict=True)} if alike else {}
    state = short or state
    renamed = {_OLD_DENSENET.sub(r"\1", name): tensor for name, tensor in state.items()}
    return renamed if set(renamed) <= names else state


def _check_fits(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own, found = ({name: tuple(tensor.shape) for name, tensor in s.items()} for s in (model.state_dict(), state))
    if not own.keys() & found.keys():
        theirs, ours = (", ".join(list(names)[:3]) or "none" for names in (found, own))
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: they have no name in common; the file's are {theirs}, …, the "
            f"model's {ours}, …"
        )
    for name in own.keys() - found.keys():
        if name.endswith(".num_batches_tracked"):  # of batch norm, which files from before torch 0.4.1 do not have
            del own[name]
    shapes = {name: (found.get(name, "missing"), own.get(name, "missing")) for name in own | found}
    wrong = [f"{name} is {theirs}, in the model {ours}" for name, (theirs, ours) in shapes.items() if theirs != ours]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(wrong[:5])}{more}")
