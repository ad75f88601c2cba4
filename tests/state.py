"""What a call must leave as it found it: one snapshot to compare before and after."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS += ("_state_dict_hooks", "_load_state_dict_pre_hooks")


def hooks_of(model: nn.Module) -> dict[str, list[int]]:
    """Ids of the hooks of every module, and of the parameters' own."""
    found = {f"{n}.{kind}": list(getattr(m, kind)) for n, m in model.named_modules() for kind in _HOOKS}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"{name} hooks"] = [*(p._backward_hooks or ()), *(p._post_accumulate_grad_hooks or ())]
    return found


def state_of(model: nn.Module) -> dict:
    """Everything about a model that a caller can see: bytes, flags, gradients, modes, hooks, own attributes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    return {
        "bytes": {n: hashlib.sha256(_bytes(t)).hexdigest() for n, t in tensors.items()},
        "same tensors": {n: (id(t), t.data_ptr()) for n, t in tensors.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "grad": {n: None if p.grad is None else (id(p.grad), _bytes(p.grad)) for n, p in parameters.items()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": hooks_of(model),
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def state_of_process() -> dict:
    """Random generators, threads, gradient and function modes, attention kernels, default settings."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state(legacy=False)),  # noqa: NPY002
        "python": hash(random.getstate()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "function modes": list(map(id, _get_current_function_mode_stack())),
        "dispatch modes": list(map(id, _get_current_dispatch_mode_stack())),
        "saved tensors hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "settings": (torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), np.geterr()),
    }


def files_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, and the hash of what it holds."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        return str(tensor.shape).encode()
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def unsettled(model: nn.Module) -> nn.Module:
    """A model in a state that is nobody's default: some modules in training mode, a frozen weight, a .grad, a hook."""
    model.train()
    for number, (module, p) in enumerate(zip(model.children(), model.parameters(), strict=False)):
        module.train(number % 2 == 1)  # batch normalization and dropout, where they come second and fourth
        p.requires_grad_(number % 2 == 1)
    first = next(model.parameters())
    first.grad = torch.full_like(first, 0.5)
    next(model.children()).register_forward_hook(_does_nothing)
    return model


def _does_nothing(*_: object) -> None:
    return None
