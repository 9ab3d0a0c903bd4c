"""The newest rows of every entity, so that adaptation need not read all logged days.

recent/<entity column>/current.json                the base in use: its folder, its last day, what it was made from
recent/<entity column>/base-<digest>/bucket=NN.parquet   the last N logged rows of every entity through that day, sorted

A base with the logged days after it holds the last N rows of an entity before any instant after the base's last day. It moves
on once many days have followed it, and then leaves the newest ones open: a correction of those, or an instant just before the
newest, needs no other base. Where a covered day has changed, the base is made again from all days. Whatever is missing or does
not fit is no error: adaptation then reads all logged days, and gets the same rows.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from functools import cached_property
from itertools import groupby, pairwise
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from limaml import schema
from limaml.config import Config
from limaml.errors import DataError
from limaml.events.day_store import partition_day
from limaml.io.locks import Lock, exclusive
from limaml.io.storage import Storage, whole_files
from limaml.telemetry import get_logger

NUM_BUCKETS = 16
"""A fill in 2, 4, 8 or 16 shards reads the buckets of its shard only."""
_MOST_OPEN_DAYS = 14
"""Logged days that are read beside a base before it moves on: a move writes the rows of all entities."""
_KEPT_OPEN_DAYS = 7
"""Days that a move leaves open; what is corrected is mostly this young."""
_LOCK_WAIT_S = 600.0
"""A base made from scratch reads every logged row."""
_READ_ROWS = 65_536
_DUCKDB = {"threads": 1, "memory_limit": "400MB"}
"""What does not fit is sorted on disk; the other core is adapting meanwhile."""
_log = get_logger(__name__)


@dataclass(frozen=True)
class _Base:
    """What `current.json` says."""

    folder: str
    through: str
    support_rows: int
    columns: list[str]
    made_from: str
    """Digest of names, sizes and times of the logged files it covers."""

    @property
    def last_day(self) -> date:
        return date.fromisoformat(self.through)


@dataclass(frozen=True)
class Recent:
    """The last rows of the entities of one column, before one instant."""

    storage: Storage
    tables: schema.Tables
    entity_column: str
    as_of: datetime
    support_rows: int

    @property
    def columns(self) -> pa.Schema:
        """What adaptation reads, and the event's id, which orders rows of one instant."""
        logged = self.tables.logged_events.arrow
        return pa.schema([logged.field(name) for name in [*self.tables.support_columns(self.entity_column), "event_id"]])

    def files(self, entities: Sequence[str]) -> list[str]:
        """Files that hold the last `support_rows` rows of `entities` before `as_of`, among others.

        Raises DataError if nothing is logged before `as_of`.
        """
        require_logged(self.storage, list(self._logged))
        base = self._base
        if base is None:
            return list(self._logged)
        wanted = {_bucket(shard_of(entity, NUM_BUCKETS)) for entity in entities}
        buckets = [f"{base.folder}/{name}" for name in self.storage.list(base.folder) if name in wanted]
        return buckets + self._after(base)

    def move_on(self, cfg: Config) -> None:
        """Make a base, or the next one, where too many logged days would be read. One process does, others wait for it."""
        if not self._is_due:
            return
        with exclusive(cfg, f"recent-{self.entity_column}", _LOCK_WAIT_S) as lock:
            now = Recent(self.storage, self.tables, self.entity_column, self.as_of, self.support_rows)
            if now._is_due:
                now._make(lock)

    @property
    def _is_due(self) -> bool:
        open_days = self._after(self._base) if self._base else self._logged
        # A base that covers later days stays: this instant is an older one than those that follow.
        return len(open_days) > _MOST_OPEN_DAYS and (not self._found or schema.day_end(self._found.last_day) <= self.as_of)

    def _make(self, lock: Lock) -> None:
        base, covered = self._base, list(self._logged)[:-_KEPT_OPEN_DAYS]
        rows = max(self.support_rows, self._found.support_rows) if self._found else self.support_rows
        made_from, through = self._digest(covered), _file_day(covered[-1])
        columns = _described(self.columns)
        digest = hashlib.sha256(json.dumps([made_from, rows, columns]).encode()).hexdigest()[:16]
        folder = f"{self._folder}/base-{digest}"
        read = covered
        if base:
            buckets = [f"{base.folder}/{name}" for name in self.storage.list(base.folder)]
            read = buckets + [path for path in covered if _file_day(path) > base.last_day]
        for bucket, batches in groupby(self._last_rows(read, rows), key=lambda part: part[0]):
            lock.check()
            reader = pa.RecordBatchReader.from_batches(self.columns, (batch for _, batch in batches))
            self.storage.write_batches(f"{folder}/{_bucket(bucket)}", reader)
        lock.check()
        self.storage.write_json(self._current, asdict(_Base(folder, through.isoformat(), rows, columns, made_from)))
        # Somebody may still be reading the base that this one replaces.
        kept = {folder, self._found.folder if self._found else folder}
        for name in self.storage.list(self._folder):
            if name.startswith("base-") and f"{self._folder}/{name}" not in kept:
                lock.check()
                self.storage.delete_dir(f"{self._folder}/{name}")
        _log.info("recent_rows_moved", of=self.entity_column, through=through.isoformat(), from_scratch=base is None)

    def _last_rows(self, files: list[str], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The last `rows` rows of every entity, by bucket, then by (entity, timestamp, event id)."""
        entity, names = self.entity_column, ", ".join(self.columns.names)
        with logged_rows(self.storage, files, pa.schema([self.columns.field(entity)])) as connection:
            found = connection.sql(f"SELECT DISTINCT {entity} FROM logged").to_arrow_table()[entity].drop_null()  # noqa: S608
        buckets = pa.array([shard_of(each, NUM_BUCKETS) for each in found.to_pylist()], pa.int64())
        query = (
            f"SELECT bucket, {names} FROM logged JOIN bucket_of USING ({entity})"  # noqa: S608  names of the schema
            f" QUALIFY row_number() OVER (PARTITION BY {entity} ORDER BY timestamp DESC, event_id DESC) <= $rows"
            f" ORDER BY bucket, {entity}, timestamp, event_id"
        )
        with logged_rows(self.storage, files, self.columns) as connection:
            connection.register("bucket_of", pa.table({entity: found, "bucket": buckets}))
            for batch in connection.sql(query, params={"rows": rows}).to_arrow_reader(_READ_ROWS):
                numbers = batch["bucket"].to_numpy()
                cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
                for start, stop in pairwise(cuts):
                    part = batch.slice(start, stop - start)
                    yield int(numbers[start]), part.select(self.columns.names).cast(self.columns)

    @cached_property
    def _logged(self) -> dict[str, str]:
        """Logged files up to the last day that can hold an event before `as_of`, in order, and what tells them from others."""
        last = _last_day(self.as_of)
        return {path: stamp for path, stamp in self.storage.stamps("logged").items() if _file_day(path) <= last}

    @cached_property
    def _found(self) -> _Base | None:
        return _Base(**self.storage.read_json(self._current)) if self.storage.exists(self._current) else None

    @cached_property
    def _base(self) -> _Base | None:
        """The base, if it holds what is asked for and the days it covers are what they were."""
        base = self._found
        fits = (
            base is not None
            and schema.day_end(base.last_day) <= self.as_of
            and base.support_rows >= self.support_rows
            and base.columns == _described(self.columns)
            and base.made_from == self._digest([path for path in self._logged if _file_day(path) <= base.last_day])
        )
        return base if fits else None

    def _after(self, base: _Base) -> list[str]:
        return [path for path in self._logged if _file_day(path) > base.last_day]

    def _digest(self, files: Sequence[str]) -> str:
        stamps = [[path, self._logged[path]] for path in files]
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()

    @property
    def _folder(self) -> str:
        return f"recent/{self.entity_column}"

    @property
    def _current(self) -> str:
        return f"{self._folder}/current.json"


def shard_of(entity: str, num_shards: int) -> int:
    """The shard an entity belongs to: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(entity.encode(), digest_size=8).digest(), "big") % num_shards


