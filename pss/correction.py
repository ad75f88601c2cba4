r"""What a correction costs: the smallest step that repairs a mistake, and what it does to images that were right.

The pages before judge a ranking by what a step of fixed length does to the image. Here the step is as long as it must
be, and what is judged is the damage: the divergence on retain images that the step never saw. See `pss.fisher` for
the direction and the ranking that follow from this question.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pss.editing import Ids, _check_batch, _check_ids, _check_logits, _chunks, _damage
from pss.engine import growing as _variants
from pss.engine.state import preserved
from pss.fisher import DAMPING, Weights, damped, digest, gradients_of
from pss.lines import GRID, Line, line_of, predicts, runs, shifted, smallest, unit_mask
from pss.reference import Reference
from pss.saliency import Loss, check_inputs
from pss.units import Units

log = logging.getLogger(__name__)
DIRECTIONS = ("gradient", "fisher")


def smallest_correction(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units,
    rankings: Mapping[str, Ids] | Ids,
    k: int | Sequence[int] = 25,
    direction: str | Sequence[str] = "gradient",
    retain: tuple[Tensor, Tensor] | None = None,
    fisher: Weights | Reference | None = None,
    damping: float = DAMPING,
    parameters: Mapping[str, Sequence[str]] | None = None,
    loss: str | Loss = "cross_entropy",
    max_relative_step: float = 10.0,
    tolerance: float = 0.05,
    image_ids: Sequence | None = None,
    retain_ids: Sequence | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Smallest step through the top k units that corrects each image, and what it does to the retain images.

    The step is :math:`\delta = -t\,g` or, with direction ``fisher``, :math:`-t\,g_i/(F_i+\lambda)`, zero outside the
    units, with :math:`g` the gradient at the unedited model. The first of 25 sizes, over six decades, that makes the
    label the predicted class is refined to ``tolerance``. What is corrected only between two neighbouring
    sizes, a factor of 1.8 apart, and not beyond, can be missed.

    Parameters
    ----------
    images, labels : (B, …), (B,)
        Misclassified images.
    rankings : mapping of name to (B, K) unit ids, or one such ranking
    k : int or sequence of int
        How many units, each at most K. All units of the model is the same for every ranking and taken once.
    direction : {"gradient", "fisher"} or a sequence of both
    retain : (images, labels)
        Images on which the damage is measured: none of them may be among the mistakes.
    fisher : mapping of str to Tensor, or Reference
        From `fisher_diagonal`, or a reference fitted with it, for direction ``fisher``.
    damping : float
        :math:`\lambda`, as a multiple of the mean of the Fisher information over the units' parameters.
    parameters : mapping of name to parameter names, optional
        To compare with: whole parameters that are moved instead of units, along the gradient alone.
    max_relative_step : float
        Longest step, as a multiple of the norm of the weights that it changes; of weights that are all zero, as those
        of a pruned unit are, that of as many usual weights of their layers.
    image_ids, retain_ids : sequence, optional
        Ids for the column ``image``, and of the retain images to be held against them.

    Returns
    -------
    DataFrame
        One row per image, ranking, k and direction: ``corrected``; ``step``, the norm of :math:`\delta`, and
        ``relative``, that over the norm of the weights changed; ``kl_mean`` and ``kl_worst``, the divergence
        :math:`\mathrm{KL}(p_\text{before} \,\|\, p_\text{after})` in nats over the retain images that were right;
        ``accuracy_lost`` on all retain images; ``others_corrected``, the share of the wrong ones that become right (NaN
        if there are none). Not corrected: all but the last two are infinite, and these NaN. ``k`` is 0 for
        ``parameters``.

    Raises
    ------
    ValueError
        If an image is classified correctly, is also a retain image, an id is out of range or given twice, or an option
        is not one of those above.
    """
    rankings = rankings if isinstance(rankings, Mapping) else {"ranking": rankings}
    rankings = {name: _check_ids(ids, units, dims=2) for name, ids in rankings.items()}
    ks, directions = np.atleast_1d(k).tolist(), [direction] if isinstance(direction, str) else list(direction)
    _check_options(units, rankings, ks, directions, fisher, max_relative_step, tolerance)
    if retain is None:
        raise ValueError("no retain images: give retain=(images, labels), on which the damage is measured")
    for ids in rankings.values():
        _check_batch(model, images, labels, units, ids)
    image_ids = list(range(len(images))) if image_ids is None else list(image_ids)
    if len(image_ids) != len(images) or len(set(image_ids)) != len(images):
        raise ValueError(f"image_ids must be {len(images)} different ids, one per image")
    refuse_overlap(images, retain[0], None if retain_ids is None else image_ids, retain_ids)
    names = [layer.parameter for layer in units.layers]
    curvature = damped(fisher, names, damping) if "fisher" in directions else None
    search, rows = Search(model, retain, max_relative_step, tolerance), []
    with preserved(model), tqdm(total=len(images), unit="image", delay=2, disable=not progress) as bar:
        search.check_wrong(images, labels, image_ids)
        for part, gradients in gradients_of(model, images, labels, loss):
            x, y, at = images[part], labels[part], list(range(len(images)))[part]
            for name, count, kind, masks in _jobs(model, units, rankings, ks, directions, parameters, at):
                lines = [
                    line_of(model, gradients, b, mask, curvature if kind == "fisher" else None)
                    for b, mask in enumerate(masks)
                ]
                found = search.costs(x, y, lines)
                tags = {"ranking": name, "k": count, "direction": kind}
                rows += [
                    {"image": image_ids[i], "label": int(labels[i]), **tags, **cost}
                    for i, cost in zip(at, found, strict=True)
                ]
            bar.update(len(x))
    return _repeat_all(pd.DataFrame(rows), list(rankings))


