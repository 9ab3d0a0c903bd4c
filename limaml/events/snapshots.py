"""Daily snapshots: what was known of users and items at the end of each day, and of users by attributes of items.

`snapshots/<subject>/dt=D/part.parquet` holds a row for everything that changed on day D, stamped with the end of D. A subject
is `user`, `item`, or an affinity: a user and one key. An entity changes with an event, with one that leaves a window (a user
also with one that leaves that of an entry), when so many days without an event end an aggregate's retention, with a catalogue
row that is new or different, and with events that a correction took away, so that what they left online is replaced. The
catalogue as first delivered is stamped with the start of the first day, that is the end of the day before it.

A day's rows follow from the state at the end of the day before and from the day's events (limaml.events.state); from wherever
one starts, they are the same, to the byte. Of an affinity the keys with the newest events stay, so many a user (of one day the
later ones in the order of text). A key that is dropped has a row of nulls, and starts anew with its next event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.events import catalogue, state
from limaml.events.catalogue import Kind
from limaml.events.day_store import partition, partition_files
from limaml.events.dropped import dropped_keys
from limaml.events.state import Subject
from limaml.io.storage import Storage, each_in_threads

_DAY_US = 86_400_000_000
_EPOCH = date(1970, 1, 1)

# steps: what each day added to a key, in one row. due: the days on which a key gets a row, some of them without a step. Running
# sums start from the base's, sums of a window from the days before the span that reach into it. A key's life ends when it is
# dropped: sums do not reach beyond it.
_QUERY = """
WITH known AS (
    FROM steps WHERE day >= $first
    UNION ALL
    SELECT steps.* FROM steps JOIN base USING ({keys}) WHERE steps.day < $first AND steps.day >= base.since
), lives AS (
    {lives}
), without_step AS (
    SELECT DISTINCT * FROM (SELECT {keys}, day, -1 AS life FROM touched{leaving}{lapsing})
    ANTI JOIN lives USING ({keys}, day, life)
    WHERE day BETWEEN $first AND $through
), due AS (
    SELECT {keys}, life, day, {sums} FROM lives WHERE day >= $first
    UNION ALL
    SELECT {keys}, life, day, {zeros} FROM without_step
), days AS (
    FROM due
    UNION ALL
    SELECT {keys}, life, day, {sums} FROM lives SEMI JOIN due USING ({keys}, life) WHERE day < $first
), running AS (
    SELECT {keys}, life, day, {running},
        max(day) FILTER (n > 0) OVER so_far AS last_event,
        max(day) FILTER (p > 0) OVER so_far AS last_positive,
        min(day) FILTER (n > 0) OVER so_far AS first_event
    FROM days WINDOW so_far AS (PARTITION BY {keys}, life ORDER BY day ROWS UNBOUNDED PRECEDING)
), counted AS (
    SELECT {running_keys}, running.day, {totals}, coalesce(last_event, base.last_day) AS last_day,
        coalesce(last_positive, base.last_positive_day) AS last_positive_day,
        coalesce(base.since, first_event) AS since{static}
    FROM running LEFT JOIN base ON {same_base} AND running.life = -1{history}
    WHERE running.day >= $first
)
SELECT *, false AS dropped FROM counted ANTI JOIN dropped USING ({keys}, day)
UNION ALL BY NAME
SELECT *, true AS dropped FROM dropped
ORDER BY day, {keys}
"""


@dataclass(frozen=True)
class Span:
    """What changed in some days on end: of each subject the state before them, and a row for every change."""

    first: date
    through: date
    before: Mapping[str, pa.Table]
    """`Subject.state` at the end of the day before."""
    changes: Mapping[str, pa.Table]
    """`Subject.state` of all that changed, and whether it was dropped, by (day, key)."""

    @property
    def num_dropped(self) -> dict[str, int]:
        """Subject -> keys dropped in these days."""
        return {name: int(pc.sum(table["dropped"]).as_py() or 0) for name, table in self.changes.items()}

    def rows(self, subject: Subject) -> pa.Table:
        """Snapshot rows: of the state before the days, in any order, then of the days, by (event_timestamp, key)."""
        with duckdb.connect() as connection:
            connection.register("before", self.before[subject.name])
            connection.register("changes", self.changes[subject.name])
            rows = "(SELECT *, false AS dropped FROM before UNION ALL BY NAME FROM changes)"
            return subject.snapshot_rows(connection.sql(f"SELECT {subject.projection} FROM {rows}"))

    def changed(self, rows: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
        """Of `rows` by subject those of the days."""
        return {name: table.slice(self.before[name].num_rows) for name, table in rows.items()}


def subjects(tables: schema.Tables) -> dict[str, Subject]:
    """Everything that has snapshots: users, items, and what is kept of users by attributes of items."""
    kinds = catalogue.kinds(tables)
    entities = [Subject.of_kind(kinds["user"], tables.affinities), Subject.of_kind(kinds["item"])]
    return {subject.name: subject for subject in (*entities, *map(Subject.of_affinity, tables.affinities))}


def has_windows(tables: schema.Tables) -> bool:
    """Whether something changes on days without an event of its own, as one leaves a window."""
    return any(subject.leaving or subject.lapses for subject in subjects(tables).values())


def write(storage: Storage, tables: schema.Tables, span: Span, rows: Mapping[str, pa.Table]) -> None:
    """Write a span's `rows`, by subject, and the state at its end; no state of a day in it may be kept (`state.forget`)."""
    for name, subject in subjects(tables).items():
        _write_days(storage, subject, rows[name])
        state.keep(storage, subject, span.through, _after(subject, span))


