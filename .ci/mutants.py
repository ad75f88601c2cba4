"""Change one thing at a time in a file of the core, and count the changes that its tests see.

    python .ci/mutants.py pss/ranking.py pss/evt.py

Each file has a folder of its own in runs/mutants, where mutmut works on copies. It can be stopped at any time and goes
on where it was; functions that have changed are begun anew, and so is, where all was tried, what survived, which is
listed in survivors.txt there. Texts of errors are left as they are, and so are functions with decorators, which mutmut
cannot exchange.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "runs" / "mutants"
TESTS = {
    "units": ("units",),
    "ranking": ("ranking",),
    "reference": ("reference", "statistics"),
    "evt": ("evt", "statistics"),
    "neighbors": ("neighbors",),
    "input_space": ("input_space",),
    "editing": ("repair", "one_image"),
    "correction": ("cost", "one_image"),
    "patches": ("patches",),
    "saliency": ("gradients", "gain"),
}
KILLED, SURVIVED = {1, 3}, {0, 5, 33, 34}  # exit codes that mutmut keeps; others: timeouts and crashes, which show
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
    tests = [f"tests/test_{name}.py" for name in TESTS[file.stem]]
    config = CONFIG.format(file=file.as_posix(), tests=json.dumps(tests))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8") + config, "utf-8")
    # Which tests call which function, found anew: mutmut would ask only the tests that it has not seen.
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    return folder


def try_again(file: Path, folder: Path) -> None:
    """Where a run was finished, forget what survived: there may be tests by now that see it."""
    kept = folder / "mutants" / f"{file}.meta"
    if not kept.exists():
        return
    found = json.loads(kept.read_text("utf-8"))
    codes = found["exit_code_by_key"]
    if None not in codes.values():
        codes |= dict.fromkeys((name for name, code in codes.items() if code in SURVIVED))
        kept.write_text(json.dumps(found), "utf-8")


def report(file: Path, folder: Path) -> str:
    """One line of counts; what survived goes into a file."""
    found = json.loads((folder / "mutants" / f"{file}.meta").read_text("utf-8"))["exit_code_by_key"]
    seen = Counter("left" if code is None else "survived" if code in SURVIVED else "killed" for code in found.values())
    names = [name for name, code in found.items() if code in SURVIVED]
    show = lambda name: mutmut(folder, "show", name, capture_output=True, text=True).stdout  # noqa: E731
    (folder / "survivors.txt").write_text("\n".join(map(show, names)), "utf-8")
    done = seen["killed"] + seen["survived"]
    share = f"{100 * seen['killed'] / done:.1f}%" if done else "–"
    return f"{file}: {share} killed of {done}, {seen['survived']} survived, {seen['left']} not tried"


def mutmut(folder: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    """Run mutmut in a folder."""
    return subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=folder, **how)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or [Path("pss") / f"{name}.py" for name in TESTS]
    if unknown := [str(file) for file in files if file.stem not in TESTS]:
        sys.exit(f"{', '.join(unknown)}: expected files of {', '.join(TESTS)}")
    lines = []
    for file in files:
        folder = prepare(file)
        try_again(file, folder)
        if mutmut(folder, "run", "--max-children", "1").returncode:
            sys.exit(f"mutmut stopped at {file}")
        lines.append(report(file, folder))
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")
