"""The rows of a second kind's entities, found in the rows of the first kind: an index of them, no copy.

Where users are the first kind, an item's support is the last rows of all users with it before an instant.

    R rows, E entities, U tasks (an entity as of an instant), T tasks of the first kind, Q query rows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from limaml.features.columns import Indices
from limaml.tasks.rows import OtherTasks, Rows, SourceRows

NOBODY = -1
"""In place of an entity: the row is scored with the kind's prior."""


@dataclass(frozen=True)
class OtherEntities:
    """Rows of a table by the entities of one of its columns."""

    support_rows: int
    """N: support is the entity's last N events before the as-of instant."""
    entities: tuple[str, ...]
    entity_index: Indices
    """(E,) index into the encoder's vocabulary."""
    offsets: Indices
    """(E + 1,) entity e's places in `row` are offsets[e] to offsets[e + 1]."""
    row: Indices
    """(R,) rows of the table, sorted by (entity, timestamp, event id)."""
    entity: Indices
    """(R,) entity of each row of the table."""
    timestamp_us: Indices
    """(R,) of each row of the table."""

    @classmethod
    def sorted_by(
        cls, names: Sequence[str], entity: Indices, timestamp_us: Indices, event: Indices, entity_index: Indices, num_rows: int
    ) -> Self:
        """Of rows with these entities, instants and ranks of event ids; `num_rows`: N."""
        row = np.lexsort((event, timestamp_us, entity))
        offsets = np.searchsorted(entity[row], np.arange(len(names) + 1))
        return cls(num_rows, tuple(names), entity_index, offsets, row, entity, timestamp_us)

    def supports(self, entity_U: Indices, as_of_us_U: Indices) -> tuple[Indices, Indices]:
        """Places in `row`, first and end, of the last N events of each entity before its instant."""
        before_U = entity_U * self._num_instants + np.searchsorted(self._instants, as_of_us_U, side="left")
        stop_U = np.searchsorted(self._keys, before_U, side="left")
        return np.maximum(self.offsets[entity_U], stop_U - self.support_rows), stop_U

    def gather(self, source: SourceRows, entity_U: Indices, as_of_us_U: Indices) -> Rows:
        """Supports as U tasks, padded; `source` is the table that `row` numbers."""
        first_U, stop_U = self.supports(entity_U, as_of_us_U)
        size_U = stop_U - first_U
        step = np.arange(max(1, int(size_U.max(initial=1))))
        mask = step < size_U[:, None]
        at = self.row[np.where(mask, first_U[:, None] + step, 0)] if len(self.row) else np.zeros(mask.shape, np.int64)
        return Rows.gather(source, at, mask.astype(np.float32), as_of_us_U)

    def tasks(self, source: SourceRows, entity_TQ: Indices, as_of_us_T: Indices) -> OtherTasks | None:
        """What query rows with these entities (`NOBODY`: the prior, or padding) need; None if they need none."""
        wanted = entity_TQ != NOBODY
        if not wanted.any():
            return None
        entity_U, as_of_us_U, at = distinct_tasks(entity_TQ[wanted], np.broadcast_to(as_of_us_T[:, None], wanted.shape)[wanted])
        task_TQ = np.zeros(wanted.shape, np.int64)
        task_TQ[wanted] = at + 1
        return OtherTasks(
            support=self.gather(source, entity_U, as_of_us_U),
            entity_index_U=torch.from_numpy(self.entity_index[entity_U]),
            task_TQ=torch.from_numpy(task_TQ),
        )

    # An entity's events before an instant by one search: a key is the entity and the rank of the instant.

    @cached_property
    def _instants(self) -> Indices:
        found: Indices = np.unique(self.timestamp_us)
        return found

    @property
    def _num_instants(self) -> int:
        return len(self._instants) + 1

    @cached_property
    def _keys(self) -> Indices:
        rank = np.searchsorted(self._instants, self.timestamp_us[self.row])
        keys: Indices = self.entity[self.row] * self._num_instants + rank
        return keys


def distinct_tasks(entity: Indices, as_of_us: Indices) -> tuple[Indices, Indices, npt.NDArray[np.int64]]:
    """Entity and instant of each distinct pair, in order of both, and which of them each given pair is."""
    pairs, at = np.unique(np.stack([entity, as_of_us], axis=1), axis=0, return_inverse=True)
    return pairs[:, 0], pairs[:, 1], at.reshape(-1)
