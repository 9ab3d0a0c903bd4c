"""Somebody else's Parquet files, whatever they hold and however they are laid out."""

from datetime import UTC, date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.config import SourceConfig
from limaml.errors import ConfigError, DataError, UnreadableDayError
from limaml.events.day_store import conforms
from limaml.events.parquet_source import ParquetSource

TODAY = date(2026, 2, 1)
DAY = date(2026, 1, 1)


def rows(label):
    return pa.table({"label": pa.array([label], pa.int8())})


def write(folder, relative, table=None):
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows(0) if table is None else table, path)
    return path


def source(folder, **settings):
    return ParquetSource(SourceConfig(kind="parquet", path=str(folder), **settings), TODAY)


@pytest.fixture
def folder(tmp_path):
    for day, names in (("2026-01-01", ["a", "b"]), ("2026-01-04", ["a"])):
        for number, name in enumerate(names):
            write(tmp_path, f"events/dt={day}/{name}.parquet", rows(number))
    return tmp_path


def test_days_are_the_calendar_from_first_to_last(folder):
    assert source(folder).days() == [date(2026, 1, n) for n in (1, 2, 3, 4)]
    assert source(folder).left_out == []


def test_files_of_a_day_are_read_together_and_a_missing_day_is_none(folder):
    assert source(folder).read_day(DAY).to_pylist() == [{"label": 0}, {"label": 1}]
    assert source(folder).read_day(date(2026, 1, 2)) is None
    (folder / "events" / "dt=2026-01-02").mkdir()
    assert source(folder).read_day(date(2026, 1, 2)) is None
    assert source(folder).unread(date(2026, 1, 2)) == []


def test_files_in_folders_below_the_day_are_read(folder):
    write(folder, "events/dt=2026-01-01/hour=08/c.snappy.parquet", rows(2))
    write(folder, "events/dt=2026-01-01/d.parquet/part-0.parquet", rows(3))
    assert sorted(source(folder).read_day(DAY)["label"].to_pylist()) == [0, 1, 2, 3]
    assert source(folder).unread(DAY) == []


def test_hidden_and_unfinished_files_are_no_part_of_a_day(folder):
    day = folder / "events" / "dt=2026-01-01"
    for name in ("._a.parquet", ".a.parquet.crc", "_SUCCESS", "_half.parquet", "_temporary/0/c.parquet"):
        (day / name).parent.mkdir(parents=True, exist_ok=True)
        (day / name).write_bytes(b"half")
    assert source(folder).read_day(DAY).num_rows == 2
    assert source(folder).unread(DAY) == []


def test_what_lies_with_a_day_and_is_not_read_is_named(folder):
    (folder / "events" / "dt=2026-01-01" / "hour=09").mkdir()
    (folder / "events" / "dt=2026-01-01" / "hour=09" / "c.csv").write_text("n\n7\n")
    assert source(folder).unread(DAY) == ["hour=09/c.csv"]
    assert source(folder).read_day(DAY).num_rows == 2


def test_a_day_of_other_files_is_delivered_and_cannot_be_read(folder):
    csv = folder / "events" / "dt=2026-01-02" / "c.csv"
    csv.parent.mkdir()
    csv.write_text("n\n7\n")
    with pytest.raises(
        UnreadableDayError, match=r"dt=2026-01-02 must hold Parquet files, got only c\.csv; deliver them as Parquet"
    ):
        source(folder).read_day(date(2026, 1, 2))


def test_a_folder_that_is_no_day_is_named_and_left_out(folder):
    for name in ("dt=2026-01-32", "dt=20260102", "dt=2026-1-2", "date=2026-01-02", "notes", "_SUCCESS", ".trash"):
        (folder / "events" / name).mkdir()
    left_out = source(folder).left_out
    assert [reason.split(":")[0] for reason in left_out] == [
        "events/date=2026-01-02", "events/dt=2026-01-32", "events/dt=2026-1-2", "events/dt=20260102", "events/notes",
    ]  # fmt: skip
    assert left_out[1] == "events/dt=2026-01-32: must be dt= and a calendar day YYYY-MM-DD; rename it"
    assert source(folder).days() == [date(2026, 1, n) for n in (1, 2, 3, 4)]


