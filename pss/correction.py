r"""The smallest step that corrects a mistake, and what it does to images that were right.

A gain :math:`a_u = 1 + d_u` on the weights of every unit moves the logits by :math:`J d`, where :math:`J` is the
gain saliency of every logit. What it does to usual images is to second order

.. math:: \mathrm{KL} \approx \tfrac12 d^\top F d, \qquad F = \mathbb E\bigl[J^\top(\mathrm{diag}\,p - pp^\top)J\bigr],

so the least harmful correction is the :math:`d` of least :math:`d^\top F d` whose margins :math:`z_y - z_k` are closed.
:math:`F` has low rank, and is solved with through its factor. The diagonal of squared gradients of the true labels,
which many take for :math:`F`, is nearly zero on images that the model is sure of, and cost more on digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from scipy.optimize import lsq_linear
from torch import Tensor, nn
from tqdm import tqdm

from pss.editing import Ids, check_batch, check_logits, damage, distinct
from pss.engine.checks import check_ids, check_known, check_positive
from pss.engine.edits import restored
from pss.engine.state import laid_out, preserved
from pss.saliency import Loss, check_inputs, get_loss, parameter_saliency, profile
from pss.storage.tensors import bytes_of
from pss.units import Units

DAMPING = 0.01  # added to F, as a multiple of the mean of its diagonal
_CAUTION = (1, 10, 100)  # factors of the damping that are tried
_RIVALS = 5  # classes that a mistake must pass
_EXACT = 2**26  # numbers in the factor of F up to which it is taken over all classes
_DRAWS = 3  # labels drawn for each image beyond
_NUMBERS = 2**20  # in the images of one pass
_ROWS = 256  # of a batch that holds each image once for every combination of its logits
_SIZES = 25  # step sizes tried first, over six decades


# ----------------------------------------------------------------------------------------------- gains and curvature


def unit_maps(units: Units) -> dict[str, Tensor]:
    """Unit of every weight by parameter name, broadcastable to the parameter; ``len(units)`` for weights of none."""
    maps: dict[str, Tensor] = {}
    for start, group in zip(units.starts, units.layers, strict=False):
        kept = {0, group.dim} if group.groups > 1 else {group.dim}
        shape = [size if dim in kept else 1 for dim, size in enumerate(group.shape)]
        of = maps.setdefault(group.parameter, torch.full(shape, len(units)))
        ids = start + torch.arange(group.count)
        if group.groups > 1:
            of[:] = ids.reshape(group.groups, 1, -1).expand(-1, group.shape[0] // group.groups, -1).reshape(of.shape)
        else:
            of.view(-1)[torch.from_numpy(group.slices).flatten()] = ids.repeat_interleave(group.rows)
    return maps


def gain_jacobian(
    model: nn.Module, images: Tensor, units: Units, combinations: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    r"""Derivative of every logit to the gain of every unit, for each image: their gain saliency, see `pss.profile`.

    .. math:: J_{ju} = \frac{\partial z_j}{\partial a_u} = \sum_{i \in u} \theta_i \frac{\partial z_j}{\partial\theta_i}

    (at :math:`a = 1`).

    Parameters
    ----------
    images : (B, …)
    combinations : (B, M, C), optional
        Weights of sums of logits that are taken instead.
    steps : (U,), optional
        Differentiate at gains of 1 plus these.

    Returns
    -------
    Tensor, shape (B, C, U) or (B, M, U)
    """
    if combinations is None:
        classes = logits_of(model, images[:1]).shape[1]
        combinations = torch.eye(classes, device=images.device).expand(len(images), -1, -1)
    steps = torch.zeros(len(units)) if steps is None else steps
    many, rows = combinations.shape[1], combinations.flatten(0, 1)
    numbers = torch.arange(len(rows), device=images.device)
    size = max(1, min(_ROWS, _NUMBERS // images[0].numel()) // many)
    loss = lambda z, at: (rows[at].to(z) * z).sum(dim=1)  # noqa: E731
    parts = zip(images.split(size), numbers.split(size * many), strict=True)
    with shifted(model, changes(model, unit_maps(units), steps)):  # the profile is of the weights as they are there
        found = [profile(model, x.repeat_interleave(many, 0), at, units, loss, True, of="gain") for x, at in parts]
    found = torch.cat(found).unflatten(0, combinations.shape[:2])
    gains = (1 + steps).to(found)
    return found / gains.where(gains != 0, 1)


class Curvature:
    r"""The quadratic form :math:`F + \lambda I` from a factor, :math:`F = R^\top R`.

    Parameters
    ----------
    rows : (n, U)
        :math:`R`.
    """

    def __init__(self, rows: Tensor):
        rows = rows.double()
        self.rows = torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
        _, singular, self._axes = torch.linalg.svd(self.rows, full_matrices=False)
        self._values = singular.square()
        self.damping = DAMPING * float(self._values.sum()) / rows.shape[1] + torch.finfo(torch.float32).tiny

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, units: Units, seed: int = 0, temperature: float = 1.0) -> Curvature:
        """Of the KL on these images: over all classes where the factor stays small, otherwise of labels drawn.

        At another temperature T: of :math:`T^2` times the KL of logits divided by T.
        """
        p = (logits_of(model, images).double() / temperature).softmax(dim=1)
        eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        if len(images) * p.shape[1] * len(units) <= _EXACT:
            weights = p.sqrt()[:, :, None] * (eye - p[:, None])
        else:
            drawn = torch.multinomial(p.cpu(), _DRAWS, True, generator=torch.Generator().manual_seed(seed))
            weights = (eye[drawn.to(p.device)] - p[:, None]) / _DRAWS**0.5
        return cls(gain_jacobian(model, images, units, weights).flatten(0, 1) / len(images) ** 0.5)

    def solve(self, vectors: Tensor, damping: float | None = None) -> Tensor:
        r""":math:`(F + \lambda I)^{-1}` times each row, (m, U)."""
        damping = self.damping if damping is None else damping
        along = (vectors @ self._axes.mT) * (self._values / (self._values + damping))
        return (vectors - along @ self._axes) / damping

    def correction(self, slopes: Tensor, needs: Tensor, price: float = np.inf, damping: float | None = None) -> Tensor:
        r"""Steps (U,) of least :math:`\tfrac12 d^\top(F+\lambda I)d` with ``slopes @ d >= needs``.

        With a finite ``price`` what is lacking costs that much each, so that some may be left. By the dual problem, a
        least-squares problem in one bounded number for each of the m needs.
        """
        towards = self.solve(slopes, damping)
        gram = slopes @ towards.mT
        scale = float(gram.diagonal().mean())
        if not scale > 0:
            return torch.zeros_like(slopes[0])
        gram = gram + 1e-9 * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        root = torch.linalg.cholesky(gram).cpu()
        target = torch.linalg.solve_triangular(root, needs.double().cpu()[:, None], upper=False)[:, 0]
        found = lsq_linear(root.mT.numpy(), target.numpy(), bounds=(0, price)).x
        return torch.from_numpy(found).to(towards) @ towards


def margins(
    model: nn.Module, images: Tensor, labels: Tensor, units: Units, steps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Margins (B, M) of the labels over their strongest rivals, and their derivative (B, M, U), at gains 1 + steps."""
    with shifted(model, {} if steps is None else changes(model, unit_maps(units), steps)):
        logits = logits_of(model, images).double()
    eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    weights = eye[labels][:, None] - eye[_rivals(logits, labels)]
    return (weights * logits[:, None]).sum(dim=2), gain_jacobian(model, images, units, weights, steps).double()


