"""How the rows of a table of events come before a query: those of files lie there always, others come for one query."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from limaml import telemetry
from limaml.errors import ConfigError
from limaml.events import table_files as tf
from limaml.events import table_scans as ts
from limaml.events.table_columns import Mapped

_TYPE_ROWS = 1_000
"""Of a table that is no file: enough for a value of each column."""
_log = telemetry.get_logger(__name__)


class Reading:
    """The rows of `view` in a connection, which `table` holds."""

    def __init__(self, connection: Any, view: str, table: tf.TableFiles | ts.Scan) -> None:
        self._connection, self._view, self._table = connection, view, table
        self._scan: ts.Scan | None = None
        self._mapped: Mapping[str, Mapped] = {}
        self._zone = ""

    @property
    def scan(self) -> ts.Scan | None:
        """A table that every query reads for itself."""
        return self._scan

    @property
    def is_whole(self) -> bool:
        """Whether all rows were read into the connection's database."""
        return self._scan is None and not (isinstance(self._table, tf.TableFiles) and self._table.is_lazy)

    def settle(self, mapped: Mapping[str, Mapped], zone: str, check: Callable[[], None]) -> None:
        """Decide by the mapped time how a table that is no file is read, and `check` types, whose messages show some rows."""
        table, view = self._table, self._view
        self._mapped, self._zone = mapped, zone
        if isinstance(table, tf.TableFiles):
            return check()
        self._connection.unregister(view)
        time, day = mapped["timestamp"], date(1970, 1, 1)
        if not (ts.can_bound(time) or ts.day_bounds(mapped.get("day"), day, day)):
            reason = f"source.columns.timestamp ({time.text!r}) is no plain column of times: each verb reads all rows once"
            _log.warning("table_read_whole", setting=table.setting, reason=reason)
            ts.load(self._connection, view, table, table.rows())
            return check()
        self._scan = table
        try:
            needs_zone = not zone and (time.is_naive or time.is_text)  # Only a value says whether one is missing.
            with self._registered(self._some_rows(table) if needs_zone else table.schema.empty_table()):
                return check()
        except ConfigError:
            with self._registered(self._some_rows(table)):
                check()
            raise

    @staticmethod
    def _some_rows(table: ts.Scan) -> pa.Table:
        with table.sample(_TYPE_ROWS) as reader:
            return reader.read_all()

    def bounds(self, first: datetime | None, end: datetime | None, span: Sequence[date] = ()) -> list[ts.Bound]:
        """What a time in [first, end), of the days of `span`, says of the table's columns."""
        if self._scan is None:
            return []
        bounds = ts.time_bounds(self._mapped["timestamp"], self._zone, first, end)
        if span:
            bounds += ts.day_bounds(self._mapped.get("day"), span[0] - timedelta(days=1), span[-1] + timedelta(days=1))
        return bounds

    @contextmanager
    def rows(
        self, bounds: Sequence[ts.Bound], columns: Sequence[str] | None = None, parts: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Show the rows within bounds, for one query."""
        if self._scan is None:
            yield
            return
        with self._scan.rows(columns, bounds, parts) as reader, self._registered(reader):
            yield

    @contextmanager
    def _registered(self, rows: Any) -> Iterator[None]:
        self._connection.register(self._view, rows)
        try:
            yield
        finally:
            # A stream that was read is empty: a query that forgets to ask for rows must fail.
            self._connection.unregister(self._view)
