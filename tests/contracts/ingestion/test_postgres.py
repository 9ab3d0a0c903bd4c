"""Events, users and items in a real PostgreSQL server: the days of the same rows in Parquet files, by the server's index."""

import re
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from structlog.testing import capture_logs

from limaml import config
from limaml.config import Config, SourceConfig
from limaml.errors import ConfigError, DataError, StoreError
from limaml.events import ingest
from limaml.events import table_scans as ts
from limaml.events.check import check
from limaml.events.table_columns import Mapped
from limaml.events.table_source import TableSource
from limaml.features import feature_store
from limaml.io.storage import Storage
from limaml.local.init import Answers, init
from tests.contracts.ingestion.conftest import ROOT
from tests.postgres import create_database, postgres_server, psql

pytestmark = pytest.mark.services

TODAY = date(2026, 6, 1)
FIRST = date(2026, 5, 1)
NUM_DAYS = 6
COLUMNS = {"user_id": "customer", "item_id": "sku", "timestamp": "at", "label": "stars >= 3"}
MAPPED = {"columns": COLUMNS, "user_columns": {"user_id": "customer"}, "item_columns": {"item_id": "sku"}}
FEATURES = [
    {"entity": "user", "name": "segment", "type": "category"},
    {"entity": "item", "name": "price", "type": "number"},
    {"entity": "item", "name": "v", "type": "vector", "width": 3, "encoder": "hand 1", "licence": "CC0-1.0"},
    {"entity": "context", "name": "page", "type": "category"},
]


class Database:
    """The server, a URL without its password, and that password in the environment."""

    def __init__(self, url):
        self.url = url
        self.password = re.search(r":([0-9a-f]+)@", url)[1]
        self.named = url.replace(self.password, "${SHOP_PASSWORD}")

    def run(self, statement):
        return psql(self.url, statement)

    def table(self, name):
        return f"{self.named}?table={name}"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        found = Database(create_database(url, "shop"))
        found.run(
            "CREATE SCHEMA raw;"
            "CREATE TABLE raw.purchases (customer bigint, sku text, at timestamptz, stars bigint, page text);"
            "CREATE INDEX ON raw.purchases (at);"
            'CREATE TABLE raw."Customers" (customer bigint, segment text);'
            "CREATE TABLE raw.products (sku text, price float8, v float8[]);"
        )
        yield found


@pytest.fixture(autouse=True)
def password(database, monkeypatch):
    monkeypatch.setenv("SHOP_PASSWORD", database.password)


def purchases():
    start = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
    rows = [(day, n) for day in range(NUM_DAYS) for n in range(60)]
    return pa.table(
        {
            "customer": pa.array([n % (2 * day + 4) for day, n in rows], pa.int64()),
            "sku": [f"s{n % (day + 3)}" for day, n in rows],
            # Midnight, and the day's last microsecond.
            "at": pa.array(
                [start + timedelta(days=day, minutes=24 * n) for day, n in rows[:-1]]
                + [start + timedelta(days=NUM_DAYS, microseconds=-1)],
                pa.timestamp("us", "UTC"),
            ),
            "stars": pa.array([n % 5 for _, n in rows], pa.int64()),
            "page": [None if n % 7 == 0 else "front, 'back'"[: n % 3 + 5] for _, n in rows],
        }
    )


TABLES = {
    "events": ("raw.purchases", purchases()),
    "users": ('raw."Customers"', pa.table({"customer": list(range(14)), "segment": ["new", None] * 7})),
    "items": (
        "raw.products",
        pa.table(
            {
                "sku": [f"s{n}" for n in range(8)],
                "price": [1.5 * n for n in range(8)],
                "v": [[n / 4, 1.0, -n / 2] for n in range(8)],
            }
        ),
    ),
}


def literal(value):
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return f"ARRAY{value}"
    return str(value) if isinstance(value, int | float) else "'" + str(value).replace("'", "''") + "'"


@pytest.fixture(scope="module")
def world(database):
    """The tables, filled in an order of no time."""
    for name, table in TABLES.values():
        rows = [f"({', '.join(map(literal, row.values()))})" for row in table.to_pylist()]
        database.run(f"INSERT INTO {name} VALUES {', '.join(rows[::2] + rows[1::2])}; ANALYZE {name};")
    return database