def rival_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Margins (B, M) of the labels over their strongest rivals."""
    logits = logits.double()
    return logits.gather(1, labels[:, None]) - logits.gather(1, _rivals(logits, labels))


def _rivals(logits: Tensor, labels: Tensor) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(_RIVALS, logits.shape[1] - 1), dim=1).indices


def changes(model: nn.Module, maps: Mapping[str, Tensor], steps: Tensor) -> dict[str, Tensor]:
    """What gains of 1 plus these steps (U,) add to the weights."""
    steps = torch.cat([steps, steps.new_zeros(1)])
    return {name: (p := model.get_parameter(name)).detach() * steps[of].to(p) for name, of in maps.items()}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of the model in evaluation mode, without gradients."""
    size = max(1, _NUMBERS // max(1, images[0].numel()))
    with preserved(model), torch.no_grad():
        return torch.cat([laid_out(model, part, model) for part in images.split(size)])


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL of each image in nats, float64, from the logits before and after."""
    p, q = before.double().log_softmax(dim=1), after.double().log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def predicts(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is predicted, over the last dimension; never where a number overflowed."""
    return (logits.argmax(dim=-1) == labels) & logits.isfinite().all(dim=-1)


@contextmanager
def shifted(model: nn.Module, delta: Mapping[str, Tensor], size: float = 1.0) -> Iterator[nn.Module]:
    """Add ``size`` times the changes to the named parameters; bit-identical afterwards."""
    with torch.no_grad(), restored([model.get_parameter(name).data for name in delta]) as weights:
        for weight, change in zip(weights, delta.values(), strict=True):
            weight.add_(change, alpha=size)
        yield model


# ------------------------------------------------------------------------------------------------- the smallest step


def smallest_correction(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units | None = None,
    rankings: Mapping[str, Ids] | Ids | None = None,
    k: int | Sequence[int] | None = None,
    through: str | Sequence[str] = "gains",
    retain: tuple[Tensor, Tensor] | None = None,
    usual: Tensor | None = None,
    parameters: Mapping[str, Sequence[str]] | None = None,
    loss: str | Loss = "cross_entropy",
    max_relative_step: float = 10.0,
    tolerance: float = 0.05,
    image_ids: Sequence | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Smallest step that corrects each image, and what it does to the retain images.

    Through ``gains`` the step is the :math:`d` of least :math:`d^\top F d` (see the module) that closes the margins,
    taken to be linear; through ``weights`` it is along the gradient of the loss. Then the first of 25 sizes, over six
    decades, that makes the label the predicted class is refined to ``tolerance``.

    Parameters
    ----------
    images, labels : (B, …), (B,)
        Misclassified images.
    units : Units, optional
        By default the filters of the model's convolutions.
    rankings : mapping of name to (B, K) unit ids, or one such ranking, optional
        Take the step through the top ``k`` units of these; by default, and for k = all, through all units.
    k : int or sequence of int, optional
    through : {"gains", "weights"} or a sequence of both
    retain : (images, labels)
        Images on which the damage is measured. None of them may be among the mistakes or the usual images.
    usual : (N, …)
        Images on which the curvature :math:`F` of the KL is taken, for ``gains``: of the kind that the model meets.
    parameters : mapping of name to parameter names, optional
        To compare with: whole parameters that are moved instead of units, along the gradient.
    loss : str or callable
        Whose gradient is the direction through ``weights``.
    max_relative_step : float
        Longest step, as a multiple of the norm of the weights that it changes; of weights that are all zero, as those
        of a pruned unit are, that of as many usual weights of their layers.
    image_ids : sequence, optional
        Ids for the column ``image``.

    Returns
    -------
    DataFrame
        One row per image, ranking, k and way: ``corrected``; ``step``, the norm of the change of the weights, and
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
    units = Units.of(model) if units is None else units
    ways = [through] if isinstance(through, str) else list(through)
    rankings = {"all": np.arange(len(units))[None].repeat(len(images), 0)} if rankings is None else rankings
    rankings = rankings if isinstance(rankings, Mapping) else {"ranking": rankings}
    rankings = {name: check_ids(ids, len(units)) for name, ids in rankings.items()}
    ks = [len(units)] if k is None else np.atleast_1d(k).tolist()
    _check_options(units, rankings, ks, ways, usual)
    check_positive(max_relative_step=max_relative_step, tolerance=tolerance)
    if retain is None:
        raise ValueError("no retain images: give retain=(images, labels), on which the damage is measured")
    for ids in rankings.values():
        check_batch(model, images, labels, units, ids)
    image_ids = distinct(image_ids, len(images)).tolist()
    check_inputs(model, *retain, what="retain images")
    check_mistakes(model, (images, labels), image_ids)
    refuse_overlap(retain[0], images)
    if usual is not None:
        check_inputs(model, usual, usual.new_zeros(len(usual), dtype=torch.long), what="usual images")
        refuse_overlap(retain[0], usual, "usual images")
    curvature = Curvature.of(model, usual, units) if "gains" in ways else None
    search = _Search(model, units, retain, usual, curvature, get_loss(loss), max_relative_step, tolerance)
    rows: list[dict] = []
    with preserved(model):
        for b, image_id in enumerate(tqdm(image_ids, unit="image", delay=2, disable=not progress)):
            x, y = images[b : b + 1], labels[b : b + 1]
            of_image = {"image": image_id, "label": int(y)}
            gradient = search.gradient(x, y) if "weights" in ways or parameters else {}
            found: dict[tuple, dict] = {}  # all units are the same whatever the ranking
            for way, count, name in product(ways, ks, rankings):
                ids = tuple(range(count)) if count == len(units) else tuple(rankings[name][b, :count].tolist())
                if (way, ids) not in found:
                    line = search.by_gains(x, y, ids) if way == "gains" else search.by_gradient(x, y, gradient, ids)
                    found[way, ids] = search.measure(*line)
                rows.append(of_image | {"ranking": name, "k": count, "through": way} | found[way, ids])
            for name, whole in (parameters or {}).items():
                cost = search.measure(*search.by_gradient(x, y, gradient, (), whole))
                rows.append(of_image | {"ranking": name, "k": 0, "through": "weights"} | cost)
    return pd.DataFrame(rows)


@dataclass
class _Search:
    """Finds the smallest step that corrects an image, and measures it on the retain images."""

    model: nn.Module
    units: Units
    retain: tuple[Tensor, Tensor]
    usual: Tensor | None
    curvature: Curvature | None
    loss: Loss
    longest: float
    tolerance: float

    def __post_init__(self) -> None:
        self.maps = unit_maps(self.units)
        self.before = logits_of(self.model, self.retain[0]).double().log_softmax(dim=1)

    def gradient(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Of the loss of one image, to every parameter."""
        return {name: g[0] for name, g in parameter_saliency(self.model, x, y, self.loss, signed=True).items()}

    def by_gradient(
        self, x: Tensor, y: Tensor, gradient: Mapping[str, Tensor], ids: Sequence[int], whole: Sequence[str] = ()
    ) -> tuple:
        """Line along the gradient of the loss through the units, or through whole parameters, and the size on it."""
        mask = {name: torch.ones_like(self.model.get_parameter(name), dtype=torch.bool) for name in whole}
        mask |= self._mask(ids)
        delta = {name: -torch.where(where, gradient[name], 0).double() for name, where in mask.items()}
        line, length = self._line(delta, mask)
        return line, length, self._smallest(x, y, line)

    def by_gains(self, x: Tensor, y: Tensor, ids: Sequence[int]) -> tuple:
        """Line of least curvature that closes the margins, and the size on it.

        Of lines for several dampings, and one with the margins linear at the end of the best, that of least KL on the
        usual images: where the curvature is nearly zero, it does not hold for long.
        """
        ids, mask, before = list(ids), self._mask(ids), logits_of(self.model, self.usual)
        own = self.curvature if len(ids) == len(self.units) else Curvature(self.curvature.rows[:, ids])
        found: list[tuple] = [(np.inf, ({}, 0.0, np.inf), 1, torch.zeros(len(self.units)).to(own.rows))]
        unmoved = margins(self.model, x, y, self.units)
        for factor in (*_CAUTION, None):
            _, _, again, start = min(found, key=lambda each: each[0])
            gaps, slopes = (v[0] for v in (unmoved if factor else margins(self.model, x, y, self.units, start)))
            needs = (slopes @ start) * (factor is None) - gaps
            factor, steps = factor or again, torch.zeros_like(start)
            steps[ids] = own.correction(slopes[:, ids], needs, damping=factor * own.damping)
            delta = changes(self.model, self.maps, steps)
            line, length = self._line(delta, mask)
            size = self._smallest(x, y, line)
            if np.isfinite(size):
                with shifted(self.model, line, size):
                    kl = float(divergences(before, logits_of(self.model, self.usual)).mean())
                found.append((kl, (line, length, size), factor, steps * (size * length / _norm(delta))))
        return min(found, key=lambda each: each[0])[1]

    def _mask(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Where the units lie in their parameters."""
        masks = {name: torch.isin(of, torch.tensor(ids, dtype=torch.long)) for name, of in self.maps.items()}
        whole = {name: self.model.get_parameter(name) for name in masks}
        return {name: mask.to(whole[name].device).expand_as(whole[name]) for name, mask in masks.items() if mask.any()}

    def _line(self, delta: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """The change made as long as the weights that it may change, and that length; of no change an empty line.

        Weights that are all zero (pruned units) count as long as as many usual ones of their layers.
        """
        weights = {name: self.model.get_parameter(name).detach() for name in mask}
        length = _norm({name: torch.where(mask[name], w, 0) for name, w in weights.items()})
        if not length > 0:
            usual = {name: w.double().square().mean() for name, w in weights.items()}
            length = sum(float(usual[name] * mask[name].sum()) for name in mask) ** 0.5
        size = _norm(delta)
        if not (size > 0 and length > 0):
            return {}, 0.0
        return {name: (delta[name] * (length / size)).to(w) for name, w in weights.items()}, length

    @torch.no_grad()
    def _smallest(self, x: Tensor, y: Tensor, line: dict[str, Tensor]) -> float:
        def corrected(size: float) -> bool:
            with shifted(self.model, line, size):
                return bool(predicts(self.model(x), y).all())

        return smallest(corrected, self.longest, self.tolerance) if line else np.inf

    @torch.no_grad()
    def measure(self, line: dict[str, Tensor], length: float, size: float) -> dict:
        """The step in the columns of the result."""
        if not np.isfinite(size):
            infinite = dict.fromkeys(("step", "relative", "kl_mean", "kl_worst"), np.inf)
            return {"corrected": False, **infinite, "accuracy_lost": np.nan, "others_corrected": np.nan}
        with shifted(self.model, line, size):
            after = logits_of(self.model, self.retain[0]).double().log_softmax(dim=1)
        done = damage(self.before, after, self.retain[1])
        return {
            "corrected": True,
            "step": size * length,
            "relative": size,
            "kl_mean": done["kl_mean"],
            "kl_worst": done["kl_worst"],
            "accuracy_lost": done["accuracy_before"] - done["accuracy_after"],
            "others_corrected": done["corrected"],
        }


def smallest(corrected: Callable[[float], bool], longest: float, tolerance: float = 0.05) -> float:
    """First of the sizes that corrects, to a relative tolerance from above; inf where none does.

    What is corrected only between two neighbouring sizes, a factor of 1.8 apart, and not beyond, can be missed.
    """
    sizes = np.geomspace(longest * 1e-6, longest, _SIZES)
    at = next((i for i, size in enumerate(sizes) if corrected(size)), None)
    if at is None:
        return np.inf
    low, high = sizes[at - 1] if at else longest * 1e-12, sizes[at]
    while high > low * (1 + tolerance):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if corrected(middle) else (middle, high)
    return float(high)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


# ----------------------------------------------------------------------------------------------------------- checks


def check_mistakes(model: nn.Module, mistakes: tuple[Tensor, Tensor], image_ids: Sequence) -> None:
    """Refuse images that are no mistakes."""
    logits = logits_of(model, mistakes[0])
    check_logits(mistakes[1], logits)
    right = [image_ids[b] for b in predicts(logits, mistakes[1]).nonzero()[:, 0].tolist()]
    if right:
        raise ValueError(f"images {right[:5]} are classified correctly: there is nothing to correct, leave them out")


def refuse_overlap(retain: Tensor, others: Tensor, what: str = "mistakes") -> None:
    """Refuse retain images that are among others, by their bytes."""
    if common := {bytes_of(image.cpu()) for image in retain} & {bytes_of(image.cpu()) for image in others}:
        raise ValueError(
            f"{len(common)} of the retain images are among the {what}: the damage is measured on images that the "
            "step never saw, so take them out of one"
        )


def _check_options(
    units: Units, rankings: Mapping[str, np.ndarray], ks: list[int], ways: list[str], usual: Tensor | None
) -> None:
    shortest = min(ids.shape[1] for ids in rankings.values()) if rankings else 0
    for k in ks:
        if not (1 <= k <= shortest or k == len(units)):
            raise ValueError(f"k = {k} is outside 1..{shortest}, the ids given, and is not {len(units)}, all units")
    for way in ways:
        check_known("through", way, ("gains", "weights"))
    if "gains" in ways and (usual is None or not len(usual)):
        raise ValueError("through='gains' needs usual=: images, without labels, on which the curvature is taken")
