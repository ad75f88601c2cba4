"""The command ``cache``: what is kept between runs, how large it is, and how to be rid of it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pss.storage.places import cache_folder


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser the options of ``cache``."""
    empty = "remove everything, or what is named, as profiles: it is made again when it is needed"
    parser.add_argument("--empty", nargs="*", metavar="NAME", help=empty)


def main(options: argparse.Namespace) -> None:
    """Print a line for each kind of what is kept, with its size; with ``--empty`` remove it."""
    folder = cache_folder()
    kept = {path.name: path for path in sorted(folder.glob("*"))}
    if unknown := [name for name in options.empty or () if name not in kept]:
        options.refuse(f"{folder} holds no {', '.join(unknown)}: it has {', '.join(kept) or 'nothing'}")
    total = 0
    for name, path in kept.items():
        size = sum(_size(file) for file in ([path] if path.is_file() else path.rglob("*")))
        removed = options.empty is not None and (not options.empty or name in options.empty)
        if removed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        total += 0 if removed else size
        print(f"{size / 1e6:10.1f} MB  {name}{'  removed' if removed else ''}")
    print(f"{total / 1e6:10.1f} MB  in {folder}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