def require_logged(storage: Storage, files: Sequence[str]) -> None:
    """Raises DataError if there are no logged files to adapt from."""
    if not files:
        raise DataError(f"{storage.path('logged')} must hold a partition to adapt from, got none; run limaml ingest first")


@contextmanager
def logged_rows(
    storage: Storage, files: Sequence[str], columns: pa.Schema, entity_column: str = "", span: tuple[str, str] | None = None
) -> Iterator[Any]:
    """A duckdb connection that sees these columns of `files` as `logged`, to be read once, and all of them whatever is
    asked; of a `span` of entities, first and last, no other rows are read than those of row groups that may hold some.
    """
    import duckdb

    with (
        TemporaryDirectory(prefix="limaml-sort-") as folder,
        duckdb.connect(config=_DUCKDB | {"temp_directory": folder}) as connection,
    ):
        connection.execute("SET TimeZone = 'UTC'")
        # Joins as they are written: duckdb takes a scanner for an empty table, and would put all its rows into the hash table.
        connection.execute("SET disabled_optimizers = 'build_side_probe_side,join_order'")
        connection.register("logged", storage.scanner(files, columns, entity_column, span))
        with whole_files("It must be as it was written; ingest its day again, or delete it if it lies under recent/."):
            yield connection


def _last_day(as_of: datetime) -> date:
    """The last day that can hold an event before `as_of`."""
    return (as_of - timedelta(microseconds=1)).date()


def _file_day(path: str) -> date:
    """The day of `logged/dt=D/...`."""
    return partition_day(path.split("/")[1])


def _bucket(number: int) -> str:
    return f"bucket={number:02d}.parquet"


def _described(columns: pa.Schema) -> list[str]:
    return [f"{field.name} {field.type}" for field in columns]
