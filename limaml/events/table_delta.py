"""A Delta table: files whose statistics, in the table's log, say what they hold."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds

from limaml.errors import DataError, LimamlError, StoreError
from limaml.events import table_scans as ts
from limaml.events.table_scans import Bound

_BATCH = {"batch_size": 65_536, "batch_readahead": 2, "fragment_readahead": 1}
"""Rows in memory follow this, not the table."""


class DeltaScan:
    """The newest version of a Delta table when it was opened."""

    kind = "a Delta table"
    remedy = "correct the table, or wait until it can be reached"

    def __init__(self, setting: str, location: str) -> None:
        """Raises ConfigError if the package is missing, DataError if there is no such table or it needs another reader."""
        deltalake = ts.installed(setting, "deltalake")
        self.setting, self.unreadable = setting, dict[str, str]()
        url, store = ts.object_store(location)
        self._location = url
        known = {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_REGION"}
        options = {known[name]: value for name, value in store.items() if name in known}
        options |= {"AWS_ALLOW_HTTP": "true"} if store.get("scheme") == "http" else {}
        exceptions = deltalake.exceptions
        try:
            table = deltalake.DeltaTable(url, storage_options=options or None)
            self._dataset = table.to_pyarrow_dataset()
            self._files = pa.table(table.get_add_actions(flatten=True))
        except exceptions.TableNotFoundError as error:
            raise DataError(f"{setting} must name {self.kind}, got {ts.redacted(url)}: {ts.told(error)}; correct it") from error
        except exceptions.DeltaProtocolError as error:
            raise DataError(
                f"{setting} must be a Delta table without deletion vectors and column mapping, got {ts.redacted(url)}: "
                f"{ts.told(error)}; write it without them (e.g. REORG TABLE … APPLY (PURGE)), or export it to Parquet"
            ) from error
        except (exceptions.DeltaError, OSError, pa.ArrowException) as error:
            raise self._failed(error) from error
        self._fragments = {fragment.path: fragment for fragment in self._dataset.get_fragments()}
        self.schema = self._dataset.schema

    def rows(
        self, columns: Sequence[str] | None = None, bounds: Sequence[Bound] = (), parts: Sequence[int] | None = None
    ) -> AbstractContextManager[pa.RecordBatchReader]:
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return ts.streamed(schema, self._batches(schema, bounds, parts), self._failed)

    def sample(self, num_rows: int) -> AbstractContextManager[pa.RecordBatchReader]:
        parts = range(self._files.num_rows)
        batches = ts.sampled(parts, lambda some: self._batches(self.schema, (), some), num_rows)
        return ts.streamed(self.schema, batches, self._failed)

    def spans(self, column: str, bounds: Sequence[Bound]) -> pa.Table:  # noqa: ARG002
        files, kind = self._files, self.schema.field(column).type
        num_rows = files["num_records"]

        def statistic(name: str, missing: pa.DataType) -> pa.ChunkedArray:
            return files[name].cast(missing) if name in files.column_names else pa.nulls(files.num_rows, missing)

        if f"partition.{column}" in files.column_names:
            low = high = statistic(f"partition.{column}", kind)
            nulls = pa.array([0 if value.is_valid else None for value in low], pa.int64())
        else:
            low, high = statistic(f"min.{column}", kind), statistic(f"max.{column}", kind)
            nulls = statistic(f"null_count.{column}", pa.int64())
        filled = pa.compute.subtract(num_rows, nulls)
        return pa.table({"part": pa.array(range(files.num_rows), pa.int32()), "low": low, "high": high, "num_rows": filled})

    def _batches(self, schema: pa.Schema, bounds: Sequence[Bound], parts: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
        dataset = self._dataset
        if parts is not None:
            paths = self._files["path"].take(pa.array(parts, pa.int32())).to_pylist()
            fragments = [self._fragments[path] for path in paths]
            dataset = pds.FileSystemDataset(fragments, self.schema, dataset.format, dataset.filesystem)
        yield from dataset.scanner(columns=schema.names, filter=self._condition(bounds), **_BATCH).to_batches()

    def _condition(self, bounds: Sequence[Bound]) -> Any:
        condition: Any = None
        for bound in bounds:
            field = pds.field(bound.column)
            found = None if bound.ranges else field.is_null()
            for low, high in bound.ranges:
                inside = field.is_valid()
                for value, compare in ((low, field.__ge__), (high, field.__le__)):
                    if value is not None:
                        inside &= compare(self._scalar(bound.column, value))
                found = inside if found is None else found | inside
            condition = found if condition is None else condition & found
        return condition

    def _scalar(self, column: str, value: Any) -> Any:
        kind = self.schema.field(column).type
        if isinstance(value, datetime):
            return pa.scalar(value, kind)
        return pa.scalar(float(value)) if pa.types.is_floating(kind) else pa.scalar(value)

    def _failed(self, error: Exception) -> LimamlError:
        return StoreError(
            f"{self.setting} must be {self.kind} that can be read, got {ts.redacted(self._location)}: {ts.told(error)}; "
            "check the address, the table and the credentials in the environment, then try again"
        )
