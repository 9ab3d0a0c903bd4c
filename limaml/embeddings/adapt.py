"""Adapt many entities in one stream: planned entities -> their last N events -> embeddings (contract 3).

An embedding is a pure function of (model version, those events with their logged features): whoever computes it, in whatever
batch, gets the same vector to 1e-6, and the same entities in the same order on one thread count give the same bytes.

    T tasks (one an entity), D embedding width
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from limaml import schema
from limaml.config import TaskKindConfig
from limaml.data.events import partition_files
from limaml.data.storage import Storage
from limaml.errors import DataError

if TYPE_CHECKING:
    from limaml.models.bundle import Bundle
    from limaml.models.network import LiMAML

_THREADS = 1
"""Threads of torch and duckdb while adapting: another count sums in another order, and a re-run must give the same bytes."""


def active_entities(storage: Storage, kind: TaskKindConfig, as_of: datetime) -> list[str]:
    """Entities with at least one logged event in the last `active_days` before `as_of`, sorted."""
    first, through = as_of - timedelta(days=kind.active_days), _last_day(as_of)
    files = partition_files(storage, "logged", first=first.date(), through=through)
    query = (
        f"SELECT DISTINCT {kind.entity_column} FROM logged"  # noqa: S608  names come from the schema
        " WHERE timestamp >= $first AND timestamp < $as_of ORDER BY 1"
    )
    with _duckdb(storage, files) as connection:
        return [row[0] for row in connection.execute(query, {"first": first, "as_of": as_of}).fetchall()]


def shard_of(entity: str, num_shards: int) -> int:
    """The shard an entity belongs to: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(entity.encode(), digest_size=8).digest(), "big") % num_shards


def adapt(
    storage: Storage,
    bundle: "Bundle",
    version: str,
    kind: TaskKindConfig,
    entities: Sequence[str],
    as_of: datetime,
    batch_entities: int,
) -> pa.Table:
    """Embeddings of `entities` as of an instant: a table of schema.embeddings, sorted by entity.

    Support is the entity's last N events before `as_of`, N from the bundle's configuration. An entity without any gets the
    prior. Memory follows `batch_entities`, not the number of entities or events.
    """
    planned = sorted(entities)
    columns = schema.embeddings(kind.entity_column, bundle.config.model.embedding_dim).arrow
    with _one_thread():
        chunks = list(_embed_chunks(storage, bundle, kind, planned, as_of, batch_entities))
    vectors = [chunk for chunk, _, _ in chunks]
    sizes = [size for _, chunk, _ in chunks for size in chunk]
    last = [instant for _, _, chunk in chunks for instant in chunk]
    flat = pa.concat_arrays(vectors) if vectors else pa.array([], pa.float32())
    return pa.table(
        [
            pa.array(planned, pa.string()),
            pa.repeat(kind.name, len(planned)),
            pa.FixedSizeListArray.from_arrays(flat, bundle.config.model.embedding_dim),
            pa.repeat(version, len(planned)),
            pa.array(sizes, pa.int64()),
            pa.array([as_of] * len(planned), schema.TIMESTAMP),
            pa.array(last, schema.TIMESTAMP),
        ],
        schema=columns,
    )


