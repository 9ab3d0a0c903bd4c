"""What counts as other code, and so calls for training again, and what does not."""

from pathlib import Path

import pytest

import limaml
from limaml.training.revision import code_of, code_revision, revision_of

MODULE = '''"""What it is for."""

RATE = 0.5
"""Its source."""


def step(x: float, rate: float = RATE) -> float:
    """One step."""
    # Downhill.
    return x - rate * pow(x, 2)


class Named:
    """A thing."""

    name: str = "a # b"
    """Its name."""
'''
KERNEL = """/* A sum. */
#include <math.h>
#define TWICE(x) ((x) + (x))
#pragma GCC target("arch=x86-64-v3")

double sum(const double *x, long n) {
    double total = 0.0; // in order
    for (long i = 0; i < n; ++i) total += x[i];
    return TWICE(total);
}
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """As small as one can be."""
    for folder in ("config", "schema", "events", "features", "tasks", "models", "meta", "training", "evaluation"):
        (tmp_path / folder).mkdir()
    for name in ("config/model.py", "schema/columns.py", "metrics.py", "models/block.py"):
        (tmp_path / name).write_text(MODULE)
    (tmp_path / "meta" / "kernel.c").write_text(KERNEL)
    return tmp_path


def edited(package: Path, name: str, old: str, new: str) -> str:
    path = package / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return revision_of(package)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""One step."""', '"""One step down the slope,\n\n    of `rate`.\n    """'),
        ('    """One step."""\n', ""),
        ('"""What it is for."""\n', ""),
        ('"""Its source."""', '"""Its measurement."""'),
        ('    """Its name."""\n', ""),
        ("# Downhill.", "# Towards the minimum."),
        ("    # Downhill.\n", "\n\n"),
        ("x - rate * pow(x, 2)", "x - rate * pow(\n        x,  # the place\n        2,\n    )"),
        ("x - rate * pow(x, 2)", "(x - (rate * pow(x, 2)))"),
        ('"a # b"', "'a # b'"),
    ],
)
def test_how_python_is_written_down_does_not_count(package, old, new):
    before = revision_of(package)
    assert edited(package, "models/block.py", old, new) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.5", "RATE = 0.25"),
        ("x - rate", "x + rate"),
        ("rate: float = RATE", "rate: float = 1.0"),
        ("pow(x, 2)", "pow(2, x)"),
        ("def step", "def stride"),
        ('"a # b"', '"a # c"'),
        ("name: str", "name: bytes"),
        ("return x", "assert x; return x"),
    ],
)
def test_what_python_does_counts(package, old, new):
    before = revision_of(package)
    assert edited(package, "models/block.py", old, new) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/* A sum. */", '/* A sum of doubles,\n * "in order". */'),
        ("/* A sum. */\n", ""),
        (" // in order", ""),
        ("// in order", "// it's in order"),
        ("    return", "\n\n\treturn"),
        ("sum(const double *x, long n)", "sum(const double *x,\n           long n)"),
        ("#define TWICE(x) ((x) + (x))", "#define TWICE(x) \\\n    ((x) + (x))"),
    ],
)
def test_how_c_is_written_down_does_not_count(package, old, new):
    before = revision_of(package)
    assert edited(package, "meta/kernel.c", old, new) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total += x[i];", "total += x[i] * x[i];"),
        ("total += x[i];", "/* total += x[i]; */;"),
        ("0.0;", "1.0;"),
        ("((x) + (x))", "((x) * 2)"),
        ("((x) + (x))\n", "((x) + (x)) "),
        ("x86-64-v3", "x86-64-v4"),
        ('"arch=x86-64-v3"', '"arch=x86-64-v3//"'),
        ("++i", "+ +i"),
    ],
)
def test_what_c_does_counts(package, old, new):
    before = revision_of(package)
    assert edited(package, "meta/kernel.c", old, new) != before


def test_the_names_of_the_files_and_their_number_count(package):
    before = revision_of(package)
    (package / "models" / "block.py").rename(package / "models" / "other.py")
    renamed = revision_of(package)
    assert renamed != before
    (package / "models" / "again.py").write_text("")
    assert revision_of(package) not in (before, renamed)


def test_files_that_shape_no_model_do_not_count(package):
    before = revision_of(package)
    (package / "cli.py").write_text("RATE = 2")
    (package / "meta" / "kernel.so").write_bytes(b"\x7fELF")
    assert revision_of(package) == before


def test_settings_of_experiments_are_taken_as_they_are(tmp_path):
    (tmp_path / "worlds.toml").write_text('# why\nkey = "a"\n')
    assert code_of(tmp_path / "worlds.toml") == '# why\nkey = "a"\n'


def test_this_package_has_a_revision():
    assert code_revision() == revision_of(Path(limaml.__file__).parent)
