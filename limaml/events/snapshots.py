"""Daily snapshots of entities: their static features and aggregates over events before the day's end.

`snapshots/{user,item}/dt=D/part.parquet` holds a row for every entity that changed on day D (an event, one that leaves a
window, or a catalogue row that is new or different; events that a correction took away count, so that what they left online is
replaced), stamped with the end of D. The catalogue as first delivered is stamped with the start of the first day, that is the
end of the day before it. Everything is a pure function of the events and the catalogue's history, so writing a day again gives
the same bytes.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

import duckdb
import pyarrow as pa

from limaml import schema
from limaml.config import FeatureConfig
from limaml.events import catalogue
from limaml.events.catalogue import Kind
from limaml.events.day_store import EventStore, partition, partition_files
from limaml.io.storage import Storage

_DAY_US = 86_400_000_000
_EPOCH = date(1970, 1, 1)

# steps: what each day added to an entity; a catalogue change, a superseded event and one that leaves a window add nothing.
# state: the running sums, of all days and of windows.
# The rate's prior is fixed by configuration, not estimated from other entities: a row depends on its entity's rows alone.
_QUERY = """
WITH seen AS (
    SELECT {key}, epoch_us("timestamp") // {day_us} AS day, count(*) AS n, sum(label) AS p FROM events GROUP BY ALL
    UNION ALL
    SELECT DISTINCT {key}, epoch_us("timestamp") // {day_us} AS day, 0 AS n, 0 AS p FROM superseded
), steps AS (
    FROM seen
    UNION ALL
    SELECT {key}, day, 0 AS n, 0 AS p FROM history{leaving}
), touched AS (
    SELECT DISTINCT {key} FROM steps WHERE day BETWEEN $first AND $through
), days AS (
    SELECT {key}, day, sum(n) AS n, sum(p) AS p FROM steps SEMI JOIN touched USING ({key}) GROUP BY ALL
), state AS (
    SELECT {key}, day, {sums} FROM days
)
SELECT state.{key}, (state.day + 1) * {day_us} AS event_timestamp{static}{aggregates}
FROM state ASOF LEFT JOIN history ON state.{key} = history.{key} AND state.day >= history.day
WHERE state.day BETWEEN $first AND $through
ORDER BY event_timestamp, state.{key}
"""


def write(storage: Storage, kinds: Mapping[str, Kind], first: date, through: date) -> dict[str, int]:
    """Compute and write the snapshots of all days from `first` to `through` with one query a kind; returns rows written."""
    return {kind.name: _write_kind(storage, kind, first, through) for kind in kinds.values()}


def has_windows(kinds: Mapping[str, Kind]) -> bool:
    """Whether entities change on days without an event of theirs, as one leaves a window."""
    return any(feature.window_days for kind in kinds.values() for feature in kind.features)


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
            f"SELECT * FROM snapshots {semi_join} QUALIFY row_number() OVER"  # noqa: S608  names come from the schema
            f" (PARTITION BY {key} ORDER BY event_timestamp DESC) = 1 ORDER BY {key}"
        ).to_arrow_table()
    return rows.cast(kind.snapshots.arrow)


def _write_kind(storage: Storage, kind: Kind, first: date, through: date) -> int:
    rows = _compute(storage, kind, first, through)
    stamps = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    position = 0
    while position < rows.num_rows:
        end = int(stamps.searchsorted(stamps[position], side="right"))
        day = (datetime.fromtimestamp(int(stamps[position]) / 1e6, tz=UTC) - timedelta(days=1)).date()
        storage.write_table(f"snapshots/{kind.name}/{partition(day)}/part.parquet", rows.slice(position, end - position))
        position = end
    return int(rows.num_rows)


def _compute(storage: Storage, kind: Kind, first: date, through: date) -> pa.Table:
    """Snapshot rows of all entities that changed within the span, sorted by (event_timestamp, entity)."""
    events = storage.dataset(EventStore(storage).paths(through=through), schema.EVENTS.arrow)
    superseded = storage.dataset(partition_files(storage, "events_superseded", through=through), schema.EVENTS.arrow)
    windows = sorted({feature.window_days for feature in kind.features if feature.window_days})
    query = _QUERY.format(
        key=kind.key,
        day_us=_DAY_US,
        static="".join(f", history.{name}" for name in kind.static),
        leaving="".join(f" UNION ALL SELECT {kind.key}, day + {days}, 0, 0 FROM seen" for days in windows),  # noqa: S608
        sums=", ".join(_sum(value, days, kind.key) for value in "np" for days in (0, *windows)),
        aggregates="".join(f", {_aggregate(feature)} AS {feature.name}" for feature in kind.features if feature.aggregate),
    )
    values = {"first": (first - _EPOCH).days, "through": (through - _EPOCH).days}
    with duckdb.connect() as connection:
        connection.register("events", events)
        connection.register("superseded", superseded)
        connection.register("history", catalogue.history(storage, kind))
        rows = connection.sql(query, params=values).to_arrow_table()
    micros = rows["event_timestamp"].cast(schema.TIMESTAMP)
    rows = rows.set_column(rows.schema.get_field_index("event_timestamp"), "event_timestamp", micros)
    return rows.select(kind.snapshots.names).cast(kind.snapshots.arrow).combine_chunks()


def _sum(value: str, window_days: int, key: str) -> str:
    """SQL: the running sum of a value over an entity's days, or over so many of them; its name says which."""
    span = f" RANGE BETWEEN {window_days - 1} PRECEDING AND CURRENT ROW" if window_days else ""
    return f"sum({value}) OVER (PARTITION BY {key} ORDER BY day{span}) AS {value}{window_days}"


def _aggregate(feature: FeatureConfig) -> str:
    """SQL over an entity's running sums: n events, p of them positive."""
    n, p = (f"{value}{feature.window_days}" for value in "np")
    if feature.aggregate == "count":
        return f"{n}::BIGINT"
    return f"(({p} + {feature.prior * feature.prior_rows!r}) / ({n} + {feature.prior_rows!r}))::FLOAT"


def _read(storage: Storage, kind: Kind, files: list[str]) -> pa.Table:
    return storage.dataset(files, kind.snapshots.arrow).to_table().sort_by(kind.key)
