"""What the files of the project promise each other."""

import re
import runpy
import tomllib
from itertools import chain
from pathlib import Path

import yaml


def requirements(lines: list[str]) -> dict[str, str]:
    """Name to version bounds; conda's names for two packages, pip's for the rest."""
    found = {}
    for line in lines:
        name, bounds = re.fullmatch(r"([A-Za-z0-9_.\[\]-]+?)\s*([<>=!~].*)?", line.split(";")[0].strip()).groups()
        name = {"pytorch": "torch", "pytorch-cpu": "torch"}.get(name, name).lower().replace("_", "-")
        found[name] = ",".join(sorted((bounds or "").replace(" ", "").split(",")))
    return found


def everything(project: dict, extra: str = "test") -> list[str]:
    """What an extra installs: the dependencies, its own lines, and those of the extras that it names."""
    found = list(project["dependencies"])
    for line in project["optional-dependencies"][extra]:
        named = re.fullmatch(r"pss\[(.+)\]", line)
        found += [r for name in named[1].split(",") for r in everything(project, name)] if named else [line]
    return found


def allowed(project: dict) -> list[str]:
    """What any extra brings, also those that a target of their own installs."""
    extras = project["optional-dependencies"].values()
    return [line for line in chain(project["dependencies"], *extras) if not line.startswith("pss[")]


def test_environment_yml_equals_pyproject(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = requirements(everything(project))
    conda = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    given = requirements([entry for entry in conda if isinstance(entry, str)])
    python = given.pop("python")
    given.pop("pip")
    given |= requirements([line for line in pip if not line.startswith("-")])
    assert given == wanted
    assert python == ",".join(sorted(project["requires-python"].split(",")))


def test_constraints_pin_every_dependency_within_its_bounds(root):
    from packaging.requirements import Requirement

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split())
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for line in allowed(project):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line


def test_contracts_of_imports_name_every_file_of_the_core(root):
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    core = {f"pss.{path.stem}" for path in (root / "pss").glob("*.py") if not path.stem.startswith("__")}
    named = {contract["name"]: contract for contract in contracts}
    assert set(named["The core knows storage and the engine, and no room in front of it"]["source_modules"]) == core
    assert set(named["Storage and the engine know no papers"]["forbidden_modules"]) == core


BREACHES = {  # a line that breaks each contract
    "The core knows storage and the engine, and no room in front of it": ("ranking.py", "from pss.apps import report"),
    "Rooms lie one behind the other": ("data/pictures.py", "from pss.models import load"),
    "Storage and the engine know no papers": ("storage/places.py", "def late():\n    from pss import evt"),
    "The engine is torch alone": ("engine/state.py", "import scipy"),
}


def test_a_contract_of_imports_that_is_broken_turns_lint_red(root, tmp_path):
    import os
    import shutil
    import subprocess
    import sys

    def lint() -> tuple[int, dict[str, str]]:
        command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, dict(re.findall(r"^(.+) (KEPT|BROKEN)$", done.stdout, re.MULTILINE))

    assert "lint-imports" in (root / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    shutil.copytree(root / "pss", tmp_path / "pss", ignore=lambda _, names: {n for n in names if n == "__pycache__"})
    shutil.copy(root / "pyproject.toml", tmp_path)
    assert lint() == (0, dict.fromkeys(BREACHES, "KEPT"))
    for contract, (file, line) in BREACHES.items():
        path = tmp_path / "pss" / file
        whole = path.read_text()
        path.write_text(f"{whole}\n\n{line}\n")
        status, found = lint()
        assert status == 1 and found[contract] == "BROKEN", found
        path.write_text(whole)


def test_mutation_run_names_files_and_tests_that_are_there(root):
    table = runpy.run_path(root / ".ci" / "mutants.py")["TESTS"]
    assert all((root / "pss" / f"{name}.py").is_file() for name in table)
    assert all((root / "tests" / f"test_{name}.py").is_file() for names, _ in table.values() for name in names)


def without(packages: list[str], code: str) -> str:
    """Run code in a process in which these packages cannot be imported; what it printed, or why it failed."""
    import subprocess
    import sys

    block = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    made = subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120, check=False
    )
    return made.stdout + made.stderr.strip().split("\n")[-1]


