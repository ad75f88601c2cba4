"""Where the heads of an attention module lie in its weights, read from its attributes and the names of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_SIZES = ("head_dim", "attention_head_size", "dim_head")
_PARTS = ("q", "k", "v", "qk", "kv", "qkv")
_WORDS = {"query": "q", "key": "k", "value": "v", "c_attn": "qkv", "query_key_value": "qkv"}
_DECORATION = re.compile(r"^(to_|w)(?=[qkv])|_(proj|lin|linear)$")


def heads_of(module: nn.Module) -> Iterator[tuple]:
    """Heads of the queries, the keys and the values of an attention module; nothing of any other module.

    Known are ``nn.MultiheadAttention``, and modules whose layers have the names that timm, torchvision and Hugging Face
    give them: one layer for all (``qkv``, ``c_attn``), or several (``query``, ``q_proj``, ``to_q``, ``kv``, …).
    The rows of one for all are q of every head, then k of every head, then v. Where the module has a ``key_dim``, or
    ``head_first`` is set, they are q, k and v of one head, then of the next.

    Yields
    ------
    tuple
        The fields of `pss.units.UnitGroup`: parameter, shape, count, dim, rows, offset, stride, label.

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
        if head_first is None and len(parts) > 1 and (weight.dim() > 2 or name.startswith("query")):  # either is met
            raise ValueError(f"how the rows of {name} are laid out is not known: set head_first, True or False")
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
