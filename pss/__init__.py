"""Parameter-space saliency: which parameters made a network misclassify an image, and can they be repaired."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {  # imported when first used: `import pss` is quick, and `python -m pss.profiles` imports nothing twice
    "Units": "units",
    "parameter_saliency": "gradients",
    "profile": "gradients",
    "ProfileStore": "profiles",
    "profile_dataset": "profiles",
    "Reference": "reference",
    "input_saliency": "input_space",
    "nearest": "neighbors",
    "cost_of_correction": "cost",
    "fisher_diagonal": "fisher",
    "fisher_scores": "fisher",
    "Patch": "patches",
    "fit_patch": "patches",
    "METHODS": "ranking",
    "rank": "ranking",
    "significant": "ranking",
    "stage_shares": "ranking",
    "edit_curve": "repair",
    "edit_curves": "repair",
    "edited": "repair",
}
_MODULES = (
    "batch",
    "cost",
    "data",
    "evt",
    "explain",
    "experiment",
    "explorer",
    "fisher",
    "gradients",
    "input_space",
    "models",
    "neighbors",
    "patches",
    "plots",
    "profiles",
    "ranking",
    "reference",
    "repair",
    "report",
    "units",
    "zoo",
)
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pss.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"pss.{name}")
    raise AttributeError(f"module 'pss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
