"""Every way to rank the units of an image by how unusual their saliency is: a new one is one entry of `RANKINGS`.

All rank the same population, every unit of the model, so that their tops can be compared. Dead units (constant over
the reference set) come last whatever the method. A ranking knows profiles and their reference only, so it serves every
quantity that a profile can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from pss.engine.checks import check_count, check_finite, check_known
from pss.reference import Reference
from pss.units import Units


@dataclass(frozen=True)
class Question:
    """What a ranking may look at; see `rank`."""

    profiles: Tensor
    reference: Reference | None
    units: Units | None
    generator: torch.Generator
    match: str
    k: int


@dataclass(frozen=True)
class Ranking:
    """One way to rank.

    Attributes
    ----------
    label, color : str
        How figures show it; the colours are those of Okabe and Ito and their shades.
    score : callable ``(Question) -> (B, U)``
        float64, larger is more anomalous; ``-inf`` for a unit that does not take part.
    needs : tuple of str
        Of "reference", "scale_free" (that it is fitted so), "units".
    tail : str
        The tail of the reference whose probability it ranks by: "gpd" or "exponential".
    differentiable : bool
        A standardization, one number for each unit that follows its saliency: `pss.input_saliency` can differentiate
        it, `pss.nearest` compare by it, and a mean over images ranks for all of them.
    """

    label: str
    color: str
    score: Callable[[Question], Tensor]
    needs: tuple[str, ...] = ("reference",)
    tail: str = ""
    differentiable: bool = False


def rank(
    profiles: Tensor,
    reference: Reference | None = None,
    method: str = "zscore",
    k: int | None = None,
    units: Units | None = None,
    generator: torch.Generator | int = 0,
    match: str = "pot",
) -> Tensor:
    """Ids of the k most anomalous units of every image, most anomalous first.

    Every method takes profiles of every quantity. Which unit is broken: `rank_together`, over the images that went
    wrong, of ``of="output", signed=True`` by ``layer_relative_zscore``, with a reference from before. It names nearly
    all planted faults first, and its scores stay low where nothing is broken; rankings of the gradient find less than
    half, ``pot`` fewer than ``scale_free_zscore``. Which to prune: ``raw`` of the signed gain of the margin
    (``of="gain", signed=True, loss="logit_difference"``). Which to fine-tune: ``zscore`` corrects at less damage than
    random units, the last layer at less still.

    Parameters
    ----------
    profiles : Tensor, shape (B, U)
    reference : Reference, optional
        Needed by every method but ``raw``, ``random`` and those of the last stage; where given, dead units
        come last.
    method : str
        ``zscore`` (Levin et al. 2022), ``abs_zscore`` (the explainer's), ``layer_relative_zscore`` (that over its mean
        in the other units of the layer: what a fault does to all that comes after it is taken out, and alone in its own
        layer it stays), ``pot`` (Wang and Sato 2023), ``exponential`` (POT with the shape held at zero),
        ``scale_free_zscore`` and ``scale_free_pot`` (the same, only by a reference fitted with ``scale_free=True``),
        ``ratio`` (to the reference mean), ``raw`` (saliency itself), ``random_last_stage`` and ``last_stage_raw`` (the
        papers' conv5 heuristic: units of the last stage at random, or by raw saliency), ``random``,
        ``layer_matched_random`` (random units with as many in each layer as the top k by ``match``), ``lowest_zscore``
        (the lowest z-scores first).
    k : int, optional
        How many; all units by default.
    units : Units, optional
        Needed by ``layer_relative_zscore``, ``random_last_stage``, ``last_stage_raw`` and ``layer_matched_random``.
    generator : torch.Generator or int
        Source of randomness, or its seed.
    match : str
        Method whose layers ``layer_matched_random`` copies.

    Returns
    -------
    Tensor of int64, shape (B, k)

    Raises
    ------
    ValueError
        For an unknown method, a k outside 1..U, a missing reference or units, or a profile that is not finite.
    """
    scores = score(profiles, reference, method, generator, units, match, k)
    k = scores.shape[1] if k is None else k
    take_part = scores > -torch.inf
    if (few := take_part.sum(dim=1) < k).any():
        raise ValueError(f"k = {k} is more than the {int(take_part[few][0].sum())} units that {method!r} ranks")
    return _first(dead_last(scores, reference), k)


def dead_last(scores: Tensor, reference: Reference | None) -> Tensor:
    """The scores, and for dead units one after all that are alive, before what takes no part, finite also as a sum."""
    if reference is None:
        return scores
    return scores.masked_fill(reference.dead.to(scores.device) & (scores > -torch.inf), -1e300)


def _first(scores: Tensor, k: int) -> Tensor:
    """Ids of the k highest scores of every row; of equal ones the smaller id comes first."""
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)  # says nothing of the order of equal ones
    tied, ids = (values[:, 1:] == values[:, :-1]).any(dim=1), ids[:, :k]
    ids[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids


def rank_together(
    profiles: Tensor | Sequence[Tensor],
    reference: Reference | Sequence[Reference | None] | None = None,
    method: str | Sequence[str] = "zscore",
    k: int = 10,
    units: Units | None = None,
) -> pd.DataFrame:
    """One ranking for a group of images, because a cause is seen in many of them; of several quantities at once too.

    A unit's score is the mean of its scores over the images. Several quantities, as gradient, gain and output, rank for
    themselves and name their next unit in turns, the first quantity first. So a unit is near the top that stands out in
    any of them, and their scores need not mean the same: the far tail of one would otherwise hide the others. Combined
    by tail probabilities, the smaller one or the product, output and gain find fewer broken filters (notebook 13).

    Parameters
    ----------
    profiles : Tensor, shape (B, U), or a sequence of these
        Of the same images, a tensor for each quantity.
    reference : Reference, or a sequence of as many
    method : str, or a sequence of as many
        As in `rank`.
    units : Units, optional
        As in `rank`; and for the names.
    k : int
        An image counts for a unit that is among its own first k.

    Returns
    -------
    DataFrame
        All units, most anomalous first: ``unit``, ``name`` (with ``units``), ``quantity`` (the place in the sequence of
        the one that named it), ``score`` (by that one), ``images`` (share that have it among their own first k).

    Raises
    ------
    ValueError
        As `rank`, or if there are not as many references and methods as profiles.
    """
    several = [profiles] if isinstance(profiles, Tensor) else list(profiles)
    usual = [reference] * len(several) if reference is None or isinstance(reference, Reference) else list(reference)
    methods = [method] * len(several) if isinstance(method, str) else list(method)
    if not several or {len(several)} != {len(usual), len(methods)}:
        what = f"{len(several)} quantities, {len(usual)} references and {len(methods)} methods"
        raise ValueError(f"{what}: give one for each")
    asked = zip(several, usual, methods, strict=True)
    scores = torch.stack([dead_last(score(values, its, how, units=units), its) for values, its, how in asked])
    means = scores.mean(dim=1)
    turns, quantity = _turns(means).min(dim=0)
    of_images = _first(-_turns(scores).amin(dim=0), k)
    columns = {
        "unit": torch.arange(len(turns)),
        "quantity": quantity,
        "score": means.gather(0, quantity[None])[0],
        "images": torch.zeros_like(scores[0]).scatter_(1, of_images, 1.0).mean(dim=0),
    }
    order = turns.argsort().cpu()
    table = pd.DataFrame({name: values.cpu()[order].numpy() for name, values in columns.items()})
    if units is not None:
        table.insert(1, "name", [units.name(unit) for unit in order.tolist()])
    return table


def _turns(scores: Tensor) -> Tensor:
    """When each of Q quantities names each unit, if they name their next one in turns; (Q, …, U)."""
    places = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    first = torch.arange(len(scores), device=scores.device).view(-1, *[1] * (scores.ndim - 1))
    return len(scores) * places + first


def score(
    profiles: Tensor,
    reference: Reference | None,
    method: str,
    generator: torch.Generator | int = 0,
    units: Units | None = None,
    match: str = "pot",
    k: int | None = None,
) -> Tensor:
    """Number that a method ranks by, float64 (B, U): larger is more anomalous.

    For ``pot`` and ``exponential`` the negative log tail probability, and beyond the end of a bounded tail, where the
    probability is zero, by how far beyond; ``-inf`` for units that take no part. Arguments and errors as of `rank`.
    """
    if not isinstance(profiles, Tensor):
        raise TypeError(f"profiles are a {type(profiles).__name__}: expected a tensor (B, U), as pss.profile gives it")
    if profiles.ndim != 2:
        raise ValueError(f"profiles of shape {tuple(profiles.shape)}: expected (B, U); of one image profile[None]")
    check_known("method", method, RANKINGS)
    entry, count = RANKINGS[method], profiles.shape[1]
    for what, given in (("the reference", reference), ("units=", units)):
        if given is not None and len(given) != count:
            raise ValueError(f"profiles have {count} units, {what} has {len(given)}: they are of different models")
    check_count("k", count if k is None else k, count, "the number of units")
    if "units" in entry.needs and units is None:
        raise ValueError(f"method {method!r} needs units=: pass the Units that the profiles were made with")
    check_finite(profiles)
    if "reference" in entry.needs and reference is None:
        raise ValueError(f"method {method!r} needs a reference: pss.Reference.fit(profiles of a validation set)")
    if "scale_free" in entry.needs and not reference.scale_free:
        raise ValueError(f"method {method!r} needs a reference fitted with scale_free=True: this one is not")
    generator = generator if isinstance(generator, torch.Generator) else torch.Generator().manual_seed(generator)
    return entry.score(Question(profiles.double(), reference, units, generator, match, k or count))


# --- what they rank by ------------------------------------------------------------------------------------------------


def _zscore(q: Question) -> Tensor:
    return q.reference.zscore(q.profiles)


def _layer_relative(q: Question) -> Tensor:
    """Absolute z-scores over the mean of the other units of the layer that are alive; 1 where there are none."""
    z, layers = q.reference.abs_zscore(q.profiles), torch.from_numpy(q.units.layer_ids).to(q.profiles.device)
    alive = torch.bincount(layers, (~q.reference.dead).to(z))
    sums = z.new_zeros(len(z), len(alive)).index_add_(1, layers, z)
    others = (sums[:, layers] - z) / (alive[layers] - 1)
    return z / torch.where(others > 0, others, 1.0)


def _pot(q: Question) -> Tensor:
    return q.reference.tail_score(q.profiles, "gpd")


def _exponential(q: Question) -> Tensor:
    return q.reference.tail_score(q.profiles, "exponential")


def _random(q: Question) -> Tensor:
    return torch.rand(q.profiles.shape, generator=q.generator, dtype=torch.float64).to(q.profiles.device)


def _last_stage(q: Question, scores: Tensor) -> Tensor:
    """The scores, and ``-inf`` for the units of all stages but the last."""
    inside = torch.from_numpy(q.units.stage_ids == len(q.units.stages) - 1).to(scores.device)
    return scores.masked_fill(~inside, -torch.inf)


def _random_last_stage(q: Question) -> Tensor:
    members = q.units.stage_ids == len(q.units.stages) - 1
    draws = torch.rand(len(q.profiles), int(members.sum()), generator=q.generator)
    scores = torch.zeros_like(q.profiles)
    scores[:, members] = -draws.to(scores)
    return _last_stage(q, scores)


def _layer_matched_random(q: Question) -> Tensor:
    """In the place of each of the top k a random unit of its layer, none twice for an image, dead ones last."""
    base = rank(q.profiles, q.reference, q.match, q.k, q.units)
    dead = torch.zeros(len(q.units), dtype=torch.bool) if q.reference is None else q.reference.dead.cpu()
    layers = torch.from_numpy(q.units.layer_ids)[base.cpu()]
    drawn = torch.empty_like(base, device="cpu")
    for row, row_layers in enumerate(layers):
        for layer in row_layers.unique():
            at = (row_layers == layer).nonzero()[:, 0]
            span = q.units.span(int(layer))
            ids = span.start + torch.randperm(span.stop - span.start, generator=q.generator)
            drawn[row, at] = ids[dead[ids].to(torch.uint8).argsort(stable=True)][: len(at)]
    places = -torch.arange(q.k, dtype=torch.float64, device=base.device).expand(base.shape)
    return torch.full_like(q.profiles, -torch.inf).scatter_(1, drawn.to(base.device), places)


_FREE = ("reference", "scale_free")
RANKINGS: dict[str, Ranking] = {  # in the order of legends
    "zscore": Ranking("z-score", "#0072B2", _zscore, differentiable=True),
    "abs_zscore": Ranking("|z-score|", "#56B4E9", lambda q: q.reference.abs_zscore(q.profiles), differentiable=True),
    "layer_relative_zscore": Ranking("|z|, relative to layer", "#7FC8A9", _layer_relative, ("reference", "units")),
    "pot": Ranking("POT (GPD)", "#D55E00", _pot, tail="gpd", differentiable=True),
    "exponential": Ranking("exponential tail", "#E69F00", _exponential, tail="exponential", differentiable=True),
    "raw": Ranking("raw saliency", "#CC79A7", lambda q: q.profiles, (), differentiable=True),
    "ratio": Ranking("ratio to mean", "#009E73", lambda q: q.reference.ratio(q.profiles), differentiable=True),
    "random_last_stage": Ranking("last stage, random", "#8C6D31", _random_last_stage, ("units",)),
    "last_stage_raw": Ranking("last stage, raw", "#882255", lambda q: _last_stage(q, q.profiles), ("units",)),
    "random": Ranking("random", "#777777", _random, ()),
    "layer_matched_random": Ranking("random, same layers", "#333333", _layer_matched_random, ("units",)),
    "lowest_zscore": Ranking("least salient", "#B8B8B8", lambda q: -_zscore(q)),
    "scale_free_zscore": Ranking("z-score, scale-free", "#00324F", _zscore, _FREE, differentiable=True),
    "scale_free_pot": Ranking("POT, scale-free", "#7A2E00", _pot, _FREE, tail="gpd", differentiable=True),
}
