"""Delta and Iceberg tables: the same days as from Parquet files, and the files of other days left alone."""

import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import load_catalog
from structlog.testing import capture_logs

from limaml import config
from limaml.config import SourceConfig
from limaml.errors import ConfigError, DataError, StoreError
from limaml.events import table_scans as ts
from limaml.events.check import check
from limaml.events.table_source import TableSource
from limaml.local.init import Answers, init

TODAY = date(2026, 6, 1)
FIRST = date(2026, 3, 25)  # Berlin's clocks go forward on the fifth day.
NUM_DAYS = 7
COLUMNS = {"user_id": "customer", "item_id": "sku", "timestamp": "at", "label": "stars >= 4"}
KINDS = ("delta", "iceberg")
CONFIGURATION = Path(__file__).parents[3] / "configs" / "synthetic.toml"


def instants(day):
    start = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC) + timedelta(days=day)
    return [start + timedelta(hours=n) for n in range(24)] + [start + timedelta(hours=24, microseconds=-1)]


def berlin(at):
    return at.astimezone(ZoneInfo("Europe/Berlin")).replace(tzinfo=None)


TIMES = {
    "zoned": (lambda at: at, pa.timestamp("us", "UTC"), ""),
    "naive": (berlin, pa.timestamp("us"), "Europe/Berlin"),
    "naive of UTC": (lambda at: at.replace(tzinfo=None), pa.timestamp("us"), "UTC"),
    "date": (lambda at: at.date(), pa.date32(), "UTC"),
    "seconds": (lambda at: int(at.timestamp()), pa.int64(), ""),
    "milliseconds": (lambda at: at.timestamp() * 1000, pa.float64(), ""),
    "text": (lambda at: at.isoformat(), pa.string(), ""),
}


def purchases(day, times="zoned"):
    """Every file of the tables is a day."""
    written, kind, _ = TIMES[times]
    at = instants(day)
    return pa.table(
        {
            "customer": pa.array([(n + day) % 7 for n in range(len(at))], pa.int64()),
            "sku": [f"s{n % 11}" for n in range(len(at))],
            "at": pa.array([written(one) for one in at], kind),
            "stars": [n % 10 / 2 for n in range(len(at))],
            "price": [n * 1.5 if n % 5 else None for n in range(len(at))],
            "tags": [["a", "b"][: n % 3] for n in range(len(at))],
            "bought_on": pa.array([one.date() for one in at]),
        }
    )


