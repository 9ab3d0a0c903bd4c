"""The reference of the settings, from the models of limaml/config/: types, bounds, defaults, and the texts below the fields."""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, get_args

from experiments.markdown import table
from limaml.config import Config
from limaml.config.section import Section

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "matches"}


def settings() -> list[str]:
    """A heading, a sentence and a table for each section, in the order of `Config`."""
    lines, header = [], ("key", "type", "default", "what it is")
    for name, section, repeated in sections(Config):
        title = f"## `[[{name}]]`, any number of them" if repeated else f"## `[{name}]`"
        lines += [title, "", inspect.getdoc(section) or "", "", *table(header, _rows(section))]
    return lines


def sections(model: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section], bool]]:
    """Name, model, and whether it may be repeated, of all sections in `model` and below."""
    for name, field in model.model_fields.items():
        for below in _models(field.annotation):
            yield prefix + name, below, "tuple" in str(field.annotation)
            yield from sections(below, f"{prefix}{name}.")


def explanations(section: type[Section]) -> dict[str, str]:
    """Key -> the text below it in the code."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
        if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _models(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _rows(section: type[Section]) -> list[tuple[str, ...]]:
    schema, texts = section.model_json_schema(), explanations(section)
    rows: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        if _models(field.annotation):
            continue
        told = schema["properties"][name]
        default = f"`{json.dumps(told['default'])}`" if told.get("default") is not None else "none"
        # Outside code a < would begin a tag.
        text = re.sub(r"(`[^`]*`)|<", lambda found: found[1] or r"\<", texts.get(name, "")).replace("|", r"\|")
        rows.append((f"`{name}`", _type(told), "required" if field.is_required() else default, text))
    return rows


def _type(told: dict[str, Any]) -> str:
    if "anyOf" in told:
        return " or ".join(_type(each) for each in told["anyOf"] if each.get("type") != "null")
    if "enum" in told:
        return ", ".join(f"`{json.dumps(value)}`" for value in told["enum"])
    if told["type"] == "array":
        return f"list of {_type(told['items'])}"
    if told["type"] == "object":
        return f"table of {_type(told['additionalProperties'])}"
    bounds = [
        f"{sign} {told[key]:g}" if key != "pattern" else f"{sign} `{told[key]}`" for key, sign in _BOUNDS.items() if key in told
    ]
    return ", ".join([told.get("format", told["type"]), *bounds])
