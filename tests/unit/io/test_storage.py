"""A file appears whole or not at all, on a local disk and where there is no rename: Arrow's file system in memory."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from limaml.io.storage import Storage

COLUMNS = pa.schema([pa.field("n", pa.int64())])


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage("mock:///bucket" if request.param == "memory" else str(tmp_path))


def numbers(*values: int, fails: bool = False) -> pa.RecordBatchReader:
    def batches() -> Iterator[pa.RecordBatch]:
        for value in values:
            yield pa.record_batch([pa.array([value])], schema=COLUMNS)
        if fails:
            raise KeyboardInterrupt

    return pa.RecordBatchReader.from_batches(COLUMNS, batches())


def test_bytes_replace_bytes(storage: Storage) -> None:
    for content in (b"old", b"new", b""):
        storage.write_bytes("days/dt=D.json", content)
        assert storage.read_bytes("days/dt=D.json") == content
    assert storage.list("days") == ["dt=D.json"]


def test_a_stream_that_fails_leaves_the_file_before_and_nothing_else(storage: Storage) -> None:
    assert storage.write_batches("rows/part.parquet", numbers(1, 2)) == 2
    with pytest.raises(KeyboardInterrupt):
        storage.write_batches("rows/part.parquet", numbers(3, fails=True))
    assert storage.read_table("rows/part.parquet")["n"].to_pylist() == [1, 2]
    assert list(storage.walk("rows")) == ["rows/part.parquet"]
