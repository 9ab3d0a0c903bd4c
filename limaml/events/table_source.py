"""Any table of events that duckdb reads, with users and items beside it or without: columns are mapped by SQL.

Parquet is read a day at a time: bounds on the plain time column, or on the column of a partition folder, tell duckdb which row
groups and files to leave alone; a table of Postgres, Delta or Iceberg gets these bounds itself. What has no such bounds is read
once, into a database in a temporary folder: CSV, JSON, a table that is no file and whose time is an expression.
"""

import functools
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from functools import cached_property
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema, telemetry
from limaml.config import SourceConfig
from limaml.errors import ConfigError, DataError, UnreadableDayError
from limaml.events import table_columns as tc
from limaml.events import table_files as tf
from limaml.events import table_scans as ts
from limaml.events.negatives import WEIGHT, with_negatives
from limaml.events.parquet_source import longest_run
from limaml.events.table_columns import Mapped
from limaml.events.table_reading import Reading
from limaml.events.table_types import require_id, require_types, require_zone

_EVENTS = "events_table"
_KEYS = ("user_id", "item_id", "timestamp")
_INSTANT = '"limaml instant"'
_AHEAD_ROWS, _AHEAD_DAYS = 100_000, 31
"""Rows and days of a history that are read at once: a query a day costs 50 ms, mostly for the row groups around it."""
_log = telemetry.get_logger(__name__)


