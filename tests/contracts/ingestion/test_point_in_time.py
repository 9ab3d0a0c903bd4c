"""Feast's point-in-time join against a second, plain implementation."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from limaml import schema
from limaml.errors import StoreError
from limaml.events import catalogue, snapshots
from limaml.events.day_store import canonical
from limaml.events.logged import read_logged
from limaml.features.feature_store import join_features, open_store
from tests import declared


def plain_join(events, tables):
    """For each event, in order: the newest snapshot row of its user and item stamped no later than it."""
    rows = []
    for event in events.to_pylist():
        for key, names, table in tables:
            known = [r for r in table if r[key] == event[key] and r["event_timestamp"] <= event["timestamp"]]
            newest = max(known, key=lambda r: r["event_timestamp"], default={})
            event |= {name: newest.get(name) for name in names}
        rows.append(event)
    return pa.Table.from_pylist(rows, declared.LOGGED_EVENTS.arrow)


def all_snapshots(delivery):
    first, last = delivery.days[0] - timedelta(days=1), delivery.days[-1]
    return [
        (kind.key, declared.TABLES.names(name), snapshots.between(delivery.storage, kind, first, last).to_pylist())
        for name, kind in catalogue.kinds(declared.TABLES).items()
    ]


def test_logged_features_equal_the_plain_join(ingested):
    through = ingested.days[-2]
    logged = read_logged(ingested.storage, declared.TABLES, through=through)
    assert logged.equals(plain_join(logged.select(list(schema.EVENTS.names)), all_snapshots(ingested)))
    assert len(set(logged["user_events"].to_pylist())) > 2, "the features do vary"


def events(rows):
    """(event id, user, item, timestamp) with label 0, as a table."""
    columns = [[*column] for column in zip(*rows, strict=True)]
    return pa.Table.from_arrays(
        [*map(pa.array, columns[:3]), pa.array(columns[3], schema.TIMESTAMP), pa.array([0] * len(rows), pa.int8())],
        schema=schema.EVENTS.arrow,
    )


def test_row_at_midnight_sees_the_day_that_ended_and_the_microsecond_before_does_not(ingested):
    """The join is `<=`; a snapshot stamped at midnight holds events strictly before it."""
    day = ingested.days[1]
    table = read_logged(ingested.storage, declared.TABLES, first=day, through=day)
    user, item = table["user_id"][0].as_py(), table["item_id"][0].as_py()
    end = schema.day_end(day)
    probes = events([("before", user, item, end - timedelta(microseconds=1)), ("at", user, item, end)])
    joined = join_features(open_store(ingested.cfg), probes, declared.TABLES)
    counts = dict(zip(joined["event_id"].to_pylist(), joined["user_events"].to_pylist(), strict=True))
    of_user = np.array(read_logged(ingested.storage, declared.TABLES, through=day)["user_id"].to_pylist()) == user
    of_day = np.array(table["user_id"].to_pylist()) == user
    assert counts == {"before": int(of_user.sum() - of_day.sum()), "at": int(of_user.sum())}


def test_rows_with_equal_keys_and_timestamps_are_all_kept(ingested):
    at = schema.day_start(ingested.days[2]) + timedelta(hours=3)
    rows = [(f"e{n}", "u0", f"i{n % 2}", at) for n in range(50)]
    joined = join_features(open_store(ingested.cfg), events(rows), declared.TABLES)
    assert joined["event_id"].to_pylist() == sorted(row[0] for row in rows)
    assert joined.equals(plain_join(canonical(events(rows), schema.EVENTS), all_snapshots(ingested)))


def test_unknown_entity_and_time_before_the_first_snapshot_have_no_features(ingested):
    early = datetime(2020, 1, 1, tzinfo=UTC)
    at = schema.day_start(ingested.days[2])
    joined = join_features(
        open_store(ingested.cfg), events([("a", "nobody", "i0", at), ("b", "u0", "i0", early)]), declared.TABLES
    )
    by_id = {row["event_id"]: row for row in joined.to_pylist()}
    assert by_id["a"]["user_events"] is None
    assert by_id["a"]["item_events"] is not None
    assert by_id["b"]["genres"] is None


def test_no_events_give_no_rows(ingested):
    joined = join_features(open_store(ingested.cfg), schema.EVENTS.arrow.empty_table(), declared.TABLES)
    assert joined.equals(declared.LOGGED_EVENTS.arrow.empty_table())


def test_a_join_that_loses_rows_is_an_error(ingested, monkeypatch):
    store = open_store(ingested.cfg)
    honest = store.get_historical_features

    def losing(frame, service):
        return honest(frame.iloc[1:], service)

    monkeypatch.setattr(store, "get_historical_features", losing)
    at = schema.day_start(ingested.days[2])
    with pytest.raises(StoreError, match="must return each of 2 events once, got 1 rows of 1 events"):
        join_features(store, events([("a", "u0", "i0", at), ("b", "u1", "i0", at)]), declared.TABLES)
