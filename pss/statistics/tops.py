"""What the first units of a ranking are: significant or not, and in which stages they lie."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import torch
from scipy.stats import false_discovery_control
from torch import Tensor

from pss.engine.checks import check_count, check_share
from pss.units import Units


def fdr_significant(log_p: Tensor, n: int, q: float = 0.05, dependent: bool = False) -> Tensor:
    """Units whose tail probability is significant at false-discovery rate q; bool, (B, U).

    Benjamini and Hochberg (1995) over the units of each image. What a fitted tail says below 1 / (n + 1) no n images
    have shown, and beyond the end of a bounded one it says zero: such a probability counts as 1 / (n + 1), so that no
    unit is significant by extrapolation alone.

    Parameters
    ----------
    log_p : Tensor, shape (B, U)
        From `Reference.log_tail_probability`.
    n : int
        Number of reference images, ``reference.n``.
    q : float
    dependent : bool
        Take Benjamini and Yekutieli (2001), valid under any dependence between units, which do share their image's
        gradient size.
    """
    check_count("n", n, sys.maxsize, "the number of reference images")
    check_share("q", q, "the share of false discoveries allowed, as 0.05")
    if log_p.isnan().any():
        raise ValueError("log_p has NaN entries: leave the images out whose profiles are not finite")
    if (log_p > 0).any():
        raise ValueError("log_p has positive entries: expected logarithms, as log_tail_probability gives them")
    p = log_p.double().exp().clamp(min=1 / (n + 1)).cpu().numpy()
    adjusted = false_discovery_control(p, axis=1, method="by" if dependent else "bh")
    return torch.from_numpy(adjusted <= q).to(log_p.device)


def stage_shares(ids: Tensor, units: Units) -> pd.DataFrame:
    """Share of each stage among the top units, beside the share of all units that it holds (the prior).

    Parameters
    ----------
    ids : Tensor of int, shape (B, k)
    units : Units

    Returns
    -------
    DataFrame
        Index stage; ``share`` (mean over images, 0..1), ``error`` (its standard error over images), ``prior``.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}: expected (B, k), as pss.rank gives them")
    outside = ids[(ids < 0) | (ids >= len(units))]
    if len(outside):
        raise ValueError(f"unit {int(outside[0])} is outside 0..{len(units) - 1}")
    stages = torch.from_numpy(units.stage_ids)[ids.cpu()]
    each = torch.stack([(stages == i).double().mean(dim=1) for i in range(len(units.stages))], dim=1)  # (B, stages)
    error = each.std(dim=0) / len(each) ** 0.5 if len(each) > 1 else torch.full((each.shape[1],), torch.nan)
    prior = np.bincount(units.stage_ids, minlength=len(units.stages)) / len(units)
    shares = {"share": each.mean(dim=0).numpy(), "error": error.numpy(), "prior": prior}
    return pd.DataFrame(shares, index=pd.Index(units.stages, name="stage"))
