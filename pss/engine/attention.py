"""Where the heads of an attention module lie in its weights, read from its attributes and the names of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pss.engine.state import preserved

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_SIZES = ("head_dim", "attention_head_size", "dim_head")
_PARTS = ("q", "k", "v", "qk", "kv", "qkv")
_WORDS = {"query": "q", "key": "k", "value": "v", "c_attn": "qkv", "query_key_value": "qkv"}
_DECORATION = re.compile(r"^(to_|w)(?=[qkv])|_(proj|lin|linear)$")


def heads_of(module: nn.Module, doubts: list[str]) -> Iterator[tuple]:
    """Heads of the queries, the keys and the values of an attention module; nothing of any other module.

    Known are ``nn.MultiheadAttention``, and modules whose layers have the names that timm, torchvision and Hugging Face
    give them: one layer for all (``qkv``, ``c_attn``), or several (``query``, ``q_proj``, ``to_q``, ``kv``, …).
    The rows of one for all are q of every head, then k of every head, then v. Where the module has a ``key_dim``, or
    ``head_first`` is set, they are q, k and v of one head, then of the next. Without such an attribute the module is
    run on random numbers, to see whose output a change of some rows moves. Names of layers of which that cannot be seen
    are added to ``doubts``.

    Yields
    ------
    tuple
        The fields of `pss.engine.groups.UnitGroup`: parameter, shape, count, dim, rows, offset, stride, label.

    Raises
    ------
    ValueError
        If the attributes of the module do not say how the rows are laid out, or do not fit them.
    """
    projections = _projections(module)
    if not projections:
        return
    heads = count_heads(module) or count_heads(getattr(module, "config", None))
    if not heads:
        raise ValueError("how many heads it has is not known: set num_heads")
    total = {parts: weight.shape[dim] for parts, (_, weight, dim) in projections.items()}
    sizes = _sizes(module, heads, total, next(weight.shape[1 - dim] for _, weight, dim in projections.values()))
    for parts, (name, weight, dim) in projections.items():
        head_first = getattr(module, "head_first", True if _number(module, "key_dim") else None)
        if head_first is None and len(parts) > 1 and heads > 1 and not isinstance(module, nn.MultiheadAttention):
            if weight.dim() == 2:
                head_first = _sees_head_first(module, name, weight, dim, [sizes[part] for part in parts], total[parts])
            if head_first is None and (weight.dim() > 2 or name.startswith("query")):  # either is met
                raise ValueError(f"how the rows of {name} are laid out is not known: set head_first, True or False")
            doubts += [name] if head_first is None else []
        each = sum(sizes[part] for part in parts)
        count = total[parts] // each if parts in ("k", "v") else heads  # several queries may share a key and a value
        if total[parts] != count * each or heads % count:
            raise ValueError(
                f"{name} has {total[parts]} rows, but by its attributes {count} heads of {each} for {parts}: "
                "set num_heads and head_dim, or key_dim and val_dim"
            )
        before = 0
        for part in parts:
            offset, stride = (before, each) if head_first else (before * count, sizes[part])
            yield name, tuple(weight.shape), count, dim, sizes[part], offset, stride, part
            before += sizes[part]


@torch.no_grad()
def _sees_head_first(
    module: nn.Module, name: str, weight: Tensor, dim: int, sizes: list[int], rows: int
) -> bool | None:
    """Whether a weight's rows are those of one head, then of the next; None where that is not seen.

    Behind the rows for the first head lie those of the second for the same, or those of the first for something else:
    which head's output moves when they change sign?
    """
    changed, width = weight.detach().clone(), rows // len(sizes)
    changed.narrow(dim, sizes[0], min(sizes)).neg_()
    inputs, windows = weight.shape[1 - dim], [b.shape[-1] for b in module.buffers() if b.dim() > 1]
    for shape in [*((n,) for n in dict.fromkeys([4, *windows])), (8, 8), (7, 7)]:
        x = torch.randn((1, *shape, inputs), generator=torch.Generator().manual_seed(0)).to(weight)
        outputs = []
        for values in (weight, changed):
            try:
                with preserved(module), _Projected(width) as seen:
                    seen.keep(torch.func.functional_call(module, {name: values}, (x,)))
            except Exception:  # whatever a module raises that takes something else
                break
            outputs.append(seen.inputs)
        for before, after in zip(*outputs, strict=False) if len(outputs) == 2 else ():
            if before.shape == after.shape and not before.equal(after):
                heads = (before != after).flatten(0, -2).any(0).unflatten(0, (-1, sizes[-1])).any(1).nonzero()
                return {(0,): True, (1,): False}.get(tuple(heads[:, 0].tolist()))
    return None


class _Projected(TorchFunctionMode):
    """Inputs of linear layers and normalizations, and an output, that are as wide as all heads."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.inputs = width, []

    def keep(self, x) -> None:
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == self.width:
            self.inputs.append(x.clone())

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if function in (F.linear, F.layer_norm, torch.addmm):
            self.keep(args[function is torch.addmm])
        return function(*args, **(kwargs or {}))


def _sizes(module: nn.Module, heads: int, total: dict[str, int], inputs: int) -> dict[str, int]:
    """Rows of one head of q, of k and of v, given the rows of every weight."""
    size = _number(module, *_SIZES) or max(1, total.get("q", inputs) // heads)
    key = _number(module, "key_dim") or size
    if "v" in total:
        keys = total["k"] // key if "k" in total else heads
        return {"q": key, "k": key, "v": max(1, total["v"] // max(1, keys))}
    return {"q": key, "k": key, "v": _number(module, "val_dim") or size}


def _projections(module: nn.Module) -> dict[str, tuple[str, nn.Parameter, int]]:
    """Weights that make queries, keys and values, by which of them, as ``qkv`` or ``q``: name, weight, dimension.

    Empty where the module is no attention.
    """
    weights: dict[str, dict[str, nn.Parameter]] = {}
    if isinstance(module, nn.MultiheadAttention):
        for name, weight in module.named_parameters(recurse=False):
            if name.endswith("proj_weight"):
                weights["qkv" if name.startswith("in") else name[0]] = {name: weight}
    for name, child in module.named_children():
        word = _DECORATION.sub("", name)
        if (parts := _WORDS.get(word, word)) in _PARTS:
            weights[parts] = {f"{name}.{n}": p for n, p in child.named_parameters() if p.dim() > 1}
    if sorted("".join(weights)) != ["k", "q", "v"]:
        return {}
    found = {}
    for parts, own in weights.items():
        name = next(iter(own), "")
        if len(own) != 1 or not name.endswith("weight"):
            raise ValueError(f"its {parts} is made by {', '.join(own) or 'no weight'}: expected one linear layer")
        found[parts] = name, own[name], int(is_conv1d(module.get_submodule(name.rpartition(".")[0])))
    return found


def count_heads(module: object) -> int | None:
    """Number of heads that the module says it has."""
    return _number(module, *_COUNTS)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of Hugging Face's GPT-2, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _number(module: object, *names: str) -> int | None:
    """The first of the attributes that is there and a whole number."""
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)
