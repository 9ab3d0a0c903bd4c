"""Columns of somebody else's table under our names: a plain column or a SQL expression, its type, and what it fails on."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import duckdb

from limaml.errors import ConfigError
from limaml.events.table_files import literal, quoted, told

_WHOLE = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT"}
ZONED = r"'\d:?\d\d(\.\d+)?\s*(Z|z|[+-]\d\d(:?\d\d)?)\s*$'"
"""Text that ends in a time and its zone."""
_UNITS = ((10**11, 1_000_000, 1), (10**14, 1_000, 1), (10**17, 1, 1), (None, 1, 1_000))
"""Numbers of a time: below this, so many microseconds each, or so many to the microsecond."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CUT = 40
_CANDIDATES = 1000
"""Rows of which an expression makes a null that are tried one by one, when it fails on one."""


@dataclass(frozen=True)
class Mapped:
    """One mapped column: the setting that maps it, its text, its SQL over the table, and its duckdb type."""

    setting: str
    text: str
    sql: str
    type: str
    is_plain: bool
    columns: tuple[str, ...]
    """The table's columns that it reads."""

    @property
    def is_whole(self) -> bool:
        return self.type in _WHOLE

    @property
    def is_number(self) -> bool:
        return self.is_whole or self.type in ("FLOAT", "DOUBLE") or self.type.startswith("DECIMAL")

    @property
    def is_text(self) -> bool:
        return self.type in ("VARCHAR", "UUID") or self.type.startswith("ENUM")

    @property
    def is_id(self) -> bool:
        return self.is_whole or self.is_text or self.type == "JSON"

    @property
    def is_naive(self) -> bool:
        """Whether it is a time without a zone; text may be one, value by value."""
        return self.type == "DATE" or (self.type.startswith("TIMESTAMP") and not self.has_zone)

    @property
    def has_zone(self) -> bool:
        return self.type.startswith("TIMESTAMP WITH TIME ZONE") or self.type.startswith("TIMESTAMPTZ")


def map_column(connection: Any, table: str, columns: Mapping[str, str], setting: str, text: str) -> Mapped:
    """`text` as a column of `table` (which has `columns`, with their types), or as an expression of them.

    Raises ConfigError if it does not parse, or reads a column that the table does not have.
    """
    name = find_column(columns, text)
    if name is not None:
        return Mapped(setting, text, quoted(name), columns[name], True, (name,))
    read = columns_read(connection, setting, text)
    try:
        # A lambda's parameter looks like a column: only what duckdb misses is missing.
        described = connection.execute(f"DESCRIBE SELECT ({text}) FROM {table}").fetchall()  # noqa: S608  the owner's own
    except duckdb.Error as error:
        missing = [name for name in read if find_column(columns, name) is None]
        if missing:
            raise ConfigError(_no_column(setting, text, missing[0], columns)) from error
        raise ConfigError(
            f"{setting} must be a SQL expression of the table's columns, got {text!r}: {told(error)}; correct it"
        ) from error
    found = tuple(dict.fromkeys(n for name in read if (n := find_column(columns, name)) is not None))
    return Mapped(setting, text, f"({text})", str(described[0][1]), False, found)


def find_column(columns: Iterable[str], text: str) -> str | None:
    """The column that a text names, as it stands or in double quotes, in upper or lower case."""
    bare = text.strip()
    if re.fullmatch(r'"([^"]|"")+"', bare):
        bare = bare[1:-1].replace('""', '"')
    names = list(columns)
    if bare in names:
        return bare
    return next((name for name in names if name.casefold() == bare.casefold()), None)


def columns_read(connection: Any, setting: str, text: str) -> list[str]:
    """Names of the columns that an expression reads, by its syntax alone."""
    statement = literal(f"SELECT {text}")
    parsed = json.loads(connection.execute(f"SELECT json_serialize_sql({statement})").fetchall()[0][0])
    if parsed.get("error"):
        raise ConfigError(
            f"{setting} must be a column of the table or a SQL expression, got {text!r}: "
            f"{parsed.get('error_message', 'it does not parse')}; correct it, or double-quote a name with odd characters"
        )
    selected = parsed["statements"][0]["node"].get("select_list", [])
    if len(parsed["statements"]) != 1 or len(selected) != 1:
        raise ConfigError(f"{setting} must be one SQL expression, got {text!r}; write one")
    return list(_references(selected[0]))


