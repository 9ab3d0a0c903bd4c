"""Tables that are not files: in Postgres, Delta or Iceberg, read as streams of Arrow by their own packages.

duckdb's extensions for them do not fit its version, and none is fetched. So a query's bounds on plain columns are handed to
the table's own index or statistics, and duckdb, which then reads the stream, applies the whole condition.
"""

import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Protocol
from urllib.parse import parse_qs

import duckdb
import pyarrow as pa

from limaml import telemetry
from limaml.config import SourceConfig
from limaml.errors import ConfigError, LimamlError
from limaml.events import table_columns as tc
from limaml.events import table_files as tf
from limaml.events.table_columns import Mapped

POSTGRES, DELTA, ICEBERG = ("postgresql://", "postgres://"), "delta:", "iceberg:"
_SAMPLE_PARTS = 20
_STREAM = "limaml_stream"
_log = telemetry.get_logger(__name__)


@dataclass(frozen=True)
class Bound:
    """Rows whose `column` lies in one of the closed `ranges`, None for no end; without ranges, rows where it is null."""

    column: str
    ranges: tuple[tuple[Any, Any], ...]


class Scan(tf.Table, Protocol):
    """A table that is read in parts. `setting` names it; `kind` and `remedy` are for messages."""

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Columns that are left out of `schema`, with their types."""
        ...

    def rows(
        self, columns: Sequence[str] | None = None, bounds: Sequence[Bound] = (), parts: Sequence[int] | None = None
    ) -> AbstractContextManager[pa.RecordBatchReader]:
        """At least the rows within all `bounds`, of all parts or of some, in bounded memory; readable once."""
        ...

    def sample(self, num_rows: int) -> AbstractContextManager[pa.RecordBatchReader]:
        """Some rows, about so many if there are more, without reading the rest where that can be."""
        ...

    def spans(self, column: str, bounds: Sequence[Bound]) -> pa.Table:
        """Of every part the numbered `part`, `low` and `high` of a column, and in `num_rows` how many are not null.

        They come from statistics or an index, and are null where they are not known. Rows out of `bounds` may be missing.
        """
        ...


def find(setting: str, location: str) -> "tf.TableFiles | Scan":
    """The files or the table that `location`, the value of `setting`, names."""
    if not is_scan(location):
        return tf.find(setting, location)
    if SourceConfig.holds_password(location):
        raise ConfigError(
            f"{setting} must hold no password or key, got {redacted(location)}; name an environment variable in its place, "
            "e.g. postgresql://shop:${SHOP_PASSWORD}@host/db?table=events"
        )
    if location.startswith(POSTGRES):
        from limaml.events.table_postgres import PostgresScan

        return PostgresScan(setting, location)
    if location.startswith(DELTA):
        from limaml.events.table_delta import DeltaScan

        return DeltaScan(setting, location.removeprefix(DELTA))
    from limaml.events.table_iceberg import IcebergScan

    return IcebergScan(setting, location.removeprefix(ICEBERG))


def is_scan(location: str) -> bool:
    return location.startswith((*POSTGRES, DELTA, ICEBERG))


def absolute(location: str) -> str:
    """A location that means the same in every folder."""
    prefix = next((p for p in (DELTA, ICEBERG) if location.startswith(p)), "")
    path = location.removeprefix(prefix)
    if "://" in path or (prefix == ICEBERG and "/" not in path):
        return location
    return prefix + os.path.abspath(path)


def installed(setting: str, module: str) -> Any:
    """A package that only some sources need. Raises ConfigError if it is missing: it names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{setting} must be read by the package {module.split('.')[0]}, which is not installed ({error}); "
            'install it: pip install "limaml[sources]"'
        ) from error


def redacted(text: str) -> str:
    """Without what may be a password or a key."""
    text = re.sub(r"//[^/\s@]*:[^/\s]*@", "//***@", text)
    return re.sub(r"((?:password|secret|token|key)[a-z_.-]*\s*=\s*)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


def told(error: Exception) -> str:
    """What a package says, in one line, without colours and secrets."""
    return tf.told(ValueError(redacted(re.sub(r"\x1b\[[0-9;]*m", "", str(error)))))


def object_store(url: str) -> tuple[str, dict[str, str]]:
    """An object store's URL without its query, and `endpoint`, `region` and `scheme` as `storage.root` has them there."""
    plain, _, query = url.partition("?")
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    found: dict[str, str] = {name: given[name] for name in ("region", "scheme") if name in given}
    if "endpoint_override" in given:
        found["endpoint"] = f"{given.get('scheme', 'https')}://{given['endpoint_override']}"
    return plain, found


@contextmanager
def streamed(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], failed: Callable[[Exception], LimamlError]
) -> Iterator[pa.RecordBatchReader]:
    """A reader of `batches`. An error in the midst of them is raised as `failed` says it, whatever who reads makes of it."""
    seen: list[Exception] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            seen.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(schema, watched())
    except Exception:
        if seen:
            raise failed(seen[0]) from seen[0]
        raise


