"""What the files of the project promise each other."""

import re
import tomllib

import yaml


def requirements(lines: list[str]) -> dict[str, str]:
    """Name to version bounds; conda's names for two packages, pip's for the rest."""
    found = {}
    for line in lines:
        name, bounds = re.fullmatch(r"([A-Za-z0-9_.\[\]-]+?)\s*([<>=!~].*)?", line.split(";")[0].strip()).groups()
        name = {"pytorch": "torch", "pytorch-cpu": "torch"}.get(name, name).lower().replace("_", "-")
        found[name] = ",".join(sorted((bounds or "").replace(" ", "").split(",")))
    return found


def everything(project: dict) -> list[str]:
    """What `make` installs: the dependencies, the extra `test`, and the extras that it names."""
    extras = project["optional-dependencies"]
    first, *others = extras["test"]
    named = re.fullmatch(r"pss\[(.+)\]", first)[1].split(",")
    return project["dependencies"] + [line for name in named for line in extras[name]] + others


def allowed(project: dict) -> list[str]:
    """What an extra may bring beside `everything`: `make test-zoo` installs one more."""
    return everything(project) + project["optional-dependencies"]["zoo"]


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
