"""What is past its retention is dropped, everywhere rows hold it; the day keeps its rows, its revision and its place."""

import copy
import random
import shutil
from datetime import date, timedelta

import pyarrow as pa
import pytest
from pydantic import ValidationError

from limaml import schema
from limaml.config import Config
from limaml.errors import NothingToDo
from limaml.events import catalogue, ingest, snapshots
from limaml.events.day_store import EventStore
from limaml.events.logged import read_logged
from limaml.events.recent import Recent
from limaml.governance.retention import retain
from limaml.io.storage import Storage
from limaml.training.candidate import fingerprint
from tests.contracts.ingestion.rich import FEATURES, Shop, day_of_events

FIRST = date(2026, 5, 1)
DAYS = [FIRST + timedelta(days=n) for n in range(8)]
KEPT = {"region": 5, "temperature": 3, "price": 4, "paid": 6, "seen": 3}
FOLDERS = ("events", "events_superseded", "logged", "logged_superseded", "recent")


def limited(cfg: Config, kept: dict[str, int] = KEPT, **sections: dict) -> Config:
    features = [feature | {"retention_days": kept.get(feature["name"], 0)} for feature in FEATURES]
    values = cfg.model_dump(exclude_unset=True) | {"features": features}
    return Config.model_validate(values | {"serving": {"log_path": f"{cfg.storage.root}/../requests"}} | sections)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """All days but the last, one of them corrected."""
    found = Shop(tmp_path_factory.mktemp("built"), DAYS)
    found.cfg = limited(found.cfg)
    for day in DAYS[:-1]:
        found.deliver(day)
    ingest.ingest_history(found.cfg, DAYS[-2], found.today)
    found.events[DAYS[1]] = found.events[DAYS[1]].slice(2)
    found.deliver(DAYS[1])
    ingest.ingest_day(found.cfg, DAYS[1], found.today)
    return found


@pytest.fixture
def shop(built, tmp_path):
    """A copy of what was built, for one test."""
    found, folder = copy.copy(built), tmp_path / "shop"
    shutil.copytree(built.folder, folder)
    found.folder, found.events = folder, dict(built.events)
    found.cfg = Config.model_validate_json(built.cfg.model_dump_json().replace(str(built.folder), str(folder)))
    found.storage = Storage(found.cfg.storage.root)
    return found


def days_with(shop, name):
    """Days on which some stored row, current or superseded, still holds a value."""
    found = set()
    for folder in FOLDERS:
        for path in shop.storage.walk(folder):
            if path.endswith(".parquet"):
                table = shop.storage.read_table(path)
                if name in table.column_names:
                    known = table.filter(table[name].is_valid())
                    found |= {at.date() for at in known["timestamp"].to_pylist()}
    return sorted(found)


def test_values_go_day_by_day_and_rows_stay(shop):
    today, before = DAYS[-2], EventStore(shop.storage).manifests()
    rows = shop.storage.num_rows(f"logged/dt={DAYS[1]}/logged-r0002.parquet")
    assert days_with(shop, "temperature") == DAYS[:-1]
    result = retain(shop.cfg, today)
    assert (result["features"], result["feature_days"]) == (5, 1 + 3 + 2 + 4 + 4), "paid, price, region, seen, temperature"
    for name, kept in KEPT.items():
        assert days_with(shop, name) == [day for day in DAYS[:-1] if day > today - timedelta(days=kept)]
    assert shop.storage.num_rows(f"logged/dt={DAYS[1]}/logged-r0002.parquet") == rows
    after = EventStore(shop.storage).manifests()
    assert [(m.revision, m.rows, m.sha256) for m in after.values()] == [(m.revision, m.rows, m.sha256) for m in before.values()]
    assert after[FIRST].dropped == ("paid", "price", "region", "seen", "temperature")
    assert after[DAYS[-2]] == before[DAYS[-2]]
    with pytest.raises(NothingToDo, match=rf"nothing is past its retention at the end of {today}"):
        retain(shop.cfg, today)


def test_the_source_delivering_the_same_again_brings_nothing_back(shop):
    retain(shop.cfg, DAYS[-2])
    files = shop.files("events", "logged")
    assert ingest.ingest_history(shop.cfg, DAYS[-2], shop.today)["status"] == "unchanged"
    assert shop.files("events", "logged") == files