def source(events, columns=None, **settings):
    cfg = {"kind": "table", "events": events, "columns": COLUMNS | (columns or {}), **settings}
    return TableSource(SourceConfig.model_validate(cfg), TODAY)


def ingested(folder, locations):
    """The stored days, catalogue and snapshots of a source, each file with its bytes."""
    cfg = Config.model_validate(
        {
            "features": FEATURES,
            "source": {"kind": "table", **locations, **MAPPED},
            "storage": {"root": str(folder / "data")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "feast" / "registry.db"),
                "online_connection": str(folder / "feast" / "online.db"),
            },
        }
    )
    feature_store.apply(cfg)
    assert ingest.ingest_history(cfg, FIRST + timedelta(days=NUM_DAYS - 2), TODAY)["ingested"] == NUM_DAYS - 1
    assert ingest.ingest_day(cfg, FIRST + timedelta(days=NUM_DAYS - 1), TODAY)["status"] == "ingested"
    storage = Storage(cfg.storage.root)
    return {path: storage.read_bytes(path) for path in storage.walk("") if path.endswith(".parquet")}


def test_the_stored_days_are_those_of_the_same_rows_in_parquet_files(world, tmp_path):
    files = {}
    for name, (_, table) in TABLES.items():
        files[name] = str(tmp_path / f"{name}.parquet")
        pq.write_table(table, files[name])
    (tmp_path / "files").mkdir()
    (tmp_path / "tables").mkdir()
    wanted = ingested(tmp_path / "files", files)
    found = ingested(tmp_path / "tables", {name: world.table(table) for name, (table, _) in TABLES.items()})
    assert len(wanted) > 3 * NUM_DAYS
    assert found == wanted


def test_a_day_is_read_by_the_index(database):
    """Half a million rows of 365 days; what the server plans is what a verb asks for."""
    database.run(
        "CREATE TABLE big AS SELECT n % 1000 AS customer, 's' || n % 50 AS sku, n % 5 AS stars,"
        " TIMESTAMPTZ '2025-06-01+00' + n * INTERVAL '63 seconds' AS at,"
        " TIMESTAMP '2025-06-01' + n * INTERVAL '63 seconds' AS local,"
        " 1748736000000 + n::bigint * 63000 AS ms FROM generate_series(0, 499999) AS n;"
        "CREATE INDEX ON big (at); CREATE INDEX ON big (local); CREATE INDEX ON big (ms); VACUUM ANALYZE big;"
        "CREATE VIEW big_view AS SELECT *, 1 AS one FROM big;"
    )
    day, midnight = date(2026, 1, 15), datetime(2026, 1, 15, tzinfo=UTC)
    times = {"at": "TIMESTAMP WITH TIME ZONE", "local": "TIMESTAMP", "ms": "BIGINT"}
    for table in ("big", "big_view"):
        scan = ts.find("source.events", database.table(table))
        for column, kind in times.items():
            time = Mapped("source.columns.timestamp", column, f'"{column}"', kind, True, (column,))
            bounds = ts.time_bounds(time, "Europe/Berlin", midnight, midnight + timedelta(days=1))
            plan = database.run(f"EXPLAIN {scan.statement(None, bounds)}")
            assert re.search(rf"Index (Scan|Cond)[^\n]*\(?.*{column}", plan), plan
            assert "Seq Scan" not in plan
    # A sample comes from pages all over the table.
    with ts.find("source.events", database.table("big")).sample(50_000) as reader:
        sampled = reader.read_all()
    assert 40_000 < sampled.num_rows < 60_000
    assert len({at.month for at in sampled["at"].to_pylist()}) == 12
    # The whole source, with what the server says it read: a day's pages and no others.
    opened = source(database.table("big"))
    database.run("SELECT pg_stat_reset()")
    assert opened.read_day(day).num_rows == 1371 + 1
    read = database.run("SELECT pg_stat_force_next_flush(); SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'big'")
    assert read.split() == ["0"]
    days = opened.days()
    assert (days[0], days[-1], len(days)) == (date(2025, 6, 1), date(2026, 5, 31), 365)
    assert sum(source(database.table("big"), {"timestamp": "ms"})._counts.values()) == 500_000


def test_memory_does_not_follow_the_table(database):
    database.run(
        "CREATE TABLE wide AS SELECT n AS customer, repeat(md5(n::text), 32) AS page FROM generate_series(1, 100000) AS n"
    )
    before, most, size = pa.total_allocated_bytes(), 0, 0
    with ts.find("source.events", database.table("wide")).rows() as reader:
        for batch in reader:
            size += batch.nbytes
            most = max(most, pa.total_allocated_bytes() - before)
    assert size > 100 * 1024 * 1000
    # The batch that is held and the next one, of four MiB each.
    assert most < size / 5


