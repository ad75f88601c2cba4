"""Print pip constraints for the lowest or the newest versions that pyproject.toml allows.

    python .ci/bounds.py lowest torch torchvision > lowest.txt

Lowest: every direct dependency at its lower bound, which so has to be a release. Newest: no constraint but the bounds.
Packages named after that stay as constraints.txt has them.
"""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def constraints(which: str, keep: list[str]) -> list[str]:
    """Lines of a constraints file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split())
    lines = [f"{name}=={pins[name]}" for name in keep]
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        name, bound = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?(?:>=([\w.]+))?", requirement).groups()
        if which == "lowest" and bound and name not in keep:
            lines.append(f"{name}=={bound}")
    return lines


if __name__ == "__main__":
    which, *keep = sys.argv[1:]
    if which not in ("lowest", "newest"):
        sys.exit(f"{which!r}: expected 'lowest' or 'newest'")
    print("\n".join(constraints(which, keep)))
