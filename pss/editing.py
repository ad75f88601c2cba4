r"""Editing units to repair a mistake: pruning and one-step fine-tuning, always undone.

Both papers judge a ranking by editing its first :math:`k` units, one after the other, and watching the
confidence in the wrong and in the true class (Levin et al. 2022, section 3.1; Wang and Sato 2023, section 4):

- ``prune``: the unit's parameters become zero;
- ``finetune``: one gradient step on the image's own loss, :math:`-\eta\, g_u`, with :math:`g_u` the gradient
  at the *unedited* model. A unit with a large gradient moves far, so this rewards large gradients by
  construction. With ``step_norm`` :math:`= \varepsilon` every unit moves equally far,
  :math:`-\varepsilon\, g_u / \lVert g_u \rVert`, and what is left to compare is the ranking.

`edit_curves` takes one pass for all edits of several images (see `pss.engine.growing`) where the model allows it, and
otherwise edits in place and undoes it: the same numbers, slower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pss.engine.checks import check_ids, check_known, check_labels, check_positive
from pss.engine.edits import EditRunner, Place, add_steps, restored
from pss.engine.state import laid_out, preserved, savable
from pss.engine.strategies import ready
from pss.saliency import Loss, check_inputs, get_loss
from pss.units import Units, check_units

log = logging.getLogger(__name__)


Edit = Literal["finetune", "prune"]
EDITS = ("finetune", "prune")
Ids = Sequence | np.ndarray | Tensor

# Images times variants times numbers in an image: 25 edits of one image at 224 pixels, or of 50 images at 32.
_CHUNK = 2**22
RETAIN_BATCH = 256  # retain images in one forward pass


@contextmanager
def edited(
    model: nn.Module, units: Units, ids: Ids, edit: Edit = "prune", steps: Sequence[Tensor] | None = None
) -> Iterator[nn.Module]:
    """Edit units of the model, and undo it on leaving: every weight is then bit-identical to what it was.

    Inside, the model is in evaluation mode. Undone also when the body raises.

    Parameters
    ----------
    ids : (k,) unit ids
    edit : {"prune", "finetune"}
        ``prune`` sets the units to zero; ``finetune`` adds ``steps`` to them.
    steps : sequence of k tensors
        What to add to each unit, as from `unit_steps`. Only for ``finetune``.

    Raises
    ------
    ValueError
        If the edit is unknown, an id is out of range or given twice, or the steps do not fit the ids.
    """
    check_units(model, units)
    ids = check_ids(ids, len(units), dims=1, least=0)
    check_known("edit", edit, EDITS)
    if (steps is None) != (edit == "prune"):
        raise ValueError("steps go with edit='finetune', which adds them to the units; edit='prune' needs none")
    if steps is not None and len(steps) != len(ids):
        raise ValueError(f"{len(steps)} steps for {len(ids)} units: give one step per unit, as unit_steps returns them")
    with preserved(model), restored(_views(model, units, ids)) as views:
        add_steps(views, [-view for view in views] if steps is None else steps)
        yield model


def unit_steps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units,
    ids: Ids,
    loss: str | Loss = "cross_entropy",
    lr: float = 1e-3,
    step_norm: float | None = None,
    strategy: str = "auto",
) -> list[list[Tensor]]:
    r"""One fine-tuning step of the given units of each image, from the gradient of its loss at the unedited model.

    :math:`-\eta\, g_u`, or with ``step_norm`` :math:`-\varepsilon\, g_u/\lVert g_u\rVert_2` (without a gradient none).

    Parameters
    ----------
    images, labels : (B, …), (B,)
    ids : (B, K) unit ids of each image
    loss : str or callable ``(outputs, labels) -> (B,)``
    lr : float
        The rate :math:`\eta`; 1e-3 in Levin et al. 2022, section 3.1.
    step_norm : float, optional
        The length :math:`\varepsilon` of every unit's step, instead of ``lr``.
    strategy : {"auto", "variants", "in_place"}
        As in `edit_curves`.

    Returns
    -------
    list of B lists of K tensors
        Each of the shape of its unit (``units.view(model, id)``).

    Raises
    ------
    ValueError
        If an id or label is out of range, an id is given twice for an image, or ``lr`` or ``step_norm`` is not
        positive.
    """
    ids = check_ids(ids, len(units))
    check_positive(lr=lr, step_norm=step_norm)
    check_batch(model, images, labels, units, ids)
    runner, result = _runner(model, units, loss, strategy), []
    with ready(model, images):
        images, labels = savable(images), savable(labels)
        for part in _chunks(images, 1):
            result += runner.gradients(images[part], labels[part], ids[part])
    return [[_step(g, lr, step_norm) for g in own] for own in result]


def edit_curve(
    model: nn.Module,
    image: Tensor,
    label: int | Tensor,
    ids: Ids,
    units: Units,
    edit: Edit = "finetune",
    image_id: Any = 0,
    **how: Any,
) -> pd.DataFrame:
    """Edit the first k units, for k = 0 .. K, and see what the model then says of the image.

    Parameters
    ----------
    image, label
        One input without the batch dimension, and its class; or both with a batch dimension of one.
    ids : (K,) unit ids, in the order of the edits
    image_id
        What the column ``image`` holds.
    **how
        ``lr``, ``step_norm``, ``loss``, ``strategy``: see `edit_curves`, also for the columns.
    """
    label = torch.as_tensor(label, device=image.device)
    if label.dim() == 0:
        image, label = image[None], label[None]
    ids = check_ids(ids, len(units), dims=1)[None]
    return edit_curves(model, image, label, ids, units, edit, image_ids=[image_id], progress=False, **how)


def edit_curves(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ids: Ids,
    units: Units,
    edit: Edit = "finetune",
    lr: float = 1e-3,
    step_norm: float | None = None,
    loss: str | Loss = "cross_entropy",
    strategy: str = "auto",
    image_ids: Sequence | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Edit the first k units of each image's own ranking, for k = 0 .. K, and see what the model then says of it.

    The edits add up; the gradient is taken once, at the unedited model (Levin et al. 2022, section 3.1). The
    model runs in evaluation mode, and is left as it was found.

    Parameters
    ----------
    images, labels : (B, …), (B,)
    ids : (B, K) unit ids of each image, in the order of the edits
    edit : {"finetune", "prune"}
    lr, step_norm, loss
        The step of ``finetune``, see `unit_steps`. The loss is also a column of the result.
    strategy : {"auto", "variants", "in_place"}
        ``variants`` carries all edits of several images through one pass, and needs a model that treats the
        rows of a batch independently and uses the edited weights in convolution and linear calls only.
        ``in_place`` edits the model and runs it again for each edit. ``auto`` takes the first where it works
        (the last variant of the first image is compared with the model edited in place), otherwise
        the second; the log says which at level INFO.
    image_ids : sequence of B, optional
        Ids for the column ``image``: 0 .. B-1 by default.
    progress : bool
        Show a progress bar when it takes more than a few seconds.

    Returns
    -------
    DataFrame
        B (K + 1) rows: ``image``; ``k`` edits made; ``unit`` edited last (-1 at k = 0); ``label``;
        ``predicted0``, the class predicted before any edit; ``predicted`` (-1 where an edit makes an output NaN);
        ``confidence_true``;
        ``confidence_wrong``, the confidence in ``predicted0``; ``corrected``, whether ``predicted`` is the
        label; ``loss``.

    Raises
    ------
    ValueError
        If an id or label is out of range, an id is given twice for an image, there is no id, the edit or strategy
        is unknown, or ``lr`` or ``step_norm`` is not positive and finite.
    """
    ids = check_ids(ids, len(units))
    check_known("edit", edit, EDITS)
    check_positive(lr=lr, step_norm=step_norm)
    check_batch(model, images, labels, units, ids)
    image_ids = distinct(image_ids, len(images))
    runner, frames = _runner(model, units, loss, strategy), []
    with ready(model, images), tqdm(total=len(images), unit="image", delay=2, disable=not progress) as bar:
        images, labels = savable(images), savable(labels)
        for part in _chunks(images, ids.shape[1] + 1):
            x, y, own = images[part], labels[part], ids[part]
            if edit == "prune":
                steps = [[-view for view in _views(model, units, i)] for i in own]
            else:
                steps = [[_step(g, lr, step_norm) for g in gs] for gs in runner.gradients(x, y, own)]
            logits = runner.logits(x, own, steps)
            check_logits(y, logits[:, 0])
            frames.append(_records(logits, y, own, image_ids[part], runner.losses))
            bar.update(len(x))
    return pd.concat(frames, ignore_index=True)