# A column of each kind of type, a value, and what is read.
TYPES = {
    "smallint": ("7", 7),
    "numeric(12,0)": ("123456789012", 123456789012),
    "numeric(5,2)": ("1.25", 1.25),
    "numeric": ("2.5", 2.5),
    "real": ("0.5", 0.5),
    "boolean": ("true", True),
    "char(4)": ("'ab'", "ab"),
    "uuid": ("'6ecd8c99-4036-403d-bf84-cf8400f67836'", "6ecd8c99-4036-403d-bf84-cf8400f67836"),
    "jsonb": ("""'{"a": 1}'""", '{"a": 1}'),
    "date": ("'2026-05-01'", date(2026, 5, 1)),
    "timestamp": ("'2026-05-01 12:00'", datetime(2026, 5, 1, 12)),
    "real[]": ("ARRAY[0.5, 2]", [0.5, 2.0]),
    "numeric[]": ("ARRAY[0.5, 2]", [0.5, 2.0]),
    "text[]": ("ARRAY['x', NULL]", ["x", None]),
    "varchar(3)[]": ("ARRAY['x']", ["x"]),
    "mood": ("'good'", "good"),
    "positive": ("3", 3),
}


def test_every_type_that_has_one_in_arrow_is_read_and_others_are_named(database):
    database.run("CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE DOMAIN positive AS integer CHECK (VALUE > 0)")
    columns = ", ".join(f'"{name}" {name}' for name in TYPES)
    database.run(f"CREATE TABLE types ({columns}, place point, hash bytea)")
    database.run(f"INSERT INTO types VALUES ({', '.join(value for value, _ in TYPES.values())}, '(1,2)', '\\x00')")
    database.run(f"INSERT INTO types VALUES ({', '.join('NULL' for _ in TYPES)}, NULL, NULL)")
    scan = ts.find("source.events", database.table("types"))
    with scan.rows() as reader:
        rows = sorted(reader.read_all().to_pylist(), key=lambda row: row["smallint"] is None)
    assert rows == [{name: value for name, (_, value) in TYPES.items()}, dict.fromkeys(TYPES)]
    assert scan.unreadable == {"place": "point", "hash": "bytea"}
    events, mapped = database.table("types"), {"item_id": "uuid", "timestamp": "timestamp", "label": "boolean"}
    for text in ("hash", "place[0]"):
        with pytest.raises(ConfigError, match=r"source\.columns\.user_id must name columns of a type that can be read, got "):
            source(events, {**mapped, "user_id": text}, timezone="UTC")
    with capture_logs() as log:
        assert source(events, {**mapped, "user_id": "smallint"}, timezone="UTC").days() == [date(2026, 5, 1)]
    assert [(line["event"], line["columns"]) for line in log] == [("columns_unreadable", "place point, hash bytea")]


def test_times_of_the_future_and_none_are_counted(database):
    database.run(
        "CREATE TABLE odd AS SELECT 1 AS customer, 's' AS sku, 4 AS stars, at::timestamptz FROM (VALUES"
        " ('2026-05-01 12:00+00'), ('2026-05-31 23:59:59.999999+00'), ('2026-06-01 00:00+00'),"
        " ('2027-01-01 00:00+00'), ('infinity'), ('-infinity'),"
        " (NULL)) AS v (at)"
    )
    opened = source(database.table("odd"))
    assert opened.days() == [date(2026, 5, 1) + timedelta(days=n) for n in range(31)]
    assert [reason.split(":")[0] for reason in opened.left_out] == ["1 rows", "3 rows"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"?table=raw.purchases": "?table=raw.none"},
            DataError,
            r"must name a table or view that its user sees, got 'raw\.none'",
        ),
        ({"?table=raw.purchases": "?table=a.b.c.d.e"}, DataError, r"must name a table as SCHEMA\.TABLE, got 'a\.b\.c\.d\.e'"),
        ({"?table=raw.purchases": ""}, ConfigError, r"must name a table, got postgresql://\*\*\*@.*; write postgresql://HOST"),
        ({"/shop?": "/none?"}, StoreError, r'must be on a server that answers, got .*database "none" does not exist'),
        ({"limaml:": "nobody:"}, ConfigError, r"must be read by a user and password that the server accepts, .*\"nobody\""),
        (
            {":${SHOP_PASSWORD}": ""},
            ConfigError,
            r"must be read by a user and password .* no password supplied; correct the env",
        ),
        (
            {"SHOP_PASSWORD": "NO_PASSWORD"},
            ConfigError,
            r"refers to \$\{NO_PASSWORD\}, which is not in the environment; set that",
        ),
        ({"limaml:${SHOP_PASSWORD}": "guest:guest"}, ConfigError, r"must hold no password or key, got postgresql://\*\*\*@"),
    ],
)
def test_what_is_wrong_is_told_apart(change, error, message, world):
    location = world.table("raw.purchases")
    for old, new in change.items():
        assert old in location
        location = location.replace(old, new)
    with pytest.raises(error, match=r"^source\.events " + message) as raised:
        ts.find("source.events", location)
    assert world.password not in str(raised.value)


