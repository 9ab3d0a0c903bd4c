"""The reference of the chart's values, from the `# --` comments above them in values.yaml."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.markdown import table

_KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):(?: |$)")
_TOLD = re.compile(r"^ *# -- (.*)$")
_MORE = re.compile(r"^ *# (?!-- )(.*)$")
_LONGEST = 60


@dataclass(frozen=True)
class Value:
    """A value that a comment explains."""

    path: tuple[str, ...]
    default: Any
    text: str


def values(path: Path) -> list[str]:
    """A table of every value: key, default, what it is."""
    rows = [(f"`{'.'.join(value.path)}`", _default(value.default), value.text) for value in explained(path)]
    return table(("value", "default", "what it is"), rows)


def explained(path: Path) -> Iterator[Value]:
    """What comments explain, in the order of the file."""
    defaults = yaml.safe_load(path.read_text())
    for keys, text in _comments(path.read_text()):
        if text:
            yield Value(keys, _at(defaults, keys), text)


def unexplained(path: Path) -> list[str]:
    """Values that no comment explains, neither their own nor that of what they are part of."""
    told = {value.path for value in explained(path)}
    return [".".join(keys) for keys in _leaves(yaml.safe_load(path.read_text())) if not told & set(_within(keys))]


def _comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key with the comment above it, empty without one; a text of several lines has no keys."""
    above: list[tuple[int, str]] = []
    told: list[str] = []
    block = -1
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block >= 0 and (not line.strip() or indent > block):
            continue
        block = -1
        if found := _TOLD.match(line):
            told = [found[1]]
        elif told and (found := _MORE.match(line)):
            told.append(found[1])
        elif found := _KEY.match(line):
            above = [(depth, key) for depth, key in above if depth < len(found[1])] + [(len(found[1]), found[2])]
            yield tuple(key for _, key in above), " ".join(told)
            told, block = [], indent if line.endswith("|") else -1
        else:
            told = []


def _within(keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (keys[:length] for length in range(1, len(keys) + 1))


def _leaves(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key)


def _at(values: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        values = values[key]
    return values


def _default(value: Any) -> str:
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= _LONGEST else "see values.yaml"
