"""Contract 10: no file but a configuration and a source's own adapter names a column of one data set."""

import re
from pathlib import Path

import pytest

from limaml import config

ROOT = Path(__file__).parents[2]
FOLDERS = ("limaml", "serving", "dags", "feature_repo", "helm", "experiments", "benchmarks", "tools")
ADAPTERS = {"limaml/events/completejourney.py", "limaml/events/movielens.py", "limaml/events/synthetic.py"}


def columns():
    """Catalogue columns that the shipped configurations declare, each with whether an adapter of its own delivers it; without
    what people read: pages and plots have titles, too.
    """
    found = {}
    for path in sorted((ROOT / "configs").glob("*.toml")):
        cfg = config.load(path)
        read = [feature for feature in cfg.features if feature.type != "text" and not feature.aggregate]
        for feature in read:
            if feature.entity != "context":
                found[feature.source_column] = cfg.source.kind not in ("table", "parquet") or found.get(feature.source_column)
    return sorted((column, bool(adapted)) for column, adapted in found.items())


@pytest.mark.parametrize(("column", "adapted"), columns())
def test_no_file_names_a_column_of_one_data_set(column, adapted):
    # In quotes or as a field, not as a word of a sentence.
    named = re.compile(rf"""["'`]{column}["'`]|\b{column}:""")
    every = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    paths = [path for path in every if not {".venv", ".sequence"} & set(path.parts)]
    assert len(paths) > 100
    naming = [str(path.relative_to(ROOT)) for path in paths if named.search(path.read_text())]
    assert set(naming) <= ADAPTERS
    assert bool(naming) == adapted, (
        "the adapters do name theirs, so the pattern finds it; a table is named in configurations only"
    )
