"""Vectors from a table: of any form that means the same, and refused where they cannot be one an item."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml.config import FeatureConfig
from limaml.errors import ConfigError, DataError
from limaml.transfer.tables import VectorTable

FEATURE = FeatureConfig(entity="item", name="poster", type="vector", width=2, encoder="clip vit-b-32", licence="MIT")


def write(path, columns):
    pq.write_table(pa.table(columns), path)
    return VectorTable(str(path), FEATURE)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_an_item_has_its_vector_or_none(tmp_path, form):
    path = tmp_path / f"posters.{form}"
    if form == "csv":
        path.write_text('item_id,vector\n1,"[0.5, 1]"\n3,"[-2, 0.25]"\n')
        table = VectorTable(str(path), FEATURE)
    else:
        table = write(path, {"item_id": [1, 3, 4], "vector": [[0.5, 1.0], [-2.0, 0.25], None]})
    first, second, third, last = table.look_up(["1", "2", "3", "4"])
    assert (second, last) == (None, None)
    assert np.array_equal([first, third], np.float32([[0.5, 1.0], [-2.0, 0.25]]))
    assert (table.origin.label, table.origin.licence, table.origin.width) == ("clip vit-b-32", "MIT", 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["a"], "picture": [[1.0, 2.0]]}, "must have columns item_id and vector, got item_id, picture"),
        ({"item_id": ["a", "b"], "vector": [[1.0, 2.0], [1.0]]}, r"vector must be .* in row 1 \(item_id b\); correct it"),
        ({"item_id": ["a", "a"], "vector": [[1.0, 2.0], [1.0, 3.0]]}, "must have one row an item, got 1 more"),
        ({"item_id": [0.5], "vector": [[1.0, 2.0]]}, "item_id must be string in every row, got 0.5"),
    ],
)
def test_a_table_that_cannot_be(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "posters.parquet", columns).look_up(["a"])


def test_what_is_not_there_or_not_named_with_a_version(tmp_path):
    with pytest.raises(ConfigError, match=r"must be a Parquet or CSV file, got .*posters.parquet', which is not there"):
        VectorTable(str(tmp_path / "posters.parquet"), FEATURE)
    write(tmp_path / "posters.parquet", {"item_id": ["a"], "vector": [[1.0, 2.0]]})
    with pytest.raises(ConfigError, match=r"encoder of poster must be what made the vectors .* and its version"):
        VectorTable(str(tmp_path / "posters.parquet"), FEATURE.model_copy(update={"encoder": "clip"}))
