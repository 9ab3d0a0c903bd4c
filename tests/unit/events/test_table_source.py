"""Somebody else's tables in every form that duckdb reads, mapped by SQL."""

import functools
import http.server
import re
import threading
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.config import DEFAULT_FEATURES, SourceConfig
from limaml.errors import ConfigError, DataError, LimamlError, UnreadableDayError
from limaml.events.casting import declared_events
from limaml.events.day_store import canonical, conforms
from limaml.events.table_source import TableSource

TODAY = date(2026, 6, 1)
FIRST = date(2026, 3, 1)
COLUMNS = {"user_id": "customer", "item_id": "sku", "timestamp": "at", "label": "stars >= 4"}


TABLES = schema.tables(DEFAULT_FEATURES)


def events_of(day):
    """A day as it is stored where nothing is declared of events."""
    return canonical(declared_events(TABLES, day)[0], schema.EVENTS)


def instants(num_rows, step=timedelta(hours=1)):
    """Times from the first day on; 24 rows a day."""
    return [datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC) + n * step for n in range(num_rows)]


def purchases(num_rows=240, at=None):
    """Integer keys, stars with halves, and a price that nobody maps."""
    return pa.table(
        {
            "customer": pa.array([n % 7 for n in range(num_rows)], pa.int64()),
            "sku": pa.array([f"s{n % 11}" for n in range(num_rows)]),
            "at": pa.array(instants(num_rows), pa.timestamp("us", tz="UTC")) if at is None else at,
            "stars": pa.array([(n % 10) / 2 for n in range(num_rows)], pa.float64()),
            "price": pa.array([n * 1.5 for n in range(num_rows)], pa.float64()),
        }
    )


