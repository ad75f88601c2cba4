"""``make bench``: speed and memory against plain loops, measured side by side in one run.

Prints every table and writes ``figures/bench.md`` and ``figures/bench.png``. Baselines are the loops written in the
modules of this folder; times are medians of repetitions that take turns; what is compared is the ratio.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch

from bench import bench_evt, bench_kernel, bench_profiles, bench_repair
from pss.data.vision import torchvision

matplotlib.use("Agg")
FIGURES = Path(__file__).resolve().parents[1] / "figures"
PARTS: dict[str, tuple[str, Callable[[], pd.DataFrame]]] = {
    "kernel": ("Saliency profiles", bench_kernel.run),
    "precision": ("bfloat16 in the backward pass", bench_kernel.run_precision),
    "memory": ("Memory of the kernel", bench_kernel.run_memory),
    "fits": ("Tail fits", bench_evt.run),
    "repair": ("Repair curves", bench_repair.run),
    "store": ("Profiles on disk", bench_profiles.run_pass),
    "reference": ("A reference larger than memory", bench_profiles.run),
}


def machine() -> str:
    """Processor, threads and versions that the numbers belong to."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{cpu}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, NumPy {np.__version__}"
    )


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers to three figures."""
    cell = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)  # noqa: E731
    rows = [list(table.columns), ["---"] * len(table.columns), *table.map(cell).values.tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def plot(tables: dict[str, pd.DataFrame]) -> None:
    """Every ratio to a plain loop in one picture: longer is faster."""
    import matplotlib.pyplot as plt

    from pss import plots

    plots.use_style()
    bars = [
        (_label(record), record["ratio"])
        for table in tables.values()
        if "ratio" in table
        for record in table.to_dict("records")
        if str(record.get("what", "profile")).startswith(("profile", "pss"))  # not the baselines
    ]
    figure, ax = plt.subplots(figsize=(9, 0.26 * len(bars) + 1))
    drawn = ax.barh([label for label, _ in bars], [ratio for _, ratio in bars], color="#0072B2")
    ax.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    ax.axvline(1, color="black", lw=1)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="times as fast as the plain loop")
    figure.savefig(FIGURES / "bench.png")


def _label(record: dict) -> str:
    sizes = [f"{record[key]} {unit}" for key, unit in (("size", "px"), ("images", "at a time")) if "edit" in record]
    return ", ".join([*(v for v in record.values() if isinstance(v, str)), *sizes])


def main() -> None:
    """Run the parts asked for, print and write them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; all by default, and only then written")
    chosen = parser.parse_args().parts or list(PARTS)
    tables, pages = {}, [f"# Bench\n\n{machine()}.\n"]
    print(pages[0])
    for key in chosen:
        started = time.monotonic()
        title, run = PARTS[key]
        tables[key] = run()
        pages.append(f"## {title}\n\n{inspect.cleandoc(run.__doc__)}\n\n{markdown(tables[key])}\n")
        print(pages[-1], f"({time.monotonic() - started:.0f} s)\n", flush=True)
    if chosen == list(PARTS):
        (FIGURES / "bench.md").write_text("\n".join(pages), encoding="utf-8")
        plot(tables)
        print(f"written to {FIGURES}/bench.md and bench.png")


if __name__ == "__main__":
    main()