def write(kind, folder, tables, name="events"):
    """Write a file a table; returns what the configuration calls them."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "delta":
        for table in tables:
            deltalake.write_deltalake(folder / name, table, mode="append")
        return f"delta:{folder / name}"
    if kind == "iceberg":
        catalogue = load_catalog(
            "shop", type="sql", uri=f"sqlite:///{folder}/catalogue.db", warehouse=f"file://{folder}/warehouse"
        )
        catalogue.create_namespace_if_not_exists("raw")
        written = catalogue.create_table(f"raw.{name}", schema=tables[0].schema)
        for table in tables:
            written.append(table)
        location = catalogue.load_table(f"raw.{name}").metadata_location
        catalogue.close()
        return f"iceberg:{location}"
    for number, table in enumerate(tables):
        (folder / name).mkdir(exist_ok=True)
        pq.write_table(table, folder / name / f"{number}.parquet")
    return str(folder / name)


def source(events, columns=None, **settings):
    cfg = {"kind": "table", "events": events, "columns": COLUMNS | (columns or {}), **settings}
    return TableSource(SourceConfig.model_validate(cfg), TODAY)


@pytest.fixture
def log():
    with capture_logs() as lines:
        yield lines


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_days_are_those_of_the_same_rows_in_parquet_files(kind, times, tmp_path):
    tables = [purchases(day, times) for day in range(NUM_DAYS)]
    found, wanted = (source(write(form, tmp_path / form, tables), timezone=TIMES[times][2]) for form in (kind, "parquet"))
    assert found.days() == wanted.days() == [FIRST + timedelta(days=n) for n in range(NUM_DAYS)]
    for day in wanted.days():
        rows = wanted.read_day(day)
        assert rows.num_rows == 25
        assert found.read_day(day).sort_by("event_id").to_pylist() == rows.sort_by("event_id").to_pylist()
    for day in (FIRST + timedelta(days=1), None):
        assert [table.to_pylist() for table in found.catalogue(day)] == [table.to_pylist() for table in wanted.catalogue(day)]


@pytest.mark.parametrize("times", ["zoned", "naive of UTC"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_day_is_read_without_the_files_of_other_days(kind, times, tmp_path):
    def written(at):
        return TIMES[times][0](at)

    # Without the day's last row: Delta's statistics are in whole milliseconds, so that it could be of the next day.
    events = write(kind, tmp_path, [purchases(day, times).slice(0, 24) for day in range(NUM_DAYS)])
    for path in tmp_path.rglob("*.parquet"):
        if written(instants(2)[0]) not in pq.read_table(path, columns=["at"])["at"].to_pylist():
            path.unlink()
    opened = source(events, timezone=TIMES[times][2], users=write("parquet", tmp_path / "u", [pa.table({"user_id": [1]})]))
    assert opened.read_day(FIRST + timedelta(days=2)).num_rows == 24
    assert opened.left_out == []
    # The calendar stands in the statistics of the files that are gone.
    assert opened.days() == [FIRST + timedelta(days=n) for n in range(NUM_DAYS)]
    with pytest.raises(StoreError, match=r"^source\.events must be an? \w+ table that can be read, got "):
        opened.read_day(FIRST + timedelta(days=3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_two_days_is_read_for_the_calendar(kind, tmp_path):
    both = pa.concat_tables([purchases(0), purchases(1)])
    opened = source(write(kind, tmp_path, [both, purchases(3)]))
    assert opened.days() == [FIRST + timedelta(days=n) for n in range(4)]
    assert opened.read_day(FIRST + timedelta(days=1)).num_rows == 25
    assert opened.read_day(FIRST + timedelta(days=2)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_day_and_of_the_future_are_named(kind, tmp_path):
    odd = purchases(0).slice(0, 3)
    odd = odd.set_column(2, "at", pa.array([None, datetime(2027, 1, 1, tzinfo=UTC), datetime(2026, 6, 1, 8, tzinfo=UTC)]))
    opened = source(write(kind, tmp_path, [purchases(0), odd.cast(purchases(0).schema)]))
    assert opened.days() == [FIRST]
    assert [reason.split(":")[0] for reason in opened.left_out] == ["1 rows", "1 rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_that_is_an_expression_reads_the_table_once_and_says_so(kind, tmp_path, log):
    tables = [purchases(day).rename_columns({"at": "bought_at"}) for day in range(NUM_DAYS)]
    opened = source(write(kind, tmp_path, tables), {"timestamp": "bought_at - INTERVAL 1 DAY"})
    assert opened.days() == [FIRST + timedelta(days=n - 1) for n in range(NUM_DAYS)]
    for path in tmp_path.rglob("*.parquet"):
        path.unlink()
    assert all(opened.read_day(day).num_rows == 25 for day in opened.days())
    assert [line["event"] for line in log] == ["table_read_whole"]
    assert "no plain column of times: each verb reads all rows once" in log[0]["reason"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_days_bounds_what_a_time_that_is_text_cannot(kind, tmp_path, log):
    events = write(kind, tmp_path, [purchases(day, "text") for day in range(NUM_DAYS)])
    opened = source(events, {"day": "bought_on"})
    for path in tmp_path.rglob("*.parquet"):
        if not {date(2026, 3, 25), date(2026, 3, 26)} & set(
            pq.read_table(path, columns=["bought_on"])["bought_on"].to_pylist()
        ):
            path.unlink()
    assert opened.read_day(FIRST).num_rows == 25
    assert not log


@pytest.mark.parametrize("kind", KINDS)
def test_users_and_items_come_from_such_tables_too(kind, tmp_path):
    events = write(kind, tmp_path / "e", [purchases(0)])
    users = write(kind, tmp_path / "u", [pa.table({"no": pa.array([1, 2], pa.int64()), "segment": ["new", None]})], "users")
    items = write(kind, tmp_path / "i", [pa.table({"sku": ["s1"], "v": [[0.5, 1.0]]})], "items")
    opened = source(events, users=users, items=items, user_columns={"user_id": "no"}, item_columns={"item_id": "sku"})
    known, sold = opened.catalogue()
    assert known.to_pylist() == [{"user_id": "1", "segment": "new"}, {"user_id": "2", "segment": None}]
    assert sold.to_pylist() == [{"item_id": "s1", "v": [0.5, 1.0]}]


@pytest.mark.parametrize("kind", KINDS)
def test_what_did_not_happen_is_sampled_alike(kind, tmp_path):
    tables = [purchases(day) for day in range(3)]
    wanted, found = (
        source(write(form, tmp_path / form, tables), {"label": ""}, negatives={"per_positive": 2}).read_day(
            FIRST + timedelta(days=1)
        )
        for form in ("parquet", kind)
    )
    assert wanted.num_rows == 75
    assert found.sort_by("event_id").to_pylist() == wanted.sort_by("event_id").to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_follow_the_table(kind, tmp_path):
    num_files, rows = 12, 20_000
    wide = pa.table({"at": pa.array([datetime(2026, 5, 1, tzinfo=UTC)] * rows), "v": [[float(n)] * 32 for n in range(rows)]})
    events = write(kind, tmp_path, [wide] * num_files)
    before, most, count = pa.total_allocated_bytes(), 0, 0
    with ts.find("source.events", events).rows() as reader:
        for batch in reader:
            count += batch.num_rows
            most = max(most, pa.total_allocated_bytes() - before)
    assert count == num_files * rows
    # A file and what is read ahead of it, not twelve.
    assert most < 4 * wide.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_an_expression_fails_on_is_named(kind, tmp_path):
    table = purchases(0).append_column("grade", pa.array(["4"] * 24 + ["good"]))
    opened = source(write(kind, tmp_path, [table]), {"label": "CAST(grade AS INTEGER) >= 4"})
    with pytest.raises(DataError, match=r"source\.columns\.label must not fail on any row, got .* on the row grade 'good'"):
        opened.read_day(FIRST)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_missing_is_named_with_those_there(kind, tmp_path):
    events = write(kind, tmp_path, [purchases(0)])
    with pytest.raises(
        ConfigError, match=r"source\.columns\.user_id must name columns of the table, got 'custmer'; there are: cust"
    ):
        source(events, {"user_id": "custmer"})
    with pytest.raises(
        ConfigError, match=r"source\.columns\.item_id must be whole numbers or text, got 'tags' of type VARCHAR\[\]"
    ):
        source(events, {"item_id": "tags"})


def test_naive_times_need_a_zone(tmp_path):
    with pytest.raises(ConfigError, match=r"source\.timezone must say .* the first value '2026-03-25 0"):
        source(write("delta", tmp_path, [purchases(0, "naive")]))


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("delta:{folder}/none", DataError, r"source\.events must name a Delta table, got .*/none: .*; correct it"),
        ("iceberg:{folder}/none", DataError, r"source\.events must name a metadata file of an Iceberg table .* got .*/none: "),
        ("iceberg:{folder}/none.metadata.json", DataError, r"must name a metadata file of an Iceberg table"),
        ("iceberg:nocatalogue.raw.events", ConfigError, r"must name a catalogue that pyiceberg can open, got 'nocatalogue'"),
        ("iceberg:events", ConfigError, r"must be iceberg:CATALOGUE\.NAMESPACE\.TABLE or iceberg:PATH_OR_URL, got 'events'"),
    ],
)
def test_what_is_not_there_is_named(location, error, message, tmp_path):
    with pytest.raises(error, match=message):
        source(location.format(folder=tmp_path))


def test_a_catalogue_is_found_by_its_name_in_the_environment(tmp_path):
    write("iceberg", tmp_path, [purchases(0)])
    program = """
