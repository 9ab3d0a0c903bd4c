"""Your own data: `events/dt=YYYY-MM-DD/`, `users.parquet` and `items.parquet` under one folder or URL.

A day's files may lie in folders of their own below it (`hour=08/`, Spark's `x.parquet/`). Names that begin with `.` or `_` are
unfinished work or somebody's notes, by the convention of Hive and Spark. Whatever else is not read is named.
"""

import io
import re
from collections.abc import Sequence
from datetime import date, timedelta
from functools import cached_property
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from limaml import schema
from limaml.config import SourceConfig
from limaml.errors import ConfigError, DataError, UnreadableDayError
from limaml.events.casting import with_types
from limaml.io.storage import Storage

_PARTITION = re.compile(r"dt=(\d{4}-\d{2}-\d{2})")


class ParquetSource:
    """Hive partitions written by somebody else; nothing is assumed about what a file holds."""

    name = "parquet"

    def __init__(self, cfg: SourceConfig, today: date) -> None:
        """`today` (UTC) is not over, so it is no day of the source yet."""
        if not cfg.path:
            raise ConfigError("source.path must name a folder or URL when source.kind = 'parquet', got ''; set it")
        self._storage = Storage(cfg.path)
        self._max_gap_days = cfg.max_gap_days
        self._today = today

    def catalogue(self, through: date | None = None) -> tuple[pa.Table, pa.Table]:  # noqa: ARG002
        return self._catalogue("users"), self._catalogue("items")

    def days(self) -> list[date]:
        days, left_out = self._calendar
        if not days:
            found = f", found only: {'; '.join(left_out)}" if left_out else ", found none"
            raise DataError(f"{self._storage.path('events')} must hold folders dt=YYYY-MM-DD{found}; deliver a day")
        return [days[0] + timedelta(days=n) for n in range((days[-1] - days[0]).days + 1)]

    @property
    def left_out(self) -> Sequence[str]:
        return self._calendar[1]

    def read_day(self, day: date) -> pa.Table | None:
        folder = _folder(day)
        names, unread = self._files(day)
        if not names and unread:
            listing = "\n".join(unread)
            message = (
                f"{self._storage.path(folder)} must hold Parquet files, got only {', '.join(unread)}; deliver them as Parquet"
            )
            raise UnreadableDayError(message, listing.encode())
        if not names:
            return None
        tables = [self._read(name) for name in names]
        same = set(tables[0].column_names)
        if all(set(table.column_names) == same for table in tables):
            tables = [table.select(tables[0].column_names) for table in tables]
        try:
            return pa.concat_tables(tables)
        except pa.ArrowInvalid as error:
            first = self._storage.read_bytes(names[0])
            raise UnreadableDayError(f"files of {self._storage.path(folder)} must share one schema: {error}", first) from error

    def unread(self, day: date) -> Sequence[str]:
        return self._files(day)[1]

    def _files(self, day: date) -> tuple[list[str], list[str]]:
        """A day's Parquet files, and the other files below it (from its folder on)."""
        folder = f"{_folder(day)}/"
        paths = [path for path in self._storage.walk(_folder(day)) if not _is_hidden(path.removeprefix(folder))]
        read = [path for path in paths if path.endswith(".parquet")]
        return read, [path.removeprefix(folder) for path in paths if path not in set(read)]

    @cached_property
    def _calendar(self) -> tuple[list[date], list[str]]:
        """Delivered days of the past, ascending, and what lies beside them and is not read, with the reason."""
        days, left_out = [], []
        for name in self._storage.list("events"):
            day = _day(name)
            if day is None and not _is_hidden(name):
                left_out.append(f"events/{name}: must be dt= and a calendar day YYYY-MM-DD; rename it")
            elif day is not None and day > self._today:
                left_out.append(f"events/{name}: must not be after today ({self._today}); correct its name")
            elif day is not None and day < self._today:
                days.append(day)
        kept = longest_run(sorted(days), self._max_gap_days)
        left_out += [
            f"{_folder(day)}: must lie at most source.max_gap_days ({self._max_gap_days}) days from the others, {kept[0]} to "
            f"{kept[-1]}; correct its name, or raise the setting"
            for day in sorted(set(days) - set(kept))
        ]
        return kept, left_out

    def _catalogue(self, known: str) -> pa.Table:
        name = f"{known}.parquet"
        if not self._storage.exists(name):
            raise DataError(f"{self._storage.path(name)} must exist: it holds the known {known}; write it")
        if not self._storage.is_folder(name):
            return _each_once(self._storage.read_table(name), self._storage.path(name))
        # As Spark writes a table.
        paths = [path for path in self._storage.walk(name) if path.endswith(".parquet") and not _is_hidden(path)]
        if not paths:
            raise DataError(f"{self._storage.path(name)} must hold Parquet files, found none; write the known {known} into it")
        try:
            return _each_once(pa.concat_tables([self._storage.read_table(path) for path in paths]), self._storage.path(name))
        except pa.ArrowInvalid as error:
            raise DataError(f"files of {self._storage.path(name)} must share one schema: {error}; write them again") from error

    def _read(self, relative: str) -> pa.Table:
        raw = self._storage.read_bytes(relative)
        path = self._storage.path(relative)
        try:
            table = _each_once(pq.ParquetFile(io.BytesIO(raw)).read(), path)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableDayError(f"{path} must be a readable Parquet file: {error}; deliver it again", raw) from error
        except DataError as error:
            raise UnreadableDayError(str(error), raw) from None
        return with_types(table, schema.EVENTS)


def _folder(day: date) -> str:
    return f"events/dt={day.isoformat()}"


def _day(name: str) -> date | None:
    """The day of a partition folder, None for a name that is none."""
    match = _PARTITION.fullmatch(name)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:
        return None


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def longest_run(days: list[date], max_gap_days: int) -> list[date]:
    """The most days (of equally many the last) of which none is further than that from the next."""
    runs = [days[:1]]
    for before, day in pairwise(days):
        if (day - before).days > max_gap_days:
            runs.append([])
        runs[-1].append(day)
    return max(reversed(runs), key=len)


def _each_once(table: pa.Table, path: str) -> pa.Table:
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{path} must have each column once, got {', '.join(twice)} more than once; write it again")
    return table