def write(folder, table=None, name="events.parquet", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(purchases() if table is None else table, path, **options)
    return path


def source(events, columns=None, **settings):
    cfg = SourceConfig.model_validate(
        {"kind": "table", "events": str(events), "columns": COLUMNS | (columns or {}), **settings}
    )
    return TableSource(cfg, TODAY)


def text(folder, content, name="events.csv", encoding="utf-8"):
    path = folder / name
    path.write_text(content, encoding=encoding)
    return path


def test_a_day_has_the_columns_of_events(tmp_path):
    table, ignored = declared_events(TABLES, source(write(tmp_path)).read_day(FIRST + timedelta(days=1)))
    assert conforms(table, schema.EVENTS)
    # Columns that are not mapped as they are come along, for features to be declared of them.
    assert ignored == ["price", "stars"]
    assert table.num_rows == 24
    rows = table.select(["user_id", "item_id", "timestamp", "label"]).sort_by("timestamp").to_pylist()
    wanted = [
        {"user_id": str(n % 7), "item_id": f"s{n % 11}", "timestamp": at, "label": int((n % 10) / 2 >= 4)}
        for n, at in enumerate(instants(48))
    ]
    assert rows == wanted[24:]


def test_days_are_the_calendar_and_a_day_without_rows_is_none(tmp_path):
    table = purchases(72)
    hole = pa.array([at.date() != FIRST + timedelta(days=1) for at in instants(72)])
    opened = source(write(tmp_path, table.filter(hole)))
    assert opened.days() == [FIRST + timedelta(days=n) for n in range(3)]
    assert opened.read_day(FIRST + timedelta(days=1)) is None
    assert opened.left_out == []


def test_today_is_not_over_and_times_that_cannot_be_are_named(tmp_path):
    at = [*instants(24), datetime(2026, 6, 1, 8, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC), None]
    at.append(datetime(1999, 1, 1, tzinfo=UTC))
    opened = source(write(tmp_path, purchases(28, pa.array(at, pa.timestamp("us", tz="UTC")))))
    assert opened.days() == [FIRST]
    assert [re.sub(r";.*", "", reason) for reason in opened.left_out] == [
        "1 rows: must not be after today (2026-06-01)",
        "1 rows: must have a time, but source.columns.timestamp ('at') is null",
        "1 rows of 1999-01-01: must lie at most source.max_gap_days (366) days from the others, 2026-03-01 to 2026-03-01",
    ]


# Time columns that all say `instants`.
TIMES = {
    "another zone": lambda ts: ts.cast(pa.timestamp("ms", tz="Asia/Tokyo")),
    "seconds": lambda ts: pa.array([t.as_py().timestamp() for t in ts], pa.float64()).cast(pa.int64()),
    "seconds as a small integer": lambda ts: pa.array([int(t.as_py().timestamp()) for t in ts], pa.uint32()),
    "milliseconds": lambda ts: pa.array([int(t.as_py().timestamp()) * 1000 for t in ts], pa.int64()),
    "microseconds": lambda ts: pa.array([int(t.as_py().timestamp()) * 10**6 for t in ts], pa.int64()),
    "nanoseconds": lambda ts: pa.array([int(t.as_py().timestamp()) * 10**9 for t in ts], pa.int64()),
    "seconds with a fraction": lambda ts: pa.array([t.as_py().timestamp() for t in ts], pa.float64()),
    "ISO text": lambda ts: pa.array([t.as_py().isoformat() for t in ts]),
    "ISO text with Z": lambda ts: pa.array([f"{t.as_py():%Y-%m-%dT%H:%M:%S.%f}Z" for t in ts]),
    "ISO text of a zone": lambda ts: pa.array([t.as_py().astimezone(ZoneInfo("America/New_York")).isoformat() for t in ts]),
}


@pytest.mark.parametrize("form", TIMES)
def test_times_in_every_form_are_the_same_instants(tmp_path, form):
    written = TIMES[form](pa.array(instants(72), pa.timestamp("us", tz="UTC")))
    opened = source(write(tmp_path, purchases(72, written)))
    assert opened.days() == [FIRST + timedelta(days=n) for n in range(3)]
    for number, day in enumerate(opened.days()):
        got = sorted(opened.read_day(day)["timestamp"].to_pylist())
        assert got == instants(72)[24 * number : 24 * number + 24]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/St_Johns", "Pacific/Kiritimati", "UTC"])
@pytest.mark.parametrize("unit", ["us", "ns", "s"])
def test_naive_times_are_those_of_the_zone(tmp_path, zone, unit):
    # 40 days around the end of March, when Berlin's clocks go forward.
    at = pa.array(instants(40 * 24), pa.timestamp("us", tz="UTC"))
    local = pc.local_timestamp(at.cast(pa.timestamp("us", tz=zone))).cast(pa.timestamp(unit))
    opened = source(write(tmp_path, purchases(40 * 24, local)), timezone=zone)
    got = [at for day in opened.days() for at in sorted(opened.read_day(day)["timestamp"].to_pylist())]
    assert got == instants(40 * 24)


def test_a_time_that_clocks_skip_or_show_twice_is_read(tmp_path):
    local = pa.array([datetime(2026, 3, 29, 2, 30), datetime(2025, 10, 26, 2, 30)], pa.timestamp("us"))
    opened = source(write(tmp_path, purchases(2, local)), timezone="Europe/Berlin")
    assert opened.read_day(date(2026, 3, 29))["timestamp"].to_pylist() == [datetime(2026, 3, 29, 1, 30, tzinfo=UTC)]
    assert opened.read_day(date(2025, 10, 26))["timestamp"].to_pylist() == [datetime(2025, 10, 26, 1, 30, tzinfo=UTC)]


def test_dates_are_midnights_of_the_zone(tmp_path):
    opened = source(write(tmp_path, purchases(1, pa.array([date(2026, 3, 2)]))), timezone="Europe/Berlin")
    assert opened.days() == [date(2026, 3, 1)]
    assert opened.read_day(date(2026, 3, 1))["timestamp"].to_pylist() == [datetime(2026, 3, 1, 23, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("at", "first"),
    [
        (pa.array([None, datetime(2026, 3, 1, 8)], pa.timestamp("us")), "'2026-03-01 08:00:00'"),
        (pa.array(["2026-03-01T08:00:00Z", "2026-03-02 09:00"]), "'2026-03-02 09:00'"),
        (pa.array(["2026-03-01", None]), "'2026-03-01'"),
    ],
)
def test_a_naive_time_without_a_zone_is_refused_by_its_value(tmp_path, at, first):
    with pytest.raises(ConfigError, match=rf"source\.timezone must say.*\('at'\).*the first value {first}; set it"):
        source(write(tmp_path, purchases(2, at)))


def test_an_unknown_zone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"source\.timezone must be a name of the tz database, got 'Berlin'"):
        source(write(tmp_path), timezone="Berlin")


def test_ids_are_the_same_as_integers_and_as_text(tmp_path):
    table = purchases()
    as_text = table.set_column(0, "customer", table["customer"].cast(pa.string()))
    as_category = table.set_column(0, "customer", table["customer"].cast(pa.string()).dictionary_encode())
    days = [
        events_of(source(write(tmp_path, t, f"{n}.parquet")).read_day(FIRST))
        for n, t in enumerate((table, as_text, as_category))
    ]
    assert days[0].equals(days[1])
    assert days[0].equals(days[2])


def test_ids_of_events_do_not_depend_on_the_order_of_rows(tmp_path):
    table = pa.concat_tables([purchases(48), purchases(48).slice(0, 5), purchases(48).slice(0, 5)])
    backwards = table.take(pa.array(range(table.num_rows - 1, -1, -1)))
    one, other = (
        events_of(source(write(tmp_path, t, f"{n}.parquet")).read_day(FIRST)) for n, t in enumerate((table, backwards))
    )
    assert one.equals(other)
    assert len(set(one["event_id"].to_pylist())) == one.num_rows == 34


@pytest.mark.parametrize("column", ["stars", "price"])
def test_rows_of_one_moment_keep_their_ids_in_any_order(tmp_path, column):
    """They differ in the label, or in what else they hold."""
    same = purchases(1)
    values = pa.array([0.5, 4.5, 4.0, 1.0, 3.0]) if column == "stars" else pa.array([3.0, 1.0, 5.0, 2.0, 4.0])
    table = pa.concat_tables([same] * 5)
    table = table.set_column(table.schema.get_field_index(column), column, values)
    found = []
    for number, order in enumerate(([0, 1, 2, 3, 4], [4, 2, 0, 3, 1])):
        day = source(write(tmp_path, table.take(pa.array(order)), f"{number}.parquet")).read_day(FIRST)
        found.append({row["event_id"]: (row["label"], row[column]) for row in day.to_pylist()})
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_an_id_of_events_may_be_mapped(tmp_path):
    table = purchases().append_column("receipt no.", pa.array(range(240), pa.int32()))
    day = source(write(tmp_path, table), {"event_id": '"receipt no."'}).read_day(FIRST)
    assert sorted(day["event_id"].to_pylist(), key=int) == [str(n) for n in range(24)]


def row_groups_read(opened, day, monkeypatch):
    """What `read_day` makes duckdb scan: row groups, of how many."""
    seen = []
    run = opened._run
    monkeypatch.setattr(opened, "_run", lambda statement: seen.append(statement) or run(statement))
    assert opened.read_day(day).num_rows
    plan = opened._connection.execute(f"EXPLAIN ANALYZE {seen[0]}").fetchall()[0][1]
    scanned = re.search(r"Row Groups Scanned: (\d+) / (\d+)", plan)
    return int(scanned[1]), int(scanned[2])


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        ("another zone", {}),
        ("seconds", {}),
        ("milliseconds", {}),
        ("naive", {"timezone": "Europe/Berlin"}),
    ],
)
def test_a_day_is_read_from_its_row_groups(tmp_path, at, settings, monkeypatch):
    rows = 50 * 24
    stamps = pa.array(instants(rows), pa.timestamp("us", tz="UTC"))
    written = stamps.cast(pa.timestamp("us")) if at == "naive" else TIMES[at](stamps)
    path = write(tmp_path, purchases(rows, written), row_group_size=24)
    scanned, of = row_groups_read(source(path, **settings), FIRST + timedelta(days=20), monkeypatch)
    # A day in Berlin lies in two of UTC's, and a naive bound is a day wider.
    assert (scanned <= 4, of) == (True, 50)


