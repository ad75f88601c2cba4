"""Profiles on disk: what the store adds to a pass, and a reference of 50,000 × 26,560 profiles in blocks of units.

    python bench/bench_profiles.py [--samples 50000] [--units 26560] [--threads 2] [--folder DIR]

The rows are synthetic (an exponential variate a unit, times one log-normal size an image) and written to a store in a
temporary folder: 5.3 GB by default. `Reference.fit` runs in a process of its own, which reports two peaks: ``peak_gb``,
its own memory (anonymous pages, sampled every 20 ms), and ``peak_with_files_gb``, which counts the pages of the file
that happened to be mapped too (the kernel's high-water mark). Pages of the file that the system keeps cached are in
neither: it takes them back when they are needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch

import pss
from pss.storage import folder
from pss.storage.passes import choose_batch_size
from pss.storage.records import FINISHED, empty_rows


def write_synthetic(path: Path, samples: int, units: int, seed: int = 0) -> None:
    """A finished store of heavy-tailed rows, made and written 256 rows at a time."""
    made_of = {"samples": samples, "n_units": units, "provenance": {}, "computed_with": {"torch": torch.__version__}}
    folder.begin(path, made_of | {"batch_size": 256, "threads": 1})
    partial = folder.partial_of(path)
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(-7, 2, units).astype(np.float32)
    with folder.writer(partial, made_of) as write:
        for start in range(0, samples, 256):
            count = min(256, samples - start)
            rows = rng.standard_exponential((count, units), np.float32)
            rows *= scale * rng.lognormal(0, 1.5, (count, 1)).astype(np.float32)
            _, records = empty_rows(count, 0)
            records["status"] = FINISHED
            write(start, rows, records)
    folder.finish(path)


class OwnMemory:
    """Peak of this process's anonymous memory while it runs, in GB."""

    def __enter__(self) -> OwnMemory:
        self.start = self.peak = _anonymous_gb()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._sample, daemon=True)
        self.watch.start()
        return self

    def _sample(self) -> None:
        while not self.over.wait(0.02):
            self.peak = max(self.peak, _anonymous_gb())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watch.join()


def _anonymous_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def fit_here(path: Path, threads: int) -> dict:
    """Open, check and fit in this process; times in seconds, memory in GB."""
    torch.set_num_threads(threads)
    open_store, fit = pss.ProfileStore.open, pss.Reference.fit  # imported here, before the clock starts
    times = [time.perf_counter()]
    store = open_store(path)
    times.append(time.perf_counter())
    cpu = time.process_time()
    with OwnMemory() as memory:
        reference = fit(store, level=0.90)
    cpu = time.process_time() - cpu
    times.append(time.perf_counter())
    return {
        "samples": store.shape[0],
        "units": store.shape[1],
        "file_gb": store.shape[0] * store.shape[1] * 4 / 1e9,
        "threads": threads,
        "open_and_check_s": times[1] - times[0],
        "fit_s": times[2] - times[1],
        "fit_cpu_s": cpu,  # of all threads: what the fit costs, however busy the machine is
        "before_gb": memory.start,
        "peak_gb": memory.peak,
        "peak_with_files_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "fitted": int(reference.fitted.sum()),
    }


def run(
    samples: int = 50_000, units: int = 26_560, threads: int | None = None, within: str | None = None
) -> pd.DataFrame:
    """One row: sizes, seconds to write, to open with checksums and to fit, and peak memory of the fit."""
    with tempfile.TemporaryDirectory(dir=within, prefix="pss-bench-") as temporary:
        path = Path(temporary) / "profiles"
        start = time.perf_counter()
        write_synthetic(path, samples, units)
        write_s = time.perf_counter() - start
        command = [
            sys.executable,
            __file__,
            "--measure",
            str(path),
            "--threads",
            str(threads or torch.get_num_threads()),
        ]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return pd.DataFrame([{"write_s": write_s, **measured}])


def run_pass(repeats: int = 3, threads: int | None = None) -> pd.DataFrame:
    """The shipped model over the digits: `profile` alone on the same batches, against `profile_dataset`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    model, data = pss.models.digits(), pss.data.digits("test")
    images, labels = data.tensors
    size = choose_batch_size(model, images[0])
    alone, stored, reopened = [], [], []
    try:
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="pss-bench-") as temporary:
                start = time.perf_counter()
                for part in zip(images.split(size), labels.split(size), strict=True):
                    pss.profile(model, *part)
                alone.append(time.perf_counter() - start)
                for times in (stored, reopened):
                    start = time.perf_counter()
                    pss.profile_dataset(model, data, None, Path(temporary) / "profiles", progress=False)
                    times.append(time.perf_counter() - start)
        row = {"images": len(images), "batch": size, "threads": torch.get_num_threads()}
    finally:
        torch.set_num_threads(before)
    row |= {"profile_s": median(alone), "profile_dataset_s": median(stored), "reopened_s": median(reopened)}
    return pd.DataFrame([{**row, "stored_over_alone": row["profile_dataset_s"] / row["profile_s"]}])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--units", type=int, default=26_560)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where the temporary file goes (default: the system's temporary folder)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(fit_here(options.measure, options.threads)))
    else:
        print(run_pass(threads=options.threads).T.to_string(header=False))
        print(run(options.samples, options.units, options.threads, options.folder).T.to_string(header=False))
