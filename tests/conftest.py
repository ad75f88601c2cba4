"""Fixtures shared by the tests: small models and data, one thread."""

import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from served import chromium

# The kernel of this environment, whatever kernels and settings the machine has.
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
os.environ.pop("JUPYTER_PATH", None)

ROOT = Path(__file__).resolve().parents[1]
PEER_DATA = ROOT.parent / "shared" / "peer-data"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def peer_data() -> Path:
    if not PEER_DATA.is_dir():
        pytest.skip("published statistics are not on this machine")
    return PEER_DATA


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """What the tests counted, and the table whose rows they gave.

    `record_property("count kills", 3)` adds three kills, `record_property("table row", {"name": "a"})` a row.
    """
    passed = {report.nodeid for report in terminalreporter.stats.get("passed", [])}
    counts = Counter()
    teardowns = [report for report in terminalreporter.stats.get("", []) if report.when == "teardown"]
    rows = [value for report in teardowns for name, value in report.user_properties if name == "table row"]
    if rows:
        table = pd.DataFrame(rows)
        terminalreporter.write_line(table.to_string(index=False, na_rep="", float_format="{:.2f}".format))
        for name in table.select_dtypes("float"):
            terminalreporter.write_line(f"median of {name!r}: {table[name].median():.2f}")
    for report in teardowns:  # these have every property
        if report.nodeid in passed:
            for name, number in report.user_properties:
                if name.startswith("count "):
                    counts[name.removeprefix("count ")] += number
    if counts:
        found = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))
        terminalreporter.write_line(f"counted: {len(passed):,} tests, {found}")