def _references(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":
            yield node["column_names"][0]
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _references(part)


def _no_column(setting: str, text: str, missing: str, columns: Mapping[str, str]) -> str:
    folded = {name.casefold(): name for name in columns}
    close = [folded[name] for name in difflib.get_close_matches(missing.casefold(), folded, n=3, cutoff=0.4)]
    ordered = [*close, *sorted(name for name in columns if name not in close)]
    more = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    what = repr(text) if text == missing else f"{missing!r} in {text!r}"
    return f"{setting} must name columns of the table, got {what}; there are: {', '.join(ordered[:20])}{more}"


def id_sql(mapped: Mapped) -> str:
    """An id as text; 1 and '1' are the same."""
    return f"({mapped.sql} ->> '$')" if mapped.type == "JSON" else f"CAST({mapped.sql} AS VARCHAR)"


def label_sql(mapped: Mapped | None) -> str:
    """A label as a boolean or a number; without one, every row is positive."""
    if mapped is None:
        return "true"
    return mapped.sql if mapped.type == "BOOLEAN" else f"CAST({mapped.sql} AS DOUBLE)"


def instant_sql(mapped: Mapped, zone: str) -> str:
    """The instant that a time says. One that the clocks of `zone` skip counts from the hour before; of two, it is the later."""
    raw = mapped.sql
    if mapped.type == "TIMESTAMP WITH TIME ZONE":
        return raw
    if mapped.is_number:
        raw = f"CAST({raw} AS BIGINT)" if mapped.is_whole else raw
        cases = " ".join(f"WHEN abs({raw}) < {below} THEN {raw} * {times}" for below, times, _ in _UNITS[:-1])
        last = f"{raw} {'//' if mapped.is_whole else '/'} {_UNITS[-1][2]}"
        micros = f"CASE {cases} ELSE {last} END"
        return f"make_timestamptz(CAST({micros if mapped.is_whole else f'floor({micros})'} AS BIGINT))"
    local = f"timezone({literal(zone)}, CAST({raw} AS TIMESTAMP))" if zone else "CAST(NULL AS TIMESTAMPTZ)"
    if mapped.is_text:
        return f"CASE WHEN regexp_matches({raw}, {ZONED}) THEN CAST({raw} AS TIMESTAMPTZ) ELSE {local} END"
    return local if mapped.is_naive else f"CAST({raw} AS TIMESTAMPTZ)"


def between_sql(mapped: Mapped, zone: str, first: datetime | None, end: datetime | None) -> str:
    """Whether a time lies in [first, end), with bounds on the plain column from which duckdb knows what not to read."""
    instant = instant_sql(mapped, zone)
    exact = [f"{instant} >= {_instant(first)}"] if first else []
    exact += [f"{instant} < {_instant(end)}"] if end else []
    if not mapped.is_plain or not exact:
        return " AND ".join(exact) or "true"
    if not (mapped.is_number or mapped.is_naive):
        return " AND ".join(exact)
    ranges = []
    for low, high in plain_ranges(mapped, zone, first, end):
        bounds = [(">=", low), ("<=", high)]
        ranges.append(" AND ".join(f"{mapped.sql} {sign} {_plain(value)}" for sign, value in bounds if value is not None))
    return f"({' OR '.join(f'({bounds})' for bounds in ranges)}) AND {' AND '.join(exact)}"


def plain_ranges(
    mapped: Mapped, zone: str, first: datetime | None, end: datetime | None
) -> list[tuple[datetime | int | None, datetime | int | None]]:
    """Closed ranges, None for no end, of a plain column's values, outside which no instant lies in [first, end)."""
    if mapped.is_number:
        # One range for each unit. Wider than the day by a unit, since an instant is rounded to a microsecond.
        return [
            (
                None if first is None else _micros(first) * parts // times - 1,
                None if end is None else _micros(end) * parts // times + 1,
            )
            for _, times, parts in _UNITS
        ]
    low, high = (_shown(zone, first, min), _shown(zone, end, max)) if mapped.is_naive else (first, end)
    if low and mapped.type == "DATE":  # It is compared as its midnight.
        low = low.replace(hour=0, minute=0, second=0, microsecond=0)
    if high and not mapped.type.endswith("NS"):  # The next day's first rows are then left alone.
        high -= timedelta(microseconds=1)
    return [(low, high)]


def _shown(zone: str, instant: datetime | None, furthest: Callable[[set[timedelta]], timedelta]) -> datetime | None:
    """What clocks of the zone show at least or at most, an hour further where they are moved: they skip or repeat times."""
    if instant is None:
        return None
    near = [instant + timedelta(hours=n) for n in range(-25, 26)]
    offsets = {moment.astimezone(ZoneInfo(zone)).utcoffset() or timedelta(0) for moment in near}
    if len(offsets) > 1:
        offsets |= {min(offsets) - timedelta(hours=1), max(offsets) + timedelta(hours=1)}
    return (instant.astimezone(UTC) + furthest(offsets)).replace(tzinfo=None)


def _plain(value: datetime | int) -> str:
    return f"TIMESTAMP '{value:%Y-%m-%d %H:%M:%S.%f}'" if isinstance(value, datetime) else str(value)


def _instant(value: datetime) -> str:
    return f"TIMESTAMPTZ '{value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00'"


def _micros(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(microseconds=1)


def described(row: Mapping[str, Any]) -> str:
    """A row for a message: its columns and values, cut."""
    return ", ".join(f"{name} {cut(value)}" for name, value in row.items())


def cut(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _CUT else f"{text[:_CUT]}… ({len(text)} characters)"


def failing_row(
    connection: Any, table: str, expressions: Sequence[tuple[Mapped, str]], where: str
) -> tuple[Mapped, dict[str, Any], str] | None:
    """The first column whose SQL fails on a row, with what it read there and duckdb's message; None if none does."""
    for column, sql in expressions:
        read = ", ".join(quoted(name) for name in column.columns)
        try:
            candidates = connection.sql(
                f"SELECT DISTINCT {read} FROM {table} WHERE ({where}) AND TRY({sql}) IS NULL LIMIT {_CANDIDATES}"  # noqa: S608
            ).to_arrow_table()
        except duckdb.Error:  # Another column's fault.
            continue
        for at in range(candidates.num_rows):
            row = candidates.slice(at, 1)
            connection.register("one_row", row)
            try:
                connection.execute(f"SELECT {sql} FROM one_row").fetchall()  # noqa: S608
            except duckdb.Error as error:
                return column, row.to_pylist()[0], told(error)
            finally:
                connection.unregister("one_row")
    return None
