"""Where files of PSS itself live."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder(own: bool = False) -> Path:
    """Where prepared files are kept: ``PSS_CACHE`` if set, ``data/cache`` of a checkout, or the user's cache folder.

    What is made of the users' own networks (``own``) never goes into a checkout.

    Raises
    ------
    ValueError
        If ``PSS_CACHE`` is not an absolute path (what it names would depend on the current directory).
    """
    if chosen := os.environ.get("PSS_CACHE"):
        path = Path(chosen).expanduser()
        if not path.is_absolute():
            raise ValueError(f"PSS_CACHE is {chosen!r}: give an absolute path")
        return path
    checkout = None if own else checkout_data()
    if checkout is not None and os.access(checkout, os.W_OK):
        return checkout / "cache"
    return Path(platformdirs.user_cache_dir("pss"))


def checkout_data() -> Path | None:
    """The folder ``data/`` of the checkout that this module is imported from, or None if it was installed elsewhere."""
    path = Path(__file__).resolve().parents[2]
    return path / "data" if (path / "pyproject.toml").is_file() and (path / "data").is_dir() else None
