"""One notebook through papermill: its parameters, values for them checked beforehand, and the executed copy."""

from __future__ import annotations

import ast
import base64
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from traitlets.config import Config

from pss.storage.whole import write_whole

KERNEL = "python3"
# Where kernels and their managers know how, what they say to each other is encrypted (newer ones warn if it is not).
ENCRYPTED = Config(KernelManager={"transport_encryption": "auto"})
# Texts under these names are places on disk; under others only those that begin or end like one.
_PLACES = re.compile(r"(^|_)(paths?|folders?|files?|root|checkpoint|output)$")
_LIKE_PLACES = re.compile(r"^\.\.?(/|$)|^~/|\.(ya?ml|csv|json|npy|npz|pth?|safetensors|png|jpe?g|webp|tiff?|html)$")
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}


def parameters_of(notebook: str | os.PathLike) -> dict[str, Any]:
    """Names and default values in the cell tagged ``parameters``; None for a default that is no plain literal.

    Raises
    ------
    ValueError
        If there is not exactly one such cell, or it is no Python.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{Path(notebook).name} has {len(tagged)} cells tagged 'parameters': expected one")
    try:
        body = ast.parse(tagged[0]).body
    except SyntaxError as error:
        raise ValueError(f"the parameters cell of {Path(notebook).name} is no plain Python: {error}") from error
    found: dict[str, Any] = {}
    for statement in body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and getattr(statement, "value", None) is not None:
            found[targets[0].id] = _literal(statement.value)
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


# --- values -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML of plain values: ``1e-3`` is a number as in Python, and a name given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Value of a YAML text; tags that make objects, and what cannot be read, are a ValueError."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not plain YAML: {error}") from error


def read_text(text: str, default: Any) -> Any:
    """Value that a text of the command line or of a CSV stands for: YAML, but a text stays one (007, no, 1e3)."""
    if isinstance(default, str):
        try:
            value = read_yaml(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return read_yaml(text)


def check_values(notebook: str | os.PathLike, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, of the types of the notebook's defaults.

    A default of None takes anything; a number with a point takes a whole one too; the members of a list are compared
    with those of the default.

    Raises
    ------
    ValueError
        For a name that the notebook lacks (papermill only warns), or a value of another type.
    """
    known, name = parameters_of(notebook), Path(notebook).name
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    return {key: _of_type(value, known[key], f"{name}: {key}") for key, value in values.items()}


def _of_type(value: Any, default: Any, what: str) -> Any:
    """The value if its type fits; a whole number where the default has a point becomes one with a point."""
    if type(value) not in _KINDS:  # dates, sets, bytes
        raise ValueError(f"{what} = {value!r} is a {type(value).__name__}: put it in quotes to give a text")
    if isinstance(default, tuple):
        default = list(default)
    if isinstance(value, list):
        kinds = {type(member) for member in default} if isinstance(default, list) else set()
        first = default[0] if len(kinds) == 1 else None
        value = [_of_type(member, first, f"{what}[{i}]") for i, member in enumerate(value)]
    elif isinstance(value, dict):
        value = {key: _of_type(member, None, f"{what}[{key!r}]") for key, member in value.items()}
    if type(value) is int and type(default) is float:
        return float(value)
    if default is None or type(value) is type(default):
        return value
    kind, expected = _KINDS[type(value)], _KINDS.get(type(default), type(default).__name__)
    raise ValueError(f"{what} = {value!r} is {kind}, but its default {default!r} is {expected}: give {expected}")


def place(name: str, value: Any, base: Path) -> Any:
    """The value, absolute if it is a relative place on disk: one seen from ``base``, not from the notebook's folder.

    Places are texts under names that end in path, folder, file, root, checkpoint or output, and under any name those
    that begin with ``./``, ``../`` or ``~/`` or end as a file does, as ``weights.pth`` or ``model.yaml``.
    """
    if isinstance(value, list):
        return [place(name, member, base) for member in value]
    if not isinstance(value, str) or not value or "://" in value:
        return value
    if _PLACES.search(name) or _LIKE_PLACES.search(value):
        return os.path.normpath(base.absolute() / Path(value).expanduser())
    return value


# --- running ----------------------------------------------------------------------------------------------------------


def run_notebook(
    notebook: str | os.PathLike, output: str | os.PathLike, parameters: Mapping[str, Any] | None = None
) -> list[Path]:
    """Execute a notebook in its own folder and write the executed copy, with its figures in a folder beside it.

    Parameters
    ----------
    notebook, output : path
    parameters : mapping, optional
        Values for names in the notebook's parameters cell. The kernel runs in the notebook's folder: relative paths
        among them are seen from there (`place` makes them absolute).

    Returns
    -------
    list of Path
        The figures.

    Raises
    ------
    ValueError
        For a parameter that the notebook lacks, or a value of another type than its default.
    papermill.exceptions.PapermillExecutionError
        If a cell raises; the copy and the figures up to there are kept.
    """
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    parameters = check_values(notebook, parameters or {})
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.stem}.running.ipynb")
    try:
        _execute(notebook, beside, parameters)
    except Exception:
        if beside.exists():
            write_whole(output, beside.read_bytes())
            _write_figures(output)
        raise
    else:
        write_whole(output, beside.read_bytes())  # papermill's own file may not be on the disk yet
        return _write_figures(output)
    finally:
        beside.unlink(missing_ok=True)


def _execute(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    papermill.execute_notebook(
        str(notebook),
        str(output),
        dict(parameters),
        kernel_name=KERNEL,
        language="python",  # for notebooks that do not say
        cwd=str(notebook.parent),
        progress_bar=False,
        config=ENCRYPTED,
    )


def _write_figures(executed: Path) -> list[Path]:
    """Write every picture among the outputs to ``<stem>/NN.png`` beside the notebook."""
    folder = executed.with_suffix("")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    written = []
    for cell in nbformat.read(executed, as_version=4).cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                written.append(folder / f"{len(written) + 1:02d}.png")
                write_whole(written[-1], base64.b64decode(data["image/png"]))
    return written


def refresh(notebook: str | os.PathLike) -> None:
    """Execute a notebook in place, ready to commit: with its outputs, without times, progress bars and messages."""
    path = Path(notebook)
    beside = path.with_name(f".{path.stem}.running.ipynb")
    try:
        _execute(path.resolve(), beside.resolve(), {})
        executed = nbformat.read(beside, as_version=4)
        original = nbformat.read(path, as_version=4)
        for cell, source in zip(executed.cells, original.cells, strict=True):
            cell.metadata = source.metadata
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        executed.metadata = _plain_metadata()
        write_whole(path, nbformat.writes(executed).rstrip("\n") + "\n")
    finally:
        beside.unlink(missing_ok=True)


def _plain_metadata() -> nbformat.NotebookNode:
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": KERNEL}
    return nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
