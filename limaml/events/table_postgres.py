"""A table or view of Postgres: a day's bounds go into the query, so that the server uses its index, and rows come as a stream.

Every query has a connection of its own: a verb may think for minutes between two, and none keeps a transaction open.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pyarrow as pa

from limaml.errors import ConfigError, DataError, LimamlError, StoreError
from limaml.events import table_scans as ts
from limaml.events.table_files import literal, quoted
from limaml.events.table_scans import Bound

_SECRET = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_CONNECT_TIMEOUT_S = "10"
"""libpq's own is to wait for ever."""
_BATCH_BYTES = 4 << 20
_TIMES = {"date", "timestamp", "timestamptz"}
_PLAIN = {"bool", "int2", "int4", "int8", "float4", "float8", "text", "varchar"}
_PLAIN |= {f"_{name}" for name in _PLAIN}
_AS_TEXT = {"bpchar", "name", "uuid", "json", "jsonb", "citext", "inet", "cidr", "macaddr", "vector", "halfvec"}
_AS_TEXTS = {"_bpchar", "_name", "_uuid", "_citext"}
_COLUMNS = """
    SELECT a.attname::text, coalesce(b.typname, t.typname)::text, coalesce(b.typtype, t.typtype)::text,
        format_type(a.atttypid, a.atttypmod), CASE WHEN b.oid IS NULL THEN a.atttypmod ELSE t.typtypmod END::bigint
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_type b ON t.typtype = 'd' AND b.oid = t.typbasetype
    WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
_QUARTERS_OF_AN_HOUR = 900
"""Seconds: every zone's days begin at a whole one."""


