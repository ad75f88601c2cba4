"""Patches: the repair of a mistake through a few units, kept in a small file, applied to one model and removed again.

`fit_patch` looks for the smallest step through as few units as will do that corrects the mistakes within a damage
budget on retain images, and says so when there is none. A part of the retain images, and of several mistakes, is held
out: the step and its length are chosen without them, so that what the patch does to them is evidence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pss
from pss.correction import Search, refuse_overlap
from pss.editing import _damage, predicted
from pss.engine.folding import ExplicitNormalization
from pss.engine.state import preserved
from pss.fisher import DAMPING, Weights, damped, digest, fisher_scores
from pss.lines import line_of, predicts, shifted, smallest, unit_mask
from pss.ranking import score
from pss.reference import Reference
from pss.saliency import Loss, check_inputs, get_loss, profile
from pss.storage.fingerprints import fingerprint
from pss.storage.tensors import pack, unpack
from pss.storage.whole import write_whole
from pss.units import Units

Images = tuple[Tensor, Tensor]
BEYOND = 1.1  # how far beyond the boundary a patch goes, so that no rounding takes it back
KS = (1, 2, 5, 10, 25, 50)
SEVERAL = 4  # from this many mistakes on, some are held out


@dataclass(frozen=True)
class Patch:
    """New weights for a few units of one model.

    Attributes
    ----------
    model : str
        Fingerprint of the unpatched model, the only one that the patch goes on.
    units : tuple of int
        Ids of the units.
    names : tuple of str
        Their readable names.
    places : tuple
        Parameter name of each unit, and per dimension the first and last index (None for the whole).
    original, difference : tuple of Tensor
        Weights of each unit without the patch, and what it adds to them.
    corrected : bool
        Whether the mistakes that it was made for are corrected within the budget. Otherwise it holds no units.
    reason : str
        Why not.
    evidence : DataFrame
        Before and after on each ``part``: mistakes, retain, and what was held out of both.
    tried : DataFrame
        What was tried before, per number of units.
    about : dict of str to str
        How it was made, with which versions, and the fingerprint of the units.
    """

    model: str
    units: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    places: tuple = ()
    original: tuple[Tensor, ...] = ()
    difference: tuple[Tensor, ...] = ()
    corrected: bool = False
    reason: str = ""
    evidence: pd.DataFrame = field(default_factory=pd.DataFrame)
    tried: pd.DataFrame = field(default_factory=pd.DataFrame)
    about: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        if not self.units:
            return f"Patch(none: {self.reason})"
        return f"Patch({len(self.units)} units, {self.kilobytes:.1f} kB, for model {self.model[:8]}…)"

    @property
    def kilobytes(self) -> float:
        """Size of the file, in units of 1,024 bytes."""
        return len(self._content()) / 1024

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the new weights into the model, in place; returns it.

        Raises
        ------
        ValueError
            If this is not exactly the model that the patch was made for, or the patch holds no units.
        """
        self._check_not_empty()
        found = fingerprint(model)
        if found != self.model:
            why = (
                "this patch is applied to it already"
                if self.fits(model) and self.is_applied(model)
                else ("if another patch is applied to it, remove that and apply the sum of both")
            )
            raise ValueError(f"the patch is for model {self.model[:8]}…, this one is {found[:8]}…: {why}")
        self._write(model, [o + d for o, d in zip(self.original, self.difference, strict=True)])
        return model

    def remove(self, model: nn.Module) -> nn.Module:
        """Put the original weights back, bit-identical; returns the model.

        Raises
        ------
        ValueError
            If the patch is not applied to this model.
        """
        self._check_not_empty()
        if not (self.fits(model) and self.is_applied(model)):
            raise ValueError("the patch is not applied to this model: its units have other weights")
        self._write(model, self.original)
        return model

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Apply, and remove on leaving."""
        self.apply(model)
        try:
            yield model
        finally:
            self._write(model, self.original)

    def is_applied(self, model: nn.Module) -> bool:
        """Whether the units have exactly the patched weights."""
        pairs = zip(self._views(model), self.original, self.difference, strict=True)
        return all(torch.equal(view, (o + d).to(view.device)) for view, o, d in pairs)

    def fits(self, model: nn.Module) -> bool:
        """Whether the model has parameters of the names and shapes of the units, whatever their values."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if not all(name in parameters for name, _ in self.places):
            return False
        return all(v.shape == o.shape for v, o in zip(self._views(model), self.original, strict=True))

    def __add__(self, other: Patch) -> Patch:
        """Both patches as one; its evidence is not that of either: get it with `measured`.

        Raises
        ------
        ValueError
            If they conflict: made for different models or units, or changing the same units.
        """
        for patch in (self, other):
            patch._check_not_empty()
        if self.model != other.model or self.about.get("units") != other.about.get("units"):
            raise ValueError("the patches conflict: they were made for different models, or different kinds of units")
        if common := sorted(set(self.units) & set(other.units)):
            raise ValueError(
                f"the patches conflict: both change units {common[:10]}; fit one patch for the mistakes of both"
            )
        both = {n: getattr(self, n) + getattr(other, n) for n in ("units", "names", "places", "original", "difference")}
        return replace(self, **both, evidence=pd.DataFrame(), tried=pd.DataFrame())

    def measured(self, model: nn.Module, parts: Mapping[str, Images]) -> Patch:
        """The patch with new evidence: before and after on each part, (images, labels) by name."""
        before = {name: _log_probabilities(model, images) for name, (images, _) in parts.items()}
        with self.applied(model):
            after = {name: _log_probabilities(model, images) for name, (images, _) in parts.items()}
        rows = [_evidence(name, before[name], after[name], labels) for name, (_, labels) in parts.items()]
        return replace(self, evidence=pd.DataFrame(rows))

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        self._check_not_empty()
        content = self._content()
        write_whole(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Patch:
        """Read a patch.

        Raises
        ------
        ValueError
            If the file is damaged, or no patch.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no patch at {path}")
        tensors, held = unpack(path, "patch")
        if not isinstance(held, dict):
            raise ValueError(f"{path.name} is no patch of pss: its header has no 'patch' entry")
        count = range(len(held["units"]))
        places = tuple((name, tuple(map(tuple, index))) for name, index in held.pop("places"))
        frames = {name: pd.DataFrame(held.pop(name)) for name in ("evidence", "tried")}
        plain = {name: tuple(held.pop(name)) for name in ("units", "names")}
        weights = {name: tuple(tensors[f"{i}.{name}"] for i in count) for name in ("original", "difference")}
        return cls(places=places, **plain, **frames, **weights, **held)

    def _content(self) -> bytes:
        plain = {n: getattr(self, n) for n in ("model", "units", "names", "places", "corrected", "reason", "about")}
        frames = {n: getattr(self, n).to_dict("records") for n in ("evidence", "tried")}
        pairs = (("original", self.original), ("difference", self.difference))
        tensors = {f"{i}.{name}": t.cpu().contiguous() for name, own in pairs for i, t in enumerate(own)}
        return pack(tensors, "patch", plain | frames)

    def _views(self, model: nn.Module) -> list[Tensor]:
        return [model.get_parameter(name).data[tuple(slice(*ends) for ends in index)] for name, index in self.places]

    def _write(self, model: nn.Module, values: Sequence[Tensor]) -> None:
        views = self._views(model)
        kept = [view.clone() for view in views]
        try:
            for view, value in zip(views, values, strict=True):
                view.copy_(value)
        except BaseException:  # all units or none
            for view, value in zip(views, kept, strict=True):
                view.copy_(value)
            raise

    def _check_not_empty(self) -> None:
        if not self.units:
            raise ValueError(f"this patch holds no units: {self.reason}")


def fit_patch(
    model: nn.Module,
    mistakes: Images,
    retain: Images,
    units: Units,
    reference: Reference | None = None,
    budget: float = 0.01,
    measure: str = "kl",
    method: str | None = None,
    direction: str | None = None,
    fisher: Weights | None = None,
    damping: float = DAMPING,
    ks: Sequence[int] | None = None,
    rounds: int = 5,
    held_out: float = 0.3,
    loss: str | Loss = "cross_entropy",
    max_relative_step: float = 10.0,
    seed: int = 0,
    progress: bool = True,
) -> Patch:
    r"""Find a few units and a step that correct the mistakes within a damage budget, or say that there are none.

    For k = 1, 2, 5, … units: the smallest step that corrects all mistakes, as in `pss.smallest_correction`, along the
    mean gradient of the mistakes, and where one line does not correct them all, along a line from its best point, up
    to ``rounds`` times. The first k whose damage on the retain images is within the budget is taken.

    Parameters
    ----------
    mistakes, retain : (images, labels)
        Misclassified images, and images that are to stay as they are. They may not overlap.
    reference : Reference, optional
        For the ranking; every method but ``raw`` and ``fisher`` needs it. Dead units come last.
    budget : float
        Most damage allowed, mean over retain images.
    measure : {"kl", "accuracy"}
        ``kl``: :math:`\mathrm{KL}(p_\text{before}\,\|\,p_\text{after})` in nats over those that were right;
        ``accuracy``: share of accuracy lost.
    method : str, optional
        Ranking of the units, by the mean over the mistakes of `pss.ranking.score`. By default what notebook 10 found
        to cost least: ``fisher`` where there is Fisher information, otherwise ``zscore``.
    direction : {"gradient", "fisher"}, optional
        By default ``fisher`` where there is Fisher information.
    fisher, damping
        As in `pss.smallest_correction`; by default that of the reference, if it has any.
    ks : sequence of int, optional
        Numbers of units to try: 1, 2, 5, 10, 25, 50 by default.
    held_out : float
        Share of the retain images, and of four or more mistakes, that only the evidence sees.
    seed : int
        Of the choice of what is held out.

    Returns
    -------
    Patch
        With ``corrected`` False, a ``reason`` and no units where there is none.

    Raises
    ------
    ValueError
        If a mistake is none, is among the retain images, none of these is right, the reference is of another model,
        units or loss, or an option is not one of those above.
    """
    ks = [k for k in KS if k <= len(units)] if ks is None else ks
    method = method or ("zscore" if fisher is None else "fisher")
    direction = direction or ("gradient" if fisher is None else "fisher")
    _check_fit(mistakes, retain, units, budget, measure, direction, fisher, held_out, ks, rounds, max_relative_step)
    check_inputs(model, *mistakes, units, "mistakes")
    if reference is not None:
        reference.check(units, model=model, loss=loss, signed=False)
    refuse_overlap(mistakes[0], retain[0])
    rng = np.random.default_rng(seed)
    parts = dict(zip(("mistakes", "mistakes held out"), _split(mistakes, held_out, rng, SEVERAL), strict=True))
    parts |= dict(zip(("retain", "retain held out"), _split(retain, held_out, rng, 2), strict=True))
    (images, labels), loss = parts["mistakes"], get_loss(loss)
    tried, found = [], None
    with preserved(model):
        Search(model, retain, max_relative_step, 0.05).check_wrong(*mistakes, list(range(len(mistakes[0]))))
        order = _order(model, images, labels, units, reference, method, fisher, damping, loss)
        names = [layer.parameter for layer in units.layers]
        curvature = damped(fisher, names, damping) if direction == "fisher" else None
        before = _log_probabilities(model, parts["retain"][0])
        if not predicts(before, parts["retain"][1]).any():
            raise ValueError("none of the retain images is classified correctly: there is nothing to keep, give others")
        for k in tqdm(sorted(set(ks)), unit="k", delay=2, disable=not progress):
            mask = unit_mask(model, units, order[:k])
            delta = _correct(model, images, labels, mask, curvature, loss, rounds, max_relative_step)
            tried.append({"k": k, "corrected": delta is not None, **_damage_of(model, delta, before, *parts["retain"])})
            if delta is not None and tried[-1][measure] <= budget:
                found = (order[:k], delta)
                break
    about = _about(model, units, budget, measure, method, direction, damping, seed)
    about |= {"mistakes": _digest(mistakes), "retain": _digest(retain)}
    base = Patch(about.pop("model"), tried=pd.DataFrame(tried), about=about)
    if found is None:
        return replace(base, reason=_reason(tried, measure, budget, len(images)))
    patch = replace(base, corrected=True, **_weights(model, units, *found))
    return patch.measured(model, {name: part for name, part in parts.items() if len(part[0])})


def _correct(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    mask: dict[str, Tensor],
    curvature: Weights | None,
    loss: Loss,
    rounds: int,
    max_relative_step: float,
) -> dict[str, Tensor] | None:
    """Change of the masked parameters that corrects all images, None if none is found."""
    total = {name: torch.zeros_like(model.get_parameter(name)) for name in mask}
    for _ in range(rounds):
        with shifted(model, total), torch.no_grad():
            line = line_of(model, _mean_gradient(model, images, labels, mask, loss), 0, mask, curvature)
            if line is None:
                return None
            losses: dict[float, float] = {}

            def corrected(sizes: Tensor, line=line, losses=losses) -> Tensor:  # (1, S)
                hits = []
                for size in sizes[0].tolist():
                    with shifted(model, line.delta, size):
                        logits = model(images)
                    losses[size] = float(loss(logits, labels).mean())
                    hits.append(bool(predicts(logits, labels).all()))
                return torch.tensor([hits])

            size = smallest(corrected, 1, max_relative_step)[0]
            done = np.isfinite(size)
            if done:
                size = size * BEYOND if bool(corrected(torch.tensor([[size * BEYOND]])).all()) else size
            else:
                size = min((s for s in losses if np.isfinite(losses[s])), key=losses.get, default=0.0)
        total = {name: t + size * line.delta[name] for name, t in total.items()}
        if done:
            break
    with shifted(model, total), torch.no_grad():
        return total if bool(predicts(model(images), labels).all()) else None


def _mean_gradient(model: nn.Module, images: Tensor, labels: Tensor, names: Sequence[str], loss: Loss) -> Weights:
    """Of the images that are wrong now, (1, *shape) by parameter name."""
    wrong = predicted(model(images)) != labels
    with preserved(model), torch.enable_grad(), ExplicitNormalization():
        model.requires_grad_(False)
        parameters = [model.get_parameter(name).requires_grad_() for name in names]
        total = loss(model(images[wrong]), labels[wrong]).mean()
        found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return {name: g[None] for name, g in zip(names, found, strict=True)}


def _order(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    units: Units,
    reference: Reference | None,
    method: str,
    fisher: Weights | None,
    damping: float,
    loss: Loss,
) -> list[int]:
    """Unit ids, best first, by the mean score over the images; dead units last."""
    if method == "fisher":
        if fisher is None:
            raise ValueError("method 'fisher' needs fisher=: pss.fisher_diagonal(model, reference set, units)")
        scores = fisher_scores(model, images, labels, units, fisher, damping, loss)
    else:
        scores = score(profile(model, images, labels, units, loss), reference, method)
    scores = scores.mean(dim=0)
    if reference is not None:
        scores = scores.masked_fill(reference.dead.to(scores.device), -torch.inf)
    return scores.argsort(descending=True, stable=True).tolist()


def _weights(model: nn.Module, units: Units, ids: Sequence[int], delta: Weights) -> dict[str, tuple]:
    places, original, difference = [], [], []
    for unit in ids:
        number, j = units.locate(unit)
        layer = units.layers[number]
        index = layer.index(j)
        places.append((layer.parameter, tuple((s.start, s.stop) for s in index)))
        original.append(units.view(model, unit).detach().cpu().clone())
        difference.append(delta[layer.parameter][index].cpu().clone())
    names = tuple(units.name(unit) for unit in ids)
    both = {"original": tuple(original), "difference": tuple(difference)}
    return {"units": tuple(ids), "names": names, "places": tuple(places), **both}


def _damage_of(
    model: nn.Module, delta: Weights | None, before: Tensor, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """Damage to the retain images, under the names that ``measure`` takes; infinite without a step."""
    if delta is None:
        return {"kl": np.inf, "accuracy": np.inf}
    with shifted(model, delta):
        found = _damage(before, _log_probabilities(model, images), labels)
    return {"kl": found["kl_mean"], "accuracy": found["accuracy_before"] - found["accuracy_after"]}


def _evidence(part: str, before: Tensor, after: Tensor, labels: Tensor) -> dict:
    damage = _damage(before, after, labels)
    kept = ("accuracy_before", "accuracy_after", "still_right", "kl_mean", "kl_worst")
    return {"part": part, "n": len(labels), **{name: damage[name] for name in kept}}


def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    with preserved(model), torch.no_grad():
        return torch.cat([model(part).double().log_softmax(dim=1) for part in images.split(256)])


def _split(part: Images, share: float, rng: np.random.Generator, least: int) -> tuple[Images, Images]:
    """What is worked with and what is held out, the latter empty where there are fewer than ``least``."""
    images, labels = part
    order = rng.permutation(len(images))
    held = 0 if len(images) < least or share == 0 else min(max(1, round(share * len(images))), len(images) - 1)
    used, rest = (torch.as_tensor(np.sort(at).copy(), device=images.device) for at in (order[held:], order[:held]))
    return (images[used], labels[used]), (images[rest], labels[rest])


def _reason(tried: list[dict], measure: str, budget: float, count: int) -> str:
    ks = ", ".join(str(row["k"]) for row in tried)
    if not any(row["corrected"] for row in tried):
        all_of_them = f"all {count} mistakes" if count > 1 else "the mistake"
        return f"no step within the cap through the top {ks} units corrects {all_of_them}"
    best = min((row for row in tried if row["corrected"]), key=lambda row: row[measure])
    damage = f"{measure} {best[measure]:.3g} with {best['k']} units (of {ks} tried)"
    return f"the least damage, {damage}, is over the budget {budget:g}"


def _about(model: nn.Module, units: Units, *how: object) -> dict[str, str]:
    names = ("budget", "measure", "method", "direction", "damping", "seed")
    versions = {"pss": pss.__version__, "torch": torch.__version__}
    made = {name: str(value) for name, value in zip(names, how, strict=True)}
    return {"model": fingerprint(model), "units": units.fingerprint, **made, **versions}


def _digest(images: Images) -> str:
    """Checksum of images and labels."""
    return hashlib.sha256("".join(digest(part) for part in images).encode()).hexdigest()


def _check_fit(
    mistakes: Images,
    retain: Images,
    units: Units,
    budget: float,
    measure: str,
    direction: str,
    fisher: Weights | None,
    held_out: float,
    ks: Sequence[int],
    rounds: int,
    max_relative_step: float,
) -> None:
    for what, (images, labels), least in (("mistakes", mistakes, 1), ("retain images", retain, 2)):
        if len(images) != len(labels) or len(images) < least:
            raise ValueError(f"{len(images)} {what} and {len(labels)} labels: give as many, and at least {least}")
    if measure not in ("kl", "accuracy"):
        raise ValueError(f"unknown measure {measure!r}: expected 'kl' or 'accuracy'")
    if direction not in ("gradient", "fisher") or (direction == "fisher" and fisher is None):
        raise ValueError(
            f"direction {direction!r}: expected 'gradient', or 'fisher' with fisher= from pss.fisher_diagonal"
        )
    if not (np.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget must be zero or positive, not {budget}: it is the {measure} allowed on retain images")
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: expected at least 1")
    if not (np.isfinite(max_relative_step) and max_relative_step > 0):
        raise ValueError(f"max_relative_step must be positive and finite, not {max_relative_step}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out = {held_out} is outside [0, 1): it is the share of images only the evidence sees")
    if not ks or not all(1 <= k <= len(units) for k in ks):
        raise ValueError(f"ks = {tuple(ks)}: expected numbers of units in 1..{len(units)}")
