"""An Iceberg table: files whose statistics, in the table's manifests, say what they hold. One file is in memory at a time."""

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from limaml.errors import ConfigError, DataError, LimamlError, StoreError
from limaml.events import table_scans as ts
from limaml.events.table_scans import Bound


class IcebergScan:
    """The newest snapshot of an Iceberg table when it was opened."""

    kind = "an Iceberg table"
    remedy = "correct the table, or wait until it can be reached"

    def __init__(self, setting: str, location: str) -> None:
        """Raises ConfigError if the package or the catalogue is missing, DataError if there is no such table."""
        ts.installed(setting, "pyiceberg.io.pyarrow")
        self.setting, self.unreadable, self._location = setting, dict[str, str](), location
        self._table = self._in_place() if "/" in location else self._in_catalogue()
        self.schema = self._arrow(self._table.schema())

    def rows(
        self, columns: Sequence[str] | None = None, bounds: Sequence[Bound] = (), parts: Sequence[int] | None = None
    ) -> AbstractContextManager[pa.RecordBatchReader]:
        scan = self._table.scan(
            row_filter=self._condition(bounds), selected_fields=("*",) if columns is None else tuple(columns)
        )
        schema = self._arrow(scan.projection())
        # In the order in which it was asked for: a projection keeps the table's.
        schema = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        return ts.streamed(schema, self._batches(scan, schema, parts), self._failed)

    def sample(self, num_rows: int) -> AbstractContextManager[pa.RecordBatchReader]:
        scan = self._table.scan()
        batches = ts.sampled(range(len(self._tasks)), lambda parts: self._batches(scan, self.schema, parts), num_rows)
        return ts.streamed(self.schema, batches, self._failed)

    def spans(self, column: str, bounds: Sequence[Bound]) -> pa.Table:  # noqa: ARG002
        from pyiceberg.conversions import from_bytes

        field = self._table.schema().find_field(column)
        spans: list[tuple[Any, Any, int | None]] = []
        for task in self._tasks:
            file = task.file
            ends: list[Any] = [(stored or {}).get(field.field_id) for stored in (file.lower_bounds, file.upper_bounds)]
            nulls = (file.null_value_counts or {}).get(field.field_id)
            if task.delete_files or nulls is None or None in ends:
                spans.append((None, None, None))
            else:
                low, high = (from_bytes(field.field_type, end) for end in ends)
                spans.append((low, high, file.record_count - nulls))
        kind = self.schema.field(column).type
        return pa.table(
            {
                "part": pa.array(range(len(spans)), pa.int32()),
                "low": pa.array([low for low, _, _ in spans], kind),
                "high": pa.array([high for _, high, _ in spans], kind),
                "num_rows": pa.array([num_rows for _, _, num_rows in spans], pa.int64()),
            }
        )

    def _in_place(self) -> Any:
        from pyiceberg.table import StaticTable

        url, store = ts.object_store(self._location)
        properties = {f"s3.{name}": value for name, value in store.items() if name in ("endpoint", "region")}
        try:
            return StaticTable.from_metadata(url.rstrip("/"), properties)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"{self.setting} must name a metadata file of {self.kind} (….metadata.json), or a folder with "
                f"metadata/version-hint.text, got {ts.redacted(url)}: {ts.told(error)}; correct it, or name a catalogue"
            ) from error
        except Exception as error:
            raise self._failed(error) from error

    def _in_catalogue(self) -> Any:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

        catalogue, _, name = self._location.partition(".")
        if "." not in name:
            raise ConfigError(
                f"{self.setting} must be iceberg:CATALOGUE.NAMESPACE.TABLE or iceberg:PATH_OR_URL, got {self._location!r}; "
                "write one of them"
            )
        try:
            opened = load_catalog(catalogue)
        except Exception as error:
            raise ConfigError(
                f"{self.setting} must name a catalogue that pyiceberg can open, got {catalogue!r}: {ts.told(error)}; describe "
                f"it in .pyiceberg.yaml or the environment (PYICEBERG_CATALOG__{catalogue.upper()}__URI)"
            ) from error
        try:
            return opened.load_table(name)
        except (NoSuchTableError, NoSuchNamespaceError) as error:
            raise DataError(
                f"{self.setting} must name {self.kind} of {catalogue}, got {name!r}: {ts.told(error)}; correct it"
            ) from error
        except Exception as error:
            raise self._failed(error) from error

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        """All files; parts are their numbers."""
        return self._planned(self._table.scan())

    def _planned(self, scan: Any) -> list[Any]:
        try:
            return sorted(scan.plan_files(), key=lambda task: task.file.file_path)
        except Exception as error:
            raise self._failed(error) from error

    def _batches(self, scan: Any, schema: pa.Schema, parts: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
        from pyiceberg.io.pyarrow import ArrowScan

        table = self._table
        arrow = ArrowScan(table.metadata, table.io, scan.projection(), scan.row_filter)
        for task in self._planned(scan) if parts is None else [self._tasks[part] for part in parts]:
            for batch in arrow.to_record_batches([task]):  # Several at once are read at once, and wait in memory.
                yield batch.select(schema.names).cast(schema)

    def _condition(self, bounds: Sequence[Bound]) -> Any:
        ex: Any = importlib.import_module("pyiceberg.expressions")  # Its types do not say that names and values may be plain.
        found: Any = ex.AlwaysTrue()
        for bound in bounds:
            inside: Any = ex.AlwaysFalse() if bound.ranges else ex.IsNull(bound.column)
            for low, high in bound.ranges:
                of_range: Any = ex.NotNull(bound.column)
                if low is not None:
                    of_range = ex.And(of_range, ex.GreaterThanOrEqual(bound.column, self._literal(bound.column, low, 0)))
                if high is not None:
                    of_range = ex.And(of_range, ex.LessThanOrEqual(bound.column, self._literal(bound.column, high, 1)))
                inside = ex.Or(inside, of_range)
            found = ex.And(found, inside)
        return found

    def _literal(self, column: str, value: Any, up: int) -> Any:
        if isinstance(value, datetime):
            # The day's last microsecond has a thousand nanoseconds.
            nanos = self.schema.field(column).type.unit == "ns"
            return (value + timedelta(microseconds=up * nanos)).isoformat()
        return value.isoformat() if isinstance(value, date) else value

    @staticmethod
    def _arrow(schema: Any) -> pa.Schema:
        from pyiceberg.io.pyarrow import schema_to_pyarrow

        return schema_to_pyarrow(schema, include_field_ids=False).remove_metadata()

    def _failed(self, error: Exception) -> LimamlError:
        return StoreError(
            f"{self.setting} must be {self.kind} that can be read, got {ts.redacted(self._location)}: {ts.told(error)}; "
            "check the address, the table and the credentials in the environment, then try again"
        )
