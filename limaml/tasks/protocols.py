"""The two protocols, as lists of tasks that every method is scored on.

*first-k*: support = a user's first k rows; the query rows are those later than the largest k's last row, the same for every k.
*as served*: one task per user and day; support = the user's last rows before that day began, query = the day's rows. That is
what a service refreshed daily would have used. Another refresh interval may take the place of the day.

The features of a row are those it was logged with: the offline point-in-time join, never the service.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows, TaskSpec, support_spec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class QueryRows:
    """What the metrics need of the query rows of a list of specs, in their order."""

    labels: Floats
    users: Ints
    """0 .. num_users - 1, users numbered in the order of their ids."""
    num_users: int
    support_sizes: Ints
    rows: Ints
    """Row number in the TaskRows."""

    def __len__(self) -> int:
        return len(self.labels)


def query_rows(rows: TaskRows, specs: Sequence[TaskSpec]) -> QueryRows:
    """Gather labels, users and support sizes of all query rows."""
    sizes = np.array([len(spec.query) for spec in specs], np.int64)
    index = np.concatenate([spec.query for spec in specs]) if specs else np.zeros(0, np.int64)
    entities, users = np.unique(np.repeat(np.array([spec.entity for spec in specs], np.int64), sizes), return_inverse=True)
    return QueryRows(
        labels=rows.label[index].astype(np.float64),
        users=users.astype(np.int64),
        num_users=len(entities),
        support_sizes=np.repeat(np.array([spec.support_size for spec in specs], np.int64), sizes),
        rows=index,
    )


def first_k(
    rows: TaskRows, users: Collection[str], ks: Sequence[int], *, min_query_rows: int, support_rows: int
) -> dict[int, list[TaskSpec]]:
    """Tasks of `users` for every k; each list has the same users and, user by user, the same query rows.

    A user's query starts at the first row later than row max(ks): rows of that row's own second are left out, so that no
    query row is as old as a support row. Users with fewer than `min_query_rows` query rows are left out.
    """
    largest = max(ks)
    tasks: dict[int, list[TaskSpec]] = {k: [] for k in ks}
    for entity in _positions(rows, users):
        start, stop = int(rows.offsets[entity]), int(rows.offsets[entity + 1])
        if stop - start <= largest:
            continue
        first_query = start if largest == 0 else rows.first_row_at(entity, int(rows.timestamp_us[start + largest - 1]) + 1)
        if stop - first_query < min_query_rows:
            continue
        as_of_us, query = int(rows.timestamp_us[first_query]), np.arange(first_query, stop)
        for k in ks:
            support_start = start + max(0, k - support_rows)
            tasks[k].append(TaskSpec(entity, as_of_us, support_start, start + k, query))
    return tasks


def as_served(
    rows: TaskRows,
    *,
    from_us: int,
    support_rows: int,
    users: Collection[str] | None = None,
    every_us: int = MICROSECONDS_PER_DAY,
) -> list[TaskSpec]:
    """One task for every user and day with rows at or after `from_us` (microseconds, UTC); all users if none are named.

    `every_us` takes the place of the day: embeddings are refreshed at its multiples since 1970; 1 is at once.
    """
    tasks = []
    for entity in range(rows.num_entities) if users is None else _positions(rows, users):
        first, stop = rows.first_row_at(entity, from_us), int(rows.offsets[entity + 1])
        if first == stop:
            continue
        periods = rows.timestamp_us[first:stop] // every_us
        starts = first + np.flatnonzero(np.r_[True, periods[1:] != periods[:-1]])
        for begin, end in zip(starts, np.r_[starts[1:], stop], strict=True):
            as_of_us = int(rows.timestamp_us[begin] // every_us) * every_us
            spec = support_spec(rows, entity, as_of_us, support_rows)
            query = np.arange(begin, end)
            tasks.append(TaskSpec(entity, as_of_us, spec.support_start, spec.support_stop, query))
    return tasks


def days_seen(rows: TaskRows, specs: Sequence[TaskSpec]) -> Ints:
    """(T,) number of days (UTC) before each spec's as-of instant on which its entity has rows, supports' limit or not."""
    days = rows.timestamp_us // MICROSECONDS_PER_DAY
    first = np.r_[True, days[1:] != days[:-1]][: len(days)]
    first[rows.offsets[:-1]] = True
    seen = np.r_[0, np.cumsum(first)]
    entities, stops = (np.array(part, np.int64) for part in ([s.entity for s in specs], [s.support_stop for s in specs]))
    found: Ints = seen[stops] - seen[rows.offsets[entities]]
    return found


def _positions(rows: TaskRows, users: Collection[str]) -> list[int]:
    wanted = set(users)
    return [position for position, entity in enumerate(rows.entities) if entity in wanted]
