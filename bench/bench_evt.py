"""Tail fits of many units: `pss.evt.fit_gpd` against a loop of `scipy.stats.genpareto.fit`.

    python bench/bench_evt.py [--rows 26560] [--excesses 5000] [--repeats 3] [--threads 2] [--loop-rows 40]

The loop is timed on a few rows, spread over the data, and extrapolated to all of them. Repetitions take turns;
times are medians. One pass of log1p over the data is the measure of what is possible.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np
import pandas as pd
import torch
from scipy.stats import genpareto

from pss.evt import fit_gpd


def synthetic_excesses(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    """Excesses (rows, n) with shapes spread over -0.4..1.5 and scales over 1e-9..1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    xi = torch.linspace(-0.4, 1.5, rows, dtype=torch.float64)[torch.randperm(rows, generator=generator)]
    scale = 10 ** (-9 * torch.rand(rows, generator=generator, dtype=torch.float64))
    x = torch.empty(rows, n, dtype=torch.float64)
    for part, shape, size in zip(x.split(256), xi.split(256), scale.split(256), strict=True):
        part.exponential_(generator=generator).mul_(shape[:, None]).expm1_().mul_((size / shape)[:, None])
    return x


def scipy_loop(excesses: np.ndarray) -> np.ndarray:
    """Fit one row after another; on rows divided by their mean, without which SciPy fails at small scales."""
    fits = []
    for row in excesses:
        mean = row.mean()
        shape, _, scale = genpareto.fit(row / mean, floc=0)
        fits.append((shape, scale * mean))
    return np.array(fits)


def one_pass_log1p(x: torch.Tensor) -> None:
    """What a single evaluation of the likelihood costs at least."""
    for part in x.split(max(1, (1 << 19) // x.shape[1])):
        torch.log1p(part).sum(1)


def run(rows: int = 26560, n: int = 5000, repeats: int = 3, loop_rows: int = 40) -> pd.DataFrame:
    """Time the fits of ``rows`` units with ``n`` excesses each; columns what, size, seconds, ratio (loop / it)."""
    x = synthetic_excesses(rows, n)
    chosen = np.linspace(0, rows - 1, loop_rows).astype(int)
    few = x[chosen].numpy()
    contestants = {
        f"loop of scipy.stats.genpareto.fit, extrapolated from {loop_rows} rows": (
            lambda: scipy_loop(few),
            rows / loop_rows,
        ),
        "pss.evt.fit_gpd": (lambda: fit_gpd(x), 1.0),
        "one pass of log1p": (lambda: one_pass_log1p(x), 1.0),
    }
    fit_gpd(x[:100])
    seconds = {what: [] for what in contestants}
    for _ in range(repeats):
        for what, (function, factor) in contestants.items():
            start = time.perf_counter()
            function()
            seconds[what].append((time.perf_counter() - start) * factor)
    loop, *_ = times = [median(t) for t in seconds.values()]
    size = f"{rows:,} x {n:,} float64"
    return pd.DataFrame(
        {"what": list(seconds), "size": size, "seconds": times, "ratio": [loop / t for t in times]},
    )


def worst_deficit(rows: int = 40, n: int = 5000) -> float:
    """Largest amount by which SciPy's log-likelihood per excess is above ours (negative: never)."""
    x = synthetic_excesses(rows, n, seed=1)
    ours = (fit_gpd(x).log_likelihood / n).numpy()
    loop = [
        genpareto.logpdf(row, c, scale=s).mean() for row, (c, s) in zip(x.numpy(), scipy_loop(x.numpy()), strict=True)
    ]
    return float(np.max(np.array(loop) - ours))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=26560)
    parser.add_argument("--excesses", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loop-rows", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = run(args.rows, args.excesses, args.repeats, args.loop_rows)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.repeats}")
    print(table.to_string(index=False, float_format="{:.4g}".format))
    print(f"SciPy's log-likelihood per excess above ours, at most: {worst_deficit(n=args.excesses):.2g}")


if __name__ == "__main__":
    main()
