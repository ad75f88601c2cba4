"""Whether the budget of `pss.patches.fit_patch` holds on images that took no part.

    python -m bench.budget [--patches 200] [--retain 200] [--out data/experiments/budget.csv]

Small networks, trained on MNIST with different seeds, are patched for some of their mistakes on digits by other
writers, ten patches a network. Each patch is judged by its mean KL on the digits that were right and are neither
mistakes nor retain images. Rows are written as they are found, and a second call goes on after the last. What is
counted is the share of patches within the budget, with the exact (Clopper-Pearson) interval.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import pss
from bench import tables
from pss.correction import divergences, logits_of
from pss.patches import fit_patch

OUT = tables.EXPERIMENTS / "budget.csv"
PER_NETWORK, RETAIN = 10, 200


@lru_cache(maxsize=1)
def network(seed: int) -> nn.Module:
    """About 4,000 parameters and 40 filters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [(3, 8), (8, 16), (16, 16)]
        blocks = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(4, b), nn.ReLU()) for a, b in layers]
        model = nn.Sequential(*blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
        train, optimizer = pss.data.mnist("train"), torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(3):
            for at in torch.randperm(len(train)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(train.images[at]), train.labels[at]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


def patch(model: nn.Module, number: int, retain: int) -> dict:
    """One row: a patch for one, three or five mistakes within one of three budgets, and its KL on the other digits."""
    data, rng = pss.data.digits("all"), np.random.default_rng(number)
    right = (pss.models.predict(model, data.images).argmax(dim=1) == data.labels).numpy()
    good, bad = (rng.permutation(np.flatnonzero(which)) for which in (right, ~right))
    count, budget = int(rng.choice([1, 3, 5])), float(rng.choice([0.02, 0.05, 0.1]))
    part = lambda at: (data.images[at], data.labels[at])  # noqa: E731
    found = fit_patch(model, part(bad[:count]), part(good[:retain]), budget=budget, seed=number, progress=False)
    row = {"patch": number, "mistakes": count, "budget": budget, "left": len(found.left), "kl": np.nan, "others": 0}
    if len(found.gains):
        others = data.images[good[retain:]]
        before = logits_of(model, others)
        with found.applied(model):
            row |= {"kl": float(divergences(before, logits_of(model, others)).mean()), "others": len(others)}
    return row


def summary(rows: pd.DataFrame) -> str:
    """How many of the patches that were found keep to the budget, and how close they come."""
    rows = rows[rows["kl"].notna()]
    within = int((rows["kl"] <= rows["budget"]).sum())
    used = (rows["kl"] / rows["budget"]).quantile([0.5, 0.95, 1]).round(2).tolist()
    share, (low, high) = within / len(rows), stats.binomtest(within, len(rows)).proportion_ci()
    return (
        f"{within} of {len(rows)} patches are within the budget: {share:.3f}, 95% interval {low:.3f} to {high:.3f}; "
        f"share of the budget used: median {used[0]}, 95% of patches at most {used[1]}, all {used[2]}"
    )


def run(out: Path, patches: int, retain: int) -> None:
    """Go on until there are so many patches (tries without one come on top), and say what came out."""
    rows = tables.begin(out, "python -m bench.budget", retain=retain)
    while rows.empty or rows["kl"].notna().sum() < patches:
        tables.add(out, patch(network(len(rows) // PER_NETWORK), len(rows), retain))
        rows = tables.read(out)
    print(f"{summary(rows)}\n{len(rows)} tries")


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, patches=200, retain=RETAIN)
