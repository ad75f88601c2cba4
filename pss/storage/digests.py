"""Checksums of content; loads no torch, which the workers of a sweep do without."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """SHA-256 over parts one after the other: text, bytes, arrays, and of a path what its file holds."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: total)
        else:
            total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def key_of(provenance: Any, length: int = 20) -> str:
    """Short name for plain values: that of a folder in the cache for what is made of them."""
    return digest(json.dumps(provenance, sort_keys=True))[:length]
