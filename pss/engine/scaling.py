"""Weights of a model multiplied by factors of several owners, put on by `torch.nn.utils.parametrize` and taken off.

The weights below are never written. Factors of one owner go on together or not at all, and come off in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

_Stack = parametrize.ParametrizationList


class _Factor(nn.Module):
    """Multiplies a weight; knows its owner, and the order that the module's parameters had."""

    def __init__(self, owner: Any, factor: Tensor, order: tuple[str, ...]):
        super().__init__()
        self.owner, self.order = owner, order
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def owners(model: nn.Module) -> list[Any]:
    """Whose factors are on a model, in the order in which they were put on."""
    return list(dict.fromkeys(module.owner for module in model.modules() if isinstance(module, _Factor)))


def put_on(model: nn.Module, owner: Any, factors: Mapping[str, Tensor]) -> None:
    """Multiply parameters, by name, wherever the model uses them."""
    try:
        for name, factor in factors.items():
            for module, own in _places(model, name):
                stacked = [gain for stack in _stacks(module).values() for gain in stack]
                order = stacked[0].order if stacked else tuple(module._parameters)
                gain = _Factor(owner, factor.to(getattr(module, own)), order)
                parametrize.register_parametrization(module, own, gain, unsafe=True)
    except BaseException:  # all factors or none
        take_off(model, owner)
        raise


def take_off(model: nn.Module, owner: Any) -> None:
    """Leave the weights that are there without the owner's factors."""
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        stacks, order = module.parametrizations, ()
        for stack in stacks.values():
            own = [i for i, gain in enumerate(stack) if isinstance(gain, _Factor) and gain.owner == owner]
            for i in reversed(own):
                order = stack[i].order
                del stack[i]
        empty = {name: stack.original for name, stack in stacks.items() if not len(stack)}
        if len(empty) < len(stacks):
            for name in empty:
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        elif empty:  # by hand: what torch does here would reach copies of the model too, which share the class
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            module._parameters = {name: empty.get(name, module._parameters.get(name)) for name in order}


def weight(model: nn.Module, name: str) -> Tensor | None:
    """A parameter as the model uses it, with all factors on it; None where there is none of that name."""
    return next((getattr(module, own) for module, own in _places(model, name)), None)


def state_below(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without factors.

    Raises
    ------
    ValueError
        If the model has parametrizations of another kind.
    """
    for name, module in model.named_modules():
        others = [g for g in module if not isinstance(g, _Factor)] if isinstance(module, _Stack) else []
        if others:
            owner = name.replace(".parametrizations", "").replace("parametrizations.", "")
            raise ValueError(f"{owner} is parametrized already, by {type(others[0]).__name__}: make it plain first")
    below = re.compile(r"(^|\.)parametrizations\.(\w+)\.original$")
    return {below.sub(r"\1\2", name): tensor for name, tensor in model.state_dict().items()}


def _stacks(module: nn.Module) -> Mapping[str, _Stack]:
    return getattr(module, "parametrizations", {})


def _places(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold a parameter, more than one where it is shared, with its name in each."""
    modules = [(path, module) for path, module in model.named_modules() if not isinstance(module, _Stack)]
    places = [(path, m, n) for path, m in modules for n in (*m._parameters, *_stacks(m))]
    original = next((_original(m, n) for path, m, n in places if f"{path}.{n}".lstrip(".") == name), None)
    yield from [(m, n) for _, m, n in places if original is not None and _original(m, n) is original]


def _original(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module, below its factors."""
    stacks = _stacks(module)
    return stacks[name].original if name in stacks else module._parameters[name]
