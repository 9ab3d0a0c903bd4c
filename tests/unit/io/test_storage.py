"""A file appears whole or not at all, on a local disk and where there is no rename: Arrow's file system in memory."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from limaml.errors import DataError
from limaml.io.storage import Storage, each_in_threads, whole_files

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


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("folder/file", b"what was there")
    with pytest.raises(TypeError):
        storage.write_bytes("folder/file", object())
    assert storage.read_bytes("folder/file") == b"what was there"


def test_names_come_sorted_whatever_the_file_system_says(storage: Storage) -> None:
    names = [f"{number:02}" for number in range(40)]
    for name in reversed(names):
        storage.write_bytes(f"a/{name}/file", b"")
    assert storage.list("a") == names
    assert list(storage.walk("a")) == [f"a/{name}/file" for name in names]
    assert storage.list("nowhere") == []


def test_what_a_killed_writer_left_is_not_listed(storage: Storage) -> None:
    storage.write_bytes("days/dt=D.json", b"{}")
    storage.write_bytes("days/.dt=D.json.1a2b", b"{")
    assert storage.list("days") == ["dt=D.json"]


def test_a_parquet_file_that_was_cut_short_has_no_rows_and_is_named_with_the_remedy(storage: Storage) -> None:
    storage.write_table("rows/part.parquet", pa.table({"n": [1, 2]}))
    assert (storage.num_rows("rows/part.parquet"), storage.num_rows("rows/other.parquet")) == (2, None)
    content = storage.read_bytes("rows/part.parquet")
    storage.write_bytes("rows/part.parquet", content[: len(content) // 2])
    assert storage.num_rows("rows/part.parquet") is None
    with pytest.raises(DataError, match=r"rows/part\.parquet.* write it again$"), whole_files("write it again"):
        storage.dataset(["rows/part.parquet"], COLUMNS).to_table()
    with pytest.raises(ZeroDivisionError), whole_files("write it again"):
        _ = 1 / 0


def test_the_options_of_a_url_stay_behind_every_path() -> None:
    storage = Storage("mock:///bucket?region=here&scheme=http")
    assert storage.path("days/dt=D.json") == "mock:///bucket/days/dt=D.json?region=here&scheme=http"
    storage.write_bytes("days/dt=D.json", b"content")
    assert list(storage.walk("days")) == ["days/dt=D.json"]
    assert Storage("mock:///bucket").path("days") == "mock:///bucket/days"


def test_every_item_is_written_and_an_error_of_one_is_raised(tmp_path):
    storage = Storage(str(tmp_path))
    each_in_threads(lambda number: storage.write_bytes(f"{number}.bin", b"x"), range(20))
    assert len(storage.list("")) == 20

    def fail(number):
        if number == 7:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        each_in_threads(fail, range(20))
