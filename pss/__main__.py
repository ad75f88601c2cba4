"""``python -m pss COMMAND``: notebooks and sweeps, profiles of a data set, the built-in model, the explorer, caches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each has a home, with add_options(parser, command) and main(options), imported when it is asked for; and an example.
COMMANDS = {
    "run": ("batch", "execute notebooks", "notebooks/11_explain_one_image.ipynb -p model net.yaml -p data_root photos"),
    "sweep": ("batch", "execute one notebook over a grid or a table of parameters", "sweep.yaml --jobs 2"),
    "profile": ("profiling", "profile a data set into a folder", "--model net.yaml --data photos --out runs/photos"),
    "train": ("training", "train a ResNet-18 on the built-in digits", "--out net.safetensors --epochs 2"),
    "evaluate": ("training", "accuracy of the built-in model, or one like it, on all built-in sets", "net.safetensors"),
    "explorer": ("explorer", "write the explorer of the site", "site/_static/explorer"),
    "cache": ("caches", "list what is kept in the cache, or empty it", "--empty profiles"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its own module is imported, and its options known, once it is asked for."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m pss", description="Parameter-space saliency.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (home, what, example) in COMMANDS.items():
        example = f"example: python -m pss {name} {example}"
        command = commands.add_parser(name, help=what, description=what, epilog=example)
        if name in arguments[:1]:
            try:
                module = import_module(f"pss.apps.{home}")
            except ModuleNotFoundError as error:
                command.error(f"needs {error.name}: pip install 'pss[notebooks]'")
            module.add_options(command, name)
            command.set_defaults(run=module.main, refuse=command.error)
    options = parser.parse_args(arguments)
    return options.run(options) or 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["profile"]:  # a process of its own, which does nothing else
        import_module("pss.engine.process").keep_freed_memory()
    sys.exit(main())
