"""The state at the end of a day, from which the next day's snapshots follow: running sums of every subject.

state/<subject>/dt=D.parquet    kept of the last days and of the first of each month; a correction of an older day starts there

A state is known to be of the events as they are: whoever changes a day first forgets every state from it on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from limaml import schema
from limaml.config import FeatureConfig
from limaml.events.catalogue import Kind
from limaml.events.day_store import partition_day
from limaml.io.storage import Storage

_KEPT_DAYS = 8
_DAY_US = 86_400_000_000
_MILLIONTHS = pa.decimal128(38, 0)
"""Sums of numbers are whole millionths: they come out the same in whatever order they are added."""


@dataclass(frozen=True)
class Subject:
    """What is counted: users, items, or users by an attribute of their items."""

    name: str
    keys: tuple[str, ...]
    snapshots: schema.Table
    kind: Kind | None = None
    affinity: schema.Affinity | None = None
    maps: tuple[schema.Affinity, ...] = ()
    """Of users: what is kept of them by attributes of items, which goes online with their own row."""

    @classmethod
    def of_kind(cls, kind: Kind, maps: tuple[schema.Affinity, ...] = ()) -> Self:
        return cls(kind.name, (kind.key,), kind.snapshots, kind=kind, maps=maps)

    @classmethod
    def of_affinity(cls, affinity: schema.Affinity) -> Self:
        return cls(affinity.name, ("user_id", affinity.by), affinity.snapshots, affinity=affinity)

    @property
    def static(self) -> tuple[str, ...]:
        return self.kind.static if self.kind else ()

    @property
    def values(self) -> tuple[str, ...]:
        """What a snapshot says of its key."""
        return tuple(name for name in self.snapshots.names if name not in (*self.keys, "event_timestamp"))

    @property
    def aggregates(self) -> tuple[FeatureConfig, ...]:
        """Features of an entity that are made of its events."""
        return tuple(feature for feature in self.kind.features if feature.aggregate) if self.kind else ()

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Days of each window, ascending; 0, all time, is always there."""
        mine = self.affinity.features if self.affinity else self.aggregates
        return tuple(sorted({0, *(feature.window_days for feature in mine)}))

    @cached_property
    def leaving(self) -> tuple[int, ...]:
        """Days after an event on which it leaves a window, so that a row is due: one of a user's maps, too."""
        windows = {*self.windows, *(days for affinity in self.maps for days in affinity.windows)}
        return tuple(sorted(windows - {0}))

    @cached_property
    def lapses(self) -> tuple[int, ...]:
        """Days after a key's last event on which an aggregate is past its retention, so that a row is due."""
        return tuple(sorted({feature.retention_days for feature in self.aggregates if feature.retention_days}))

    @cached_property
    def sums(self) -> dict[str, str]:
        """Sum -> SQL of a day's: events, positive ones, and of each number that there is a mean of its total and its count."""
        numbers = dict.fromkeys(feature.of for feature in self.aggregates if feature.of)
        found = {"n": "count(*)", "p": "sum(label)::BIGINT"}
        for number in numbers:
            found[f"{number}_sum"] = f"sum(round({number} * 1000000)::DECIMAL(38, 0))"
            found[f"{number}_count"] = f"count({number})"
        return found

    def sql_type(self, name: str) -> str:
        return "DECIMAL(38, 0)" if name.endswith("_sum") else "BIGINT"

    @cached_property
    def state(self) -> pa.Schema:
        """A key's sums: day of its last change, catalogue columns, sums of all time and of windows, and its event days."""
        fields = [pa.field(key, pa.string()) for key in self.keys] + [pa.field("day", pa.int64())]
        sums = [
            pa.field(f"{name}{days}", _MILLIONTHS if name.endswith("_sum") else pa.int64())
            for name in self.sums
            for days in self.windows
        ]
        static = [self.snapshots.arrow.field(name) for name in self.static]
        # since: day of the first event since the key was last dropped; no event before it counts.
        days = [pa.field(name, pa.int64()) for name in ("last_day", "last_positive_day", "since")]
        return pa.schema([*fields, *sums, *days, *static])

    @cached_property
    def changes(self) -> pa.Schema:
        """A state's row, and whether the key was dropped."""
        return self.state.append(pa.field("dropped", pa.bool_()))

    @cached_property
    def projection(self) -> str:
        """SQL: a snapshot's row of a changed state."""
        values = [self._aggregate(feature) for feature in self.aggregates]
        if self.affinity:
            last = {self.affinity.last_day(positive=positive): _last_day(positive) for positive in (False, True)}
            counts = {name: column for name, column in last.items() if name in self.values}
            for days in self.affinity.windows:
                counts |= {self.affinity.events(days): f"n{days}", self.affinity.positives(days): f"p{days}"}
            values = [f"CASE WHEN NOT dropped THEN {column} END AS {name}" for name, column in counts.items()]
        stamp = f"make_timestamptz((day + 1) * {_DAY_US}) AS event_timestamp"
        return ", ".join([stamp, *self.keys, *self.static, *values])

    def snapshot_rows(self, relation: Any) -> pa.Table:
        """A relation of `projection` as the table of snapshots."""
        rows = relation.to_arrow_table()
        return rows.select(self.snapshots.names).cast(self.snapshots.arrow).combine_chunks()

    def _aggregate(self, feature: FeatureConfig) -> str:
        n, p = (f"{name}{feature.window_days}" for name in "np")
        if feature.aggregate == "count":
            value = n
        elif feature.aggregate == "rate":
            value = f"(({p} + {feature.prior * feature.prior_rows!r}) / ({n} + {feature.prior_rows!r}))::FLOAT"
        elif feature.aggregate == "mean":
            total, count = (f"{feature.of}_{part}{feature.window_days}" for part in ("sum", "count"))
            value = f"({total}::DOUBLE / 1000000 / nullif({count}, 0))::FLOAT"
        else:
            value = _last_day(feature.positive)
        if feature.retention_days:
            value = f"CASE WHEN last_day IS NULL OR day - last_day < {feature.retention_days} THEN {value} END"
        return f"{value} AS {feature.name}"


