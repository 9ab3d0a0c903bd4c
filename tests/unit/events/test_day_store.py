"""The event store: which files a span of days has, and whose rows a revision changed."""

from datetime import date, timedelta

import pyarrow as pa
import pytest

from limaml import schema
from limaml.events.day_store import DayManifest, EventStore, canonical, conforms, partition_files
from limaml.io.storage import Storage

DAY = date(2026, 1, 5)
NEXT, AFTER = DAY + timedelta(days=1), DAY + timedelta(days=2)


def events(*rows, day=DAY):
    """(event, user, item, label), all at the day's first instant."""
    values = [
        {"event_id": event, "user_id": user, "item_id": item, "timestamp": schema.day_start(day), "label": label}
        for event, user, item, label in rows
    ]
    return canonical(pa.Table.from_pylist(values, schema.EVENTS.arrow), schema.EVENTS)


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


@pytest.fixture
def store(storage):
    return EventStore(storage)


def accept(store, day, table, revision):
    store.place(day, table, revision)
    store.commit(DayManifest(day, "passed", revision, table.num_rows))


def changed(store, column, revision, since):
    return store.changed_entities(DAY, revision, since)[column].to_pylist()


def test_a_span_has_both_its_ends_and_no_file_that_is_still_being_written(storage):
    for day in (AFTER, DAY, NEXT):
        storage.write_bytes(f"events/dt={day}/events-r0001.parquet", b"")
    storage.write_bytes(f"events/dt={NEXT}/.events-r0002.parquet.1a2b", b"half a file of a process that was killed")
    first, second, third = (f"events/dt={day}/events-r0001.parquet" for day in (DAY, NEXT, AFTER))
    assert partition_files(storage, "events") == [first, second, third]
    assert partition_files(storage, "events", first=NEXT) == [second, third]
    assert partition_files(storage, "events", through=NEXT) == [first, second]
    assert partition_files(storage, "events", first=NEXT, through=NEXT) == [second]


def test_lineage_has_the_passed_days_through_the_last_one(store):
    for day, status, revision in ((DAY, "passed", 2), (NEXT, "quarantined", 3), (AFTER, "passed", 1)):
        store.commit(DayManifest(day, status, revision))
    assert store.lineage(AFTER) == {str(DAY): 2, str(AFTER): 1}
    assert store.lineage(AFTER - timedelta(days=1)) == {str(DAY): 2}


def test_changed_are_those_whose_rows_came_went_or_differ(store):
    accept(store, DAY, events(("1", "stays", "a", 1), ("2", "goes", "b", 0), ("3", "turns", "c", 0)), 1)
    accept(store, DAY, events(("1", "stays", "a", 1), ("3", "turns", "c", 1), ("4", "comes", "d", 1)), 2)
    assert changed(store, "user_id", 2, since=1) == ["comes", "goes", "turns"]
    assert changed(store, "item_id", 2, since=1) == ["b", "c", "d"]
    assert changed(store, "user_id", 2, since=0) == ["comes", "stays", "turns"], "nothing known: all of the day's"
    assert changed(store, "user_id", 2, since=2) == []
    assert changed(store, "user_id", 0, since=0) == [], "no revision, no rows"


def test_a_revision_is_compared_with_any_before_it(store):
    for revision, labels in ((1, (0, 0)), (2, (1, 0)), (3, (1, 1))):
        accept(store, DAY, events(("1", "u1", "a", labels[0]), ("2", "u2", "a", labels[1])), revision)
    assert [changed(store, "user_id", 3, since) for since in (1, 2, 3)] == [["u1", "u2"], ["u2"], []]


@pytest.mark.parametrize("column", schema.EVENTS.names)
def test_a_null_where_none_may_be_does_not_conform(column):
    table = events(("1", "u1", "a", 1))
    assert conforms(table, schema.EVENTS)
    nothing = pa.nulls(1, table.schema.field(column).type)
    assert not conforms(table.set_column(table.schema.get_field_index(column), column, nothing), schema.EVENTS)


def test_manifests_are_read_once_and_what_the_store_records_is_among_them(store, storage, monkeypatch):
    EventStore(storage).commit(DayManifest(NEXT, "passed", 1))
    read = []
    before = Storage.read_json
    monkeypatch.setattr(Storage, "read_json", lambda self, path: read.append(path) or before(self, path))
    assert list(store.manifests()) == [NEXT]
    store.commit(DayManifest(DAY, "passed", 1, warnings=("rows",)))
    store.record_no_data(AFTER)
    assert (store.days(), store.days("no_data")) == ([DAY, NEXT], [AFTER])
    assert store.lineage(AFTER) == {str(DAY): 1, str(NEXT): 1}
    assert read == ["format.json", f"days/dt={NEXT}.json"]
    store.manifests().clear()
    assert store.manifests() == EventStore(storage).manifests()
