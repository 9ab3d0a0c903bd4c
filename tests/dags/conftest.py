"""A program in the place of the interpreter that runs the verbs, so that a test decides what a verb does; a server for pods."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dags.pod_task import api

__all__ = ["api"]

PROGRAM = """#!{python}
import json, os, pathlib, sys
result = pathlib.Path(sys.argv[-1].removeprefix("--result="))
def leave(**value):
    result.write_text(json.dumps(dict(verb=sys.argv[3], status="ok") | value))
"""


@pytest.fixture
def verb_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`verb_program(body)` makes the operator run `body` in the place of a verb; returns the folder the program lies in."""

    def install(body: str) -> Path:
        program = tmp_path / "python"
        program.write_text(PROGRAM.replace("{python}", sys.executable) + body)
        program.chmod(0o700)
        monkeypatch.setenv("AIRFLOW__LIMAML__PYTHON", str(program))
        return tmp_path

    return install
