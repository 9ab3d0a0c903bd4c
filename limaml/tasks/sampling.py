"""Tasks cut out of logged rows: support before an as-of instant, query from it on.

Events with equal timestamps are never split: support is every event < a (its last N), query is drawn from events >= a, and
< a + `meta.horizon_days` where a horizon is set.
Everything random is drawn from one generator for the whole meta-batch, so that neither the number of workers nor which of
them builds a task changes what is trained on.

    T tasks, R rows (S support, Q query), F features
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from limaml.config import Config, TaskKindConfig
from limaml.errors import DataError
from limaml.features.columns import UNKNOWN, Indices
from limaml.features.encoder import EncodedRows, Encoder, timestamps_us
from limaml.tasks.rows import Rows, TaskBatch

MICROSECONDS_PER_DAY = 86_400_000_000
_NO_ROWS: Indices = np.zeros(0, np.int64)
_PASS_ROWS = 1500
"""What one more pass costs, in rows of a large pass: T = 1 to T = 256 of the benchmark's networks (docs/performance.md)."""


@dataclass(frozen=True)
class TaskRows:
    """Encoded rows of all entities of one kind, sorted by (entity, timestamp, event id)."""

    encoded: EncodedRows
    label: npt.NDArray[np.float32]
    timestamp_us: Indices
    source_row: Indices
    """(R,) row of the logged table that each row came from."""
    entities: tuple[str, ...]
    offsets: Indices
    """(E + 1,) rows of entity e are offsets[e] to offsets[e + 1]."""
    entity_index: Indices
    """(E,) index into the encoder's entity vocabulary."""

    @classmethod
    def from_logged(cls, logged: pa.Table, encoder: Encoder, kind: TaskKindConfig) -> Self:
        """Encode and sort logged events (in any order)."""
        ids = logged[kind.entity_column].combine_chunks().dictionary_encode()
        names = np.array(ids.dictionary.to_pylist(), dtype=object)
        rank = np.argsort(np.argsort(names, kind="stable"), kind="stable")
        entity = rank[ids.indices.to_numpy(zero_copy_only=False)] if len(names) else _NO_ROWS
        event = logged["event_id"].combine_chunks().dictionary_encode()
        event_rank = np.argsort(np.argsort(np.array(event.dictionary.to_pylist(), dtype=object), kind="stable"))
        time_us = timestamps_us(logged)
        order = np.lexsort((event_rank[event.indices.to_numpy(zero_copy_only=False)], time_us, entity))
        return cls(
            encoded=encoder.encode_ordered(logged, order),
            label=logged["label"].to_numpy().astype(np.float32)[order],
            timestamp_us=time_us[order],
            source_row=order,
            entities=tuple(sorted(names.tolist())),
            offsets=np.searchsorted(entity[order], np.arange(len(names) + 1)),
            entity_index=encoder.entity_index(sorted(names.tolist())),
        )

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    def position(self, entity: str) -> int | None:
        """Where `entity` stands in `entities`, None if it has no row."""
        at = int(np.searchsorted(np.array(self.entities, dtype=object), entity)) if self.entities else 0
        return at if at < len(self.entities) and self.entities[at] == entity else None

    def first_row_at(self, entity: int, instant_us: int) -> int:
        """Row number of the entity's first event >= the instant (its end if there is none)."""
        start, stop = int(self.offsets[entity]), int(self.offsets[entity + 1])
        return start + int(np.searchsorted(self.timestamp_us[start:stop], instant_us, side="left"))


@dataclass(frozen=True)
class TaskSpec:
    """One task as row numbers of a TaskRows; `support_start` to `support_stop` is its support."""

    entity: int
    as_of_us: int
    support_start: int
    support_stop: int
    query: Indices = field(default_factory=lambda: _NO_ROWS)
    hide_profile: bool = False
    hide_entity: bool = False
    hide_items: Indices = field(default_factory=lambda: _NO_ROWS)
    """Rows whose item is replaced by the unknown one."""

    @property
    def support_size(self) -> int:
        return self.support_stop - self.support_start


def microseconds(instant: datetime) -> int:
    """Microseconds since 1970 of an aware instant, exactly."""
    if instant.tzinfo is None:
        raise DataError(f"an as-of instant must carry a time zone, got {instant!r}; use schema.day_end(day)")
    return int(pa.scalar(instant, pa.timestamp("us", tz="UTC")).value)


def support_spec(rows: TaskRows, entity: int, as_of: datetime | int, support_rows: int) -> TaskSpec:
    """The task whose support is the entity's last `support_rows` events before `as_of` (a datetime, or microseconds).

    It has no query: this is what adaptation runs on.
    """
    as_of_us = as_of if isinstance(as_of, int) else microseconds(as_of)
    stop = rows.first_row_at(entity, as_of_us)
    return TaskSpec(entity, as_of_us, max(int(rows.offsets[entity]), stop - support_rows), stop)


def meta_batch(rows: TaskRows, cfg: Config, *, seed: int, step: int) -> list[TaskSpec]:
    """The whole meta-batch of one outer step: a pure function of (rows, cfg, seed, step); each worker takes its slice."""
    return sample_tasks(rows, cfg, np.random.default_rng((seed, step)), cfg.training.tasks_per_step)


def sample_tasks(rows: TaskRows, cfg: Config, rng: np.random.Generator, num_tasks: int) -> list[TaskSpec]:
    """Draw training tasks, entities uniformly. Raises DataError if there is no entity to draw."""
    if not rows.num_entities:
        raise DataError("training tasks must be drawn from at least one entity, got rows of none; ingest more days")
    return [_sample_task(rows, cfg, rng, int(rng.integers(rows.num_entities))) for _ in range(num_tasks)]