def test_a_partition_folder_of_another_day_is_not_opened(tmp_path):
    for number in range(9):
        day = FIRST + timedelta(days=number)
        write(tmp_path, purchases(240).slice(24 * number, 24), f"shop/dt={day}/part.parquet")
    (tmp_path / "shop" / f"dt={FIRST}" / "part.parquet").write_bytes(b"no Parquet")
    day = FIRST + timedelta(days=5)
    assert source(tmp_path / "shop", {"day": "dt"}).read_day(day).num_rows == 24
    with pytest.raises(DataError, match=rf"source\.events must be readable PARQUET:.*dt={FIRST}"):
        source(tmp_path / "shop")


def test_a_folder_is_read_whole_without_hidden_and_unfinished_files(tmp_path):
    write(tmp_path, purchases(24), "shop/a/one.parquet")
    write(tmp_path, purchases(48).slice(24).select(["stars", "sku", "at", "customer"]), "shop/two.parquet")
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_tmp/x.parquet", "._one.parquet", "readme.md"):
        path = tmp_path / "shop" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing")
    opened = source(tmp_path / "shop")
    assert [opened.read_day(day).num_rows for day in opened.days()] == [24, 24]
    assert source(tmp_path / "shop" / "**" / "*.parquet").days() == opened.days()


