"""What the last notebooks, the site and the command line call: reports, experiments, sweeps, the explorer.

A notebook takes `explain` with `reading` and `report` (one image), `group` (a folder of mistakes), `experiment` (a data
set) or `explorer`; ``python -m pss`` takes `batch` (over `sweep`, `execution` and `parameters`), `profiling`,
`training`, `explorer` and `caches`.
"""

import sys
from importlib import import_module
from types import ModuleType

__all__ = ["experiment", "explain", "explorer", "group", "reading", "report"]

# Where JupyterLab is, jsonschema spends two seconds on a grammar for a format that nothing in a notebook has.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> ModuleType:  # imported when first used
    if name in __all__:
        return import_module(f"pss.apps.{name}")
    raise AttributeError(f"module 'pss.apps' has no attribute {name!r}")