def _sample_task(rows: TaskRows, cfg: Config, rng: np.random.Generator, entity: int) -> TaskSpec:
    as_of_us = _sample_instant(rows, cfg, rng, entity)
    spec = support_spec(rows, entity, as_of_us, cfg.meta.support_rows)
    later = np.arange(spec.support_stop, _query_stop(rows, cfg, entity, as_of_us))
    query = np.sort(rng.permutation(later)[: cfg.meta.query_rows])
    used = np.concatenate([np.arange(spec.support_start, spec.support_stop), query])
    return TaskSpec(
        entity,
        as_of_us,
        spec.support_start,
        spec.support_stop,
        query,
        hide_profile=bool(rng.random() < cfg.model.profile_dropout),
        hide_entity=bool(rng.random() < cfg.model.unknown_entity_share),
        hide_items=used[rng.random(len(used)) < cfg.model.unknown_item_share],
    )


def _query_stop(rows: TaskRows, cfg: Config, entity: int, as_of_us: int) -> int:
    """Row number behind the last row that a task as of the instant may be asked about."""
    if not cfg.meta.horizon_days:
        return int(rows.offsets[entity + 1])
    return rows.first_row_at(entity, as_of_us + cfg.meta.horizon_days * MICROSECONDS_PER_DAY)


def _sample_instant(rows: TaskRows, cfg: Config, rng: np.random.Generator, entity: int) -> int:
    """An as-of instant with at least one event within the horizon after it.

    The first event (empty support), the start of a day with events on it and before it, or the time of an event drawn uniformly
    among those after the first instant. An entity whose history does not allow what was drawn gets the first event. So an event
    follows within a day, the shortest horizon, whatever the horizon is, and the draw of instants does not depend on it.
    """
    times = rows.timestamp_us[rows.offsets[entity] : rows.offsets[entity + 1]]
    first = int(times[0])
    kind, position = rng.random(), rng.random()
    if kind < cfg.meta.zero_support_probability:
        return first
    if kind < cfg.meta.zero_support_probability + cfg.meta.day_boundary_probability:
        days = np.unique(times // MICROSECONDS_PER_DAY)[1:]
        return int(days[int(position * len(days))]) * MICROSECONDS_PER_DAY if len(days) else first
    inside = times[times > first]
    if rng.random() < cfg.meta.early_probability:
        inside = inside[: cfg.meta.early_rows]
    return int(inside[int(position * len(inside))]) if len(inside) else first


def by_length(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """The specs in order of their support's and query's rows."""
    return sorted(specs, key=lambda spec: (spec.support_size, len(spec.query)))


def length_groups(specs: Sequence[TaskSpec]) -> list[list[TaskSpec]]:
    """Specs in order of length, divided into runs that are cheapest to pad, each to its own longest support and query.

    The cost of a run is its padded rows and `_PASS_ROWS`; the division is the best one (dynamic programming over its last run).
    Gradients are summed over the runs of one meta-batch, so how it is divided changes no task's weight.
    """
    ordered = by_length(specs)
    support, query = np.array([(spec.support_size, len(spec.query)) for spec in ordered], np.int64).reshape(-1, 2).T
    cost, starts = np.zeros(len(ordered) + 1), np.zeros(len(ordered) + 1, np.int64)
    for stop in range(1, len(ordered) + 1):
        widest_query = np.maximum.accumulate(query[stop - 1 :: -1] if stop > 1 else query[:1])[::-1]
        padded = np.arange(stop, 0, -1) * (support[stop - 1] + widest_query)
        total = cost[:stop] + padded + _PASS_ROWS
        starts[stop] = int(np.argmin(total))
        cost[stop] = total[starts[stop]]
    groups, stop = [], len(ordered)
    while stop:
        groups.append(ordered[starts[stop] : stop])
        stop = int(starts[stop])
    return groups[::-1]


def build_batch(rows: TaskRows, specs: Sequence[TaskSpec]) -> TaskBatch:
    """Gather the specs' rows into padded tensors, as wide as the longest support and the longest query (at least 1)."""
    support = [np.arange(spec.support_start, spec.support_stop) for spec in specs]
    entity = np.array([spec.entity for spec in specs], np.int64)
    hidden = np.array([spec.hide_entity for spec in specs], np.bool_)
    return TaskBatch(
        support=_gather(rows, specs, support),
        query=_gather(rows, specs, [spec.query for spec in specs]),
        entity_index_T=torch.from_numpy(np.where(hidden, UNKNOWN, rows.entity_index[entity])),
        entities=tuple(rows.entities[spec.entity] for spec in specs),
    )


def _gather(rows: TaskRows, specs: Sequence[TaskSpec], chosen: Sequence[Indices]) -> Rows:
    width = max(1, *(len(each) for each in chosen)) if chosen else 1
    at = np.zeros((len(specs), width), np.int64)
    mask = np.zeros((len(specs), width), np.float32)
    for task, each in enumerate(chosen):
        at[task, : len(each)] = each
        mask[task, : len(each)] = 1.0
    gathered = Rows.gather(rows, at, mask, np.array([spec.as_of_us for spec in specs], np.int64))
    hidden = np.array([spec.hide_profile for spec in specs], np.bool_)
    gathered.user_dense_TRF[torch.from_numpy(hidden)] = 0.0
    for task, spec in enumerate(specs):
        if len(spec.hide_items):
            gathered.item_index_TR[task, torch.from_numpy(np.isin(at[task], spec.hide_items))] = UNKNOWN
    return gathered