class PostgresScan:
    """What `postgresql://USER:${NAME}@HOST/DATABASE?table=SCHEMA.TABLE` names."""

    kind = "a table of Postgres"
    remedy = "correct the table, or wait until the server can be reached"

    def __init__(self, setting: str, location: str) -> None:
        """Raises ConfigError, DataError or StoreError, which say apart what is wrong: package, address, password or table."""
        self._dbapi = ts.installed(setting, "adbc_driver_postgresql.dbapi")
        self.setting, self._location = setting, location
        self._secrets: list[str] = []
        self._url, table = self._address(location)
        oid, self._table, kind, estimate = self._relation(table)
        self._can_sample, self._estimate = kind in ("r", "p", "m"), int(estimate or 0)
        described = self._query(_COLUMNS.format(oid=int(oid)))
        self._types = {name: typname for name, typname, *_ in described}
        read = {name: _read(name, typname, typtype, modifier) for name, typname, typtype, _, modifier in described}
        self._read = {name: sql for name, sql in read.items() if sql}
        self.unreadable = {name: shown for name, _, _, shown, _ in described if not read[name]}
        if not self._read:
            raise DataError(
                f"{setting} must have columns that can be read, got {table!r} with {self.unreadable}; name another table"
            )
        with self._reader(f"{self.statement()} LIMIT 0") as reader:
            self.schema = reader.schema

    def rows(
        self,
        columns: Sequence[str] | None = None,
        bounds: Sequence[Bound] = (),
        parts: Sequence[int] | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[pa.RecordBatchReader]:
        return self._reader(self.statement(columns, bounds))

    def sample(self, num_rows: int) -> AbstractContextManager[pa.RecordBatchReader]:
        statement = self.statement()
        if self._can_sample and self._estimate > 2 * num_rows:
            statement += f" TABLESAMPLE SYSTEM ({100 * num_rows / self._estimate:.6f}) REPEATABLE (1)"
            num_rows *= 2  # The estimate may be old; a limit that is reached would cut off the table's end.
        return self._reader(f"{statement} LIMIT {num_rows}")

    def spans(self, column: str, bounds: Sequence[Bound]) -> pa.Table:
        """The server counts by quarters of an hour, of which each has one day in every zone."""
        name, typname = quoted(column), self._types[column]
        epoch = {"timestamp": "TIMESTAMP '2000-01-01'", "timestamptz": "TIMESTAMPTZ '2000-01-01 00:00:00+00'"}.get(typname)
        if epoch:
            bins = f"date_bin('{_QUARTERS_OF_AN_HOUR} seconds', {name}, {epoch})"
        elif typname == "date":
            bins = name
        else:  # By the unit that its size says: `limaml.events.table_columns`.
            units = {"1e11": "1e0", "1e14": "1e3", "1e17": "1e6"}.items()
            width = f"CASE {' '.join(f'WHEN abs({name}) < {end} THEN {width}' for end, width in units)} ELSE 1e9 END"
            bins = f"{width}, floor({name} / ({width} * {_QUARTERS_OF_AN_HOUR}))"
        where = self._where([*bounds, Bound(column, ((None, None),))])
        statement = f"SELECT min({name}) AS low, count(*) AS num_rows FROM {self._table}{where} GROUP BY {bins}"  # noqa: S608
        with self._reader(statement) as reader:
            found = reader.read_all()
        low = found["low"].cast(self.schema.field(column).type)
        parts = pa.array(range(found.num_rows), pa.int32())
        return pa.table({"part": parts, "low": low, "high": low, "num_rows": found["num_rows"]})

    def statement(self, columns: Sequence[str] | None = None, bounds: Sequence[Bound] = ()) -> str:
        """The query of `rows`."""
        names = list(self._read) if columns is None else columns
        selected = ", ".join(f"{self._read[name]} AS {quoted(name)}" for name in names)
        return f"SELECT {selected} FROM {self._table}{self._where(bounds)}"  # noqa: S608  the server quoted it

    def _where(self, bounds: Sequence[Bound]) -> str:
        """On the columns as they are, so that their indexes serve."""
        conditions = []
        for bound in bounds:
            column, timed = quoted(bound.column), self._types[bound.column] in _TIMES
            inside = [] if bound.ranges else [f"{column} IS NULL"]
            if timed and not bound.ranges:
                inside += [f"{column} = 'infinity'", f"{column} = '-infinity'"]
            for low, high in bound.ranges:
                ends = [f"{column} {sign} {_value(end)}" for sign, end in ((">=", low), ("<=", high)) if end is not None]
                if timed:
                    ends += [f"{column} {sign} '{end}'" for sign, end in ((">", "-infinity"), ("<", "infinity"))]
                inside.append(" AND ".join(ends) or f"{column} IS NOT NULL")
            conditions.append(f"({' OR '.join(f'({one})' for one in inside)})")
        return f" WHERE {' AND '.join(conditions)}" if conditions else ""

    # The connection.

    def _address(self, location: str) -> tuple[str, str]:
        """libpq's URL with secrets filled in, and the table's name."""
        split = urlsplit(location)
        asked = dict(parse_qsl(split.query, keep_blank_values=True))
        table = asked.pop("table", "")
        if not table:
            raise ConfigError(
                f"{self.setting} must name a table, got {self._shown}; write postgresql://HOST/DATABASE?table=SCHEMA.TABLE"
            )
        if "PGCONNECT_TIMEOUT" not in os.environ:
            asked.setdefault("connect_timeout", _CONNECT_TIMEOUT_S)
        asked.setdefault("application_name", "limaml")
        netloc = _SECRET.sub(lambda found: quote(self._secret(found[1]), safe=""), split.netloc)
        query = {name: _SECRET.sub(lambda found: self._secret(found[1]), value) for name, value in asked.items()}
        return f"postgresql://{netloc}{split.path}?{urlencode(query, quote_via=quote)}", table

    def _secret(self, name: str) -> str:
        if name not in os.environ:
            raise ConfigError(f"{self.setting} refers to ${{{name}}}, which is not in the environment; set that variable")
        value = os.environ[name]
        self._secrets += [value, quote(value, safe="")] if value else []
        return value

    def _relation(self, table: str) -> Sequence[Any]:
        try:
            found = self._query(
                "SELECT c.oid::bigint, c.oid::regclass::text, c.relkind::text, c.reltuples::bigint FROM pg_class c "  # noqa: S608
                f"WHERE c.oid = to_regclass({literal(table)}) AND c.relkind IN ('r', 'p', 'm', 'v', 'f')"
            )
        except DataError as error:
            raise DataError(f"{self.setting} must name a table as SCHEMA.TABLE, got {table!r}: {error}") from error
        if not found:
            raise DataError(
                f"{self.setting} must name a table or view that its user sees, got {table!r}, which is not there in "
                f"{self._shown}; write SCHEMA.TABLE, in double quotes what is not lower case"
            )
        return found[0]

    @property
    def _shown(self) -> str:
        return ts.redacted(self._location)

    def _query(self, statement: str) -> list[tuple[Any, ...]]:
        with self._reader(statement) as reader:
            return list(zip(*(column.to_pylist() for column in reader.read_all().columns), strict=True))

    @contextmanager
    def _reader(self, statement: str) -> Iterator[pa.RecordBatchReader]:
        try:
            with self._dbapi.connect(self._url, autocommit=True) as connection, connection.cursor() as cursor:
                for setting in ("TimeZone = 'UTC'", "default_transaction_read_only = on"):
                    cursor.execute(f"SET {setting}")
                cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
                cursor.execute(statement)
                with cursor.fetch_record_batch() as reader:
                    schema = reader.schema.remove_metadata()
                    batches = (batch.replace_schema_metadata(None) for batch in reader)
                    with ts.streamed(schema, batches, self._failed) as stream:
                        yield stream
        except self._dbapi.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> LimamlError:
        state = getattr(error, "sqlstate", None) or ""
        said = str(error).split("\nQuery was:")[0]
        for value in self._secrets:
            said = said.replace(value, "***")
        said = ts.told(ValueError(re.sub(r"^[A-Z_]+: (\[libpq\] )?", "", said)))
        if re.search(r"authentication failed|no password supplied", said) or state.startswith("28"):
            return ConfigError(
                f"{self.setting} must be read by a user and password that the server accepts, got {self._shown}: {said}; "
                "correct the environment's variable that the URL names, or PGPASSWORD, or the file in PGPASSFILE"
            )
        if state == "42501":
            return ConfigError(
                f"{self.setting} must be a table that its user may read, got {self._shown}: {said}; grant SELECT on "
                "it, and USAGE on its schema"
            )
        # In the midst of rows no code is told, but a server that ends says FATAL, and one that is busy cancels.
        if state.startswith(("22", "42")) or (re.search(r"\bERROR: (?!cancel)", said) and not state):
            return DataError(
                f"{self.setting} must be {self.kind} that can be read, got {self._shown}: {said}; correct the table"
            )
        return StoreError(
            f"{self.setting} must be on a server that answers, got {self._shown}: {said}; check the address and the server, "
            "then try again"
        )


def _read(name: str, typname: str, typtype: str, modifier: int) -> str:
    """SQL that gives a column in a type that Arrow has; empty if there is none."""
    column = quoted(name)
    if typtype == "e" or typname in _AS_TEXT:
        return f"{column}::text"
    if typname in _AS_TEXTS:
        return f"{column}::text[]"
    if typname in _TIMES:
        return f"CASE WHEN isfinite({column}) THEN {column}::{typname} END"  # Arrow has no infinity: it counts as no time.
    if typname == "numeric":
        # Whole numbers that fit stay whole, since they may be ids.
        precision, scale = ((modifier - 4) >> 16) & 0xFFFF, (modifier - 4) & 0x7FF
        return f"{column}::{'int8' if modifier >= 4 and scale == 0 and precision <= 18 else 'float8'}"
    if typname == "_numeric":
        return f"{column}::float8[]"
    return f"{column}::{typname.removeprefix('_')}{'[]' if typname.startswith('_') else ''}" if typname in _PLAIN else ""


def _value(end: Any) -> str:
    if isinstance(end, datetime):
        if end.tzinfo is None:
            return f"TIMESTAMP '{end:%Y-%m-%d %H:%M:%S.%f}'"
        return f"TIMESTAMPTZ '{end.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00'"
    return str(end) if isinstance(end, int) else f"DATE '{end}'"