def advance(storage: Storage, tables: schema.Tables, first: date, through: date) -> Span:
    """Compute what changed from `first` to `through`, from the newest state that is kept of a day before them."""
    every = subjects(tables)
    start, before = state.newest_before(storage, every.values(), first)
    if start is not None and start < first - timedelta(days=1):
        gap = _advance(storage, tables, before, start + timedelta(days=1), first - timedelta(days=1))
        before = {name: _after(subject, gap) for name, subject in every.items()}
    elif start is None:
        days = [day for kind in catalogue.kinds(tables).values() if (day := catalogue.first_day(storage, kind)) is not None]
        beginning = min([*days, first])
        if beginning < first:
            gap = _advance(storage, tables, before, beginning, first - timedelta(days=1))
            before = {name: _after(subject, gap) for name, subject in every.items()}
    return _advance(storage, tables, before, first, through)


def changed(storage: Storage, kind: Kind, day: date) -> pa.Table:
    """Snapshot rows stamped with the end of `day`, sorted by entity: what publishing that day writes."""
    return _read(storage, kind, partition_files(storage, f"snapshots/{kind.name}", first=day, through=day))


def between(storage: Storage, kind: Kind, first: date, last: date) -> pa.Table:
    """All snapshot rows stamped with the ends of the days from `first` to `last`."""
    return _read(storage, kind, partition_files(storage, f"snapshots/{kind.name}", first=first, through=last))


def latest(storage: Storage, kind: Kind, through: date, entities: Sequence[str] | None = None) -> pa.Table:
    """Newest snapshot row of every entity (or of `entities`) stamped no later than the end of `through`, sorted by entity."""
    files = partition_files(storage, f"snapshots/{kind.name}", through=through)
    key = kind.key
    with duckdb.connect() as connection:
        connection.register("snapshots", storage.dataset(files, kind.snapshots.arrow))
        semi_join = ""
        if entities is not None:
            connection.register("wanted", pa.table({key: pa.array(entities, pa.string())}))
            semi_join = f"SEMI JOIN wanted USING ({key})"
        rows = connection.sql(
            f"SELECT * FROM snapshots {semi_join} QUALIFY row_number() OVER"
            f" (PARTITION BY {key} ORDER BY event_timestamp DESC) = 1 ORDER BY {key}"
        ).to_arrow_table()
    # A count is null once it is past its retention, also where that is no longer declared.
    expected = kind.snapshots.arrow
    return pa.table({field.name: rows[field.name].cast(field.type) for field in expected}, schema=expected)


