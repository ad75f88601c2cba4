"""What is asked for, a column for every group of slices, and the way of a batch through the engine in parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pss.engine.groups import UnitGroup
from pss.engine.recorder import Options
from pss.engine.state import laid_out, savable
from pss.engine.strategies import Columns, Loss, Part, Task, compute, known_of, ready
from pss.engine.verification import verified


def task_of(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    loss: Loss,
    check: Callable[[Any, Tensor, int], None],
    options: Options,
    kind: Hashable,
) -> Task:
    """A column for every group, of each quantity that the options ask for; see `Task`."""
    names = _canonical_names(model)
    by_name: dict[str, dict[int, UnitGroup]] = {}
    for number, group in enumerate(groups):
        by_name.setdefault(names.get(group.parameter, group.parameter), {})[number] = group

    def reduce(name: str, values: Tensor, of: str) -> Columns:
        first = options.of.index(of) * len(groups)
        means = {first + number: (group, group.reduce(values)) for number, group in by_name[name].items()}
        if of == "gradient":
            return {number: mean for number, (_, mean) in means.items()}
        sums = {number: mean * (group.size if of == "gain" else 1) for number, (group, mean) in means.items()}
        return {number: c if options.signed else c.abs() for number, c in sums.items()}

    columns = {name: count for name, some in by_name.items() if (count := _columns(some.values(), options))}
    rows = (*(name for name, some in by_name.items() if all(_in_rows(group) for group in some.values())), *columns)
    whole = tuple(name for name in by_name if name not in rows)
    if "output" in options.of and whole:
        raise ValueError(f"units of {', '.join(whole[:5])} are no rows of a layer: of='output' knows what rows say")
    labels = tuple(group.name for group in groups) * len(options.of)
    return Task(model, loss, check, rows, whole, reduce, labels, columns, options, kind)


def _in_rows(group: UnitGroup) -> bool:
    """Whether means over the rows of a matrix are enough."""
    return group.in_rows and len(group.shape) > 1


def _columns(groups: Iterable[UnitGroup], options: Options) -> int:
    """Number of columns, if means over them are enough: of the gradient, only a matrix's are taken; otherwise zero."""
    if any(group.dim != 1 or (len(group.shape) > 2 and "gradient" in options.of) for group in groups):
        return 0
    return max(group.shape[1] * group.groups for group in groups)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """First name of every parameter, by each of its names: shared parameters have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def compute_in_parts(
    task: Task, images: Tensor, labels: Tensor, verify: bool, verify_again: bool = False
) -> tuple[Tensor, Part]:
    """All columns of a batch, side by side; and the whole of it, with outputs and losses if every part has them."""
    size, parts = images_at_once(images), []
    with ready(task.model, images):
        known = known_of(task, images)
        for x, y in zip(savable(images.detach()).split(size), savable(labels).split(size), strict=True):

            def part_of(x: Tensor, y: Tensor = y, again: bool = verify_again and not parts) -> Part:
                part = compute(task, x, y, known)
                compares = verify and "output" not in task.options.of  # of which a gradient knows nothing
                if compares and (again or not known.verified) and known.ways != ("loop",):
                    return verified(task, x, y, part, known)
                return part

            parts.append(laid_out(task.model, x, part_of))
    whole = Part.join(parts)
    return torch.cat([whole.columns[i] for i in sorted(whole.columns)], dim=1), whole


def images_at_once(images: Tensor) -> int:
    """Larger batches are slower on a CPU: about 8 images at 224 pixels; a GPU wants more."""
    numbers = (64 if images.is_cuda else 8) * 3 * 224 * 224
    return max(1, min(256, numbers // images[0].numel()))
