"""Somebody else's Parquet files, whatever they hold."""

from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml.data.parquet_source import ParquetSource
from limaml.errors import ConfigError, DataError, UnreadableDayError


@pytest.fixture
def folder(tmp_path):
    for day, names in (("2026-01-01", ["a", "b"]), ("2026-01-04", ["a"])):
        for number, name in enumerate(names):
            path = tmp_path / "events" / f"dt={day}" / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"n": [number]}), path)
    return tmp_path


def test_days_are_the_calendar_from_first_to_last(folder):
    (folder / "events" / "notes").mkdir()
    assert ParquetSource(str(folder)).days() == [date(2026, 1, n) for n in (1, 2, 3, 4)]


def test_files_of_a_day_are_read_together_and_a_missing_day_is_none(folder):
    source = ParquetSource(str(folder))
    assert source.read_day(date(2026, 1, 1)).to_pylist() == [{"n": 0}, {"n": 1}]
    assert source.read_day(date(2026, 1, 2)) is None
    (folder / "events" / "dt=2026-01-02").mkdir()
    assert source.read_day(date(2026, 1, 2)) is None


def test_unreadable_file_carries_its_bytes(folder):
    path = folder / "events" / "dt=2026-01-04" / "a.parquet"
    path.write_bytes(b"nonsense")
    with pytest.raises(UnreadableDayError, match=r"a\.parquet must be a readable Parquet file") as caught:
        ParquetSource(str(folder)).read_day(date(2026, 1, 4))
    assert caught.value.raw == b"nonsense"


def test_files_with_different_columns_are_refused(folder):
    pq.write_table(pa.table({"m": ["x"]}), folder / "events" / "dt=2026-01-01" / "b.parquet")
    with pytest.raises(UnreadableDayError, match="must share one schema"):
        ParquetSource(str(folder)).read_day(date(2026, 1, 1))


def test_missing_catalogue_days_and_path_name_the_remedy(tmp_path):
    source = ParquetSource(str(tmp_path))
    with pytest.raises(DataError, match=r"users\.parquet must exist: it holds the known users"):
        source.catalogue()
    with pytest.raises(DataError, match=r"must hold folders dt=YYYY-MM-DD, found none"):
        source.days()
    with pytest.raises(ConfigError, match=r"source\.path must name a folder or URL"):
        ParquetSource("")
