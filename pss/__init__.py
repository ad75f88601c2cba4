"""Parameter-space saliency: which parameters made a network misclassify an image, and can they be repaired."""

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
