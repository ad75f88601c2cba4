"""Parameter-space saliency: which parameters made a network misclassify an image, and can they be repaired."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {  # imported when first used: `import pss` is quick
    "Units": "units",
    "parameter_saliency": "saliency",
    "profile": "saliency",
    "ProfileStore": "profiles",
    "profile_dataset": "profiles",
    "Reference": "reference",
    "RANKINGS": "ranking",
    "rank": "ranking",
    "rank_together": "ranking",
    "fdr_significant": "ranking",
    "stage_shares": "ranking",
    "edit_curve": "editing",
    "edit_curves": "editing",
    "edited": "editing",
    "side_effects": "editing",
    "smallest_correction": "correction",
    "Patch": "patches",
    "fit_patch": "patches",
    "input_saliency": "input_space",
    "nearest": "neighbors",
}
_MODULES = (
    "apps",
    "correction",
    "data",
    "editing",
    "evt",
    "input_space",
    "models",
    "neighbors",
    "patches",
    "plots",
    "profiles",
    "ranking",
    "reference",
    "saliency",
    "statistics",
    "units",
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