def test_a_correction_brings_values_back_until_the_next_run(shop):
    retain(shop.cfg, DAYS[-2])
    shop.events[DAYS[0]] = shop.events[DAYS[0]].slice(1)
    shop.deliver(DAYS[0])
    assert ingest.ingest_day(shop.cfg, DAYS[0], shop.today)["status"] == "corrected"
    assert DAYS[0] in days_with(shop, "price")
    assert EventStore(shop.storage).manifests()[DAYS[0]].dropped == ()
    assert retain(shop.cfg, DAYS[-2])["feature_days"] == 5, "of the corrected day alone"
    assert DAYS[0] not in days_with(shop, "price")


def test_what_is_counted_of_later_days_does_not_change(shop, tmp_path):
    """Aggregates go on from their running sums; windows are shorter than what is kept."""
    other = Shop(tmp_path / "other", DAYS)
    other.cfg, other.events = limited(other.cfg), shop.events
    for day in DAYS[:-1]:
        other.deliver(day)
    ingest.ingest_history(other.cfg, DAYS[-2], other.today)
    retain(shop.cfg, DAYS[-2])
    for each in (shop, other):
        each.deliver(DAYS[-1])
        ingest.ingest_day(each.cfg, DAYS[-1], each.today)
    one, two = (read_logged(s.storage, schema.tables(s.cfg.features), first=DAYS[-1], through=DAYS[-1]) for s in (shop, other))
    assert one["paid"].null_count < one.num_rows
    assert one.equals(two)


def test_of_what_was_known_the_newest_row_stays(shop):
    """Of users: `seen` is made of events and kept 3 days, `region` is delivered and kept 5."""
    users = catalogue.kinds(schema.tables(shop.cfg.features))["user"]
    shop.write("users.parquet", pa.table({"user_id": [f"u{n}" for n in range(5)], "region": ["n", "w", None, "n", "e"]}))
    shop.deliver(DAYS[-1])
    ingest.ingest_day(shop.cfg, DAYS[-1], shop.today)
    before = snapshots.between(shop.storage, users, FIRST, DAYS[-1])
    newest = snapshots.latest(shop.storage, users, DAYS[-1])
    assert retain(shop.cfg, DAYS[-1])["files"] > 0
    after = {
        (row["user_id"], row["event_timestamp"]): row
        for row in snapshots.between(shop.storage, users, FIRST, DAYS[-1]).to_pylist()
    }
    for row in before.to_pylist():
        day = (row["event_timestamp"] - timedelta(days=1)).date()
        expected = row | {name: None for name in ("seen", "region", "paid") if day <= DAYS[-1] - timedelta(days=KEPT[name])}
        assert after[row["user_id"], row["event_timestamp"]] == expected
    assert len(after) == before.num_rows
    assert snapshots.latest(shop.storage, users, DAYS[-1]).equals(newest)
    delivered = {
        row["user_id"]: row["region"]
        for row in catalogue.history(shop.storage, users).to_pylist()
        if row["day"] < day_number(FIRST)
    }
    assert delivered == {"u0": "n", "u1": None, "u2": None, "u3": "n", "u4": "e"}, "what u1 had before is gone"
    assert min(shop.storage.list("state/user")) > f"dt={DAYS[-1] - timedelta(days=3)}"
    with pytest.raises(NothingToDo):
        retain(shop.cfg, DAYS[-1])


def test_a_count_whose_retention_is_declared_later_is_dropped_from_older_files(shop):
    """They were written when a count could not be null."""
    users = catalogue.kinds(schema.tables(shop.cfg.features))["user"]
    for path in shop.storage.walk("snapshots/user"):
        table = shop.storage.read_table(path)
        never_null = pa.schema([field.with_nullable(field.name != "seen") for field in table.schema])
        shop.storage.write_table(path, table.cast(never_null))
    assert retain(shop.cfg, DAYS[-2])["files"] > 0
    first = snapshots.changed(shop.storage, users, FIRST)
    assert first["seen"].null_count == first.num_rows > 0


