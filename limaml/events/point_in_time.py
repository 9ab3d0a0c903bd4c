"""The point-in-time join: each event with what was known before its day.

Feast's `get_historical_features` over the same snapshots is the definition, and a test holds this to it: the same columns by
one duckdb query, over the rows that a span of days has just changed.
"""

from collections.abc import Mapping

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.errors import StoreError
from limaml.events.snapshots import Span, subjects


def known_rows(tables: schema.Tables, span: Span) -> dict[str, pa.Table]:
    """What events of a span's days may be joined with: of each subject the rows before them and those of the days."""
    return {name: span.rows(subject, before=True) for name, subject in subjects(tables).items()}


def join(events: pa.Table, tables: schema.Tables, known: Mapping[str, pa.Table]) -> pa.Table:
    """Each event with the newest of the `known_rows` of its user, item and entries that is not later than it.

    Returns `tables.logged_events`, sorted by (user_id, timestamp, event_id).
    """
    joins, values = [], []
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("events", events.select(tables.events.names))
        for name, subject in subjects(tables).items():
            connection.register(name, known[name])
            # An entry by a category is that of the category which the item has in the same join.
            holders = ["item" if subject.affinity and key not in ("user_id", "item_id") else "events" for key in subject.keys]
            same = " AND ".join(f'{holder}.{key} = "{name}".{key}' for holder, key in zip(holders, subject.keys, strict=True))
            joins.append(f' ASOF LEFT JOIN "{name}" ON {same} AND events."timestamp" >= "{name}".event_timestamp')
            values += [f'"{name}".{column}' for column in subject.values]
        query = f"SELECT events.*, {', '.join(values)} FROM events{''.join(joins)}"
        query += ' ORDER BY events.user_id, events."timestamp", events.event_id'
        found = connection.sql(query).to_arrow_table()
    logged = tables.logged_events
    found = found.select(logged.names).cast(logged.arrow).combine_chunks()
    if found.num_rows != events.num_rows:
        unique = len(pc.unique(found["event_id"]))
        raise StoreError(
            f"the point-in-time join must return each of {events.num_rows} events once, got {found.num_rows} rows "
            f"of {unique} events; look for snapshots with equal key and timestamp"
        )
    return found
