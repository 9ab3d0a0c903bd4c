"""Feast is imported without typeguard's instrumentation, and typeguard is left as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import typeguard
before = typeguard.typechecked
from limaml.features.feature_store import import_feast
{first}
import feast
assert typeguard.typechecked is before
print("TypeCheckMemo" in feast.Entity.__init__.__code__.co_names)
"""


# Without the second case, the first could not fail if Feast dropped typeguard, or typeguard worked otherwise.
@pytest.mark.parametrize(("first", "instrumented"), [("import_feast()", "False"), ("", "True")])
def test_feast_is_imported_without_instrumentation_and_typeguard_is_restored(first: str, instrumented: str) -> None:
    script, root = SCRIPT.format(first=first), Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == instrumented