CSV = 'customer;sku;at;stars\n01;a;2026-03-01 08:00;4,5\n1;"b;c";2026-03-01 09:00;3,0\n'


def test_csv_with_semicolons_a_byte_order_mark_and_decimal_commas(tmp_path):
    path = text(tmp_path, CSV, encoding="utf-8-sig")
    day = source(path, timezone="Europe/Berlin", decimal=",").read_day(FIRST).sort_by("timestamp")
    # A leading zero is part of an id, whatever the other rows look like.
    assert day["user_id"].to_pylist() == ["01", "1"]
    assert day["item_id"].to_pylist() == ["a", "b;c"]
    assert day["label"].to_pylist() == [1, 0]
    assert day["timestamp"][0].as_py() == datetime(2026, 3, 1, 7, tzinfo=UTC)


@pytest.mark.parametrize(("ending", "codec"), [("gz", "gzip"), ("zst", "zstd")])
def test_compressed_files_are_read(tmp_path, ending, codec):
    plain = source(text(tmp_path, CSV), timezone="UTC", decimal=",").read_day(FIRST)
    with pa.CompressedOutputStream(str(tmp_path / f"packed.csv.{ending}"), codec) as packed:
        packed.write(CSV.encode())
    opened = source(f"file://{tmp_path}/packed.csv.{ending}", timezone="UTC", decimal=",")
    assert opened.read_day(FIRST).equals(plain)


def test_a_csv_time_without_a_zone_among_others_with_one_is_refused(tmp_path):
    path = text(tmp_path, "customer,sku,at,stars\n1,a,2026-03-01 08:00+02,4\n1,b,2026-03-01 09:00,3\n")
    with pytest.raises(ConfigError, match=r"source\.timezone.*'2026-03-01 09:00'"):
        source(path)
    assert sorted(source(path, timezone="UTC").read_day(FIRST)["timestamp"].to_pylist()) == [
        datetime(2026, 3, 1, 6, tzinfo=UTC),
        datetime(2026, 3, 1, 9, tzinfo=UTC),
    ]


@pytest.mark.parametrize("name", ["events.jsonl", "events.ndjson", "events.json"])
def test_json_lines_and_ids_of_both_types(tmp_path, name):
    lines = [
        '{"customer": 1, "sku": "a", "at": "2026-03-01T08:00:00Z", "stars": 4}',
        '{"customer": "1", "sku": "b", "at": "2026-03-01T09:00:00+02:00", "stars": 3}',
    ]
    content = f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
    day = source(text(tmp_path, content, name)).read_day(FIRST).sort_by("item_id")
    assert day["user_id"].to_pylist() == ["1", "1"]
    assert [at.hour for at in day["timestamp"].to_pylist()] == [8, 7]


def test_tables_of_users_and_items_bring_their_columns(tmp_path):
    write(tmp_path, pa.table({"id": pa.array([1, 2]), "plan": ["a", "b"]}), "users.parquet")
    text(tmp_path, "sku,price\ns1,1.5\ns2,2\n", "items.csv")
    opened = source(
        write(tmp_path),
        users=str(tmp_path / "users.parquet"),
        items=str(tmp_path / "items.csv"),
        user_columns={"user_id": "id"},
        item_columns={"item_id": "upper(sku)"},
    )
    users, items = opened.catalogue(FIRST)
    assert users.to_pylist() == [{"user_id": "1", "plan": "a"}, {"user_id": "2", "plan": "b"}]
    assert items.to_pylist() == [{"item_id": "S1", "sku": "s1", "price": 1.5}, {"item_id": "S2", "sku": "s2", "price": 2.0}]


