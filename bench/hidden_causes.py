"""Hidden causes and what removes them: the table of notebook 14, over three triggers and three networks each.

    python -m bench.hidden_causes [--workers 2] [--width 16] [--networks 3] [--out data/experiments/hidden_causes.csv]

The work is done by the notebook's own functions, in its cells with the tag ``experiment``. A row is a trigger, a
network, a number of complaints and a way to remove the cause. What comes first is what the notebook asks first: five
complaints for each trigger, then other numbers of them for the white patch. Rows are written as they are found, and a
second call goes on with those that are missing.
"""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch

from bench import tables

OUT = tables.EXPERIMENTS / "hidden_causes.csv"
NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "14_hidden_cause.ipynb"
PATCHES = ("nothing", "gains", "gains, transplants")
RIVALS = ("never poisoned", "last layer", "last layer, transplants", "pruning", "fine-pruning", "neuron pruning")
N_TRAINED = 1000  # training images; the page makes do with fewer
KEY = ["trigger", "seed", "complaints", "way"]
STATED = ("width", "epochs", "n_clean", "n_trained", "budget", "n_pruned", "mask_steps")
Case = tuple[str, int, int]  # trigger, network, number of complaints


@lru_cache(maxsize=1)
def functions(width: int) -> dict[str, Any]:
    """What the notebook defines, for networks of this width."""
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        tags = cell["metadata"].get("tags", [])
        if {"experiment", "parameters"} & set(tags):
            exec("".join(cell["source"]), names)  # noqa: S102  (our own)
            names |= {"width": width, "n_trained": N_TRAINED}
    return names


def outcomes(case: Case, ways: list[str], width: int) -> list[dict]:
    """Rows of one network and number of complaints, one for each way."""
    here = functions(width)
    return here["outcomes"](here["trained"](*case[:2]), *case, ways)


def cases(networks: int) -> list[tuple[Case, tuple[str, ...]]]:
    """What is asked, the most important first, with the ways."""
    triggers, seeds = ("white patch", "stripes", "sticky note"), range(networks)
    found: list = [((trigger, seed, 5), PATCHES + RIVALS) for trigger, seed in itertools.product(triggers, seeds)]
    return found + [(("white patch", seed, count), PATCHES) for count in (1, 2, 10, 20) for seed in seeds]


def run(out: Path, workers: int, width: int, networks: int) -> None:
    """Make the rows that are missing."""
    stated = functions(width)
    there = tables.begin(out, "python -m bench.hidden_causes", **{name: stated[name] for name in STATED})
    done = tables.done(there, KEY)
    missing = [(case, [way for way in ways if (*case, way) not in done]) for case, ways in cases(networks)]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(outcomes, case, ways, width) for case, ways in missing if ways]
        for job in as_completed(jobs):
            for row in job.result():
                tables.add(out, row)
            print({name: row[name] for name in KEY[:3]}, "done", flush=True)


if __name__ == "__main__":
    tables.command(run, __doc__, OUT, workers=2, width=16, networks=3)
