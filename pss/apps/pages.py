"""HTML by templates, in which every name and value is escaped, and the words that pages say in two languages."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

_HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """Fill a file of ``templates/``."""
    loader = FileSystemLoader(_HERE / "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(values)


@cache
def words() -> dict[str, dict[str, Any]]:
    """What ``words.yaml`` holds: Japanese ``columns``, ``values`` and ``reasons``; ``sentences`` in both languages."""
    return yaml.safe_load((_HERE / "words.yaml").read_text(encoding="utf-8"))


class _Words(string.Formatter):
    """``{n:unit|# units}`` is the first where n is 1, else the second; # is the number. ``{n!j}`` is n in Japanese."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return in_japanese(value) if conversion == "j" else super().convert_field(value, conversion)

    def format_field(self, value: Any, spec: str) -> str:
        one, either, many = spec.partition("|")
        return (one if value == 1 else many.replace("#", f"{value:,}")) if either else super().format_field(value, spec)


def sentence(name: str, /, **values: Any) -> tuple[str, str]:
    """A sentence of ``words.yaml`` with these values, in English and in Japanese."""
    told, fill = words()["sentences"][name], _Words().format
    return fill(told["en"], **values), fill(told["ja"], **values)


def in_japanese(text: str, kind: str = "values") -> str:
    """A value of a table, or part of a reason, in Japanese; where ``words.yaml`` has no pattern of it, as it is."""
    found = ((re.fullmatch(pattern, text), said) for pattern, said in words()[kind].items())
    return next((said.format(*match.groups()) for match, said in found if match), text)


def joined(told: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Sentences as one text, in English and in Japanese."""
    return " ".join(english for english, _ in told), "".join(japanese for _, japanese in told)


def no_patch(name: str, reason: str, **values: Any) -> tuple[str, str]:
    """The sentence of a patch without gains, with its reason in either language."""
    said = "，".join(in_japanese(part, "reasons") for part in reason.split(": "))
    return sentence(name, reason=reason, **values)[0], sentence(name, reason=said, **values)[1]