def test_notebooks_are_started_without_torch_and_networks_opened_without_its_compiler():
    assert without(["torch"], "import pss.apps.batch; print('started')") == "started\n"
    loaded = "print('torchvision' in sys.modules, {'torch._dynamo', 'sympy'} & sys.modules.keys())\n"
    asked = "from torch._dynamo import utils\nfrom torchvision.ops.roi_align import is_compile_supported as asked\n"
    same = "print(asked('cpu') == utils.is_compile_supported('cpu'), asked is utils.is_compile_supported)"
    assert without([], f"import pss.models\n{loaded}{asked}{same}") == "True set()\nTrue False\n"


def test_a_network_of_ones_own_needs_no_extra(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    imported = {"scikit-learn": "sklearn", "scikit-image": "skimage"}
    base, names = (requirements(lines) for lines in (project["dependencies"], everything(project, "lab")))
    extras = [imported.get(n, n.replace("-", "_")) for n in names if n not in base]
    assert {"papermill", "mlxtend", "skimage", "jupyterlab", "seaborn"} <= set(extras)
    code = """
import torch, pss
from pss.apps import explain, experiment, report
assert all(getattr(pss, name) for name in pss.__all__)
network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 3))
images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 3
profiles = pss.profile(network, images, labels, pss.Units.of(network))
print(pss.rank(profiles[:1], pss.Reference.fit(profiles), k=1).numel())
"""
    assert without(extras, code) == "1\n"
    told = "pip install 'pss[notebooks]'"
    assert told in without(["papermill"], "from pss.__main__ import main; main(['run', 'notebooks'])")
    assert told in without(["sklearn"], "import pss; pss.data.digits()")
    assert told in without(["skimage"], "import pss; pss.data.photographs()[0].path")


def test_pss_is_found_in_a_folder_that_holds_a_folder_pss(tmp_path):
    import os
    import subprocess
    import sys

    (tmp_path / "pss").mkdir()  # as a clone of that name is
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import pss; pss.models"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_ci_calls_the_test_command_of_the_readme(root):
    assert "make test" in (root / ".ci" / "run").read_text()
    assert "make test" in (root / "README.md").read_text()
    assert "make run" in (root / "README.md").read_text()


def test_importing_pss_changes_no_global_state():
    import subprocess
    import sys

    check = """
import torch, numpy
state = lambda: (torch.get_num_threads(), torch.initial_seed(), torch.get_rng_state().sum(), torch.is_grad_enabled())
before = state()
import pss
assert state() == before, (before, state())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, timeout=120)


def test_workflow_runs_targets_of_the_makefile(root):
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["make"]
    targets = {target.split()[0] for target in job["strategy"]["matrix"]["target"]}
    assert targets == {"lint", "test", "test-faults", "test-lowest", "test-newest"}
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", (root / "Makefile").read_text(), re.MULTILINE)
    assert targets <= {name for rule in rules for name in rule.split()}
    python = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert python == "3.11" and job["steps"][-1]["run"] == "make ${{ matrix.target }}"


def test_lowest_versions_are_the_lower_bounds(root):
    import subprocess
    import sys

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bounds = {name.split("[")[0]: bound for name, bound in requirements(allowed(project)).items()}
    command = [sys.executable, root / ".ci" / "bounds.py"]
    run = lambda *how: subprocess.run([*command, *how], check=True, capture_output=True, text=True).stdout  # noqa: E731
    lowest = dict(line.lower().split("==") for line in run("lowest", "torch").split())
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split())
    assert lowest.pop("torch") == pins["torch"] and run("newest", "torch").split() == [f"torch=={pins['torch']}"]
    assert all(f">={version}" in bounds[name].split(",") for name, version in lowest.items())
    assert lowest.keys() == bounds.keys() - {"torch"}
