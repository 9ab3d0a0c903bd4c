"""Supports of many entities out of a stream of logged rows that is sorted by (entity, timestamp, event id).

The vectorised form of `tasks.TaskRows.from_logged`, `support_spec` and `build_batch` for adaptation: nothing is sorted, and
no Python object is made for a row or an entity.

    T tasks (one an entity), S support rows, E entities, R rows
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from limaml.errors import DataError
from limaml.features.columns import UNKNOWN, Floats, Indices
from limaml.features.derived import timestamps_us
from limaml.features.encoder import EncodedRows, Encoder
from limaml.tasks.rows import Rows

MAX_TASKS = 256
"""Tasks that are adapted at once, and the rows they may hold. 16 rows a task, reference network, one core: 32 us a task with 64
of them, 25 with 128, 20 with 256, 21 with 512, and 41 with 1024, whose activations do not fit the cache."""
MAX_ROWS = 8192


def cut_by_entity(batches: Iterable[pa.RecordBatch], column: str, num_entities: int) -> Iterator[pa.Table]:
    """Tables of `num_entities` whole entities (the last may have fewer), wherever the sorted batches are cut.

    Raises DataError if the entities are not in ascending order.
    """
    pending: list[pa.RecordBatch] = []
    seen, last = 0, None
    for batch in batches:
        if not batch.num_rows:
            continue
        keys = _plain(batch[column])
        starts = _starts(keys, last)
        _require_ascending(keys.take(pa.array(starts)), last, column)
        position = 0
        for cut in starts[-seen % num_entities :: num_entities].tolist():
            pending.append(batch.slice(position, cut - position))
            if any(part.num_rows for part in pending):
                yield pa.Table.from_batches(pending)
            pending, position = [], cut
        pending.append(batch.slice(position))
        seen, last = seen + len(starts), keys[-1].as_py()
    if pending:
        yield pa.Table.from_batches(pending)


@dataclass(frozen=True)
class Supports:
    """Support rows of E entities, end to end and encoded; an entity without any is there too."""

    encoded: EncodedRows
    label: Floats
    timestamp_us: Indices
    entities: pa.Array
    """(E,) strings, ascending."""
    entity_index: Indices
    """(E,) index into the encoder's entity vocabulary."""
    first: Indices
    """(E,) an entity's rows are first to first + size; S rows at most, the last ones before the as-of instant."""
    size: Indices
    as_of_us: int

    @classmethod
    def from_sorted(cls, logged: pa.Table, encoder: Encoder, column: str, as_of_us: int, support_rows: int) -> Self:
        """Whole entities' rows, sorted. A row without a timestamp stands for an entity that has no event.

        Raises DataError if an entity's rows are not in the order of time.
        """
        rows = logged.combine_chunks().to_batches()[0]
        keys = _plain(rows[column])
        starts = _starts(keys, None)
        entities = keys.take(pa.array(starts))
        time_us = timestamps_us(rows, missing=as_of_us)
        _require_in_time(time_us, starts, entities)
        stop = starts + np.add.reduceat((time_us < as_of_us).astype(np.int64), starts)
        first = np.maximum(starts, stop - support_rows)
        size = stop - first
        if size.sum() < len(time_us):
            rows = rows.take(pa.array(_ranges(first, size)))
            time_us, first = timestamps_us(rows), np.cumsum(size) - size
        return cls(
            encoded=encoder.encode_table(rows),
            label=rows["label"].to_numpy().astype(np.float32),
            timestamp_us=time_us,
            entities=entities,
            entity_index=encoder.entity_index(entities, column),
            first=first,
            size=size,
            as_of_us=as_of_us,
        )

    @property
    def last_event_us(self) -> pa.Array:
        """(E,) time of each entity's last support row, null if it has none."""
        last = self.timestamp_us.take(self.first + self.size - 1, mode="clip") if len(self.timestamp_us) else self.first
        return pa.array(last, mask=self.size == 0)

    def calls(self) -> Iterator[tuple[Indices, Rows, Tensor]]:
        """(numbers of at most T entities, their rows, index of their entities), entities of one width at a time.

        A width is the least power of two that holds an entity's rows, and T and S follow from it alone: missing tasks are
        empty ones at the end. So an entity's embedding comes out of the same sums whoever shares its batch (contract 5).
        """
        width = np.where(self.size > 0, 1 << np.ceil(np.log2(np.maximum(self.size, 1))).astype(np.int64), 0)
        for num_rows in np.unique(width[width > 0]).tolist():
            chosen = np.flatnonzero(width == num_rows)
            num_tasks = min(MAX_TASKS, max(1, MAX_ROWS // num_rows))
            for start in range(0, len(chosen), num_tasks):
                tasks = chosen[start : start + num_tasks]
                entity_index = np.full(num_tasks, UNKNOWN, np.int64)
                entity_index[: len(tasks)] = self.entity_index[tasks]
                yield tasks, self._rows(tasks, num_tasks, num_rows), torch.from_numpy(entity_index)

    def _rows(self, tasks: Indices, num_tasks: int, num_rows: int) -> Rows:
        first, size = self.first[tasks], self.size[tasks]
        if len(tasks) == num_tasks and size.sum() == num_tasks * num_rows == first[-1] - first[0] + num_rows:
            return Rows.consecutive(self, int(first[0]), num_tasks, num_rows, self.as_of_us)
        step, missing = np.arange(num_rows), num_tasks - len(tasks)
        mask = np.pad(step < size[:, None], ((0, missing), (0, 0)))
        at = np.where(mask, np.pad(first, (0, missing))[:, None] + step, 0)
        return Rows.gather(self, at, mask.astype(np.float32), np.full(num_tasks, self.as_of_us))


def _plain(keys: pa.Array) -> pa.Array:
    return keys.cast(pa.string()) if pa.types.is_dictionary(keys.type) else keys


def _starts(keys: pa.Array, before: str | None) -> Indices:
    """Row numbers at which another entity begins than the one `before` them."""
    changes = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy(zero_copy_only=False)
    return np.flatnonzero(np.concatenate([[keys[0].as_py() != before], changes]))


def _ranges(first: Indices, size: Indices) -> Indices:
    """first[0], first[0] + 1, … (size[0] of them), first[1], …"""
    return np.repeat(first - (np.cumsum(size) - size), size) + np.arange(size.sum())


def _require_ascending(entities: pa.Array, before: str | None, column: str) -> None:
    if before is not None:
        entities = pa.concat_arrays([pa.array([before], entities.type), entities])
    ascending = pc.less(entities.slice(0, max(len(entities) - 1, 0)), entities.slice(1)).to_numpy(zero_copy_only=False)
    if not ascending.all():
        at = int(np.argmin(ascending))
        raise DataError(
            f"rows to be adapted must be sorted by {column}, got {entities[at + 1]} after {entities[at]}; sort them by "
            f"({column}, timestamp, event_id)"
        )


def _require_in_time(time_us: Indices, starts: Indices, entities: pa.Array) -> None:
    steps = np.diff(time_us, prepend=time_us[:1])
    steps[starts] = 0
    if (steps < 0).any():
        at = int(np.searchsorted(starts, int(np.argmin(steps)), side="right")) - 1
        raise DataError(
            f"rows to be adapted must be sorted by time within an entity, those of {entities[at]} are not; sort them by "
            "(entity, timestamp, event_id)"
        )