def test_a_day_after_today_is_named_and_today_is_not_over(folder):
    for day in ("2026-01-31", "2026-02-01", "2026-02-02", "2036-05-04"):
        write(folder, f"events/dt={day}/a.parquet")
    assert source(folder).days()[-1] == date(2026, 1, 31)
    assert source(folder).left_out == [
        f"events/dt={day}: must not be after today (2026-02-01); correct its name" for day in ("2026-02-02", "2036-05-04")
    ]


def test_a_day_far_from_its_neighbours_is_named_and_left_out(folder):
    write(folder, "events/dt=1970-01-01/a.parquet")
    assert source(folder).days()[0] == DAY
    assert source(folder).left_out == [
        "events/dt=1970-01-01: must lie at most source.max_gap_days (366) days from the others, 2026-01-01 to 2026-01-04; "
        "correct its name, or raise the setting"
    ]
    assert source(folder, max_gap_days=20454).days()[0] == date(1970, 1, 1)
    assert source(folder, max_gap_days=20453).days()[0] == DAY
    assert source(folder, max_gap_days=2).days() == [date(2026, 1, 4)], "of runs of equally many days the last"


def test_unreadable_file_carries_its_bytes(folder):
    path = folder / "events" / "dt=2026-01-04" / "a.parquet"
    path.write_bytes(b"nonsense")
    with pytest.raises(UnreadableDayError, match=r"a\.parquet must be a readable Parquet file") as caught:
        source(folder).read_day(date(2026, 1, 4))
    assert caught.value.raw == b"nonsense"


def test_files_with_different_columns_are_refused(folder):
    write(folder, "events/dt=2026-01-01/b.parquet", pa.table({"item_id": ["x"]}))
    with pytest.raises(UnreadableDayError, match="must share one schema"):
        source(folder).read_day(DAY)


def test_a_column_that_is_there_twice_is_refused(folder):
    write(folder, "events/dt=2026-01-04/a.parquet", pa.table([pa.array([1]), pa.array([2])], names=["n", "n"]))
    with pytest.raises(UnreadableDayError, match=r"must have each column once, got n more than once"):
        source(folder).read_day(date(2026, 1, 4))


TEXT = pa.string()
AT = datetime(2026, 1, 1, 23, 30, tzinfo=UTC)


def event(text=TEXT, stamp=schema.TIMESTAMP):
    return pa.table(
        {
            "event_id": pa.array(["e"], text),
            "user_id": pa.array(["u"], text),
            "item_id": pa.array(["i"], text),
            "timestamp": pa.array([AT], schema.TIMESTAMP).cast(stamp),
            "label": pa.array([1], pa.int8()),
        }
    )


FORMS = {
    "zone": {"stamp": pa.timestamp("us", tz="Europe/Berlin")},
    "offset": {"stamp": pa.timestamp("us", tz="+05:30")},
    "Etc/UTC": {"stamp": pa.timestamp("us", tz="Etc/UTC")},
    "ns": {"stamp": pa.timestamp("ns", tz="UTC")},
    "ms": {"stamp": pa.timestamp("ms", tz="Asia/Tokyo")},
    "s": {"stamp": pa.timestamp("s", tz="UTC")},
    "large_string": {"text": pa.large_string()},
    "string_view": {"text": pa.string_view()},
}


LABELS = {
    "int64": (pa.array([0, 1]), [0, 1]),
    "bool": (pa.array([False, True]), [0, 1]),
    "float": (pa.array([0.0, 1.0]), [0, 1]),
    "decimal": (pa.array([0, 1]).cast(pa.decimal128(20, 1)), [0, 1]),
    "NaN": (pa.array([1.0, float("nan")]), [1, None]),
    "half": (pa.array([0.0, 0.5]), None),
    "text": (pa.array(["0", "1"]), None),
}


