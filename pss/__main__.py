"""``python -m pss COMMAND``: notebooks and sweeps, profiles of a data set, the built-in model, the explorer."""

import sys
from importlib import import_module

_COMMANDS = {
    "run": ("pss.apps.batch", "execute notebooks, or a sweep of one"),
    "profile": ("pss.profiles", "profile a data set into a folder"),
    "train": ("pss.models.builtin", "train a ResNet-18 on the built-in digits"),
    "evaluate": ("pss.models.builtin", "accuracy on every built-in set"),
    "explorer": ("pss.apps.explorer", "write the explorer of the site"),
}


def main() -> int:
    """Run a command; its own options follow it."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command not in _COMMANDS:
        lines = "".join(f"  {name:10} {what}\n" for name, (_, what) in _COMMANDS.items())
        print(f"usage: python -m pss COMMAND …\n\n{lines}\npython -m pss COMMAND --help tells its options")
        return 0 if command in ("-h", "--help") else 2
    home = _COMMANDS[command][0]
    return import_module(home).main([command, *arguments] if home == "pss.models.builtin" else arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