def _advance(storage: Storage, tables: schema.Tables, before: Mapping[str, pa.Table], first: date, through: date) -> Span:
    every = subjects(tables).values()
    changes = {each.name: _changes(storage, tables, each, before[each.name], first, through) for each in every}
    return Span(first, through, before, changes)


def _changes(storage: Storage, tables: schema.Tables, subject: Subject, base: pa.Table, first: date, through: date) -> pa.Table:
    """`Span.changes` of one subject."""
    earliest = first - timedelta(days=max(subject.leaving, default=0))
    dates = {"first": _number(first), "through": _number(through)}
    with duckdb.connect() as connection:
        connection.register("base", base)
        for name, folder, start in (("events", "events", earliest), ("superseded", "events_superseded", first)):
            files = partition_files(storage, folder, first=start, through=through)
            connection.register(name, storage.dataset(files, tables.events.arrow))
        _prepare(connection, storage, tables, subject, dates)
        connection.register("dropped", dropped_keys(connection, subject, dates["first"]))
        rows = connection.sql(_query(subject), params=dates).to_arrow_table()
    return rows.select(subject.changes.names).cast(subject.changes)


def _prepare(connection: Any, storage: Storage, tables: schema.Tables, subject: Subject, dates: Mapping[str, int]) -> None:
    """Make `steps` of the events, and `touched` and, of entities, `history` of what else makes a row due."""
    keys = ", ".join(subject.keys)
    source, history = "events", f'(SELECT *, epoch_us("timestamp") // {_DAY_US} AS day FROM events)'
    if subject.kind is None and subject.keys[1] != "item_id":
        items = catalogue.kinds(tables)["item"]
        connection.register("items", catalogue.history(storage, items))
        history = (
            f"(SELECT events.*, items.{subject.keys[1]} FROM {history} AS events"
            f" ASOF JOIN items ON events.item_id = items.item_id AND events.day >= items.day)"
        )
    sums = ", ".join(f"{expression} AS {name}" for name, expression in subject.sums.items())
    connection.execute(
        f"CREATE TEMP TABLE steps AS SELECT {keys}, day, {sums} FROM {history} AS {source}"
        f" WHERE {subject.keys[-1]} IS NOT NULL GROUP BY ALL"
    )
    if subject.kind is None:
        connection.execute("CREATE TEMP TABLE touched AS SELECT *, 0 AS day FROM base WHERE false")
        return
    connection.register("history", catalogue.history(storage, subject.kind, since=dates["first"]))
    connection.execute(
        f"CREATE TEMP TABLE touched AS SELECT {keys}, day FROM history UNION"
        f' SELECT {keys}, epoch_us("timestamp") // {_DAY_US} AS day FROM superseded'
    )


