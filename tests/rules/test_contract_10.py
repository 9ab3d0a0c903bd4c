"""Contract 10: no file but a configuration and a source's own adapter names a column of one data set."""

import re
from pathlib import Path

import pytest

from limaml import config

ROOT = Path(__file__).parents[2]
FOLDERS = ("limaml", "serving", "dags", "feature_repo", "helm", "experiments", "benchmarks", "tools")
ADAPTERS = {"limaml/events/completejourney.py", "limaml/events/movielens.py", "limaml/events/synthetic.py"}


def columns():
    """Catalogue columns that the shipped configurations declare, but for what people read: pages and plots have titles, too."""
    found = set()
    for path in sorted((ROOT / "configs").glob("*.toml")):
        read = [feature for feature in config.load(path).features if feature.type != "text" and not feature.aggregate]
        found |= {feature.source_column for feature in read if feature.entity != "context"}
    return sorted(found)


@pytest.mark.parametrize("column", columns())
def test_no_file_names_a_column_of_one_data_set(column):
    # In quotes or as a field, not as a word of a sentence.
    named = re.compile(rf"""["'`]{column}["'`]|\b{column}:""")
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    naming = [str(path.relative_to(ROOT)) for path in paths if named.search(path.read_text())]
    assert set(naming) <= ADAPTERS
    assert naming, "the adapters do name it, so the pattern finds it"
