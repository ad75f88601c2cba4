"""One image of a batch alone, by plain autograd: the check of everything faster.

What may differ is rounding, and what rounding does to a ReLU: where an input is so near to zero that its sign is
another, single units change by percents, and all those before them a little. So it is decided layer by layer:

1. Equal to the root of the precision's epsilon, of the layer's largest value: right. Most networks end here. So is what
   is within rounding of the largest sum of sizes: signed terms may cancel until nothing but rounding is left.
2. In float64, anything else is wrong. In a lower precision a layer is wrong if it is off by `_WHOLE` by its norm.
3. Otherwise it is explained if at most `_FEW` of its units are off by `_UNIT`, and none of these in its sign.
4. What is not explained is decided in float64, on a copy of the network and the same batch, where ReLUs do not change.

Products in bfloat16 are held to 2 alone, and the same pass without them to all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pss.engine.calls import Unsupported
from pss.engine.strategies import Known, Part, Task, compute, one_by_one

log = logging.getLogger(__name__)
_WHOLE, _FEW, _UNIT = 0.25, 0.02, 0.05
Plain = dict[int, tuple[Tensor, Tensor]]  # columns of one image, and what of them is rounding


def verified(task: Task, images: Tensor, labels: Tensor, part: Part, known: Known) -> Part:
    """The part, if it is right for one of its images; or else the same by plain autograd, with a log line.

    Raises
    ------
    Unsupported
        If plain autograd of the images one by one does not give what it gave for the one, or the strategy that is
        wrong was asked for.
    """
    row = int(torch.stack([values.abs().sum(1).double() for values in part.columns.values()]).sum(0).argmax())
    plain = _alone(task, images[row : row + 1], labels[row : row + 1])
    if not all(values.isfinite().all() for values, _ in plain.values()):
        return part  # of the image that says most there is nothing to compare with
    wrong = _first_wrong(task, images, labels, part, row, plain, known)
    if wrong is not None and task.options.strategy != "fast" and known.ways != ("loop",):
        log.warning("%s differs from plain autograd of one image, which is used instead, one image at a time", wrong)
        known.ways = ("loop",)
        part = compute(task, images, labels, known)
        wrong = _first(_is_not_rounding, task, part, row, plain)
    if wrong is not None:
        raise Unsupported(
            f"the profile of image {row} of the batch is not what plain autograd gives for it alone, first in {wrong}: "
            + ("use strategy='auto'" if task.options.strategy == "fast" else "does the network draw random numbers, or")
            + ("" if task.options.strategy == "fast" else " remember the images before? verify=False takes what comes")
        )
    known.verified = True
    return part


def _alone(task: Task, image: Tensor, label: Tensor) -> Plain:
    """Columns of one image by plain autograd. Far below the largest sum of sizes of a quantity all is rounding."""
    (gradients,) = one_by_one(task, image, label, task.parameters)
    values, sizes = (
        {k: v for name, g in gradients.items() for k, v in task.columns(name, g, sizes).items()}
        for sizes in (False, True)
    )
    count = len(task.names) // len(task.options.of)
    largest = [
        torch.stack([v.max() for k, v in sizes.items() if k // count == i]).max() for i in range(len(task.options.of))
    ]
    eps = torch.finfo(largest[0].dtype).eps
    return {number: (column[0], 100 * eps * largest[number // count]) for number, column in values.items()}


def _first_wrong(
    task: Task, images: Tensor, labels: Tensor, part: Part, row: int, plain: Plain, known: Known
) -> str | None:
    """Name of the first layer that is wrong, or None."""
    if task.options.precision == "bf16":
        if wrong := _first(_is_off_as_a_whole, task, part, row, plain):
            return wrong
        task = replace(task, options=replace(task.options, precision="fp32"))
        part = compute(task, images, labels, known)
    unequal = _first(_is_not_rounding, task, part, row, plain)
    if unequal is None or next(iter(plain.values()))[0].dtype == torch.float64:
        return unequal
    if wrong := _first(_is_off_as_a_whole, task, part, row, plain):
        return wrong
    unexplained = _first(_is_more_than_branches, task, part, row, plain)
    return unexplained and _first_wrong_in_double(task, images, labels, row, known, unexplained)


def _first_wrong_in_double(
    task: Task, images: Tensor, labels: Tensor, row: int, known: Known, unexplained: str
) -> str | None:
    try:
        exact = replace(task, model=copy.deepcopy(task.model).double())
        images = images.double() if images.is_floating_point() else images
        part = compute(exact, images, labels, Known(known.ways, plain=set(known.plain)))
        plain = _alone(exact, images[row : row + 1], labels[row : row + 1])
    except Exception as error:  # networks that cannot be copied, or compute in one precision only: not excused
        log.info("cannot be decided in float64: %s", error)
        return unexplained
    return _first(_is_not_rounding, exact, part, row, plain)


def _first(
    is_wrong: Callable[[Tensor, Tensor, Tensor], bool], task: Task, part: Part, row: int, plain: Plain
) -> str | None:
    """Name of the first layer that is wrong by one of the rules below."""
    wrong = (number for number in sorted(plain) if is_wrong(part.columns[number][row], *plain[number]))
    return next((task.names[number] for number in wrong), None)


def _is_not_rounding(a: Tensor, b: Tensor, floor: Tensor) -> bool:
    return not bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max() + floor)


def _is_off_as_a_whole(a: Tensor, b: Tensor, floor: Tensor) -> bool:
    return not bool((a - b).norm() <= _WHOLE * b.norm() + floor * len(b) ** 0.5)


def _is_more_than_branches(a: Tensor, b: Tensor, floor: Tensor) -> bool:
    off = (a - b).abs() > _UNIT * b.abs().clamp(min=b.abs().mean()) + floor
    return int(off.sum()) > int(_FEW * len(b)) or bool((off & ((a * b.conj()).real < 0)).any())
