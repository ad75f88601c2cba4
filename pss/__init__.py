"""Parameter-space saliency: which parameters made a network misclassify an image, and can they be repaired.

The files beside this one hold the ideas of the papers, in reading order:

===============  ===================================================================================================
``units``        what a unit is: filters, rows, heads in one numbering
``saliency``     the saliency of parameters and units; the losses that are differentiated
``profiles``     the same of every image of a data set, on disk
``evt``          generalized Pareto fits
``reference``    what is usual for each unit: the z-score, the tail probability
``ranking``      every way to rank units: a new one is an entry of `RANKINGS`
``editing``      pruning and fine-tuning units, what that repairs, and what it does elsewhere
``correction``   the smallest step that corrects a mistake
``patches``      gains that correct mistakes, in a file
``input_space``  which pixels drive the units
``neighbors``    which mistakes were made by the same units
===============  ===================================================================================================

The folders hold the trades behind them, each said in the first line of its ``__init__.py``: `engine` computes (torch
alone), `storage` writes every file, `data` and `models` are images and networks, `statistics` and `plots` what pages
show, `apps` what the last notebooks and the command line call.
"""

import pkgutil
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_OFFERED = {  # by each file, in reading order; imported when first used: `import pss` is quick
    "units": ["Units"],
    "saliency": ["parameter_saliency", "profile"],
    "profiles": ["ProfileStore", "profile_dataset"],
    "reference": ["Reference"],
    "ranking": ["RANKINGS", "rank", "rank_together"],
    "editing": ["edit_curve", "edit_curves", "edited", "side_effects"],
    "correction": ["smallest_correction"],
    "patches": ["Patch", "fit_patch"],
    "input_space": ["input_saliency"],
    "neighbors": ["nearest"],
    "statistics": ["fdr_significant", "stage_shares"],
}
_HOMES = {name: home for home, names in _OFFERED.items() for name in names}
_MODULES = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pss.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"pss.{name}")
    raise AttributeError(f"module 'pss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