def refuse_overlap(
    images: Tensor, others: Tensor, ids: Sequence | None = None, other_ids: Sequence | None = None
) -> None:
    """Refuse retain images that are among the mistakes, by their pixels and where given by their ids."""
    common = {digest(image) for image in images} & {digest(image) for image in others}
    if not common and ids is not None and other_ids is not None:
        common = set(ids) & set(other_ids)
    if common:
        raise ValueError(
            f"{len(common)} of the retain images are among the mistakes: the damage is measured on images that the "
            "step never saw, so take them out of one"
        )


class Search:
    """Finds the smallest step that corrects, and measures it on the retain images."""

    def __init__(self, model: nn.Module, retain: tuple[Tensor, Tensor], max_relative_step: float, tolerance: float):
        self.model, (self.retain, self.retain_labels) = model, retain
        self.max_relative_step, self.tolerance = max_relative_step, tolerance
        self.trusted: set[str] = set()  # parameters whose edits in one pass were compared with edits in place
        check_inputs(model, *retain, what="retain images")
        with torch.no_grad(), preserved(model):
            logits = torch.cat([model(part) for part in self.retain.split(256)])
        _check_logits(self.retain_labels, logits)
        self.before = logits.double().log_softmax(dim=1)

    @torch.no_grad()
    def check_wrong(self, images: Tensor, labels: Tensor, image_ids: list) -> None:
        """Refuse images that are no mistakes."""
        logits = torch.cat([self.model(part) for part in images.split(256)])
        _check_logits(labels, logits)
        right = predicts(logits, labels).nonzero()[:, 0].tolist()
        if right:
            which = [image_ids[i] for i in right[:5]]
            raise ValueError(f"images {which} are classified correctly: there is nothing to correct, leave them out")

    @torch.no_grad()
    def costs(self, images: Tensor, labels: Tensor, lines: list[Line | None]) -> list[dict]:
        """The columns of the result for images with their lines."""
        there = [b for b, line in enumerate(lines) if line is not None]
        sizes = dict.fromkeys(range(len(lines)), np.inf)
        for part in _chunks(images, GRID):
            now = there[part]
            if now:
                x, y, own = images[now], labels[now], [lines[b] for b in now]
                sizes |= dict(zip(now, self._smallest(x, y, own), strict=True))
        return [self._measure(images[b], labels[b], line, sizes[b]) for b, line in enumerate(lines)]

    def _smallest(self, images: Tensor, labels: Tensor, lines: list[Line]) -> list[float]:
        """Smallest size that corrects each image; inf where none does."""
        try:
            together = lambda sizes: predicts(self._along(images, lines, sizes), labels[:, None])  # noqa: E731
            return smallest(together, len(lines), self.max_relative_step, self.tolerance)
        except Exception as error:  # whatever a model raises on a growing batch: a real fault comes again in place
            log.info("steps one at a time, in place, because: %s", error)
            return [self._alone(*each) for each in zip(images, labels, lines, strict=True)]

    def _alone(self, image: Tensor, label: Tensor, line: Line) -> float:
        def corrected(sizes: Tensor) -> Tensor:  # (1, S), in ascending order: none is tried after the first that does
            hits = torch.zeros(sizes.shape, dtype=torch.bool)
            for at, size in enumerate(sizes[0].tolist()):
                with shifted(self.model, line.delta, size):
                    hits[0, at] = predicts(self.model(image[None])[0], label)
                if hits[0, at]:
                    break
            return hits

        return smallest(corrected, 1, self.max_relative_step, self.tolerance)[0]

    def _along(self, images: Tensor, lines: list[Line], sizes: Tensor) -> Tensor:
        """Logits of every image at its sizes (B, S) along its line, (B, S, C), in one growing batch."""
        sizes, changes = sizes.to(images), {}
        for b, line in enumerate(lines):
            for name, delta in line.delta.items():
                for start, rows in runs(delta):
                    change = _variants.Change(b, 0, start, rows, sizes[b])
                    changes.setdefault(self.model.get_parameter(name), []).append(change)
        logits = _variants.forward(self.model, images, changes, sizes.shape[1])
        for b, line in enumerate(lines):
            if not line.delta.keys() <= self.trusted:
                self._compare(logits[b, -1], images[b], line, float(sizes[b, -1]))
        return logits

    def _compare(self, logits: Tensor, image: Tensor, line: Line, size: float) -> None:
        """Hold one variant against the model edited in place, once for every parameter that is edited."""
        with shifted(self.model, line.delta, size):
            expected = self.model(image[None])[0]
        slack = 1e3 * torch.finfo(logits.dtype).eps * float(expected.abs().max())
        if not torch.allclose(logits, expected, rtol=0, atol=slack):
            raise _variants.NotCarried("edited in place the model says something else: its rows interact")
        self.trusted |= line.delta.keys()

    def _measure(self, image: Tensor, label: Tensor, line: Line | None, size: float) -> dict:
        """The step of this size, edited in place, on the image and on the retain images."""
        after = None
        if np.isfinite(size):
            after = self._edited(image, label, line, size)
            if after is None:  # at the very boundary the two ways may round differently
                size = self._alone(image, label, line)
                after = self._edited(image, label, line, size) if np.isfinite(size) else None
        if after is None:
            infinite = dict.fromkeys(("step", "relative", "kl_mean", "kl_worst"), np.inf)
            return {"corrected": False, **infinite, "accuracy_lost": np.nan, "others_corrected": np.nan}
        damage = _damage(self.before, after, self.retain_labels)
        return {
            "corrected": True,
            "step": size * line.length,
            "relative": size,
            "kl_mean": damage["kl_mean"],
            "kl_worst": damage["kl_worst"],
            "accuracy_lost": damage["accuracy_before"] - damage["accuracy_after"],
            "others_corrected": damage["corrected"],
        }

    def _edited(self, image: Tensor, label: Tensor, line: Line, size: float) -> Tensor | None:
        """Log-probabilities of the retain images after the step, None if it does not correct the image."""
        with shifted(self.model, line.delta, size):
            if not predicts(self.model(image[None])[0], label):
                return None
            return torch.cat([self.model(part).double().log_softmax(dim=1) for part in self.retain.split(256)])