def test_a_wrong_password_is_told_without_it(world, monkeypatch):
    monkeypatch.setenv("SHOP_PASSWORD", "hunter2/@:")
    with pytest.raises(ConfigError, match=r"must be read by a user and password that the server accepts") as raised:
        ts.find("source.events", world.table("raw.purchases"))
    assert "hunter2" not in str(raised.value)


def test_a_password_of_odd_characters_and_one_that_libpq_finds(world, tmp_path, monkeypatch):
    world.run("CREATE ROLE odd LOGIN PASSWORD 'a/b@c:d%20 e'; GRANT USAGE ON SCHEMA raw TO odd")
    odd = world.table("raw.purchases").replace("limaml:", "odd:")
    monkeypatch.setenv("SHOP_PASSWORD", "a/b@c:d%20 e")
    with pytest.raises(ConfigError, match=r"must be a table that its user may read, .* permission denied .*; grant SELECT"):
        ts.find("source.events", odd)
    world.run("GRANT SELECT ON raw.purchases TO odd")
    assert "at" in ts.find("source.events", odd).schema.names
    plain = world.table("raw.purchases").replace("limaml:${SHOP_PASSWORD}@127.0.0.1:", "/shop?user=limaml&host=127.0.0.1&port=")
    beside = plain.replace("/shop?table", "&password=${ODD_PASSWORD}&table").replace("user=limaml", "user=odd")
    monkeypatch.setenv("ODD_PASSWORD", "a/b@c:d%20 e")
    assert "at" in ts.find("source.events", beside).schema.names
    (tmp_path / "pgpass").write_text(f"*:*:*:limaml:{world.password}\n")
    (tmp_path / "pgpass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    assert "at" in ts.find("source.events", world.table("raw.purchases").replace(":${SHOP_PASSWORD}", "")).schema.names


def test_a_server_that_is_not_there_can_be_tried_again(free_ports):
    location = f"postgresql://limaml@127.0.0.1:{free_ports(1)[0]}/shop?table=t"
    with pytest.raises(StoreError, match=r"must be on a server that answers, got .*Connection refused .*; check the address"):
        ts.find("source.events", location)


def test_a_row_the_server_fails_on_in_the_midst_is_told(database):
    database.run("CREATE VIEW broken AS SELECT n AS customer, 100 / (n - 90000) AS x FROM generate_series(1, 100000) AS n")
    scan = ts.find("source.events", database.table("broken"))
    message = r"source\.events must be a table of Postgres that can be read, got .* division by zero.*; correct the table"
    with pytest.raises(DataError, match=message), scan.rows() as reader:
        reader.read_all()


def test_init_reads_a_sample_and_writes_no_password(world, tmp_path, capsys):
    out = tmp_path / "out.toml"
    tables = {name: world.table(table) for name, (table, _) in TABLES.items()}
    init(tables["events"], tables["users"], tables["items"], out, Answers(label="stars >= 3"), None)
    assert world.password not in out.read_text() + capsys.readouterr().out
    cfg = config.load(out)
    assert cfg.source.events == tables["events"]
    columns = cfg.source.columns
    assert (columns.user_id, columns.item_id, columns.timestamp) == ("customer", "sku", "at")
    report = check(cfg, TODAY)
    assert (report.wrong, report.rows, report.users, report.items) == ([], 60 * NUM_DAYS, 14, 8)
