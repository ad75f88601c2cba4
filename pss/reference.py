r"""What is usual for each unit on a validation set, and how unusual a new profile is: z-score, tail probability.

Two standards are offered side by side. The z-score :math:`\hat s = (\bar s - \mu) / \sigma` (Levin et al. 2022,
section 2.1) measures distance in deviations. Peaks over threshold (Wang and Sato 2023, section 3) fits a generalized
Pareto distribution to the excesses over a high quantile :math:`u` and measures the tail probability

.. math:: P(\bar S \ge \bar s) = (n_u / n)\,(1 + \xi (\bar s - u) / \beta)^{-1/\xi},

which means the same for every unit, however heavy its tail. Below the threshold the probability is the empirical
one, so that every unit has a rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pss
from pss import evt
from pss.engine.checks import check_known, check_share, shape_of
from pss.saliency import loss_name
from pss.storage.fingerprints import fingerprint
from pss.storage.references import read_reference, write_reference
from pss.storage.store import map_blocks
from pss.units import Units

GRID = 101  # quantiles kept per unit below the threshold: the empirical tail to about 1%
MIN_IMAGES = 20
_TAIL = ("threshold", "quantiles", "n_excess", "mean_excess", "fitted", "xi", "scale")  # all of them, or none
_TENSORS = ("mean", "std", *_TAIL, "se_xi", "se_scale")
_GPD = ("xi", "scale", "se_xi", "se_scale")  # NaN where a tail is not fitted
_PLAIN = ("n", "level", "scale_free", "provenance")  # of a file, beside its tensors


@dataclass(frozen=True)
class Reference:
    """Statistics of every unit over a reference set; all tensors float64 of shape (U,) unless said otherwise.

    Attributes
    ----------
    mean, std : Tensor
        Mean and unbiased standard deviation.
    n : int
        Number of reference images; 0 where it is not known (published statistics).
    level : float
        The threshold is this quantile.
    threshold : Tensor or None
        None where a reference has no tail (published statistics): then only z-scores can be had.
    xi, scale, se_xi, se_scale : Tensor or None
        Generalized Pareto fit of the excesses, with standard errors; NaN where it was not fitted.
    fitted : Tensor of bool or None
        False for too few or tied excesses. There the tail is taken as exponential.
    n_excess, mean_excess : Tensor or None
        Number of values above the threshold and their mean excess (the scale of the exponential tail).
    quantiles : Tensor or None
        Shape (U, 101): quantiles at evenly spaced levels from 0 to ``level``.
    scale_free : bool
        Whether every profile was first divided by its own mean over units.
    provenance : dict of str to str
        What the reference was made of: fingerprints of model, units and data, loss, version.
    """

    mean: Tensor
    std: Tensor
    n: int = 0
    level: float = 0.90
    threshold: Tensor | None = None
    xi: Tensor | None = None
    scale: Tensor | None = None
    se_xi: Tensor | None = None
    se_scale: Tensor | None = None
    fitted: Tensor | None = None
    n_excess: Tensor | None = None
    mean_excess: Tensor | None = None
    quantiles: Tensor | None = None
    scale_free: bool = False
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no reference: statistics that are missing, of other shapes, or not finite."""
        held = self._tensors()
        missing = [name for name in _TAIL if name not in held]
        if 0 < len(missing) < len(_TAIL):
            raise ValueError(f"a reference with a tail lacks {missing}")
        for name, tensor in held.items():
            shape = shape_of(tensor)
            if len(shape) != (2 if name == "quantiles" else 1) or shape[0] != len(self.mean):
                raise ValueError(f"{name!r} is {shape}, expected one number for each unit, as many as 'mean' has")
            if name not in _GPD and not tensor.isfinite().all():
                raise ValueError(f"{name!r} is not finite for {int((~tensor.isfinite()).sum())} units")
        if not missing and (self.fitted.dtype != torch.bool or not self.n >= MIN_IMAGES):
            raise ValueError(f"'fitted' is {self.fitted.dtype}, n = {self.n}; expected bool, and n >= {MIN_IMAGES}")

    @classmethod
    def fit(
        cls,
        profiles: Any,
        level: float = 0.90,
        scale_free: bool = False,
        max_bytes: int = 1 << 27,
        provenance: Mapping[str, str] | None = None,
    ) -> Reference:
        """Fit the statistics of every unit, a block of units at a time.

        Parameters
        ----------
        profiles : ProfileStore, ndarray, Tensor or dask array, shape (N, U)
            Saliency profiles of the reference images, also larger than memory.
        level : float
            Quantile taken as the threshold, inside (0, 1).
        scale_free : bool
            Divide each profile by its own mean over units first. Most of the heavy tail is one number per image,
            its overall gradient size; this takes it out, and references of other images then rank much the same units
            first (notebook 04). It leaves little that is significant: the tails are light.
        max_bytes : int
            Size of a block; memory in use stays within a few times this.
        provenance : mapping of str to str, optional
            To be recorded beside what a `ProfileStore` says of itself.

        Raises
        ------
        ValueError
            If the level is outside (0, 1), there are fewer than 20 images, a profile is not finite, or with
            ``scale_free`` has a negative mean, as signed ones have.
        """
        check_share("level", level, "the quantile taken as the threshold, as 0.90")
        shape = getattr(profiles, "shape", None)
        if shape is None:
            raise TypeError(f"profiles are a {type(profiles).__name__}: expected a ProfileStore, an array or a tensor")
        if len(shape) != 2 or not shape[1]:
            raise ValueError(f"profiles of shape {tuple(shape)}: expected (N, U), as profile_dataset makes them")
        n = len(profiles)
        if n < MIN_IMAGES:
            raise ValueError(f"a reference needs at least {MIN_IMAGES} images, here are {n}: profile more images")
        sizes = None
        if scale_free:
            sums = map_blocks(partial(np.sum, axis=1, dtype=np.float64), profiles, max_bytes)
            sizes = _positive(sum(sums) / shape[1])
        parts = map_blocks(partial(_fit_block, level=level, sizes=sizes), profiles, max_bytes)
        whole = [torch.from_numpy(np.concatenate(blocks)) for blocks in zip(*parts, strict=True)]
        provenance = {**getattr(profiles, "provenance", {}), **(provenance or {})}
        whole = dict(zip(_TENSORS, whole, strict=True))
        return cls(n=n, level=float(level), scale_free=scale_free, provenance=provenance, **whole)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}

    def __len__(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        what = "mean and deviation only"
        if self.threshold is not None:
            tails = int((~self.fitted).sum())
            what = f"{self.n} images, level {self.level}, {tails} {'tail' if tails == 1 else 'tails'} not fitted"
        return f"Reference({len(self)} units, {what}, {int(self.dead.sum())} dead)"

    @property
    def dead(self) -> Tensor:
        """Units that never changed over the reference images, shape (U,): reported, never ranked first."""
        return ~(self.std > 0)

    def zscore(self, profiles: Tensor) -> Tensor:
        r"""Standardized saliency :math:`(\bar s - \mu) / \sigma`, signed as in the first paper's program; (B, U).

        Zero for dead units. The Japanese explainer writes the absolute value: `abs_zscore`.
        """
        s = self._prepare(profiles)
        safe = torch.where(self.dead, 1.0, self.std).to(s.device)
        z = (s - self.mean.to(s.device)) / safe
        return z.masked_fill(self.dead.to(s.device), 0).to(profiles.dtype)

    def abs_zscore(self, profiles: Tensor) -> Tensor:
        r""":math:`|\bar s - \mu| / \sigma`: a unit far below its mean counts as far above it does; (B, U)."""
        return self.zscore(profiles).abs()

    def ratio(self, profiles: Tensor) -> Tensor:
        r"""Saliency over its reference mean, :math:`\bar s / \mu`; (B, U), zero where the mean is zero."""
        s = self._prepare(profiles)
        mean = self.mean.to(s.device)
        return (s / mean).masked_fill(mean == 0, 0).to(profiles.dtype)

    def log_tail_probability(self, profiles: Tensor, tail: str = "gpd") -> Tensor:
        r"""Natural log of the probability of a saliency at least as large; float64, (B, U).

        Above the threshold from the fitted tail, below it from the reference quantiles; 0 (probability 1) for dead
        units, and ``-inf`` beyond the end of a bounded tail (:math:`\xi < 0`).

        Parameters
        ----------
        profiles : Tensor, shape (B, U)
        tail : {"gpd", "exponential"}
            ``exponential`` takes :math:`\xi = 0` and the mean excess as the scale.
        """
        return self._tail(profiles, tail, evt.log_tail_probability)

    def tail_score(self, profiles: Tensor, tail: str = "gpd") -> Tensor:
        """Finite number to rank by, float64 (B, U): -log p, and beyond a bounded tail by how far beyond its end."""
        return -self._tail(profiles, tail, lambda *of_tail: -evt.tail_score(*of_tail))

    def _tail(self, profiles: Tensor, tail: str, above_threshold: Callable[..., Tensor]) -> Tensor:
        if self.threshold is None:
            raise ValueError("this reference has no tail, only mean and deviation: rank by 'zscore', or fit one")
        check_known("tail", tail, ("gpd", "exponential"))
        s = self._prepare(profiles)
        here = {name: tensor.to(s.device) for name, tensor in self._tensors().items()}
        excess, dead = s - here["threshold"], self.dead.to(s.device)
        use = here["fitted"] if tail == "gpd" else torch.zeros_like(here["fitted"])
        # Where a fit was not possible the tail is exponential, and where nothing lay above the threshold like the rest.
        scale = torch.where(use, here["scale"], here["mean_excess"])
        scale = torch.where(dead, 1.0, torch.where(scale > 0, scale, here["std"]))
        mass = here["n_excess"].clamp(min=1).double() / self.n
        above = above_threshold(excess.clamp(min=0), torch.where(use, here["xi"], 0.0), scale, mass)
        # For many n the share above the threshold is not exactly 1 - level: below, no probability is less than it.
        below = self._log_empirical(s).maximum(mass.log())
        return torch.where(excess > 0, above, below).masked_fill(dead, 0)

    def _log_empirical(self, s: Tensor) -> Tensor:
        """Log P(S >= s) below the threshold, linear between the kept quantiles; 0 at and below the smallest."""
        grid = self.quantiles.to(s.device)
        values = s.T.contiguous()
        right = torch.searchsorted(grid, values).clamp(1, grid.shape[1] - 1)  # first quantile at or above s
        low, high = grid.gather(1, right - 1), grid.gather(1, right)
        part = ((values - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
        return torch.log1p(-self.level / (grid.shape[1] - 1) * (right - 1 + part)).T

    def _prepare(self, profiles: Tensor) -> Tensor:
        if profiles.ndim != 2 or profiles.shape[1] != len(self):
            what = f"profiles of shape {tuple(profiles.shape)} do not fit this reference of {len(self)} units"
            raise ValueError(f"{what}: expected (B, {len(self)}); were they made with the same units?")
        if not profiles.is_floating_point():
            raise ValueError(f"profiles are {profiles.dtype}: expected floating-point saliencies")
        s = profiles.double()
        return s / _positive(s.mean(dim=1, keepdim=True)) if self.scale_free else s

    def check(self, units: Units, **provenance: Any) -> Reference:
        """Refuse units, a model, data or a loss other than what this reference was fitted with; returns itself.

        What the reference has no record of is not compared (published statistics record nothing).

        Parameters
        ----------
        units : Units
        **provenance
            Compared as text with what is recorded: ``model`` (itself, or its fingerprint), ``loss`` (by name, or the
            function), ``signed``, ``data``, ``preprocessing`` and whatever else there is. The version of pss always is.

        Raises
        ------
        ValueError
            Naming every entry that differs.
        """
        if len(units) != len(self):
            raise ValueError(f"the reference has {len(self)} units, the model {len(units)}: fit one for this model")
        given = {"units": units.fingerprint, "pss": pss.__version__, **provenance}
        given = {key: value for key, value in given.items() if key in self.provenance}
        if isinstance(model := given.get("model"), nn.Module):
            given["model"] = fingerprint(model)
        if "loss" in given:
            given["loss"] = loss_name(given["loss"])
        differ = [key for key, value in given.items() if str(value) != str(self.provenance[key])]
        if differ:
            what = "; ".join(f"{key}: reference {self.provenance[key]}, given {given[key]}" for key in differ)
            raise ValueError(f"the reference was fitted with something else ({what}): fit one for this use")
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        write_reference(Path(path), self._tensors(), {name: getattr(self, name) for name in _PLAIN})

    @classmethod
    def load(cls, path: str | os.PathLike, units: Units | None = None, **provenance: Any) -> Reference:
        """Read a reference of ours, or the published ``ImageNet_val_saliency_stat_<model>_filter_wise.pth``.

        The published files hold mean and deviation only, from a run over ImageNet's validation set; they may predate a
        correction of their program (mean of absolute gradients against absolute mean gradient).

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, holds no such statistics, or `check` with ``units`` and ``provenance`` says that
            they are of something else.
        """
        values = read_reference(Path(path), _PLAIN)
        try:
            reference = cls(**values)
        except (TypeError, ValueError) as error:  # the first of names that it lacks, or has too many
            raise ValueError(f"{Path(path).name} holds no reference that can be used: {error}") from error
        return reference if units is None else reference.check(units, **provenance)


def _fit_block(block: np.ndarray, level: float, sizes: np.ndarray | None) -> list[np.ndarray]:
    """Statistics of a block of units, (N, b) to arrays of length b, in the order of their names above."""
    if not np.isfinite(block).all():
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        raise ValueError(f"profiles of images {bad[:10].tolist()} are not finite: leave them out or mend them")
    if sizes is not None:
        block = block / sizes[:, None]
    ordered = np.sort(block.T, axis=1)  # (b, N), each unit's values in a row
    n = ordered.shape[1]
    mean = ordered.mean(axis=1, dtype=np.float64)
    std = np.where(ordered[:, 0] == ordered[:, -1], 0.0, ordered.std(axis=1, dtype=np.float64, ddof=1))
    positions = np.linspace(0, level, GRID) * (n - 1)
    left = np.floor(positions).astype(int)
    low = ordered[:, left].astype(np.float64)
    quantiles = low + (positions - left) * (ordered[:, np.minimum(left + 1, n - 1)] - low)
    threshold = quantiles[:, -1]
    excess = ordered[:, left[-1] + 1 :] - threshold[:, None]  # all that can lie above
    excess[excess <= 0] = np.nan
    fit = evt.fit_gpd(torch.from_numpy(excess))
    n_excess = np.isfinite(excess).sum(axis=1)
    mean_excess = np.nansum(excess, axis=1) / np.maximum(n_excess, 1)
    of_tail = [getattr(fit, name).numpy() for name in ("fitted", *_GPD)]
    return [mean, std, threshold, np.ascontiguousarray(quantiles), n_excess, mean_excess, *of_tail]


def _positive(size: Any) -> Any:
    """An image whose gradient vanishes altogether keeps its zeros; means of signed gradients are no size."""
    if (size < 0).any():
        what = "scale_free divides each profile by its mean over units, which is negative for some image"
        raise ValueError(f"{what}: take profiles of sizes, signed=False")
    return size + (size == 0)