import json, sys
from limaml.errors import DataError
from limaml.events import table_scans as ts
with ts.find("source.events", "iceberg:shop.raw.events").rows(["sku"]) as reader:
    print(reader.read_all().num_rows)
try:
    ts.find("source.events", "iceberg:shop.raw.none")
except DataError as error:
    print(error)
"""
    found = {"PYICEBERG_CATALOG__SHOP__URI": f"sqlite:///{tmp_path}/catalogue.db", "PYICEBERG_CATALOG__SHOP__TYPE": "sql"}
    # A process of its own: pyiceberg reads its configuration when it is imported.
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **found}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, message = done.stdout.splitlines()
    assert rows == "25"
    assert message.startswith("source.events must name an Iceberg table of shop, got 'raw.none': ")


@pytest.mark.parametrize(
    ("location", "module"),
    [
        ("delta:some", "deltalake"),
        ("iceberg:some.raw.events", "pyiceberg.io.pyarrow"),
        ("postgresql://host/db?table=t", "adbc_driver_postgresql.dbapi"),
    ],
)
def test_a_missing_package_names_the_extra(location, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # As import finds it where it is not installed.
    with pytest.raises(ConfigError, match=r'is not installed .*; install it: pip install "limaml\[sources\]"'):
        source(location)


@pytest.mark.parametrize(
    "location",
    [
        "postgresql://shop:hunter2@host/db?table=t",
        "postgresql://shop@host/db?table=t&password=hunter2",
        "delta:s3://key:hunter2@bucket/t",
        "postgresql://shop:${NAME}hunter2@host/db?table=t",
    ],
)
def test_a_password_in_plain_text_is_refused_and_not_repeated(location, tmp_path):
    with pytest.raises(ConfigError, match=r"source\.events must hold no password or key") as raised:
        config.load(CONFIGURATION, ["source.kind='table'", f"source.events='{location}'"])
    with pytest.raises(ConfigError, match=r"source\.events must hold no password or key") as asked:
        init(location, "", "", tmp_path / "out.toml", Answers(), None)
    assert "hunter2" not in str(raised.value) + str(asked.value)


def test_what_packages_say_is_redacted():
    said = "no://me:pa@ss@host/x?password=one&x=2 s3.secret-access-key=two token = three"
    assert ts.redacted(said) == "no://***@host/x?password=***&x=2 s3.secret-access-key=*** token = ***"


@pytest.mark.parametrize("kind", KINDS)
def test_init_reads_a_sample_and_what_it_writes_can_be_checked(kind, tmp_path, monkeypatch):
    events = write(kind, tmp_path, [purchases(day) for day in range(NUM_DAYS)])
    items = write(
        kind, tmp_path / "i", [pa.table({"sku": [f"s{n}" for n in range(11)], "brand": ["x", "y"] * 5 + ["x"]})], "items"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.toml"
    init(events.replace(f"delta:{tmp_path}/", "delta:"), "", items, out, Answers(label="stars >= 4"), None)
    cfg = config.load(out)
    assert cfg.source.events == events
    columns = cfg.source.columns
    assert (columns.user_id, columns.item_id, columns.timestamp) == ("customer", "sku", "at")
    assert check(cfg, TODAY).wrong == []
