"""The one writer of files, whole or not at all; loads no torch, which the workers of a sweep do without."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

_ABANDONED = 3600.0  # seconds after which an unfinished file is that of a process that was killed


def beside(path: Path) -> Path:
    """A new hidden name for what is to be moved to this place when it is whole, or has been moved away from it.

    A process that is killed leaves ``.<name>.<random>.partial``, which nobody reads and which a later call takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(FileNotFoundError):  # another process has moved it to its place by now
            if time.time() - old.stat().st_mtime > _ABANDONED:
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def write_whole(path: Path, content: str | bytes | dict[str, Any]) -> None:
    """Write a file whole or not at all: beside its place first, then moved there.

    The content is text, bytes, or names and plain values, which are written as JSON.
    """
    if isinstance(content, dict):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    unfinished = beside(path)
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or else a power failure may leave an empty file of the right name
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