def distinct(image_ids: Sequence | None, count: int) -> np.ndarray:
    """Ids of the images, by default their numbers."""
    image_ids = np.arange(count) if image_ids is None else np.asarray(list(image_ids))
    if len(image_ids) != count or len(set(image_ids.tolist())) != count:
        raise ValueError(f"image_ids must be {count} different ids, one per image")
    return image_ids


def _place(units: Units, unit: int) -> Place:
    number, j = units.locate(unit)
    group = units.layers[number]
    return Place(group.parameter, group.index(j), group.first(j) if group.in_rows else None)


def _views(model: nn.Module, units: Units, ids: np.ndarray) -> list[Tensor]:
    """The units' weights, to be edited through."""
    return [_place(units, u).view(model) for u in ids]


def _runner(model: nn.Module, units: Units, loss: str | Loss, strategy: str) -> EditRunner:
    loss = get_loss(loss)

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        check_labels(labels, outputs)
        return loss(outputs, labels)

    return EditRunner(model, partial(_place, units), losses, strategy)


def _step(gradient: Tensor, lr: float, step_norm: float | None) -> Tensor:
    """The fine-tuning step of one unit."""
    if step_norm is None:
        return -lr * gradient
    # Scaled by the largest entry first: squares of 1e-25 are zero in float32.
    largest = gradient.abs().amax()
    scaled = gradient / torch.where(largest > 0, largest, 1)
    length = scaled.norm()
    return scaled * (-step_norm / torch.where(length > 0, length, 1))


