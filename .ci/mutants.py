"""Change one thing at a time in a file of the core, and count the changes that its tests see.

    python .ci/mutants.py --sample 50 pss/ranking.py pss/evt.py

A sample is the same each time, and part of every larger one; the share is printed with its 95% interval (Wilson).

Each file has a folder of its own in runs/mutants, where mutmut works on copies. It can be stopped at any time and goes
on where it was; functions that have changed are begun anew, and so is, where all was tried, what survived, which is
listed in survivors.txt there. What was read and changes no result is in `READ`. Texts of errors are left as they are,
and so are functions with decorators, which mutmut cannot exchange.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "runs" / "mutants"
SLOW = ("zoo", "fast_path", "difficulty", "weight_gradient", "smooth", "made_of", "general")
NOT_SLOW = " and ".join(f"not {name}" for name in SLOW)
# The tests of each file, and (by -k of pytest) which are too slow for hundreds of changes where others see the same.
TESTS = {
    "units": (("units",), ""),
    "ranking": (("ranking", "gain"), "rank"),
    "reference": (("reference", "statistics"), ""),
    "evt": (("evt", "statistics"), ""),
    "neighbors": (("neighbors",), ""),
    "input_space": (("input_space",), "not zoo"),
    "editing": (("editing", "one_image"), "not lambda and not vgg"),
    "correction": (("correction", "one_image"), ""),
    "patches": (("patches",), ""),
    "saliency": (("saliency", "gain", "verification"), NOT_SLOW),
    "profiles": (("profiles",), "not killed and not ranks and not begin_at_once"),
}
KILLED, SURVIVED = {1, 3}, {0, 5, 33, 34}  # exit codes that mutmut keeps; others: timeouts and crashes, which show
# What survived, was read, and changes no result: the new line of the change, and why.
READ = {
    r"\bstrict=(False|None)": "zip of what is as long",
    r"\.to\((None\)|None, like|like)|\barange\(.*, \)": "where a tensor lies: only a GPU tells (test_cuda.py)",
    r"\bcheck_\w+\(.*(XX|\"[A-Z ]+\")|said = .*>= 3|PARAMETRIZATIONS": "a word of an error or warning",
    r"check_images\(.*(None|labels, )\)|what=None|\(\"[A-Z ]+\", reference\)": "a word of an error",
    r"scores\.argsort\(.*(stable=False|g\(descending)|zip\(several, usual, \)": "ranking: sorted so, checked before",
    r"disable=progress|store_rows\(.*, None, rebuild\)": "the bar of progress",
    r"\(\{\}, 1\.0, np\.inf\)": "correction: the length of no line",
    r"map_blocks\(.*, \)$|max\(2, chunk_elements": "how much memory is taken",
    r"theta \* s >= -0\.5|t\.abs\(\) (>= 2|<= 1e-20)": "evt: two ways that agree there, or one number only",
    r"clamp\(0, \)|left\[\+1\]": "reference: above the threshold is no empirical tail, and below it no excess",
    r"length > 0, length, 2|\btqdm\(": "editing: a step that is zero stays so; the bar of progress",
    r"dead.*>= -torch\.inf": "ranking: what is not ranked at all",
    r"cosine\.sort\(descending=True, stable=True\)": "neighbors: the last dimension is the default",
    r"leave_parametrized=None": "patches: as false as False",
    r"last: bool = True": "profiles: images of a bad batch, taken one by one, are compared once more",
    r"np\.asarray\(values, \)": "units: a table's column of texts, by another type",
}
CONFIG = """
[tool.mutmut]
source_paths = ["pss"]
only_mutate = ["{file}"]
also_copy = ["tests", "data", "notebooks"]
pytest_add_cli_args = ["-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {tests}
do_not_mutate_patterns = ['raise \\w+', '\\blog\\.(info|warning)']
process_isolation = "forkserver"
track_dependencies = false
"""


def prepare(file: Path) -> Path:
    """The folder of this file: links to the sources, and what mutmut is to do."""
    folder = PLACE / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pss", "tests", "data", "notebooks"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    names, some = TESTS[file.stem]
    tests = [*(f"tests/test_{name}.py" for name in (*names, "bad_input")), *(["-k", some] if some else [])]
    config = CONFIG.format(file=file.as_posix(), tests=json.dumps(tests))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8") + config, "utf-8")
    # Which tests call which function, found anew: mutmut would ask only the tests that it has not seen.
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    return folder


def codes(file: Path, folder: Path) -> dict[str, int | None]:
    """The exit code of the tests for each change; None where they have not been asked."""
    kept = folder / "mutants" / f"{file}.meta"
    return json.loads(kept.read_text("utf-8"))["exit_code_by_key"] if kept.exists() else {}


def drawn(names: list[str], size: int | None) -> list[str]:
    """The first ``size`` of the changes in an order that is drawn once for all; all without a size."""
    return random.Random(0).sample(sorted(names), len(names))[:size]


def why_not(change: str) -> str:
    """Why a change, as a diff, is known to change no result; nothing where it may."""
    new = "\n".join(line for line in change.splitlines() if re.match(r"\+(?!\+\+)", line))
    return next((why for pattern, why in READ.items() if re.search(pattern, new)), "")


def report(file: Path, folder: Path, size: int | None) -> str:
    """One line of counts; what survived goes into a file, first what was not read yet."""
    found = codes(file, folder)
    names = drawn(list(found), size)
    seen = Counter("left" if found[n] is None else "survived" if found[n] in SURVIVED else "killed" for n in names)
    show = lambda name: mutmut(folder, "show", name, capture_output=True, text=True).stdout  # noqa: E731
    survivors = [(why_not(change), change) for change in map(show, (n for n in names if found[n] in SURVIVED))]
    lines = [f"{why and f'read: {why}'}\n{change}" for why, change in sorted(survivors)]
    (folder / "survivors.txt").write_text("\n".join(lines), "utf-8")
    if not (done := seen["killed"] + seen["survived"]):
        return f"{file}: none of {len(found)} tried"
    low, high = binomtest(seen["killed"], done).proportion_ci(method="wilson")
    read = sum(bool(why) for why, _ in survivors)
    said = (
        f"{file}: {seen['killed'] / done:.1%} killed of {done} ({low:.1%} to {high:.1%}), {seen['survived']} survived"
    )
    said += f", of which {read} change no result: {seen['killed'] / (done - read):.1%} of the others killed"
    return f"{said}; {seen['left']} not tried, {len(found)} in all"


def mutmut(folder: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    """Run mutmut in a folder."""
    return subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=folder, **how)


def run(file: Path, size: int | None, children: int) -> str:
    """Try what is left to try of a file."""
    folder = prepare(file)
    mutmut(folder, "run", "nothing", capture_output=True)  # makes the changes and stops: there is none of this name
    found = codes(file, folder)
    names = drawn(list(found), size)
    # Where all was tried, what survived is tried again: there may be tests by now that see it.
    left = [name for name in names if found[name] is None] or [name for name in names if found[name] in SURVIVED]
    if left and mutmut(folder, "run", "--max-children", str(children), *left).returncode:
        sys.exit(f"mutmut stopped at {file}")
    return report(file, folder, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[Path("pss") / f"{name}.py" for name in TESTS])
    parser.add_argument("--sample", type=int, help="how many changes of each file; all without it")
    parser.add_argument("--children", type=int, default=1, help="how many changes are tried at a time")
    asked = parser.parse_args()
    if unknown := [str(file) for file in asked.files if file.stem not in TESTS]:
        parser.error(f"{', '.join(unknown)}: expected files of {', '.join(TESTS)}")
    lines = []
    for file in asked.files:
        lines.append(run(file, asked.sample, asked.children))
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")