def _last_day(positive: bool) -> str:
    """A state's column."""
    return "last_positive_day" if positive else "last_day"


def newest_before(storage: Storage, subjects: Iterable[Subject], day: date) -> tuple[date | None, dict[str, pa.Table]]:
    """The newest day before `day` whose state is kept of every subject, and those states; none, and empty ones, without any."""
    subjects = list(subjects)
    kept = [{partition_day(name) for name in storage.list(_folder(subject))} for subject in subjects]
    days = [one for one in set.intersection(*kept) if one < day]
    if not days:
        return None, {subject.name: subject.state.empty_table() for subject in subjects}
    newest = max(days)
    return newest, {subject.name: storage.read_table(_path(subject, newest)).cast(subject.state) for subject in subjects}


def read(storage: Storage, subject: Subject, day: date) -> pa.Table | None:
    """A subject's state at the end of `day`, None if it is not kept."""
    path = _path(subject, day)
    return storage.read_table(path).cast(subject.state) if storage.exists(path) else None


def keep(storage: Storage, subject: Subject, day: date, table: pa.Table) -> None:
    """Keep a subject's state at the end of `day`, and let go of those that are neither new nor a month's first."""
    storage.write_table(_path(subject, day), table)
    days = sorted(partition_day(name) for name in storage.list(_folder(subject)))
    for old in days[:-_KEPT_DAYS]:
        if old.day != 1:
            storage.delete(_path(subject, old))


def forget(storage: Storage, first: date) -> None:
    """Let go of every state from the end of `first` on."""
    for name in storage.list("state"):
        for file in storage.list(f"state/{name}"):
            if partition_day(file) >= first:
                storage.delete(f"state/{name}/{file}")


def drop(storage: Storage, subject: str, through: date) -> int:
    """Let go of a subject's states up to a day, but for the newest that there is; returns how many."""
    past = [file for file in storage.list(f"state/{subject}")[:-1] if partition_day(file) <= through]
    for file in past:
        storage.delete(f"state/{subject}/{file}")
    return len(past)


def _folder(subject: Subject) -> str:
    return f"state/{subject.name}"


def _path(subject: Subject, day: date) -> str:
    return f"{_folder(subject)}/dt={day.isoformat()}.parquet"