def _records(logits: Tensor, labels: Tensor, ids: np.ndarray, image_ids: np.ndarray, loss: Loss) -> pd.DataFrame:
    """Tidy rows of the logits (B, K + 1, C)."""
    count, variants, _ = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # NumPy has no bfloat16
    probabilities = logits.softmax(dim=2)
    now = predicted(logits)
    label, before = labels[:, None].expand(-1, variants), now[:, :1].expand(-1, variants)
    confidence = lambda of: probabilities.gather(2, of[:, :, None])[:, :, 0]  # noqa: E731
    tensors = {
        "label": label,
        "predicted0": before,
        "predicted": now,
        "confidence_true": confidence(label),
        "confidence_wrong": confidence(before),
        "corrected": now == label,
        "loss": loss(logits.flatten(0, 1), label.flatten()).reshape(count, variants),
    }
    first = {
        "image": np.repeat(image_ids, variants),
        "k": np.tile(np.arange(variants), count),
        "unit": np.insert(ids, 0, -1, axis=1).ravel(),
    }
    return pd.DataFrame(first | {name: t.detach().cpu().numpy().ravel() for name, t in tensors.items()})


def side_effects(
    model: nn.Module,
    units: Units,
    ids: Ids,
    images: Tensor,
    labels: Tensor,
    edit: Edit = "prune",
    steps: Sequence[Sequence[Tensor]] | None = None,
    image_ids: Sequence | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""What the edits made for some images do to other images.

    Parameters
    ----------
    ids : (Q, K) unit ids, a row for each repaired image
    images, labels : (G, …), (G,)
        The other images (the retain set). They should not hold the repaired ones.
    edit, steps
        As in `edited`; for ``finetune`` the steps of the Q images from `unit_steps`.
    image_ids : sequence of Q, optional
        Ids of the repaired images.

    Returns
    -------
    DataFrame
        One row per repaired image: ``image``; ``k``, the number of its edits; ``accuracy_before`` and
        ``accuracy_after`` on the retain set; ``right``, how many were right before, and ``still_right``, the share of
        them that stays so; ``wrong`` and ``corrected``, the same for those that were wrong and become right;
        ``kl_mean`` and ``kl_worst``, the divergence :math:`\mathrm{KL}(p_\text{before} \,\|\, p_\text{after})` in
        nats over those that were right. NaN where there are none.

    Raises
    ------
    ValueError
        As `edited`; or if there are no retain images.
    """
    ids = check_ids(ids, len(units))
    if steps is not None and len(steps) != len(ids):
        raise ValueError(f"steps of {len(steps)} images for ids of {len(ids)}")
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} retain images and {len(labels)} labels: give as many, and at least one")
    check_inputs(model, images, labels, units, "retain images")
    image_ids = distinct(image_ids, len(ids))

    def forward() -> Tensor:  # log-probabilities in float64: the divergences are as small as 1e-6
        with torch.no_grad():
            logits = torch.cat([laid_out(model, part, model) for part in images.split(RETAIN_BATCH)])
        return logits.double().log_softmax(dim=1)

    with preserved(model):
        before = forward()
        check_logits(labels, before)
        rows = []
        for q, own in enumerate(tqdm(ids, unit="image", delay=2, disable=not progress)):
            with edited(model, units, own, edit, None if steps is None else steps[q]):
                after = forward()
            rows.append({"image": image_ids[q], "k": len(own), **damage(before, after, labels)})
    return pd.DataFrame(rows)


def damage(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    """The columns of `side_effects` from log-probabilities (G, C) of the unedited and the edited model."""
    was, now = predicted(before) == labels, predicted(after) == labels
    share = lambda hits: float(hits.double().mean()) if len(hits) else float("nan")  # noqa: E731
    kl = (before.exp() * (before - after)).sum(dim=1)[was]
    return {
        "accuracy_before": share(was),
        "accuracy_after": share(now),
        "right": int(was.sum()),
        "still_right": share(now[was]),
        "wrong": int((~was).sum()),
        "corrected": share(now[~was]),
        "kl_mean": float(kl.mean()) if len(kl) else float("nan"),
        "kl_worst": float(kl.max()) if len(kl) else float("nan"),
    }


def _chunks(images: Tensor, variants: int) -> list[slice]:
    """Slices of as many images as go through one pass."""
    size = max(1, _CHUNK // max(1, variants * images[:1].numel()))
    return [slice(i, i + size) for i in range(0, len(images), size)]


def check_batch(model: nn.Module, images: Tensor, labels: Tensor, units: Units, ids: np.ndarray) -> None:
    """Refuse images, labels and rows of ids that are not as many, or not of this model."""
    if not len(images) == len(labels) == len(ids) or not len(images):
        raise ValueError(
            f"{len(images)} images, {len(labels)} labels and {len(ids)} rows of ids: give as many, and at least one"
        )
    check_inputs(model, images, labels, units)


def check_logits(labels: Tensor, outputs: Tensor) -> None:
    """Refuse labels that are not classes of these outputs of the unedited model, and outputs that are NaN."""
    check_labels(labels, outputs)
    if (bad := outputs.isnan().any(dim=1)).any():
        raise ValueError(f"the outputs of the unedited model are NaN for images {bad.nonzero()[:10, 0].tolist()}")


def predicted(logits: Tensor) -> Tensor:
    """Class of the largest logit over the last dimension; -1, no class, where an edit made a logit NaN."""
    return logits.argmax(dim=-1).masked_fill(logits.isnan().any(dim=-1), -1)
