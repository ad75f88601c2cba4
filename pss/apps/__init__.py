"""What the last notebooks, the site and the command line call: reports, experiments, sweeps, the explorer."""

from importlib import import_module
from types import ModuleType

__all__ = ["experiment", "explain", "explorer", "report"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"pss.apps.{name}")
    raise AttributeError(f"module 'pss.apps' has no attribute {name!r}")
