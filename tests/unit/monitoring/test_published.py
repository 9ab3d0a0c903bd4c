"""Entities counted by the age of their newest row, from partitions that have passed their gate."""

from datetime import UTC, datetime, timedelta

import pyarrow as pa

from limaml import schema
from limaml.embeddings.published import published_files
from limaml.io.storage import Storage
from limaml.monitoring.published import entities_by_age

THROUGH = datetime(2026, 3, 1, tzinfo=UTC)


def write(storage, name, rows, *, passed=True):
    """Rows are (entity, days before THROUGH of as_of, of last_event_at)."""
    values = [
        {
            "user_id": entity,
            "kind": "user",
            "embedding": [1.0, 2.0],
            "model_version": "3",
            "support_size": 1,
            "as_of": THROUGH - timedelta(days=as_of),
            "last_event_at": None if last is None else THROUGH - timedelta(days=last),
        }
        for entity, as_of, last in rows
    ]
    table = pa.Table.from_pylist(values, schema.embeddings("user_id", 2).arrow)
    storage.write_table(f"embeddings/kind=user/version=3/{name}.parquet", table)
    if passed:
        storage.write_json(f"embeddings/kind=user/version=3/{name}.json", {})


def count(storage):
    return entities_by_age(storage, published_files(storage, "user", "3"), "user_id", THROUGH)


def test_an_entity_counts_once_by_its_newest_row(tmp_path):
    storage = Storage(str(tmp_path))
    write(storage, "dt=2026-02-20/shard-000", [("a", 9, 10), ("b", 9, 40), ("c", 9, 20), ("d", 9, None)])
    write(storage, "dt=2026-02-27/shard-000", [("a", 1, 1.5)])
    write(storage, "dt=2026-02-28/shard-000", [("c", 0, 0.5), ("e", 0, 0.1)])
    assert count(storage) == {"within_1d": 2, "within_7d": 1, "within_30d": 0, "older": 2}


def test_a_correction_that_took_events_away_counts(tmp_path):
    storage = Storage(str(tmp_path))
    write(storage, "dt=2026-02-27/shard-000", [("a", 1, 1.5)])
    write(storage, "dt=2026-02-27/shard-000-r0002", [("a", 0, 20)])
    assert count(storage) == {"within_1d": 0, "within_7d": 0, "within_30d": 1, "older": 0}


def test_of_two_rows_as_of_one_instant_the_one_with_the_later_event_stands(tmp_path):
    storage = Storage(str(tmp_path))
    write(storage, "dt=2026-02-27/shard-000", [("a", 0, 20), ("b", 0, 0.5)])
    write(storage, "dt=2026-02-27/shard-000-r0002", [("a", 0, 0.5), ("b", 0, 20)])
    assert count(storage) == {"within_1d": 2, "within_7d": 0, "within_30d": 0, "older": 0}


def test_the_bounds_are_whole_days(tmp_path):
    storage = Storage(str(tmp_path))
    write(storage, "dt=2026-02-28/shard-000", [("a", 0, 1), ("b", 0, 7), ("c", 0, 30), ("d", 0, 0.999)])
    assert count(storage) == {"within_1d": 1, "within_7d": 1, "within_30d": 1, "older": 1}


def test_rows_that_did_not_pass_or_are_not_published_yet_do_not_count(tmp_path):
    storage = Storage(str(tmp_path))
    write(storage, "dt=2026-02-28/shard-000", [("a", 0, 0.5)])
    write(storage, "dt=2026-02-28/shard-001", [("b", 0, 0.5)], passed=False)
    write(storage, "dt=2026-03-01/shard-000", [("a", -1, -0.5), ("c", -1, -0.5)])
    storage.write_table("embeddings/kind=user/version=3/dt=2026-02-28/planned.parquet", pa.table({"user_id": ["z"]}))
    storage.write_json("embeddings/kind=user/version=3/dt=2026-02-28/plan.json", {})
    assert count(storage) == {"within_1d": 1, "within_7d": 0, "within_30d": 0, "older": 0}


def test_a_version_without_partitions_has_no_entity(tmp_path):
    assert set(count(Storage(str(tmp_path))).values()) == {0}
