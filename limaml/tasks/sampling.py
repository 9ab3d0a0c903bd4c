"""Tasks cut out of logged rows: support before an as-of instant, query from it on.

Events with equal timestamps are never split: support is every event < a (its last N), query is drawn from events >= a, and
< a + `meta.horizon_days` where a horizon is set.
Everything random is drawn from one generator for the whole meta-batch, so that neither the number of workers nor which of
them builds a task changes what is trained on.

    T tasks, R rows (S support, Q query), F features
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from limaml.config import Config, TaskKindConfig
from limaml.errors import DataError
from limaml.features.columns import UNKNOWN, Indices
from limaml.features.derived import timestamps_us
from limaml.features.encoder import EncodedRows, Encoder
from limaml.schema import tables
from limaml.tasks.new_items import without_history
from limaml.tasks.other_entities import NOBODY, OtherEntities, distinct_tasks
from limaml.tasks.rows import OtherTasks, Rows, TaskBatch

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
    others: Mapping[str, OtherEntities] = field(default_factory=dict)
    """By kind, those behind the first: their entities in these rows."""
    as_new: EncodedRows | None = None
    """The same rows, each with its item as one that nobody has touched; of training rows where `model.hidden_item_share` asks
    for it."""

    @classmethod
    def of(cls, logged: pa.Table, encoder: Encoder, cfg: Config, *, to_train: bool = False) -> Self:
        """`from_logged` for the first kind, and the rows of the other kinds' entities among them; `to_train`: with what
        training tasks are drawn from beside the rows.
        """
        rows = cls.from_logged(logged, encoder, cfg.task_kind)
        others = {kind.name: rows._entities_of(logged, encoder, kind, cfg) for kind in cfg.task_kinds[1:]}
        rows = replace(rows, others=others) if others else rows
        if not (to_train and cfg.model.hidden_item_share):
            return rows
        as_new = encoder.encode_ordered(without_history(logged, tables(cfg.features)), rows.source_row)
        return replace(rows, as_new=replace(as_new, item_index=np.full(len(as_new), UNKNOWN)))

    def _entities_of(self, logged: pa.Table, encoder: Encoder, kind: TaskKindConfig, cfg: Config) -> OtherEntities:
        names, entity = _ranked(logged[kind.entity_column])
        _, event = _ranked(logged["event_id"])
        at = self.source_row
        index = encoder.entity_index(names, kind.entity_column)
        num_rows = cfg.support_rows_of(kind.name)
        return OtherEntities.sorted_by(names, entity[at], self.timestamp_us, event[at], index, num_rows)

    @classmethod
    def from_logged(cls, logged: pa.Table, encoder: Encoder, kind: TaskKindConfig) -> Self:
        """Encode and sort logged events (in any order)."""
        names, entity = _ranked(logged[kind.entity_column])
        _, event = _ranked(logged["event_id"])
        time_us = timestamps_us(logged)
        order = np.lexsort((event, time_us, entity))
        return cls(
            encoded=encoder.encode_ordered(logged, order),
            label=logged["label"].to_numpy().astype(np.float32)[order],
            timestamp_us=time_us[order],
            source_row=order,
            entities=tuple(names),
            offsets=np.searchsorted(entity[order], np.arange(len(names) + 1)),
            entity_index=encoder.entity_index(names, kind.entity_column),
        )

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    @property
    def drops_vectors(self) -> bool:
        """Whether training drops numbers of declared vectors."""
        return self.encoded.item_table is not None and self.encoded.item_table.dropout_V is not None

    def entities_between(self, start_us: int, end_us: int | None) -> Indices:
        """Those with a row at or after the start and, where there is one, before the end."""
        inside = self.timestamp_us >= start_us
        if end_us is not None:
            inside &= self.timestamp_us < end_us
        entity = np.searchsorted(self.offsets, np.flatnonzero(inside), side="right") - 1
        found: Indices = np.unique(entity)
        return found

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
    hide_history: Indices = field(default_factory=lambda: _NO_ROWS)
    """Rows whose item is replaced by what it was before anybody touched it (`TaskRows.as_new`)."""
    vector_seed: int | None = None
    """Of the numbers that its rows' vectors lose (`dropout` of a feature); None: they lose none."""
    others: Mapping[str, Indices] = field(default_factory=dict)
    """By kind, those behind the first: each query row's entity, whose embedding as of the same instant it is scored with;
    `NOBODY` and kinds that are not here: the prior."""

    @property
    def support_size(self) -> int:
        return self.support_stop - self.support_start


def _ranked(column: pa.ChunkedArray) -> tuple[list[str], Indices]:
    """The distinct strings in order, and each row's place among them; `NOBODY` where it has none."""
    coded = column.combine_chunks().dictionary_encode()
    names = np.array(coded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(names, kind="stable")
    rank = np.argsort(order, kind="stable")
    return names[order].tolist(), np.append(rank, NOBODY)[coded.indices.fill_null(-1).to_numpy()]


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
    """Draw training tasks, entities uniformly. Raises DataError if there is no entity to draw.

    With several kinds: entities uniformly among those that come within the horizon of one of `meta.instants_per_step` instants,
    with the other kinds' entities of their query rows.
    """
    if not rows.num_entities:
        raise DataError("training tasks must be drawn from at least one entity, got rows of none; ingest more days")
    if rows.others:
        return _with_others(rows, cfg, rng, _by_instant(rows, cfg, rng, num_tasks))
    return [_sample_task(rows, cfg, rng, int(rng.integers(rows.num_entities))) for _ in range(num_tasks)]


def _sample_task(rows: TaskRows, cfg: Config, rng: np.random.Generator, entity: int, as_of_us: int | None = None) -> TaskSpec:
    """A task as of the instant or, without one, of an instant that is drawn from its entity's history."""
    as_of_us = _sample_instant(rows, cfg, rng, entity) if as_of_us is None else as_of_us
    spec = support_spec(rows, entity, as_of_us, cfg.support_rows_of(cfg.task_kind.name))
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
        # Without the setting nothing is drawn, so that the rest of the draw stays what it was.
        hide_history=used[rng.random(len(used)) < share] if (share := cfg.model.hidden_item_share) else _NO_ROWS,
        vector_seed=int(rng.integers(2**63)) if rows.drops_vectors else None,
    )


