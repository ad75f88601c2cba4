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
    folders = list(dict.fromkeys([cache_folder(), cache_folder(own=True)]))
    names = sorted({path.name for folder in folders for path in folder.glob("*")})
    if unknown := [name for name in options.empty or () if name not in names]:
        places = " and ".join(map(str, folders))
        options.refuse(f"{places} hold no {', '.join(unknown)}: there is {', '.join(names) or 'nothing'}")
    for folder in folders:
        _list(folder, options.empty)


def _list(folder: Path, empty: list[str] | None) -> None:
    """Print what is in a folder, and remove it or some of it unless ``empty`` is None."""
    total = 0
    for path in sorted(folder.glob("*")):
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        removed = empty is not None and (not empty or path.name in empty)
        if removed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        total += 0 if removed else size
        print(f"{size / 1e6:10.1f} MB  {path.name}{'  removed' if removed else ''}")
    print(f"{total / 1e6:10.1f} MB  in {folder}")