def test_a_retention_that_is_declared_later_ends_what_is_past_already(shop):
    """The next day has a row for everyone whose last event is so many days old, or older."""
    users = catalogue.kinds(schema.tables(shop.cfg.features))["user"]
    for day in (DAYS[-1], DAYS[-1] + timedelta(days=1)):
        shop.events[day] = day_of_events(day, random.Random(0), num_users=1)
        shop.deliver(day)
        ingest.ingest_day(shop.cfg, day, shop.today)
        shop.cfg = limited(shop.cfg, KEPT | {"seen": 1})
    rows = {row["user_id"]: row["seen"] for row in snapshots.changed(shop.storage, users, day).to_pylist()}
    assert set(rows) == {f"u{n}" for n in range(5)}
    assert rows.pop("u0") is not None
    assert set(rows.values()) == {None}
    assert retain(shop.cfg, day)["files"] > 0
    unlimited = catalogue.kinds(schema.tables(limited(shop.cfg, {}).features))["user"]
    assert snapshots.latest(shop.storage, unlimited, day)["seen"].null_count == 4, "also where it is no longer declared"


def day_number(day: date) -> int:
    return (day - date(1970, 1, 1)).days


def test_a_model_of_the_rows_as_they_are_now_is_another_one(shop):
    before = fingerprint(shop.cfg, DAYS[-2])
    retain(shop.cfg, DAYS[-2])
    assert fingerprint(shop.cfg, DAYS[-2]) != before


def test_a_run_that_dies_is_done_again(shop, monkeypatch):
    written = EventStore.commit
    monkeypatch.setattr(EventStore, "commit", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        retain(shop.cfg, DAYS[-2])
    monkeypatch.setattr(EventStore, "commit", written)
    assert retain(shop.cfg, DAYS[-2])["feature_days"] == 1 + 3 + 2 + 4 + 4
    assert FIRST not in days_with(shop, "temperature")


def test_newest_rows_are_made_again_without_the_values(shop):
    tables = schema.tables(shop.cfg.features)
    as_of = schema.day_start(DAYS[-1])
    recent = Recent(shop.storage, tables, "user_id", as_of, 5)
    shop.storage.write_table("recent/user_id/base-x/bucket=00.parquet", pa.table({"timestamp": [as_of], "temperature": [1.0]}))
    retain(shop.cfg, DAYS[-2])
    assert shop.storage.list("recent") == []
    assert all(path.startswith("logged/") for path in recent.files(["u1"]))


def test_requests_and_refused_deliveries_go_with_their_first_value(shop):
    requests = Storage(shop.cfg.serving.log_path)
    for day in DAYS:
        requests.write_bytes(f"dt={day}/part-1.parquet", b"rows")
        shop.storage.write_bytes(f"consistency/dt={day}/differences.parquet", b"rows")
        shop.storage.write_bytes(f"quarantine/dt={day}/r0001/raw.bin", b"rows")
    result = retain(shop.cfg, DAYS[-2])
    kept = [f"dt={day}" for day in DAYS if day > DAYS[-2] - timedelta(days=3)]
    assert requests.list("") == shop.storage.list("consistency") == shop.storage.list("quarantine") == kept
    assert result["folders"] == 3 * (len(DAYS) - len(kept))
    shorter = limited(shop.cfg, governance={"request_log_days": 1})
    assert retain(shorter, DAYS[-2])["folders"] == 4, "requests and their comparison, of two more days"
    assert requests.list("") == [f"dt={day}" for day in DAYS[-2:]]


def test_nothing_is_touched_where_nothing_is_declared(shop):
    files = shop.files(*FOLDERS, "days")
    with pytest.raises(NothingToDo):
        retain(limited(shop.cfg, {}), DAYS[-1] + timedelta(days=1000))
    assert shop.files(*FOLDERS, "days") == files


@pytest.mark.parametrize(
    ("name", "days", "rule"),
    [
        ("weekday", 3, "retention_days must be of values that rows hold"),
        ("same", 3, "retention_days must be of values that rows hold"),
        ("price", 2, r"price must keep its values \(retention_days\) for more days than the mean paid_of_two .* \(2\), got 2"),
    ],
)
def test_a_retention_that_cannot_be_is_refused(shop, name, days, rule):
    with pytest.raises(ValidationError, match=rule):
        limited(shop.cfg, {name: days})
