"""What is kept of users by attributes of items, as it goes online: one map a user and attribute."""

from datetime import date

import duckdb
import pyarrow as pa

from limaml import schema
from limaml.events import state
from limaml.events.day_store import partition_files
from limaml.events.snapshots import subjects
from limaml.events.state import Subject
from limaml.io.storage import Storage


def maps(storage: Storage, tables: schema.Tables, users: pa.Table, through: date) -> pa.Table:
    """`tables.affinity_rows` of `users` (user_id, event_timestamp), which keep their stamps, as of the end of `through`."""
    rows = users.select(["user_id", "event_timestamp"])
    for affinity in tables.affinities:
        entries = _entries(storage, subjects(tables)[affinity.name], through)
        columns = [f"list({affinity.by} ORDER BY {affinity.by}) AS {affinity.keys_column}"]
        columns += [f"list(coalesce({name}, {schema.NO_NUMBER}) ORDER BY {affinity.by}) AS {name}" for name in affinity.counts]
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'")
            connection.register("users", rows)
            connection.register("entries", entries)
            rows = connection.sql(
                f"WITH maps AS (SELECT user_id, {', '.join(columns)} FROM entries SEMI JOIN users USING (user_id) GROUP BY ALL)"
                " SELECT * FROM users LEFT JOIN maps USING (user_id) ORDER BY user_id"
            ).to_arrow_table()
    return rows.select(tables.affinity_rows.names).cast(tables.affinity_rows.arrow).combine_chunks()


def _entries(storage: Storage, subject: Subject, through: date) -> pa.Table:
    """The newest entry of every user and key: of the state at the end of that day or, if it is not kept, of all snapshots."""
    kept = state.read(storage, subject, through)
    with duckdb.connect() as connection:
        if kept is not None:
            connection.register("kept", kept)
            return subject.snapshot_rows(
                connection.sql(f"SELECT {subject.projection} FROM (SELECT *, false AS dropped FROM kept)")
            )
        files = partition_files(storage, f"snapshots/{subject.name}", through=through)
        connection.register("snapshots", storage.dataset(files, subject.snapshots.arrow))
        newest = f"row_number() OVER (PARTITION BY user_id, {subject.keys[1]} ORDER BY event_timestamp DESC) = 1"
        rows = connection.sql(f"FROM (FROM snapshots QUALIFY {newest}) WHERE {subject.values[0]} IS NOT NULL")
        return subject.snapshot_rows(rows)