def test_columns_are_made_for_features(tmp_path):
    text(tmp_path, 'sku,tag,price\ns1,"a,b",1.5\ns2,c,2\ns3,,3\n', "items.csv")
    opened = source(
        write(tmp_path),
        items=str(tmp_path / "items.csv"),
        item_columns={
            "item_id": "sku",
            "more": {"tag": "string_split(tag, ',')", "main": "split_part(tag, ',', 1)", "cents": "100 * price"},
        },
    )
    items = opened.catalogue(FIRST)[1].select(["item_id", "price", "tag", "main", "cents"])
    assert items.to_pylist() == [
        {"item_id": "s1", "price": 1.5, "tag": ["a", "b"], "main": "a", "cents": 150.0},
        {"item_id": "s2", "price": 2.0, "tag": ["c"], "main": "c", "cents": 200.0},
        {"item_id": "s3", "price": 3.0, "tag": None, "main": None, "cents": 300.0},
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"tags": "string_split(tagg, ',')"},
            r"source\.item_columns\.more\.tags must name columns.*got 'tagg' in.*there are: tag",
        ),
        ({"n": "CAST(tag AS INTEGER)"}, r"source\.item_columns\.more\.n must not fail on any row.*on the row tag 'c': "),
    ],
)
def test_a_made_column_that_does_not_fit_is_named(tmp_path, more, message):
    text(tmp_path, "sku,tag\ns1,1\ns2,c\n", "items.csv")
    with pytest.raises(LimamlError, match=message):
        source(write(tmp_path), items=str(tmp_path / "items.csv"), item_columns={"item_id": "sku", "more": more}).catalogue(
            FIRST
        )


def test_columns_are_made_of_a_table_only():
    with pytest.raises(
        ValueError, match=r"user_columns\.more must be empty where users names no table, got plan; name the table"
    ):
        SourceConfig(kind="table", events="e.csv", user_columns={"more": {"plan": "tier"}})


def test_relative_names_lie_below_the_path(tmp_path):
    write(tmp_path)
    write(tmp_path, pa.table({"id": [1]}), "known/users.parquet")
    write(tmp_path / "elsewhere", pa.table({"sku": ["s1"]}), "items.parquet")
    opened = source(
        "events.parquet",
        path=str(tmp_path),
        users="known/*.parquet",
        user_columns={"user_id": "id"},
        items=str(tmp_path / "elsewhere" / "items.parquet"),
        item_columns={"item_id": "sku"},
    )
    assert opened.read_day(FIRST).num_rows == 24
    assert [table.num_rows for table in opened.catalogue(FIRST)] == [1, 1]


@pytest.mark.parametrize(
    ("path", "events", "location"),
    [
        ("", "e.csv", "e.csv"),
        ("data/", "e.csv", "data/e.csv"),
        ("data?", "e.csv", "data?/e.csv"),
        ("data", "/e.csv", "/e.csv"),
        ("data", "https://shop.example/e.csv", "https://shop.example/e.csv"),
        ("data", "delta:lake/e", "delta:lake/e"),
        ("s3://bucket/p?region=eu&scheme=http", "e/*.csv", "s3://bucket/p/e/*.csv?region=eu&scheme=http"),
    ],
)
def test_where_a_table_lies(path, events, location):
    assert SourceConfig(kind="table", path=path, events=events).location("events") == location


