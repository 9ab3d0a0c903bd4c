"""Adapt many entities in one stream: planned entities -> their last N events -> embeddings (contract 3).

An embedding is a pure function of (model version, those events with their logged features): whoever computes it, in whatever
batch, gets the same vector to 1e-6, and the same entities in the same order give the same bytes.
"""

from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa

from limaml import schema
from limaml.config import TaskKindConfig
from limaml.events.catalogue import item_vectors
from limaml.events.day_store import partition_files
from limaml.events.recent import Recent, logged_rows, require_logged
from limaml.io.storage import Storage

if TYPE_CHECKING:
    from limaml.models.bundle import Bundle

_READ_ROWS = 65_536
"""Rows read at a time."""


def active_entities(storage: Storage, tables: schema.Tables, kind: TaskKindConfig, as_of: datetime) -> list[str]:
    """Entities with at least one logged event in the last `active_days` before `as_of`, sorted."""
    first, through = as_of - timedelta(days=kind.active_days), _last_day(as_of)
    files = partition_files(storage, "logged", first=first.date(), through=through)
    require_logged(storage, files)
    query = (
        f"SELECT DISTINCT {kind.entity_column} FROM logged"  # noqa: S608  names come from the schema
        f" WHERE timestamp >= $first AND timestamp < $as_of AND {kind.entity_column} IS NOT NULL ORDER BY 1"
    )
    columns = pa.schema([tables.logged_events.arrow.field(name) for name in (kind.entity_column, "timestamp")])
    with logged_rows(storage, files, columns) as connection:
        return [row[0] for row in connection.execute(query, {"first": first, "as_of": as_of}).fetchall()]


def adapt(
    storage: Storage,
    bundle: "Bundle",
    version: str,
    kind: TaskKindConfig,
    entities: Sequence[str],
    as_of: datetime,
    batch_entities: int,
    *,
    is_part: bool = False,
) -> pa.RecordBatchReader:
    """Embeddings of `entities` as of an instant, as they come: batches of schema.embeddings, sorted by entity.

    Support is the entity's last N events before `as_of`, N from the bundle's configuration. An entity without any gets the
    prior. Memory follows `batch_entities` and duckdb's limit, not the number of events. With `is_part`, rows of entities before
    the first one and after the last one are left in their files.
    """
    from limaml.embeddings.stream import Adapter

    tables = schema.tables(bundle.config.features)
    adapter = Adapter.of(bundle.with_items(item_vectors(storage, tables)), version, kind, as_of)
    names = sorted(entities)
    planned = pa.table({"entity": pa.array(names, pa.string())})
    span = (names[0], names[-1]) if is_part and names else None
    num_rows = bundle.config.support_rows_of(kind.name)
    params = {"as_of": as_of, "support_rows": num_rows}
    recent = Recent(storage, tables, kind.entity_column, as_of, num_rows)

    def batches() -> Iterator[pa.RecordBatch]:
        with logged_rows(storage, recent.files(entities), recent.columns, kind.entity_column, span) as connection:
            connection.register("planned", planned)
            rows = connection.sql(_planned_rows(tables, kind), params=params).to_arrow_reader(_READ_ROWS)
            yield from adapter.embed_all(rows, batch_entities, planned.num_rows)

    return pa.RecordBatchReader.from_batches(adapter.columns, batches())


def adapt_sorted(
    storage: Storage,
    bundle: "Bundle",
    version: str,
    kind: TaskKindConfig,
    source: str,
    as_of: datetime,
    batch_entities: int,
) -> pa.RecordBatchReader:
    """`adapt` for all entities of one Parquet file of logged events that is sorted by (entity, timestamp, event id) already.

    Raises DataError, while it is read, if it is not.
    """
    from limaml.embeddings.stream import Adapter

    tables = schema.tables(bundle.config.features)
    adapter = Adapter.of(bundle.with_items(item_vectors(storage, tables)), version, kind, as_of)
    columns = tables.support_columns(kind.entity_column)
    rows = storage.read_batches(source, columns, _READ_ROWS)
    return pa.RecordBatchReader.from_batches(adapter.columns, adapter.embed_all(rows, batch_entities, total=None))


def _planned_rows(tables: schema.Tables, kind: TaskKindConfig) -> str:
    """SQL: the last N events of every planned entity; one that has none has one row of nulls."""
    entity, columns = kind.entity_column, tables.support_columns(kind.entity_column)[1:]
    # One join, whose hash table is that of the planned entities: rows pass by it, and go to disk where they are sorted.
    return (
        f"SELECT planned.entity AS {entity}, {', '.join(columns)}"  # noqa: S608  names of the schema
        f" FROM (SELECT * FROM logged WHERE timestamp < $as_of) AS earlier RIGHT JOIN planned ON {entity} = planned.entity"
        f" QUALIFY row_number() OVER (PARTITION BY planned.entity ORDER BY timestamp DESC, event_id DESC) <= $support_rows"
        f" ORDER BY planned.entity, timestamp, event_id"
    )


def _last_day(as_of: datetime) -> date:
    """The last day that can hold an event before `as_of`."""
    return (as_of - timedelta(microseconds=1)).date()
