"""What may be set in a notebook: names, defaults and kinds in its parameters cell, and values of the same types.

The comment behind a parameter may begin with its kind::

    image_path = ""     # place: a picture                     resolved from the caller's folder; must be there
    output = "runs"     # place to write: folder of the report     resolved, need not be there
    model = "digits"    # name or place: a name, or a file         resolved if it is written as a path, or is a file
    method = "zscore"   # one of zscore, pot: the ranking          nothing else is taken
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}
_COMMENT = re.compile(r"[^#]*#\s*(place to write|name or place|place|one of (?P<choices>[^:]+)):")
_LIKE_A_PATH = re.compile(r"/|^~|\.(ya?ml|safetensors|pth?)$")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook: its default (None for one that is no plain literal), and its kind, see above."""

    default: Any
    kind: str = ""
    choices: tuple[str, ...] = ()


def parameters_of(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """Parameters by name, as the cell tagged ``parameters`` has them.

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
    found: dict[str, Parameter] = {}
    for statement in body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and getattr(statement, "value", None) is not None:
            line = tagged[0].splitlines()[statement.end_lineno - 1].encode()[statement.end_col_offset :].decode()
            found[targets[0].id] = Parameter(_literal(statement.value), *_kind(line))
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _kind(comment: str) -> tuple[str, tuple[str, ...]]:
    found = _COMMENT.match(comment)
    if found is None:
        return "", ()
    choices = found["choices"]
    return ("one of", tuple(choices.replace(",", " ").split())) if choices else (found[1], ())


# --- texts and YAML ---------------------------------------------------------------------------------------------------


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
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not plain YAML: {error}") from error


def read_text(text: str, parameter: Parameter | None) -> Any:
    """Value that a text of the command line or of a CSV stands for: YAML, but a text stays one (007, no, 1e3).

    Where the default is None, numbers, true, false, and lists and mappings in brackets are what they are; all else is
    a text.
    """
    default = None if parameter is None else parameter.default
    try:
        value = read_yaml(text)
    except ValueError:
        if default is None or isinstance(default, str):
            return text
        raise
    if isinstance(default, str):
        return value if isinstance(value, str) else text
    plain = isinstance(value, int | float | None) and text.lower() not in ("yes", "no", "on", "off")
    return value if default is not None or plain or text.startswith(("{", "[", "'", '"')) else text


# --- values -----------------------------------------------------------------------------------------------------------


def read_values(notebook: str | os.PathLike, texts: Mapping[str, str]) -> dict[str, Any]:
    """Values that texts of the command line stand for, checked; raises as `check_values`."""
    known = parameters_of(notebook) if texts else {}
    return check_values(notebook, {name: read_text(text, known.get(name)) for name, text in texts.items()})


def check_values(notebook: str | os.PathLike, values: Mapping[str, Any], base: Path | None = None) -> dict[str, Any]:
    """The values, of the types of the notebook's defaults, with the places among them absolute.

    A default of None takes anything; a number with a point takes a whole one too; the members of a list are compared
    with those of the default. Relative places are seen from ``base``, by default the current folder.

    Raises
    ------
    ValueError
        For a name that the notebook lacks (papermill only warns), a value of another type, or none of the choices.
    """
    known, name = parameters_of(notebook) if values else {}, Path(notebook).name
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    checked = {}
    for key, value in values.items():
        parameter, what = known[key], f"{name}: {key}"
        checked[key] = _settle(parameter, _of_type(value, parameter.default, what), base or Path.cwd(), what)
    return checked


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


def _settle(parameter: Parameter, value: Any, base: Path, what: str) -> Any:
    """The value, absolute if it is a place; refused if it is none of the choices, or not there."""
    if isinstance(value, list):
        return [_settle(parameter, member, base, what) for member in value]
    if parameter.choices and value not in parameter.choices:
        raise ValueError(f"{what} = {value!r}: expected one of {', '.join(parameter.choices)}")
    if "place" not in parameter.kind or not isinstance(value, str) or not value or "://" in value:
        return value
    place = os.path.normpath(base.absolute() / Path(value).expanduser())
    if parameter.kind == "name or place" and not (_LIKE_A_PATH.search(value) or os.path.isfile(place)):
        return value
    return place


def check_places(notebook: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Refuse places that are not there, of values that `check_values` has seen."""
    known = parameters_of(notebook) if values else {}
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            needed = known[name].kind in ("place", "name or place") and os.path.isabs(str(text))
            if needed and not os.path.exists(text):
                seen = "relative places are seen from the folder of the command, those of a sweep from its file"
                raise ValueError(f"{Path(notebook).name}: {name} = {text!r} is not there; {seen}")