def _jobs(
    model: nn.Module,
    units: Units,
    rankings: Mapping[str, np.ndarray],
    ks: list[int],
    directions: list[str],
    parameters: Mapping[str, Sequence[str]] | None,
    at: list[int],
) -> Iterator[tuple[str | None, int, str, list[dict[str, Tensor]]]]:
    """Name, k, direction and what each image may change; the name is None for all units."""
    for kind in directions:
        for count in ks:
            if count == len(units):
                yield None, count, kind, [unit_mask(model, units, range(count))] * len(at)
                continue
            for name, ids in rankings.items():
                yield name, count, kind, [unit_mask(model, units, ids[i, :count]) for i in at]
    for name, whole in (parameters or {}).items():
        mask = {p: torch.ones_like(model.get_parameter(p), dtype=torch.bool) for p in whole}
        yield name, 0, "gradient", [mask] * len(at)


def _repeat_all(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The rows of all units, which have no ranking, for every ranking."""
    everything = frame["ranking"].isna()
    parts = [frame[~everything], *(frame[everything].assign(ranking=name) for name in names)]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _check_options(
    units: Units,
    rankings: Mapping[str, np.ndarray],
    ks: list[int],
    directions: list[str],
    fisher: Weights | Reference | None,
    max_relative_step: float,
    tolerance: float,
) -> None:
    shortest = min(ids.shape[1] for ids in rankings.values()) if rankings else 0
    for k in ks:
        if not (1 <= k <= shortest or k == len(units)):
            raise ValueError(f"k = {k} is outside 1..{shortest}, the ids given, and is not {len(units)}, all units")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r}: expected one of {', '.join(DIRECTIONS)}")
    if "fisher" in directions and fisher is None:
        raise ValueError("direction 'fisher' needs fisher=: pss.fisher_diagonal(model, reference set, units)")
    for name, value in (("max_relative_step", max_relative_step), ("tolerance", tolerance)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, not {value}")