def _query(subject: Subject) -> str:
    keys = subject.keys

    def same(left: str, right: str) -> str:
        return " AND ".join(f"{left}.{key} = {right}.{key}" for key in keys)

    running = ", ".join(
        f"coalesce(sum({name}) FILTER (day >= $first) OVER so_far, 0) AS {name}0"
        if not days
        else f"sum({name}) OVER (PARTITION BY {', '.join(keys)}, life ORDER BY day"
        f" RANGE BETWEEN {days - 1} PRECEDING AND CURRENT ROW) AS {name}{days}"
        for name in subject.sums
        for days in subject.windows
    )
    totals = ", ".join(
        f"(running.{name}{days}{f' + coalesce(base.{name}0, 0)' if not days else ''})::{subject.sql_type(name)} AS {name}{days}"
        for name in subject.sums
        for days in subject.windows
    )
    # An event leaves a window on the day that many days later, unless its key was dropped meanwhile.
    leaving = "".join(
        f" UNION ALL SELECT {', '.join(f'gone.{key}' for key in keys)}, gone.day, gone.life FROM"
        f" (SELECT {', '.join(keys)}, day + {days} AS day, life FROM lives) AS gone ASOF LEFT JOIN dropped"
        f" ON {same('gone', 'dropped')} AND gone.day > dropped.day WHERE coalesce(dropped.day, -1) = gone.life"
        for days in subject.leaving
    )
    # A key's last event before so many days without one; where a retention was declared later, the first of the days.
    lapsing = "".join(
        f" UNION ALL SELECT {', '.join(keys)}, greatest(day + {days}, $first), -1 FROM"
        f" (SELECT {', '.join(keys)}, day, lead(day) OVER (PARTITION BY {', '.join(keys)} ORDER BY day) AS next FROM"
        f" (SELECT {', '.join(keys)}, day FROM steps WHERE day >= $first UNION ALL"
        f" SELECT {', '.join(keys)}, last_day FROM base WHERE day < last_day + {days}))"
        f" WHERE coalesce(next > greatest(day + {days}, $first), true)"
        for days in subject.lapses
    )
    lives = "SELECT *, -1 AS life FROM known"
    if subject.affinity:
        lives = (
            "SELECT known.*, coalesce(dropped.day, -1) AS life FROM known"
            f" ASOF LEFT JOIN dropped ON {same('known', 'dropped')} AND known.day > dropped.day"
        )
    static, history = "", ""
    if subject.static:
        changed = "history.day IS NOT NULL"
        static = "".join(f", CASE WHEN {changed} THEN history.{n} ELSE base.{n} END AS {n}" for n in subject.static)
        history = f" ASOF LEFT JOIN history ON {same('running', 'history')} AND running.day >= history.day"
    return _QUERY.format(
        keys=", ".join(keys),
        lives=lives,
        same_base=same("running", "base"),
        running_keys=", ".join(f"running.{key}" for key in keys),
        leaving=leaving,
        lapsing=lapsing,
        sums=", ".join(subject.sums),
        zeros=", ".join(f"0 AS {name}" for name in subject.sums),
        running=running,
        totals=totals,
        static=static,
        history=history,
    )


def _after(subject: Subject, span: Span) -> pa.Table:
    """The state at the end of a span: the newest row of each key, those that were dropped left out."""
    keys = ", ".join(subject.keys)
    with duckdb.connect() as connection:
        connection.register("before", span.before[subject.name])
        connection.register("changes", span.changes[subject.name])
        newest = f"FROM changes QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY day DESC) = 1"
        rows = connection.sql(
            f"WITH newest AS ({newest}) SELECT * EXCLUDE (dropped) FROM newest WHERE NOT dropped"
            f" UNION ALL BY NAME SELECT * FROM before ANTI JOIN newest USING ({keys}) ORDER BY {keys}"
        ).to_arrow_table()
    return rows.select(subject.state.names).cast(subject.state)


def _write_days(storage: Storage, subject: Subject, rows: pa.Table) -> None:
    def write(part: tuple[int, int]) -> None:
        start, end = part
        day = (datetime.fromtimestamp(int(stamps[start]) / 1e6, tz=UTC) - timedelta(days=1)).date()
        storage.write_table(f"snapshots/{subject.name}/{partition(day)}/part.parquet", rows.slice(start, end - start))

    stamps = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(stamps)) + 1).tolist(), len(stamps)]
    each_in_threads(write, pairwise(starts) if len(stamps) else ())


def _read(storage: Storage, kind: Kind, files: list[str]) -> pa.Table:
    return storage.dataset(files, kind.snapshots.arrow).to_table().sort_by(kind.key)


def _number(day: date) -> int:
    return (day - _EPOCH).days
