"""Tensors that depend on no image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


class Constants:
    """Tensors that depend on no image: the network's own, what functions make of no tensor, and of one another.

    What is not seen here is none: values that are read of a constant are the same for every image.
    """

    def __init__(self, own: Iterable[Tensor]):
        self.versions = WeakTensorKeyDictionary()
        self.add(list(own))

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether it is known, and nothing was written into it or what it is a view of."""
        version = self.versions.get(tensor)
        return version is not None and version == tensor._version

    def are_all(self, function: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether a function's result depends on no image."""
        if any(isinstance(a, Tensor) and a not in self for a in args):
            return function in _OF_A_SHAPE
        return all(t in self for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))

    def add(self, result: Any) -> None:
        """Know the tensors in it."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.versions[tensor] = tensor._version


def parameters_of(tensor: Tensor) -> set[int]:
    """Ids of the tensors that autograd would give a gradient through this one."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    nodes, found, seen = [tensor.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        elif node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return found


_OF_A_SHAPE = {torch.zeros_like, torch.ones_like, Tensor.new_zeros, Tensor.new_ones}
