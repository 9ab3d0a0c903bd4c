"""The table of the faults that are survived, from the marks of the tests: `@pytest.mark.fault(what, after=...)`."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.markdown import table

ROOT = Path(__file__).parents[1]
_SERVICES = "pytest.mark.services"


@dataclass(frozen=True)
class Fault:
    """One mark."""

    what: str
    after: str
    test: str
    """As pytest names it, without parameters."""
    services: bool
    """Whether only `make test-services` runs it."""


def rows() -> list[str]:
    """The table, in the order of files and tests."""
    header = ("fault", "afterwards", "test", "run by")
    return table(
        header,
        [(fault.what, fault.after, f"`{fault.test}`", f"`make test{'-services' * fault.services}`") for fault in faults()],
    )


def faults() -> list[Fault]:
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py") if "site-packages" not in path.parts)
    return [fault for path in paths for fault in _of_file(path)]


def _of_file(path: Path) -> Iterator[Fault]:
    text = (ROOT / path).read_text()
    if "mark.fault(" not in text:
        return
    body = _parsed(path).body
    everywhere = any(isinstance(node, ast.Assign) and _SERVICES in ast.unparse(node) for node in body)
    for test in body:
        if not isinstance(test, ast.FunctionDef):
            continue
        services = everywhere or any(ast.unparse(mark) == _SERVICES for mark in test.decorator_list)
        for mark in test.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                [after] = [keyword.value for keyword in mark.keywords if keyword.arg == "after"]
                yield Fault(_text(mark.args[0], path), _text(after, path), f"{path}::{test.name}", services)


def _text(value: ast.expr, path: Path) -> str:
    """Of a constant, a name of one, or an f-string of them."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.Name):
        return _constants(path)[value.id]
    if isinstance(value, ast.FormattedValue):
        return _text(value.value, path)
    if isinstance(value, ast.JoinedStr):
        return "".join(_text(part, path) for part in value.values)
    raise ValueError(f"{path}: a mark `fault` must be made of texts, got {ast.unparse(value)}; write it out")


@cache
def _constants(path: Path) -> dict[str, str]:
    """Texts that a module names at its top, or imports from another one of the tests."""
    found: dict[str, str] = {}
    for node in _parsed(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            there = _constants(Path(f"{(node.module or '').replace('.', '/')}.py"))
            found |= {name.name: there[name.name] for name in node.names if name.name in there}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant):
            found[node.targets[0].id] = str(node.value.value)
    return found


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())
