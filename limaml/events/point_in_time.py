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
from limaml.events.snapshots import subjects


def join(events: pa.Table, tables: schema.Tables, known: Mapping[str, pa.Table]) -> pa.Table:
    """Each event with the newest row of its user, item and entries that is not later than it, among `Span.rows` by subject.

    Returns `tables.logged_events`, in the order of the events.
    """
    # Only what the joins need goes through them, and a number to put the rows back into order.
    events = events.select(tables.events.names)
    numbers = pa.array(range(events.num_rows), pa.int64())
    joins, values = [], []
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("events", events.select(["user_id", "item_id", "timestamp"]).append_column("number", numbers))
        for name, subject in subjects(tables).items():
            connection.register(name, known[name])
            # An entry by a category is that of the category which the item has in the same join.
            holders = ["item" if subject.affinity and key not in ("user_id", "item_id") else "events" for key in subject.keys]
            same = " AND ".join(f'{holder}.{key} = "{name}".{key}' for holder, key in zip(holders, subject.keys, strict=True))
            joins.append(f' ASOF LEFT JOIN "{name}" ON {same} AND events."timestamp" >= "{name}".event_timestamp')
            values += [f'"{name}".{column}' for column in subject.values]
        query = f"SELECT events.number, {', '.join(values)} FROM events{''.join(joins)} ORDER BY events.number"
        found = connection.sql(query).to_arrow_table().combine_chunks()
    if not found["number"].equals(pa.chunked_array([numbers])):
        unique = len(pc.unique(found["number"]))
        raise StoreError(
            f"the point-in-time join must return each of {events.num_rows} events once, got {found.num_rows} rows "
            f"of {unique} events; look for snapshots with equal key and timestamp"
        )
    logged = tables.logged_events
    joined = pa.Table.from_arrays(
        [*events.columns, *found.drop_columns("number").columns], [*events.column_names, *found.column_names[1:]]
    )
    return joined.select(logged.names).cast(logged.arrow).combine_chunks()