def sampled(parts: Sequence[int], rows: Callable[[Sequence[int]], Iterator[pa.RecordBatch]], num_rows: int) -> Iterator[Any]:
    """The first rows of parts that lie evenly among all."""
    chosen = parts[:: max(1, len(parts) // _SAMPLE_PARTS)]
    for part in chosen:
        left = -(-num_rows // len(chosen))
        for batch in rows([part]):
            yield batch.slice(0, left)
            left -= batch.num_rows
            if left <= 0:
                break


def require_readable(connection: Any, scan: "tf.TableFiles | Scan", setting: str, text: str) -> None:
    """Raises ConfigError if an expression reads a column whose type cannot be read."""
    if isinstance(scan, tf.TableFiles) or not scan.unreadable or tc.find_column(scan.schema.names, text) is not None:
        return
    plain = tc.find_column(scan.unreadable, text)
    names = [plain] if plain is not None else tc.columns_read(connection, setting, text)
    name = next((found for name in names if (found := tc.find_column(scan.unreadable, name))), None)
    if name is not None:
        raise ConfigError(
            f"{setting} must name columns of a type that can be read, got {text!r} with the column {name} of type "
            f"{scan.unreadable[name]}; cast it in a view of the database, and name that"
        )


def opened(connection: Any, view: str, scan: Scan, *, whole: bool) -> dict[str, str]:
    """Make a table visible as `view`, its rows only if `whole`; returns its columns with their types."""
    if scan.unreadable:
        columns = ", ".join(f"{name} {kind}" for name, kind in scan.unreadable.items())
        _log.warning("columns_unreadable", setting=scan.setting, columns=columns)
    if whole:
        load(connection, view, scan, scan.rows())
    else:
        connection.register(view, scan.schema.empty_table())
    return columns_of(connection, view, scan)


def columns_of(connection: Any, view: str, scan: Scan) -> dict[str, str]:
    """Names and duckdb types of a view's columns. Raises DataError if duckdb has no such type."""
    try:
        return {name: str(kind) for name, kind, *_ in connection.execute(f"DESCRIBE {view}").fetchall()}
    except duckdb.Error as error:
        raise tf.unreadable(scan, error) from error


def load(connection: Any, view: str, scan: Scan, reading: AbstractContextManager[pa.RecordBatchReader]) -> None:
    """Keep what is read in the connection's database."""
    with reading as reader:
        connection.register(_STREAM, reader)
        try:
            connection.execute(f"CREATE OR REPLACE TABLE {view} AS SELECT * FROM {_STREAM}")  # noqa: S608
        except duckdb.Error as error:
            raise tf.unreadable(scan, error) from error
        finally:
            connection.unregister(_STREAM)


def can_bound(mapped: Mapped) -> bool:
    """Whether the day's bounds on a mapped time are bounds on a column."""
    numeric = mapped.is_whole or mapped.type in ("FLOAT", "DOUBLE")
    return mapped.is_plain and (numeric or mapped.is_naive or mapped.has_zone)


def time_bounds(mapped: Mapped, zone: str, first: datetime | None, end: datetime | None) -> list[Bound]:
    """What a time in [first, end) says of its column."""
    if not can_bound(mapped) or (first is None and end is None):
        return []
    ranges: list[tuple[Any, Any]] = list(tc.plain_ranges(mapped, zone, first, end))
    if mapped.type == "DATE":
        ranges = [(low and low.date(), high and high.date()) for low, high in ranges]
    return [Bound(mapped.columns[0], tuple(ranges))]


def day_bounds(mapped: Mapped | None, low: date, high: date) -> list[Bound]:
    """What days of `source.columns.day` in [low, high] say of its column."""
    if mapped is None or not mapped.is_plain or mapped.type != "DATE":
        return []
    return [Bound(mapped.columns[0], ((low, high),))]


def known_days(
    connection: Any, scan: Scan, time: Mapped, zone: str, bounds: Sequence[Bound]
) -> tuple[list[tuple[date, int]], list[int]]:
    """Days and rows of the parts that hold rows of one day each, and the other parts."""
    spans = scan.spans(time.columns[0], bounds)
    day = f"CAST(timezone('UTC', {tc.instant_sql(time, zone)}) AS DATE)"
    days = {}
    for end in ("low", "high"):
        connection.register("span_ends", pa.table({"part": spans["part"], time.columns[0]: spans[end]}))
        try:
            days[end] = connection.execute(f"SELECT {day} FROM span_ends ORDER BY part").fetchall()  # noqa: S608
        finally:
            connection.unregister("span_ends")
    known, rest = [], []
    for part, num_rows, (low,), (high,) in zip(
        spans["part"].to_pylist(), spans["num_rows"].to_pylist(), days["low"], days["high"], strict=True
    ):
        if low is not None and low == high and num_rows is not None:
            known.append((low, num_rows))
        elif num_rows != 0:
            rest.append(part)
    return known, rest