@pytest.mark.parametrize("form", LABELS)
def test_a_label_is_cast_where_nothing_is_lost(tmp_path, form):
    column, expected = LABELS[form]
    write(tmp_path, "events/dt=2026-01-01/a.parquet", pa.table({"label": column}))
    found = source(tmp_path).read_day(DAY)["label"]
    assert (found.type == pa.int8()) == (expected is not None)
    assert found.to_pylist() == (expected or column.to_pylist())


@pytest.mark.parametrize("ids", [pa.array([7, 8]), pa.array(["7", "8"]).dictionary_encode(), pa.array([7, 8], pa.uint8())])
def test_ids_may_be_whole_numbers_or_a_dictionary(tmp_path, ids):
    write(tmp_path, "events/dt=2026-01-01/a.parquet", pa.table({"user_id": ids, "item_id": pa.array([1.0, 2.0])}))
    table = source(tmp_path).read_day(DAY)
    assert table["user_id"].to_pylist() == ["7", "8"]
    assert table["item_id"].type == pa.float64(), "a number with a fraction is no id"


@pytest.mark.parametrize("form", FORMS)
def test_the_same_values_in_another_form_are_the_same_rows(tmp_path, form):
    write(tmp_path, "events/dt=2026-01-01/a.parquet", event(**FORMS[form]))
    columns = ["label", "timestamp", "item_id", "user_id", "event_id"]
    write(tmp_path, "events/dt=2026-01-01/b.parquet", event().select(columns))
    table = source(tmp_path).read_day(DAY)
    assert conforms(table, schema.EVENTS)
    assert table["timestamp"].to_pylist() == [AT, AT]
    assert table["user_id"].to_pylist() == ["u", "u"]


def test_an_instant_that_microseconds_cannot_hold_stays_and_does_not_conform(tmp_path):
    far = pa.array([10**17], pa.int64()).cast(pa.timestamp("ms", tz="UTC"))
    write(tmp_path, "events/dt=2026-01-01/a.parquet", event().set_column(3, "timestamp", far))
    assert not conforms(source(tmp_path).read_day(DAY), schema.EVENTS)


def test_a_catalogue_may_be_a_folder(tmp_path):
    write(tmp_path, "items.parquet", pa.table({"item_id": ["i"]}))
    for part in ("a", "b"):
        write(tmp_path, f"users.parquet/part-{part}.snappy.parquet", pa.table({"user_id": [part]}))
    (tmp_path / "users.parquet" / "_SUCCESS").write_bytes(b"")
    users, _ = source(tmp_path).catalogue()
    assert users["user_id"].to_pylist() == ["a", "b"]
    write(tmp_path, "users.parquet/part-c.parquet", pa.table({"user_id": [3]}))
    with pytest.raises(DataError, match=r"files of .*users\.parquet must share one schema: "):
        source(tmp_path).catalogue()
    (tmp_path / "items.parquet").unlink()
    (tmp_path / "items.parquet").mkdir()
    for part in "abc":
        next((tmp_path / "users.parquet").glob(f"part-{part}*")).unlink()
    with pytest.raises(DataError, match=r"users\.parquet must hold Parquet files, found none"):
        source(tmp_path).catalogue()


def test_missing_catalogue_days_and_path_name_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"users\.parquet must exist: it holds the known users"):
        source(tmp_path).catalogue()
    with pytest.raises(DataError, match=r"must hold folders dt=YYYY-MM-DD, found none"):
        source(tmp_path).days()
    (tmp_path / "events" / "dt=1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"must hold folders dt=YYYY-MM-DD, found only: events/dt=1: must be dt="):
        source(tmp_path).days()
    with pytest.raises(ConfigError, match=r"source\.path must name a folder or URL"):
        ParquetSource(SourceConfig(kind="parquet"), TODAY)
