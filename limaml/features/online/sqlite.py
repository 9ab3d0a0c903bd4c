"""Feast's SQLite online store with a bulk path. Feast loads it by its class path; tables and reads are Feast's own."""

import sqlite3
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal
from urllib.parse import quote

from feast import FeatureView, RepoConfig, ValueType
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig, _quote_id, _table_id
from feast.protos.feast.types.Value_pb2 import Value

from limaml.features.online.rows import OnlineRow, Stored

_PLAIN_TYPES = {
    ValueType.STRING,
    ValueType.INT32,
    ValueType.INT64,
    ValueType.FLOAT,
    ValueType.DOUBLE,
    ValueType.BOOL,
}
"""Types that `extract_text_and_num` gives a text for."""
_US_PER_S = 1_000_000
_COLUMN = "max(CASE feature_name WHEN ? THEN value END), "
_READ_WAIT_S = 1.0
"""For a lock, which in WAL mode only recovery and `VACUUM` take from a reader."""


class BulkSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):  # type: ignore[misc]
    """Feast's own settings under another class path."""

    type: Literal["limaml.features.online.sqlite.BulkSqliteOnlineStore"] = "limaml.features.online.sqlite.BulkSqliteOnlineStore"


class BulkSqliteOnlineStore(SqliteOnlineStore):  # type: ignore[misc]
    """Rows are four columns of one table a view: key, feature, value, and its text where it has one."""

    def read_rows(
        self, config: RepoConfig, view: FeatureView, names: Sequence[str], keys: Sequence[bytes]
    ) -> list[Stored | None]:
        """What is stored for each key. A row whose features were written apart is as old as its oldest part."""
        columns = ", ".join("max(CASE feature_name WHEN ? THEN value END)" for _ in names)
        marks = ",".join("?" * len(keys))
        # An aggregate of event_ts is the integer itself; the column would come as a datetime in the process's time zone.
        query = (
            f"SELECT entity_key, min(event_ts), {columns} FROM {_table(config, view)} "  # noqa: S608 - Feast's own name, quoted
            f"WHERE entity_key IN ({marks}) GROUP BY entity_key"
        )
        found = {key: (seconds, values) for key, seconds, *values in self._get_conn(config).execute(query, [*names, *keys])}
        rows = map(found.get, keys)
        return [None if row is None else (row[0] * _US_PER_S, tuple(row[1])) for row in rows]

    def write_rows(
        self, config: RepoConfig, view: FeatureView, names: Sequence[str], keys: Sequence[bytes], rows: Sequence[OnlineRow]
    ) -> None:
        """Write rows in one transaction. Feast's column of event timestamps holds whole seconds."""
        types = {field.name: field.dtype.to_value_type() for field in view.features}
        has_text = [types[name] in _PLAIN_TYPES for name in names]
        records = (
            (key, name, value, _text(value) if plain else None, row.timestamp_us // _US_PER_S)
            for key, row in zip(keys, rows, strict=True)
            for name, plain, value in zip(names, has_text, row.values, strict=True)
        )
        connection = self._get_conn(config)
        with connection:
            connection.executemany(
                f"INSERT INTO {_table(config, view)} (entity_key, feature_name, value, value_text, event_ts) "  # noqa: S608
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT(entity_key, feature_name) DO UPDATE SET value = excluded.value, "
                "value_text = excluded.value_text, event_ts = excluded.event_ts, created_ts = NULL",
                records,
            )

    def entity_reader(self, config: RepoConfig, wanted: Sequence[tuple[FeatureView, Sequence[str]]]) -> "SqliteEntityReader":
        """Reader of one entity's rows."""
        return SqliteEntityReader(self._get_db_path(config), [(_table(config, view), names) for view, names in wanted])


class SqliteEntityReader:
    """One statement, and so one state of the database, on a read-only connection a thread.

    It gives one row: Python lets go of its lock for every row, and waits to get it back while the server's loop is busy.
    """

    def __init__(self, path: str, wanted: Sequence[tuple[str, Sequence[str]]]) -> None:
        """`wanted`: quoted table and features of each view."""
        parts = [
            f"(SELECT min(event_ts), {_COLUMN * len(names)} 0 FROM {table} WHERE entity_key = ?)"  # noqa: S608
            for table, names in wanted
        ]
        self._names = [names for _, names in wanted]
        self._query = f"SELECT * FROM {', '.join(parts)}"  # noqa: S608
        self._address = f"file:{quote(path)}?mode=ro"
        self._local = threading.local()

    def read(self, key: bytes) -> list[Stored | None]:
        """A row or None a view. Blocks. Raises sqlite3.Error."""
        try:
            if not hasattr(self._local, "connection"):
                self._local.connection = sqlite3.connect(self._address, uri=True, timeout=_READ_WAIT_S)
            marks = [mark for names in self._names for mark in (*names, key)]
            found = iter(self._local.connection.execute(self._query, marks).fetchone())
        except sqlite3.Error:
            # The next read opens the file anew: it may be another one by then.
            self._local.__dict__.pop("connection", None)
            raise
        rows: list[Stored | None] = []
        for names in self._names:
            seconds, *values, _ = (next(found) for _ in range(len(names) + 2))
            rows.append(None if seconds is None else (seconds * _US_PER_S, tuple(values)))
        return rows

    def close(self) -> None:
        """Nothing to do: a thread's connection goes with the reader."""


@lru_cache(maxsize=1024)
def _text(value: bytes) -> str | None:
    """Feast's readable copy of a value. Cached: a batch has one model version and few support sizes."""
    text: str | None = extract_text_and_num(Value.FromString(value), compute_num=False)[0]
    return text


def _table(config: RepoConfig, view: FeatureView) -> str:
    name: str = _quote_id(_table_id(config.project, view, config.registry.enable_online_feature_view_versioning))
    return name
