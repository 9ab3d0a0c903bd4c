"""Your own data: `events/dt=YYYY-MM-DD/*.parquet`, `users.parquet` and `items.parquet` under one folder or URL."""

import io
import re
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from limaml.data.storage import Storage
from limaml.errors import ConfigError, DataError, UnreadableDayError

_PARTITION = re.compile(r"^dt=(\d{4}-\d{2}-\d{2})$")


class ParquetSource:
    """Hive partitions written by somebody else; nothing is assumed about what a file holds."""

    name = "parquet"

    def __init__(self, path: str) -> None:
        if not path:
            raise ConfigError("source.path must name a folder or URL when source.kind = 'parquet', got ''; set it")
        self._storage = Storage(path)

    def catalogue(self) -> tuple[pa.Table, pa.Table]:
        for name in ("users.parquet", "items.parquet"):
            if not self._storage.exists(name):
                raise DataError(f"{self._storage.path(name)} must exist: it holds the known {name.split('.')[0]}; write it")
        return self._storage.read_table("users.parquet"), self._storage.read_table("items.parquet")

    def days(self) -> list[date]:
        matches = [_PARTITION.match(name) for name in self._storage.list("events")]
        delivered = sorted(date.fromisoformat(match[1]) for match in matches if match)
        if not delivered:
            raise DataError(f"{self._storage.path('events')} must hold folders dt=YYYY-MM-DD, found none; deliver a day")
        return [delivered[0] + timedelta(days=n) for n in range((delivered[-1] - delivered[0]).days + 1)]

    def read_day(self, day: date) -> pa.Table | None:
        folder = f"events/dt={day.isoformat()}"
        names = [name for name in self._storage.list(folder) if name.endswith(".parquet")]
        if not names:
            return None
        tables = [self._read(f"{folder}/{name}") for name in names]
        try:
            return pa.concat_tables(tables)
        except pa.ArrowInvalid as error:
            first = self._storage.read_bytes(f"{folder}/{names[0]}")
            raise UnreadableDayError(f"files of {self._storage.path(folder)} must share one schema: {error}", first) from error

    def _read(self, relative: str) -> pa.Table:
        raw = self._storage.read_bytes(relative)
        try:
            return pq.ParquetFile(io.BytesIO(raw)).read()
        except (pa.ArrowException, OSError) as error:
            message = f"{self._storage.path(relative)} must be a readable Parquet file: {error}; deliver it again"
            raise UnreadableDayError(message, raw) from error
