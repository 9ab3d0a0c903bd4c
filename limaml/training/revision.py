"""The revision of the code that shapes a model: of what runs, not of how it is written down.

An installed package has no other revision to tell. Comments, docstrings, blank lines and the breaking of lines change nothing,
so that none of them calls for training again; an annotation counts, since pydantic and dataclasses read them. What is digested
is Python's syntax tree, whose fields belong to a version of Python: another one (3.12 for 3.11) is another revision.
"""

import ast
import functools
import hashlib
import re
from pathlib import Path

_CODE = ("config", "schema", "metrics.py", "events", "features", "tasks", "models", "meta", "training", "evaluation")
_SOURCES = (".py", ".c", ".h")
# A literal is kept (group 1), in which // begins no comment; a comment goes.
_LITERAL_OR_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


@functools.cache
def code_revision() -> str:
    """SHA-256 (hex) of the code that shapes a model or its judgement.

    Read once a process: what runs is what was imported, whatever happens to the files later.
    """
    return revision_of(Path(__file__).parent.parent)


def revision_of(root: Path) -> str:
    """SHA-256 (hex) of the names and the code of the sources under a copy of this package."""
    digest = hashlib.sha256()
    for part in _CODE:
        whole = root / part
        paths = [path for path in whole.rglob("*") if path.suffix in _SOURCES] if whole.is_dir() else [whole]
        for path in sorted(paths):
            digest.update(f"{path.relative_to(root)}\0{code_of(path)}\0".encode())
    return digest.hexdigest()


def code_of(path: Path) -> str:
    """A file without what does not run: Python as its syntax tree, C without comments, anything else as it is."""
    text = path.read_text()
    if path.suffix == ".py":
        return ast.dump(_WithoutStrings().visit(ast.parse(text)))
    return _c_code(text) if path.suffix in _SOURCES else text


class _WithoutStrings(ast.NodeTransformer):
    """Drops statements that are a string alone: docstrings, and what stands below a field or a constant."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def _c_code(text: str) -> str:
    """Blanks collapsed, but for lines with literals; a directive of the preprocessor is kept on a line of its own."""
    bare = _LITERAL_OR_COMMENT.sub(lambda found: found[1] or " ", text.replace("\\\n", " "))
    lines = [line.strip() if '"' in line else " ".join(line.split()) for line in bare.splitlines()]
    return " ".join(f"\n{line}\n" if line.startswith("#") else line for line in lines if line)