def _embed_chunks(
    storage: Storage, bundle: "Bundle", kind: TaskKindConfig, planned: list[str], as_of: datetime, batch_entities: int
) -> Iterator[tuple[pa.Array, list[int], list[datetime | None]]]:
    """For `batch_entities` entities at a time: vectors end to end, support sizes, times of the last event."""
    support_rows = bundle.config.meta.support_rows
    # In float32 the order of sums, so the batch, moved a row_mlp's embedding by 5e-6; contract 5 allows 1e-6.
    network = copy.deepcopy(bundle.network).double()
    with _duckdb(storage, partition_files(storage, "logged", through=_last_day(as_of))) as connection:
        connection.register("planned", pa.table({"entity": pa.array(planned, pa.string())}))
        query = (
            f"SELECT {', '.join(schema.LOGGED_EVENTS.names)} FROM logged"  # noqa: S608  names come from the schema
            f" SEMI JOIN planned ON logged.{kind.entity_column} = planned.entity WHERE timestamp < $as_of"
            f" QUALIFY row_number() OVER (PARTITION BY {kind.entity_column} ORDER BY timestamp DESC, event_id DESC)"
            f" <= $support_rows ORDER BY {kind.entity_column}, timestamp, event_id"
        )
        rows = connection.sql(query, params={"as_of": as_of, "support_rows": support_rows})
        stream = _Stream(rows.to_arrow_reader(), kind.entity_column)
        for start in range(0, len(planned), batch_entities):
            chunk = planned[start : start + batch_entities]
            yield _embed(bundle, network, kind, chunk, stream.take_through(chunk[-1]), as_of)


def _embed(
    bundle: "Bundle", network: "LiMAML", kind: TaskKindConfig, entities: list[str], logged: pa.Table, as_of: datetime
) -> tuple[pa.Array, list[int], list[datetime | None]]:
    import numpy as np
    import torch

    from limaml.data.tasks import TaskRows, build_batch, support_spec
    from limaml.meta.engine import embed_tasks

    rows = TaskRows.from_logged(logged, bundle.encoder, kind)
    position = {entity: at for at, entity in enumerate(rows.entities)}
    specs = [support_spec(rows, at, as_of, bundle.config.meta.support_rows) for at in range(rows.num_entities)]
    vectors_TD = np.tile(bundle.prior[kind.name].numpy(), (len(entities), 1))
    present = [at for at, entity in enumerate(entities) if entity in position]
    if present:
        batch = build_batch(rows, specs)
        with torch.no_grad():
            support = batch.support.to(dtype=torch.float64)
            vectors_TD[present] = embed_tasks(network, support, batch.entity_index_T).numpy()
    sizes = [specs[position[entity]].support_size if entity in position else 0 for entity in entities]
    stops = {entity: int(rows.timestamp_us[rows.offsets[at + 1] - 1]) for entity, at in position.items()}
    last = pa.array([stops.get(entity) for entity in entities], pa.int64()).cast(schema.TIMESTAMP).to_pylist()
    return pa.array(vectors_TD.astype(np.float32).ravel()), sizes, last


class _Stream:
    """Record batches sorted by entity, handed out up to a given entity."""

    def __init__(self, reader: pa.RecordBatchReader, column: str) -> None:
        self._reader = reader
        self._column = column
        self._kept = schema.LOGGED_EVENTS.arrow.empty_table()
        self._ended = False

    def take_through(self, entity: str) -> pa.Table:
        """All rows not handed out yet whose entity sorts no later than `entity`."""
        taken = []
        while True:
            keys = self._kept[self._column].combine_chunks().to_pylist()
            end = len(keys)
            while end and keys[end - 1] > entity:
                end -= 1
            taken.append(self._kept.slice(0, end))
            self._kept = self._kept.slice(end)
            if self._kept.num_rows or self._ended:
                return pa.concat_tables(taken).combine_chunks()
            try:
                batch = self._reader.read_next_batch()
            except StopIteration:
                self._ended = True
            else:
                self._kept = pa.Table.from_batches([batch]).cast(schema.LOGGED_EVENTS.arrow)


@contextmanager
def _duckdb(storage: Storage, files: list[str]) -> Iterator[Any]:
    """A connection that sees the logged events in `files` as `logged`. Raises DataError if there are none."""
    import duckdb

    if not files:
        raise DataError(f"{storage.path('logged')} must hold a partition to adapt from, got none; run limaml ingest first")
    with duckdb.connect(config={"threads": _THREADS}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("logged", storage.dataset(files, schema.LOGGED_EVENTS.arrow))
        yield connection


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _last_day(as_of: datetime) -> Any:
    """The last day that can hold an event before `as_of`."""
    return (as_of - timedelta(microseconds=1)).date()