def test_without_tables_known_is_who_was_named_by_the_end_of_a_day(tmp_path):
    table = purchases(48)
    table = table.set_column(0, "customer", pa.array([n // 12 for n in range(48)], pa.int64()))
    opened = source(write(tmp_path, table))
    assert [opened.catalogue(day)[0]["user_id"].to_pylist() for day in opened.days()] == [["0", "1"], ["0", "1", "2", "3"]]
    assert opened.catalogue()[1].num_rows == 11


class _Web(http.server.SimpleHTTPRequestHandler):
    """A server of files that sends no parts of them."""

    def log_message(self, *_):
        pass


def test_a_url_is_read(tmp_path):
    write(tmp_path)
    text(tmp_path, CSV)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Web, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        assert source(f"{base}/events.parquet").read_day(FIRST).num_rows == 24
        assert source(f"{base}/events.csv", timezone="UTC", decimal=",").read_day(FIRST).num_rows == 2
        with pytest.raises(LimamlError, match=r"source\.events must be readable.*nothing\.csv"):
            source(f"{base}/nothing.csv")
    finally:
        server.shutdown()
        server.server_close()


# Mistakes: what is wrong, where, and what to do.


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user_id": "custmer"},
            r"source\.columns\.user_id must name columns of the table, got 'custmer'; there are: customer, ",
        ),
        ({"label": "star >= 4"}, r"source\.columns\.label must name columns.*got 'star' in 'star >= 4'; there are: stars, "),
        ({"label": "stars >="}, r"source\.columns\.label must be a column of the table or a SQL expression, got 'stars >='"),
        ({"label": "stars, price"}, r"source\.columns\.label must be one SQL expression, got 'stars, price'"),
        ({"label": "starz(stars)"}, r"source\.columns\.label must be a SQL expression.*'starz\(stars\)'.*does not exist"),
        (
            {"label": "sku"},
            r"source\.columns\.label must be boolean or 0 and 1, got 'sku' of type VARCHAR, the first value 's0'",
        ),
        ({"label": ""}, r"source must have one of columns\.label and negatives, got '' and None"),
        ({"user_id": "price"}, r"source\.columns\.user_id must be whole numbers or text, got 'price' of type DOUBLE"),
        ({"timestamp": "stars > 1"}, r"source\.columns\.timestamp must be a time.*of type BOOLEAN, the first value 'false'"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_at_once(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        source(write(tmp_path), columns)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "stars",
            r"got 0\.5 from source\.columns\.label \('stars'\) in the row user_id '1', item_id 's1', timestamp 2026-03-01",
        ),
        ("CASE WHEN stars < 3 THEN 1 END", r"got null from source\.columns\.label"),
    ],
)
def test_a_label_that_is_neither_0_nor_1_is_named_with_its_row(tmp_path, label, message):
    with pytest.raises(UnreadableDayError, match=message):
        source(write(tmp_path), {"label": label}).read_day(FIRST)


def test_an_expression_that_fails_on_one_row_names_the_row(tmp_path):
    grades = ["5"] * 30 + ["five"] + ["5"] * 17
    table = purchases(48).append_column("grade", pa.array(grades))
    opened = source(write(tmp_path, table), {"label": "CAST(grade AS INTEGER) >= 4"})
    assert opened.read_day(FIRST).num_rows == 24
    message = r"source\.columns\.label must not fail on any row, got 'CAST\(grade.*on the row grade 'five': Conversion Error"
    with pytest.raises(UnreadableDayError, match=message):
        opened.read_day(FIRST + timedelta(days=1))


def test_a_history_is_read_in_few_queries_and_a_day_that_fails_leaves_the_others(tmp_path, monkeypatch):
    grades = ["5"] * 60 + ["five"] + ["5"] * 179
    table = purchases().append_column("grade", pa.array(grades))
    path = write(tmp_path, table)
    opened = source(path, {"label": "CAST(grade AS INTEGER) >= 4"})
    days = opened.days()
    for day in days:
        if day == FIRST + timedelta(days=2):
            with pytest.raises(UnreadableDayError, match="on the row grade 'five'"):
                opened.read_day(day)
        else:
            assert opened.read_day(day).num_rows == 24
    one_by_one, ahead = source(path), source(path)
    ahead.days()
    queries = []
    run = ahead._run
    monkeypatch.setattr(ahead, "_run", lambda statement: queries.append(statement) or run(statement))
    assert all(events_of(ahead.read_day(day)).equals(events_of(one_by_one.read_day(day))) for day in days)
    assert len(queries) == 1


def test_a_time_that_is_none_names_its_row(tmp_path):
    at = pa.array([*["2026-03-01T08:00:00Z"] * 5, "yesterday"])
    opened = source(write(tmp_path, purchases(6, at)), timezone="UTC")
    with pytest.raises(DataError, match=r"source\.columns\.timestamp must not fail.*on the row at 'yesterday'"):
        opened.days()
    with pytest.raises(DataError, match="yesterday"):
        opened.read_day(FIRST)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"source\.events must name Parquet .*found none"),
        (["notes.md"], r"source\.events must name Parquet.*found only .*notes\.md"),
        (["a.csv", "b.json"], r"source\.events must name files of one format"),
    ],
)
def test_files_that_are_not_there_or_of_two_formats_are_named(tmp_path, files, message):
    for name in files:
        text(tmp_path, "customer\n1\n", name)
    with pytest.raises(DataError, match=message):
        source(tmp_path)


def test_nothing_is_fetched(tmp_path):
    opened = source(write(tmp_path))
    with pytest.raises(duckdb.Error, match="requires the extension httpfs"):
        opened._connection.execute("SELECT * FROM read_parquet('s3://bucket/x.parquet')")