class TableSource:
    """Events, users and items in tables of any form."""

    name = "table"

    def __init__(self, cfg: SourceConfig, today: date) -> None:
        """`today` (UTC) is not over, so it is no day of the source yet. Raises ConfigError if a mapping does not fit."""
        self._cfg = cfg
        self._today = today
        require_zone(cfg.timezone)
        folder = tempfile.mkdtemp(prefix="limaml-table-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._connection = tf.connect(folder)
        self._files = ts.find("source.events", cfg.location("events"))
        self._reading = Reading(self._connection, _EVENTS, self._files)
        self._columns = self._open(_EVENTS, self._files, cfg.columns.user_id, cfg.columns.item_id, time=cfg.columns.timestamp)
        self._mapped = {
            name: self._map(f"source.columns.{name}", text)
            for name, text in cfg.columns.model_dump().items()
            if text or name in _KEYS
        }
        if ("label" in self._mapped) == (cfg.negatives is not None):
            raise ConfigError(
                f"source must have one of columns.label and negatives, got {cfg.columns.label!r} and {cfg.negatives}; map a "
                'boolean or 0/1 expression, e.g. label = "stars >= 4", or, where every row is positive, set negatives only'
            )
        self._ahead: dict[date, pa.Table | None] = {}
        check = functools.partial(require_types, self._connection, _EVENTS, self._mapped, cfg.timezone)
        self._reading.settle(self._mapped, cfg.timezone, check)
        if self._reading.is_whole:
            self._sort()

    # The protocol.

    def catalogue(self, through: date | None = None) -> tuple[pa.Table, pa.Table]:
        end = schema.day_end(through) if through else None
        return self._known("users", end), self._known("items", end)

    def days(self) -> list[date]:
        days, left_out = self._calendar
        if not days:
            found = f", found only: {'; '.join(left_out)}" if left_out else ", found none"
            raise DataError(f"source.events must hold rows of days before today ({self._today}){found}; deliver a day")
        return [days[0] + timedelta(days=n) for n in range((days[-1] - days[0]).days + 1)]

    @property
    def left_out(self) -> Sequence[str]:
        """Rows of no day; rows far from the others once `days` was asked for, which reads the times of all rows."""
        return self._calendar[1] if "_calendar" in self.__dict__ else self._without_day

    def read_day(self, day: date) -> pa.Table | None:
        if day not in self._ahead:
            self._ahead = self._read_ahead(day)
        table = self._ahead.pop(day)
        if table is None:
            return None
        return self._with_label(table) if "label" in self._mapped else self._with_negatives(table, day)

    def unread(self, day: date) -> Sequence[str]:  # noqa: ARG002
        return ()

    # Reading.

    def _sort(self) -> None:
        """Keep rows that were read whole in the order of their times, which are parsed once: a day is then a few row groups."""
        time = self._mapped["timestamp"]
        instant = tc.instant_sql(time, self._cfg.timezone)
        try:
            self._connection.execute(
                f"CREATE TABLE sorted AS SELECT *, {instant} AS {_INSTANT} FROM {_EVENTS} ORDER BY {_INSTANT}"  # noqa: S608
            )
        except duckdb.Error as error:
            raise self._failed(error, "true", None) from error
        self._connection.execute(f"DROP TABLE {_EVENTS}")
        self._connection.execute(f"ALTER TABLE sorted RENAME TO {_EVENTS}")
        self._mapped["timestamp"] = replace(
            time, sql=_INSTANT, type="TIMESTAMP WITH TIME ZONE", is_plain=True, columns=time.columns if time.is_plain else ()
        )

    def _read_ahead(self, day: date) -> dict[date, pa.Table | None]:
        """A day's rows and, once the calendar is known, so that a history is being read, those of some days after it."""
        for span in (self._span(day), [day]):
            first, end = schema.day_start(span[0]), schema.day_end(span[-1])
            where = self._where(first, end, span)
            try:
                with self._reading.rows(self._reading.bounds(first, end, span)):
                    return _by_day(self._run(self._select(where)), span)
            except duckdb.Error as error:
                if span == [day]:  # Otherwise it may be another day's fault.
                    raise self._failed(error, where, day, self._reading.bounds(first, end, span)) from error
        raise AssertionError("the day alone was read, or raised")

    def _span(self, day: date) -> list[date]:
        counts = self.__dict__.get("_counts", {})
        span, rows = [day], counts.get(day, 0)
        while counts and rows < _AHEAD_ROWS and len(span) < _AHEAD_DAYS and span[-1] < self._today - timedelta(days=1):
            span.append(span[-1] + timedelta(days=1))
            rows += counts.get(span[-1], 0)
        return span

    def _open(self, view: str, files: tf.TableFiles | ts.Scan, *ids: str, time: str = "") -> dict[str, str]:
        """Make a table visible as `view`; returns its columns with their types. What cannot be read in parts is read now."""
        connection, decimal = self._connection, self._cfg.decimal
        if not isinstance(files, tf.TableFiles):
            return ts.opened(connection, view, files, whole=view != _EVENTS)
        source = tf.relation(connection, files, {}, decimal, same=bool(self._cfg.columns.day) and view == _EVENTS)
        columns = tf.columns_of(connection, source, files)
        if not files.is_lazy:
            # Guessed to be a number, '01' would be 1; and a time without a zone, among others with one, UTC's.
            types = {name: "VARCHAR" for text in ids if (name := tc.find_column(columns, text)) and files.format == "csv"}
            column = tc.find_column(columns, time)
            if column and columns[column] == "TIMESTAMP WITH TIME ZONE":
                types[column] = "VARCHAR"
            source = tf.relation(connection, files, types, decimal)
        kind = "VIEW" if files.is_lazy else "TABLE"
        try:
            connection.execute(f"CREATE {kind} {view} AS SELECT * FROM {source}")  # noqa: S608  paths are quoted
        except duckdb.Error as error:
            raise tf.unreadable(files, error) from error
        return tf.columns_of(connection, view, files)

    def _map(self, setting: str, text: str) -> Mapped:
        ts.require_readable(self._connection, self._files, setting, text)
        return tc.map_column(self._connection, _EVENTS, self._columns, setting, text)

    def _run(self, statement: str) -> pa.Table:
        return self._connection.sql(statement).to_arrow_table()

    def _first(self, statement: str) -> Any:
        rows = self._connection.execute(statement).fetchall()
        return rows[0][0] if rows else None

    def _where(self, first: datetime | None, end: datetime | None, span: Sequence[date] = ()) -> str:
        where = tc.between_sql(self._mapped["timestamp"], self._cfg.timezone, first, end)
        partition = self._mapped.get("day")
        if partition is None or not span:
            return where
        low, high = span[0] - timedelta(days=1), span[-1] + timedelta(days=1)
        return f"CAST({partition.sql} AS DATE) BETWEEN DATE '{low}' AND DATE '{high}' AND {where}"

    def _select(self, where: str) -> str:
        columns = self._mapped
        user, item = tc.id_sql(columns["user_id"]), tc.id_sql(columns["item_id"])
        instant = tc.instant_sql(columns["timestamp"], self._cfg.timezone)
        label = tc.label_sql(columns.get("label"))
        if "event_id" in columns:
            event = tc.id_sql(columns["event_id"])
        else:
            # Rows that are equal in all columns are interchangeable; others are told apart by what else they hold.
            rank = f"row_number() OVER (PARTITION BY {user}, {item}, {instant} ORDER BY {label}, row_::VARCHAR)"
            event = f"md5(concat_ws(chr(31), {user}, {item}, epoch_us({instant}), {rank}))"
        extras = "".join(f", {tf.quoted(name)}" for name in self._extras)
        return (
            f"SELECT {event} AS event_id, {user} AS user_id, {item} AS item_id, {instant} AS timestamp, "  # noqa: S608
            f"{label} AS label{extras} FROM {_EVENTS} AS row_ WHERE {where}"
        )

    @cached_property
    def _extras(self) -> list[str]:
        """Columns that are not mapped as they are, under their own names."""
        plain = {mapped.columns[0] for mapped in self._mapped.values() if mapped.is_plain and mapped.columns}
        taken = {name.casefold() for name in schema.EVENTS.names}
        return [name for name in self._columns if name not in plain and name.casefold() not in taken]

    def _known(self, which: Literal["users", "items"], end: datetime | None) -> pa.Table:
        """A table of users or items with its key under our name; without one, the ids that events before `end` name."""
        key = f"{which[:-1]}_id"
        if not self._cfg.location(which):
            ident, where = tc.id_sql(self._mapped[key]), self._where(None, end)
            statement = f"SELECT DISTINCT {ident} AS {key} FROM {_EVENTS} WHERE {where} AND {ident} IS NOT NULL ORDER BY 1"  # noqa: S608
            with self._reading.rows(self._reading.bounds(None, end), self._columns_of(key, "timestamp")):
                return self._run(statement)
        if which not in self._tables:
            self._tables[which] = self._read_known(which, key)
        return self._tables[which]

    def _read_known(self, which: Literal["users", "items"], key: str) -> pa.Table:
        """The key, the columns that are made of others, and the others as they are."""
        table, section, wanted = f"{which}_table", f"source.{which[:-1]}_columns", self._cfg.known_columns(which)
        files, text = ts.find(f"source.{which}", self._cfg.location(which)), str(getattr(wanted, key))
        columns = self._open(table, files, text)

        def mapped(name: str, text: str) -> Mapped:
            ts.require_readable(self._connection, files, f"{section}.{name}", text)
            return tc.map_column(self._connection, table, columns, f"{section}.{name}", text)

        ident, made = mapped(key, text), {name: mapped(f"more.{name}", text) for name, text in wanted.more.items()}
        require_id(self._connection, table, ident)
        taken = {name.casefold() for name in (key, *made, *(ident.columns if ident.is_plain else ()))}
        kept = [tf.quoted(name) for name in columns if name.casefold() not in taken]
        selected = [f"{tc.id_sql(ident)} AS {key}", *(f"{one.sql} AS {tf.quoted(name)}" for name, one in made.items()), *kept]
        try:
            return self._run(f"SELECT {', '.join(selected)} FROM {table}")  # noqa: S608  quoted, or the owner's own
        except duckdb.Error as error:
            found = tc.failing_row(self._connection, table, [(one, one.sql) for one in (ident, *made.values())], "true")
            raise (DataError(_fails(*found)) if found else tf.unreadable(files, error)) from error

    def _columns_of(self, *keys: str) -> list[str]:
        """The table's columns that some of ours read."""
        return list(dict.fromkeys(name for key in keys for name in self._mapped[key].columns))

    @cached_property
    def _tables(self) -> dict[str, pa.Table]:
        return {}

    # The calendar.

    @cached_property
    def _calendar(self) -> tuple[list[date], list[str]]:
        """Days of the past with rows, ascending, and what is left out of them."""
        rows = self._counts
        kept = longest_run(list(rows), self._cfg.max_gap_days)
        far = [
            f"{rows[day]} rows of {day}: must lie at most source.max_gap_days ({self._cfg.max_gap_days}) days from the others, "
            f"{kept[0]} to {kept[-1]}; correct their times, or raise the setting"
            for day in rows
            if not kept[0] <= day <= kept[-1]
        ]
        return kept, [*self._without_day, *far]

    @cached_property
    def _counts(self) -> dict[date, int]:
        """Rows of every day of the past, ascending: the times of all rows are read, where no statistics say them."""
        time, zone = self._mapped["timestamp"], self._cfg.timezone
        bounds = self._reading.bounds(None, schema.day_start(self._today))
        where = self._where(None, schema.day_start(self._today))
        day = f"CAST(timezone('UTC', {tc.instant_sql(time, zone)}) AS DATE)"
        statement = f"SELECT {day} AS day, count(*) AS num_rows FROM {_EVENTS} WHERE {where} GROUP BY 1"  # noqa: S608
        counts: Counter[date] = Counter()
        try:
            parts = None
            if self._reading.scan is not None and ts.can_bound(time):
                known, parts = ts.known_days(self._connection, self._reading.scan, time, zone, bounds)
                for found, num_rows in known:
                    counts[found] += num_rows if found < self._today else 0
            if parts != []:
                with self._reading.rows(bounds, time.columns, parts):
                    counts.update(dict(self._connection.execute(statement).fetchall()))
        except duckdb.Error as error:
            raise self._failed(error, "true", None) from error
        return {day: counts[day] for day in sorted(+counts)}

    @cached_property
    def _without_day(self) -> list[str]:
        """Rows that no day will ever hold, and those of days that are not over."""
        instant = tc.instant_sql(self._mapped["timestamp"], self._cfg.timezone)
        tomorrow = self._where(schema.day_end(self._today), None)
        left_out = []
        time = self._mapped["timestamp"]
        null = [ts.Bound(time.columns[0], ())] if self._reading.scan and ts.can_bound(time) else []
        try:
            with self._reading.rows(self._reading.bounds(schema.day_end(self._today), None), time.columns):
                future = self._first(f"SELECT count(*) FROM {_EVENTS} WHERE {tomorrow}")  # noqa: S608
            with self._reading.rows(null, time.columns):
                nulls = self._first(f"SELECT count(*) FROM {_EVENTS} WHERE {instant} IS NULL")  # noqa: S608
        except duckdb.Error as error:
            raise self._failed(error, "true", None) from error
        if future:
            left_out.append(f"{future} rows: must not be after today ({self._today}); correct their times")
        if nulls:
            left_out.append(
                f"{nulls} rows: must have a time, but source.columns.timestamp ({time.text!r}) is null; "
                "correct them at the source"
            )
        return left_out

    # What does not fit.

    def _with_label(self, table: pa.Table) -> pa.Table:
        """The label as the schema has it. Raises UnreadableDayError with the first row whose label is neither 0 nor 1."""
        label, mapped = table["label"], self._mapped["label"]
        wrong = table.filter(pc.invert(pc.is_in(label.cast(pa.float64()), value_set=pa.array([0.0, 1.0]))))
        if wrong.num_rows:
            wrong = wrong.sort_by([(name, "ascending") for name in ("timestamp", "user_id", "item_id")])
            value = wrong["label"][0].as_py()
            raise _unreadable_day(
                f"label must be boolean or 0 and 1 after mapping, got {'null' if value is None else f'{value:g}'} from "
                f"{mapped.setting} ({mapped.text!r}) in the row {tc.described({k: wrong[k][0].as_py() for k in _KEYS})}; "
                'correct the row, or write a condition, e.g. label = "stars >= 4"'
            )
        return table.set_column(table.schema.get_field_index("label"), "label", label.cast(pa.int8()))

    def _with_negatives(self, positives: pa.Table, day: date) -> pa.Table:
        """The day's events, all of which happened, and sampled ones that did not."""
        assert self._cfg.negatives is not None
        positives = positives.set_column(
            positives.schema.get_field_index("label"), "label", pa.array([1] * positives.num_rows, pa.int8())
        )
        table = with_negatives(positives, self._items_by(day), self._cfg.negatives)
        _log.info(
            "negatives_sampled",
            day=day.isoformat(),
            positives=positives.num_rows,
            negatives=table.num_rows - positives.num_rows,
            weight=pc.mean(table[WEIGHT].slice(positives.num_rows)).as_py(),
        )
        return table

    def _items_by(self, day: date) -> pa.Table:
        """Items that events named by the end of a day, in how many rows; where items have a table, those in it."""
        known = self._run(
            f"SELECT item_id, sum(num_rows)::BIGINT AS num_rows FROM {self._item_days} WHERE day <= DATE '{day}' "  # noqa: S608
            "GROUP BY 1 ORDER BY 1"
        )
        if not self._cfg.items:
            return known
        _, items = self.catalogue(day)
        return known.filter(pc.is_in(known["item_id"], value_set=items["item_id"].combine_chunks()))

    @cached_property
    def _item_days(self) -> str:
        """Table of the rows of every item on every day: one reading of these two columns."""
        item, instant = tc.id_sql(self._mapped["item_id"]), tc.instant_sql(self._mapped["timestamp"], self._cfg.timezone)
        where = self._where(None, schema.day_start(self._today))
        with self._reading.rows(
            self._reading.bounds(None, schema.day_start(self._today)), self._columns_of("item_id", "timestamp")
        ):
            self._connection.execute(
                f"CREATE TABLE item_days AS SELECT {item} AS item_id, CAST(timezone('UTC', {instant}) AS DATE) AS day, "  # noqa: S608
                f"count(*) AS num_rows FROM {_EVENTS} WHERE {where} AND {item} IS NOT NULL GROUP BY 1, 2"
            )
        return "item_days"

    def _failed(self, error: duckdb.Error, where: str, day: date | None, bounds: Sequence[ts.Bound] = ()) -> DataError:
        """Why a query failed: an expression on a row where one can be found."""
        time = self._mapped["timestamp"]
        others = [column for column in self._mapped.values() if column is not time]
        # A time that fails is of no day, so every day fails.
        tried = [(time, tc.instant_sql(time, self._cfg.timezone), "true", None), *((c, c.sql, where, day) for c in others)]
        for column, sql, of_rows, of_day in tried:
            read = None if of_day else column.columns
            with self._reading.rows(bounds if column is not time else (), read):
                found = tc.failing_row(self._connection, _EVENTS, [(column, sql)], of_rows)
            if found:
                return _unreadable_day(_fails(*found)) if of_day else DataError(_fails(*found))
        return tf.unreadable(self._files, error)


def _by_day(table: pa.Table, span: Sequence[date]) -> dict[date, pa.Table | None]:
    table = table.sort_by("timestamp").combine_chunks()
    edges = [pa.scalar(instant, schema.TIMESTAMP).value for instant in map(schema.day_start, span)]
    at = [*np.searchsorted(table["timestamp"].cast(schema.TIMESTAMP).cast(pa.int64()).to_numpy(), edges), table.num_rows]
    return {
        day: table.slice(low, high - low) if high > low else None for day, low, high in zip(span, at[:-1], at[1:], strict=True)
    }


def _fails(mapped: Mapped, row: dict[str, Any], message: str) -> str:
    return (
        f"{mapped.setting} must not fail on any row, got {mapped.text!r} on the row {tc.described(row)}: {message}; "
        "correct the row, or write an expression that takes it, e.g. with TRY_CAST"
    )


def _unreadable_day(message: str) -> UnreadableDayError:
    return UnreadableDayError(message, message.encode())
