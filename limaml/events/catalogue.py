"""Known users and items: as they are now, and every change with the day it was delivered.

catalogue/{users,items}.parquet              as last delivered
catalogue_history/{user,item}/dt=D.parquet   rows new or changed in the delivery of day D; stamped with that day's end
"""

import functools
from dataclasses import dataclass
from datetime import date
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import FeatureConfig
from limaml.errors import DataError
from limaml.events.casting import with_types
from limaml.events.day_store import partition_day
from limaml.io.storage import Storage


@dataclass(frozen=True)
class Kind:
    """How one kind of entity is stored: its catalogue, its snapshots, and what is declared of it."""

    name: str
    catalogue: schema.Table
    snapshots: schema.Table
    features: tuple[FeatureConfig, ...]

    @property
    def key(self) -> str:
        return f"{self.name}_id"

    @property
    def file(self) -> str:
        return _file(self.name)

    @property
    def static(self) -> tuple[str, ...]:
        """Catalogue columns that are features."""
        return tuple(feature.name for feature in self.features if not feature.aggregate)


@functools.cache
def kinds(tables: schema.Tables) -> dict[str, Kind]:
    """Users and items, by name."""
    entities: tuple[Literal["user", "item"], ...] = ("user", "item")
    return {name: Kind(name, tables.catalogue(name), tables.snapshots(name), tables.of(name)) for name in entities}


def declared(kind: Kind, tables: schema.Tables, delivered: pa.Table) -> tuple[pa.Table, list[str]]:
    """A delivered catalogue in the declared columns and, where that loses nothing, types; and columns that no feature reads."""
    source = {f.name: f.source_column for f in tables.features if f.entity == kind.name and not f.aggregate}
    wanted = {name: source.get(name, name) for name in kind.catalogue.names}
    there = {name: column for name, column in wanted.items() if column in delivered.column_names}
    ignored = sorted(set(delivered.column_names) - set(there.values()))
    table = pa.Table.from_arrays([delivered[column] for column in there.values()], names=list(there))
    return with_types(table, kind.catalogue), ignored


def read(storage: Storage, kind: str) -> pa.Table:
    """The catalogue of `kind` ('user' or 'item') as last delivered. Raises DataError before the first ingestion."""
    if not storage.exists(_file(kind)):
        raise DataError(f"{storage.path(_file(kind))} must exist, but nothing was ingested yet; run limaml ingest first")
    return storage.read_table(_file(kind))


def _file(kind: str) -> str:
    return f"catalogue/{kind}s.parquet"


def history(storage: Storage, kind: Kind, since: int | None = None) -> pa.Table:
    """Every catalogue row delivered (from the day `since` on), with `day` (days since the epoch) of its delivery."""
    base = f"catalogue_history/{kind.name}"
    tables = [
        table.append_column("day", pa.array([_number(name)] * table.num_rows, pa.int64()))
        for name in storage.list(base)
        if since is None or _number(name) >= since
        for table in [storage.read_table(f"{base}/{name}")]
    ]
    empty = kind.catalogue.arrow.append(pa.field("day", pa.int64())).empty_table()
    return pa.concat_tables([empty, *[table.cast(empty.schema) for table in tables]])


def first_day(storage: Storage, kind: Kind) -> date | None:
    """The day under which the first delivery is recorded; None before it."""
    names = storage.list(f"catalogue_history/{kind.name}")
    return partition_day(names[0]) if names else None


def record(storage: Storage, kind: Kind, delivered: pa.Table, day: date) -> bool:
    """Keep a delivered catalogue and, under `day`, its rows that are new or changed; returns whether there were any.

    New or changed is what was not delivered like this before it. Idempotent: what is recorded stays as it is.
    """
    delivered = delivered.select(kind.catalogue.names).cast(kind.catalogue.arrow)
    known = storage.read_table(kind.file) if storage.exists(kind.file) else kind.catalogue.arrow.empty_table()
    with duckdb.connect() as connection:
        connection.register("delivered", delivered)
        connection.register("known", known)
        columns = ", ".join(kind.catalogue.names)
        changed = connection.sql(
            f"SELECT {columns} FROM delivered EXCEPT SELECT {columns} FROM known ORDER BY {kind.key}"
        ).to_arrow_table()
    if changed.num_rows:
        path = f"catalogue_history/{kind.name}/dt={day.isoformat()}.parquet"
        changed = changed.cast(kind.catalogue.arrow)
        if storage.exists(path):
            kept = storage.read_table(path)
            replaced = pc.is_in(kept[kind.key], value_set=changed[kind.key].combine_chunks())
            changed = pa.concat_tables([kept.filter(pc.invert(replaced)), changed]).sort_by(kind.key)
        storage.write_table(path, changed)
    storage.write_table(kind.file, delivered.sort_by(kind.key))
    return bool(changed.num_rows)


def _number(name: str) -> int:
    return (partition_day(name) - date(1970, 1, 1)).days
