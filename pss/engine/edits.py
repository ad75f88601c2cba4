"""Gradients and logits of several images under edits of a few weights: together on a growing batch, or one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pss.engine.folding import ExplicitNormalization
from pss.engine.growing import Change, NotCarried, Unseen, forward
from pss.engine.state import preserved
from pss.engine.strategies import gradients_to

log = logging.getLogger(__name__)
Losses = Callable[[Tensor, Tensor], Tensor]  # of outputs and labels, which it checks


@dataclass(frozen=True)
class Place:
    """Where the weights of a unit are: parameter, index into it, and first row, None where they are not rows."""

    parameter: str
    index: tuple[slice, ...]
    row: int | None

    def view(self, model: nn.Module) -> Tensor:
        """The weights, to be edited through."""
        # .data: an edit that is undone must not make autograd refuse a graph that the caller holds.
        return model.get_parameter(self.parameter).data[self.index]


class EditRunner:
    """The two paths to gradients and logits of several images; settles on ``in_place`` where the other fails."""

    def __init__(self, model: nn.Module, place: Callable[[int], Place], losses: Losses, strategy: str):
        if strategy not in ("auto", "variants", "in_place"):
            raise ValueError(f"unknown strategy {strategy!r}: expected 'auto', 'variants' or 'in_place'")
        self.model, self.place, self.losses, self.strategy = model, place, losses, strategy
        self.trusted = False  # the growing batch was compared with the model edited in place
        self.apart = False  # an image of a batch was compared with the image alone
        self.idle: set[nn.Parameter] = set()  # parameters that take no part, as of an auxiliary head

    def gradients(self, images: Tensor, labels: Tensor, ids: np.ndarray) -> list[list[Tensor]]:
        """Gradient of each image's loss to its own units."""
        return self._choose(self._gradients_together, self._gradients_alone, images, labels, ids)

    @torch.no_grad()
    def logits(self, images: Tensor, ids: np.ndarray, steps: list[list[Tensor]]) -> Tensor:
        """Logits after the first k steps, for every k, shape (B, K + 1, C)."""
        return self._choose(self._logits_together, self._logits_alone, images, ids, steps)

    def _choose(self, together: Callable, alone: Callable, images: Tensor, *rest: Any) -> Any:
        if self.strategy == "in_place":
            return alone(images, *rest)
        try:
            return together(images, *rest)
        except Exception as error:  # whatever a model raises on a growing batch: a real fault comes again
            if isinstance(error, Unseen) and self._take_no_part(error.parameters, images[:1]):
                self.idle.update(error.parameters)
            elif self.strategy == "variants":
                raise
            else:
                log.info("edits one at a time, in place, because: %s", error)
                self.strategy = "in_place"
        return self._choose(together, alone, images, *rest)

    @torch.no_grad()
    def _take_no_part(self, parameters: list[nn.Parameter], image: Tensor) -> bool:
        """Whether the output stays bit-identical when these parameters change."""
        before = self.model(image)
        with restored([p.data for p in parameters]) as values:
            for value in values:
                value.add_(1)
            return torch.equal(before, self.model(image))

    def _changes(self, ids: np.ndarray, steps: list[list[Tensor]], cumulative: bool) -> dict:
        """Changes by parameter. ``cumulative``: edit k is made from variant k on, otherwise from the start."""
        changes: dict[nn.Parameter, list] = {}
        for image, own in enumerate(ids):
            for k, unit in enumerate(own, start=1):
                place = self.place(unit)
                if place.row is None:
                    raise NotCarried("units do not lie along the first dimension of their weight")
                parameter = self.model.get_parameter(place.parameter)
                if parameter not in self.idle:
                    change = Change(image, k if cumulative else 0, place.row, steps[image][k - 1])
                    changes.setdefault(parameter, []).append(change)
        return changes

    def _gradients_together(self, images: Tensor, labels: Tensor, ids: np.ndarray) -> list[list[Tensor]]:
        """Gradients to changes of each image's units that are zero: no gradient of a whole weight is formed."""
        zeros = [[torch.zeros_like(v).requires_grad_() for v in self._views(own)] for own in ids]
        flat = [zero for own in zeros for zero in own]
        with preserved(self.model), torch.enable_grad(), ExplicitNormalization():
            self.model.requires_grad_(False)
            outputs = forward(self.model, images, self._changes(ids, zeros, cumulative=False), 1)[:, 0]
            if not self.apart and len(images) > 1:
                with torch.no_grad():
                    self._compare(outputs[0], self.model(images[:1])[0], "alone")
                self.apart = True
            gradients = iter(gradients_to(flat, self.losses(outputs, labels).sum()))
        return [[next(gradients) for _ in own] for own in ids]

    def _gradients_alone(self, images: Tensor, labels: Tensor, ids: np.ndarray) -> list[list[Tensor]]:
        """One image at a time, the units' part of the gradients of whole parameters."""
        result = []
        for image, label, own in zip(images, labels, ids, strict=True):
            places = [self.place(unit) for unit in own]
            names = list(dict.fromkeys(place.parameter for place in places))
            with preserved(self.model), torch.enable_grad(), ExplicitNormalization():
                self.model.requires_grad_(False)
                parameters = [self.model.get_parameter(name).requires_grad_() for name in names]
                found = gradients_to(parameters, self.losses(self.model(image[None]), label[None]).sum())
            gradients = dict(zip(names, found, strict=True))
            result.append([gradients[place.parameter][place.index].clone() for place in places])
        return result

    def _logits_together(self, images: Tensor, ids: np.ndarray, steps: list[list[Tensor]]) -> Tensor:
        changes = self._changes(ids, steps, cumulative=True)
        logits = forward(self.model, images, changes, ids.shape[1] + 1)
        if not self.trusted:  # compare one variant with all edits
            with restored(self._views(ids[0])) as views:
                add_steps(views, steps[0])
                expected = self.model(images[:1])[0]
            self._compare(logits[0, -1], expected, "edited in place")
            self.trusted = True
            log.info("all edits of up to %d images in one pass", len(images))
        return logits

    @staticmethod
    def _compare(found: Tensor, expected: Tensor, when: str) -> None:
        """Refuse the growing batch where an image's logits depend on the company."""
        slack = 300 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0, atol=slack):
            raise NotCarried(f"{when} the model says something else: its rows interact")

    def _logits_alone(self, images: Tensor, ids: np.ndarray, steps: list[list[Tensor]]) -> Tensor:
        result = []
        for image, own, own_steps in zip(images, ids, steps, strict=True):
            rows = [self.model(image[None])[0]]
            with restored(self._views(own)) as views:
                for view, step in zip(views, own_steps, strict=True):
                    add_steps([view], [step])
                    rows.append(self.model(image[None])[0])
            result.append(torch.stack(rows))
        return torch.stack(result)

    def _views(self, ids: np.ndarray) -> list[Tensor]:
        return [place.view(self.model) for place in map(self.place, ids)]


@contextmanager
def restored(views: list[Tensor]) -> Iterator[list[Tensor]]:
    """Copy the values of the views back on leaving."""
    saved = [view.clone() for view in views]
    try:
        yield views
    finally:
        for view, values in zip(views, saved, strict=True):
            view.copy_(values)


def add_steps(views: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Add to each unit its step."""
    for view, step in zip(views, steps, strict=True):
        if step.shape != view.shape:
            raise ValueError(f"a step of shape {tuple(step.shape)} for a unit of shape {tuple(view.shape)}")
        view.add_(step)