def _by_instant(rows: TaskRows, cfg: Config, rng: np.random.Generator, num_tasks: int) -> list[TaskSpec]:
    """Tasks of a few instants: each is drawn from the history of its first task's entity, as a task of one kind is.

    The other tasks' entities come within the horizon after it; those that come for the first time have no support, and of the
    rest `meta.zero_support_probability` lose theirs, since their instant was not drawn for them.
    """
    specs: list[TaskSpec] = []
    num_instants = min(cfg.meta.instants_per_step, num_tasks)
    horizon_us = cfg.meta.horizon_days * MICROSECONDS_PER_DAY
    for number in range(num_instants):
        first = _sample_task(rows, cfg, rng, int(rng.integers(rows.num_entities)))
        specs.append(first)
        size = len(range(number, num_tasks, num_instants)) - 1
        if not size:
            continue
        coming = rows.entities_between(first.as_of_us, first.as_of_us + horizon_us if horizon_us else None)
        for entity in rng.choice(coming, size, replace=len(coming) < size):
            spec = _sample_task(rows, cfg, rng, int(entity), first.as_of_us)
            hide = rng.random() < cfg.meta.zero_support_probability
            specs.append(replace(spec, support_start=spec.support_stop) if hide else spec)
    return specs


def _with_others(rows: TaskRows, cfg: Config, rng: np.random.Generator, specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """The specs with the other kinds' entities of their query rows, as many as a batch may hold.

    One without earlier rows has the prior, as in the online store, and so have `meta.zero_support_probability` of the others.
    """
    sizes = [len(spec.query) for spec in specs]
    query = np.concatenate([spec.query for spec in specs])
    as_of_us = np.repeat(np.array([spec.as_of_us for spec in specs], np.int64), sizes)
    hidden = np.concatenate([np.isin(spec.query, spec.hide_history) for spec in specs])
    items = {kind.name for kind in cfg.task_kinds if kind.entity_column == "item_id"}
    found: dict[str, list[Indices]] = {}
    for kind, other in rows.others.items():
        entity = np.where(hidden & (kind in items), NOBODY, other.entity[query])
        entity_U, as_of_us_U, at = distinct_tasks(entity, as_of_us)
        first_U, stop_U = other.supports(entity_U, as_of_us_U)
        adapted = np.flatnonzero((stop_U > first_U) & (rng.random(len(entity_U)) >= cfg.meta.zero_support_probability))
        kept_U = np.zeros(len(entity_U), np.bool_)
        kept_U[rng.permutation(adapted)[: cfg.meta.max_other_tasks]] = True
        found[kind] = np.split(np.where(kept_U, entity_U, NOBODY)[at], np.cumsum(sizes)[:-1])
    return [replace(spec, others={kind: each[task] for kind, each in found.items()}) for task, spec in enumerate(specs)]


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
    seeds = [spec.vector_seed for spec in specs]
    drops = [None if seed is None else np.random.default_rng(seed) for seed in seeds]
    return TaskBatch(
        support=_gather(rows, specs, support, drops),
        query=_gather(rows, specs, [spec.query for spec in specs], drops),
        entity_index_T=torch.from_numpy(np.where(hidden, UNKNOWN, rows.entity_index[entity])),
        entities=tuple(rows.entities[spec.entity] for spec in specs),
        others={kind: tasks for kind in rows.others if (tasks := _others(rows, specs, kind)) is not None},
    )


def _others(rows: TaskRows, specs: Sequence[TaskSpec], kind: str) -> OtherTasks | None:
    """Tasks of a kind behind the first that the specs' query rows are scored with."""
    entity_TQ = np.full((len(specs), max([1, *(len(spec.query) for spec in specs)])), NOBODY)
    for task, spec in enumerate(specs):
        if kind in spec.others:
            entity_TQ[task, : len(spec.query)] = spec.others[kind]
    return rows.others[kind].tasks(rows, entity_TQ, np.array([spec.as_of_us for spec in specs], np.int64))


def _gather(
    rows: TaskRows, specs: Sequence[TaskSpec], chosen: Sequence[Indices], drops: Sequence[np.random.Generator | None]
) -> Rows:
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
        if len(spec.hide_history):
            assert rows.as_new is not None, "rows to draw training tasks from are made by TaskRows.of(..., to_train=True)"
            place = np.flatnonzero(np.isin(chosen[task], spec.hide_history))
            new = rows.as_new.take(at[task, place])
            gathered.item_index_TR[task, place] = UNKNOWN
            gathered.item_dense_TRF[task, place] = torch.from_numpy(new.item_features())
            gathered.context_TRF[task, place] = torch.from_numpy(new.context)
        if (rng := drops[task]) is not None:
            assert rows.encoded.item_table is not None, "a seed is drawn where vectors are dropped"
            rows.encoded.item_table.drop(gathered.item_dense_TRF[task, : len(chosen[task])].numpy(), rng)
    return gathered
