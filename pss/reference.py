r"""What is usual for each unit, measured on a validation set, and how unusual a new profile is.

Two standards are offered side by side. The z-score :math:`\hat s = (\bar s - \mu) / \sigma` (Levin et al. 2022,
section 2.1) measures distance in deviations. Peaks over threshold (Wang and Sato 2023, section 3) fits a generalized
Pareto distribution to the excesses over a high quantile :math:`u` and measures the tail probability

.. math:: P(\bar S \ge \bar s) = (n_u / n)\,(1 + \xi (\bar s - u) / \beta)^{-1/\xi},

which means the same for every unit, however heavy its tail. Below the threshold the probability is the empirical
one, so that every unit has a rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pss
from pss import evt
from pss.saliency import Loss
from pss.storage.fingerprints import fingerprint, name_of
from pss.storage.folder import blocks
from pss.storage.tensors import load_tensors, pack, unpack
from pss.storage.whole import write_whole
from pss.units import Units

GRID = 101  # quantiles kept per unit below the threshold: the empirical tail to about 1%
MIN_IMAGES = 20
_TAIL = ("threshold", "xi", "scale", "fitted", "n_excess", "mean_excess", "quantiles")  # all of them, or none
_FISHER = "fisher."  # before a parameter's name, in a file
_PLAIN = ("n", "level", "scale_free", "about")  # of a file, beside its tensors


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
    about : dict of str to str
        What the reference was made of: fingerprints of model, units and data, loss, version.
    fisher : dict of str to Tensor, or None
        Diagonal Fisher information of the same images by parameter name, for the ranking and direction ``fisher``.
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
    about: dict[str, str] = field(default_factory=dict)
    fisher: dict[str, Tensor] | None = None

    @classmethod
    def fit(
        cls,
        profiles: Any,
        level: float = 0.90,
        scale_free: bool = False,
        max_bytes: int = 1 << 27,
        about: dict[str, str] | None = None,
        fisher: Mapping[str, Tensor] | None = None,
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
            its overall gradient size; this takes it out.
        max_bytes : int
            Size of a block; memory in use stays within a few times this.
        fisher : mapping of str to Tensor, optional
            `pss.fisher_diagonal` of the same images, to be kept and saved with the rest.

        Raises
        ------
        ValueError
            If the level is outside (0, 1), there are fewer than 20 images, a profile is not finite, or with
            ``scale_free`` has a negative mean, as signed ones have.
        """
        if not 0 < level < 1:
            raise ValueError(f"level {level} is outside (0, 1): it is the quantile taken as the threshold, as 0.90")
        shape = getattr(profiles, "shape", None)
        if shape is None:
            raise TypeError(f"profiles are a {type(profiles).__name__}: expected a ProfileStore, an array or a tensor")
        if len(shape) != 2 or not shape[1]:
            raise ValueError(f"profiles of shape {tuple(shape)}: expected (N, U), as profile_dataset makes them")
        n = len(profiles)
        if n < MIN_IMAGES:
            raise ValueError(f"a reference needs at least {MIN_IMAGES} images, here are {n}: profile more images")
        sizes = _row_means(profiles, max_bytes) if scale_free else None
        parts = _map_blocks(profiles, max_bytes, level, sizes)
        whole = {key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]}
        about = {**getattr(profiles, "about", {}), **(about or {})}
        return cls(n=n, level=float(level), scale_free=scale_free, about=about, fisher=_whole(fisher), **whole)

    def __len__(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        if self.threshold is None:
            return f"Reference({len(self)} units, mean and deviation only, {int(self.dead.sum())} dead)"
        return (
            f"Reference({len(self)} units, {self.n} images, level {self.level}, "
            f"{int((~self.fitted).sum())} tails not fitted, {int(self.dead.sum())} dead)"
        )

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
            raise ValueError(
                "this reference has no tail, only mean and deviation: rank by 'zscore', or fit one with Reference.fit"
            )
        if tail not in ("gpd", "exponential"):
            raise ValueError(f"unknown tail {tail!r}: expected 'gpd' or 'exponential'")
        s = self._prepare(profiles)
        here = self.to(s.device)
        excess = s - here.threshold
        use = here.fitted if tail == "gpd" else torch.zeros_like(here.fitted)
        scale = torch.where(use, here.scale, here.mean_excess)  # where a fit was not possible the tail is exponential
        scale = torch.where(scale > 0, scale, here.std)  # nothing lay above the threshold
        xi, scale = torch.where(use, here.xi, 0.0), torch.where(here.dead, 1.0, scale)
        mass = here.n_excess.clamp(min=1).double() / self.n
        above = above_threshold(excess.clamp(min=0), xi, scale, mass)
        # For many n the share above the threshold is not exactly 1 - level: below, no probability is less than it.
        below = self._log_empirical(s).maximum(mass.log())
        return torch.where(excess > 0, above, below).masked_fill(here.dead, 0)

    def _log_empirical(self, s: Tensor) -> Tensor:
        """Log P(S >= s) below the threshold, linear between the kept quantiles; 0 at and below the smallest."""
        grid = self.quantiles.to(s.device)
        values = s.T.contiguous()
        right = torch.searchsorted(grid, values).clamp(1, grid.shape[1] - 1)  # first quantile at or above s
        low, high = grid.gather(1, right - 1), grid.gather(1, right)
        part = ((values - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
        step = self.level / (grid.shape[1] - 1)
        return torch.log1p(-step * (right - 1 + part)).T

    def _prepare(self, profiles: Tensor) -> Tensor:
        if profiles.ndim != 2 or profiles.shape[1] != len(self):
            raise ValueError(
                f"profiles of shape {tuple(profiles.shape)} do not fit this reference of {len(self)} units: "
                f"expected (B, {len(self)}); were they made with the same units?"
            )
        if not profiles.is_floating_point():
            raise ValueError(f"profiles are {profiles.dtype}: expected floating-point saliencies")
        s = profiles.double()
        return s / _positive(s.mean(dim=1, keepdim=True)) if self.scale_free else s

    def check(self, units: Units, **about: str) -> Reference:
        """Refuse units, a model, data or a loss other than what this reference was fitted with; returns itself.

        What the reference has no record of is not compared (published statistics record nothing).

        Raises
        ------
        ValueError
            Naming every fingerprint that differs.
        """
        if len(units) != len(self):
            raise ValueError(f"the reference has {len(self)} units, the model {len(units)}: fit one for this model")
        if self.fisher is not None and (lacks := {layer.parameter for layer in units.layers} - set(self.fisher)):
            raise ValueError(f"the reference's Fisher information lacks {sorted(lacks)[0]!r}: fit one for these units")
        given = {"units": units.fingerprint, **about}
        other = {k: (self.about[k], v) for k, v in given.items() if k in self.about and str(self.about[k]) != str(v)}
        if other:
            what = "; ".join(f"{k}: reference {a}, given {b}" for k, (a, b) in other.items())
            raise ValueError(f"the reference was fitted with something else ({what}): fit one for this use")
        return self

    def check_for(self, model: nn.Module, units: Units, loss: str | Loss, signed: bool = False) -> Reference:
        """Refuse a model, units, loss, sign or version of pss other than this was fitted with; as `check`."""
        given = {
            "model": lambda: fingerprint(model),
            "loss": lambda: name_of(loss),
            "signed": lambda: bool(signed),
            "pss": lambda: pss.__version__,
        }
        return self.check(units, **{key: value() for key, value in given.items() if key in self.about})

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        tensors |= {f"{_FISHER}{name}": tensor for name, tensor in (self.fisher or {}).items()}
        plain = {"n": self.n, "level": self.level, "scale_free": self.scale_free, "about": self.about}
        content = pack(tensors, "pss", plain)
        write_whole(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike, units: Units | None = None, **about: str) -> Reference:
        """Read a reference of ours, or the published ``ImageNet_val_saliency_stat_<model>_filter_wise.pth``.

        The published files hold mean and deviation only, from a run over ImageNet's validation set; they may predate a
        correction of their program (mean of absolute gradients against absolute mean gradient).

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, holds no such statistics, or `check` with ``units`` and ``about`` says that they are
            of something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no reference at {path}: make one with Reference.fit and save it there")
        published = path.suffix in (".pth", ".pt")
        tensors, plain = _read_published(path) if published else _read_own(path)
        held = {key.removeprefix(_FISHER): tensors.pop(key) for key in list(tensors) if key.startswith(_FISHER)}
        wrong = _what_is_wrong(tensors, plain)
        if wrong:
            raise ValueError(f"{path.name} holds no reference that can be used: {wrong}")
        if published:
            tensors = {key: tensor.double() for key, tensor in tensors.items()}
        reference = cls(**tensors, **plain, fisher=_whole(held or None))
        return reference if units is None else reference.check(units, **about)

    def to(self, device: torch.device | str) -> Reference:
        """Copy on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        held = self.fisher and {name: tensor.to(device) for name, tensor in self.fisher.items()}
        return replace(self, fisher=held, **{key: tensor.to(device) for key, tensor in moved.items()})


def _whole(fisher: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Fisher information that is one: mean squares, finite."""
    for name, tensor in (fisher or {}).items():
        if not (tensor.isfinite() & (tensor >= 0)).all():
            raise ValueError(f"the Fisher information of {name!r} is negative or not finite: it is a mean of squares")
    return None if fisher is None else dict(fisher)


def _read_published(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and deviation of the first paper's files, and the plain values that they lack."""
    held = load_tensors(path)
    if not isinstance(held, dict) or not {"mean", "std"} <= held.keys():
        raise ValueError(f"{path.name} holds no published statistics: expected a dict with 'mean' and 'std'")
    about = {"source": path.name}
    return {key: held[key] for key in ("mean", "std")}, {"n": 0, "level": 0.9, "scale_free": False, "about": about}


def _read_own(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and plain values as `Reference.save` wrote them."""
    tensors, plain = unpack(path, "pss")
    if plain is None:
        raise ValueError(f"{path.name} is no reference of pss: its header has no 'pss' entry")
    if not isinstance(plain, dict) or set(plain) != set(_PLAIN) or not isinstance(plain["about"], dict):
        raise ValueError(f"{path.name} is no reference of pss: expected {', '.join(_PLAIN)} in its header")
    return tensors, plain


def _what_is_wrong(tensors: dict[str, Any], plain: dict[str, Any]) -> str:
    """Say what keeps these from being a reference; empty where nothing does."""
    known = {f.name for f in fields(Reference)} - {*_PLAIN, "fisher"}
    needed = {"mean", "std", *_TAIL} if len(tensors) > 2 else {"mean", "std"}
    if not needed <= set(tensors) <= known:
        return f"it lacks {sorted(needed - set(tensors))} and has {sorted(set(tensors) - known)} too much"
    mean = tensors["mean"]
    count = mean.numel() if isinstance(mean, Tensor) else np.size(mean)
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if shape is None or shape[:1] != (count,) or len(shape) != (2 if key == "quantiles" else 1):
            found = type(tensor).__name__ if shape is None else shape
            return f"{key!r} is {found}, expected one number for each of {count} units"
    for key in {"mean", "std", "threshold", "quantiles", "mean_excess"} & set(tensors):
        if not tensors[key].isfinite().all():
            return f"{key!r} is not finite for {int((~tensors[key].isfinite()).sum())} units"
    if "fitted" in tensors and (tensors["fitted"].dtype != torch.bool or not plain["n"] >= MIN_IMAGES):
        return f"'fitted' is {tensors['fitted'].dtype}, n = {plain['n']}; expected torch.bool, and n >= {MIN_IMAGES}"
    return ""


def _fit_block(block: np.ndarray, level: float, sizes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Statistics of a block of units, (N, b) to arrays of length b."""
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
    return {
        "mean": mean,
        "std": std,
        "threshold": threshold,
        "quantiles": np.ascontiguousarray(quantiles),
        "n_excess": n_excess,
        "mean_excess": np.nansum(excess, axis=1) / np.maximum(n_excess, 1),
        "xi": fit.xi.numpy(),
        "scale": fit.scale.numpy(),
        "se_xi": fit.se_xi.numpy(),
        "se_scale": fit.se_scale.numpy(),
        "fitted": fit.fitted.numpy(),
    }


def _map_blocks(profiles: Any, max_bytes: int, level: float, sizes: np.ndarray | None) -> list[dict[str, np.ndarray]]:
    """Apply `_fit_block` to every block of columns; a dask array computes them on its own scheduler."""
    if hasattr(profiles, "dask"):
        import dask

        width = max(1, math.floor(max_bytes / (len(profiles) * profiles.dtype.itemsize)))
        columns = profiles.rechunk({0: -1, 1: width}).to_delayed()[0]
        return list(dask.compute(*[dask.delayed(_fit_block)(c, level, sizes) for c in columns]))
    return [_fit_block(block, level, sizes) for _, block in blocks(profiles, max_bytes)]


def _row_means(profiles: Any, max_bytes: int) -> np.ndarray:
    """Mean over units of every profile, shape (N,): what `scale_free` divides by."""
    if hasattr(profiles, "dask"):
        return _positive(np.asarray(profiles.astype(np.float64).mean(axis=1)))
    total = sum(block.sum(axis=1, dtype=np.float64) for _, block in blocks(profiles, max_bytes))
    return _positive(total / profiles.shape[1])


def _positive(size: Any) -> Any:
    """An image whose gradient vanishes altogether keeps its zeros; means of signed gradients are no size."""
    if (size < 0).any():
        raise ValueError(
            "scale_free divides each profile by its mean over units, which is negative for some image: take profiles "
            "of absolute gradients, signed=False"
        )
    return size + (size == 0)
