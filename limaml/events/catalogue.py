"""Known users and items: as they are now, and every change with the day it was delivered.

catalogue/{users,items}.parquet              as last delivered
catalogue_history/{user,item}/dt=D.parquet   rows new or changed in the delivery of day D; stamped with that day's end
catalogue_vectors/item/dt=D.parquet          vectors of the items that were new in the delivery of day D

An item's vectors stay what they first were, also when it is no longer delivered: a network, and every embedding adapted with
it, reads them for events of any age. Another vector, or one where there was none, is refused.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import FeatureConfig
from limaml.errors import DataError
from limaml.events.casting import with_types
from limaml.events.day_store import content_hash, partition_day
from limaml.features.columns import vector_values
from limaml.io.storage import Storage

_VECTORS = "catalogue_vectors/item"


@dataclass(frozen=True)
class Kind:
    """How one kind of entity is stored: its catalogue, its snapshots, and what is declared of it."""

    name: str
    catalogue: schema.Table
    delivered: schema.Table
    """`catalogue` and the vectors."""
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
    return {
        name: Kind(name, tables.catalogue(name), tables.delivered(name), tables.snapshots(name), tables.of(name))
        for name in entities
    }


def declared(kind: Kind, tables: schema.Tables, delivered: pa.Table) -> tuple[pa.Table, list[str]]:
    """A delivered catalogue in the declared columns and, where that loses nothing, types; and columns that no feature reads."""
    source = {f.name: f.source_column for f in tables.features if f.entity == kind.name and not f.aggregate}
    wanted = {name: source.get(name, name) for name in kind.delivered.names}
    there = {name: column for name, column in wanted.items() if column in delivered.column_names}
    ignored = sorted(set(delivered.column_names) - set(there.values()))
    table = pa.Table.from_arrays([delivered[column] for column in there.values()], names=list(there))
    return with_types(table, kind.delivered), ignored


def read(storage: Storage, kind: str) -> pa.Table:
    """The catalogue of `kind` ('user' or 'item') as last delivered. Raises DataError before the first ingestion."""
    if not storage.exists(_file(kind)):
        raise DataError(f"{storage.path(_file(kind))} must exist, but nothing was ingested yet; run limaml ingest first")
    return storage.read_table(_file(kind))


def item_vectors(storage: Storage, tables: schema.Tables) -> pa.Table | None:
    """The declared vectors of every item ever delivered, one row an item; None if no vector is declared."""
    return _vectors(storage, tables.item_vectors) if tables.vectors else None


def vectors_digest(storage: Storage, tables: schema.Tables, through: date) -> str | None:
    """SHA-256 (hex) of the vectors delivered through a day; None if no vector is declared."""
    if not tables.vectors:
        return None
    names = [name for name in storage.list(_VECTORS) if partition_day(name) <= through]
    return content_hash(_vectors(storage, tables.item_vectors, names))


def require_same_vectors(storage: Storage, kind: Kind, delivered: pa.Table) -> None:
    """Raises DataError if an item that is known has another vector than it had, naming the first one."""
    names = _vector_names(kind)
    if not names:
        return
    known = _vectors(storage, _vector_table(kind))
    place = pc.index_in(known[kind.key], value_set=delivered[kind.key].combine_chunks())
    again = pc.is_valid(place)
    known, now = known.filter(again), delivered.take(place.filter(again))
    for name in names:
        (before, had), (after, has) = vector_values(known[name]), vector_values(now[name])
        changed = np.flatnonzero((had != has) | (before != after).any(axis=1))
        if len(changed):
            first = int(changed[0])
            number = int(np.argmax(before[first] != after[first]))
            found = f"{after[first, number]:g} instead of {before[first, number]:g} at place {number}"
            if had[first] != has[first]:
                found = "a vector where it had none" if has[first] else "no vector where it had one"
            raise DataError(
                f"{name} must stay the vector an item was first delivered with, because what was trained and adapted with it "
                f"would be another function, got {found} for {kind.key} {known[kind.key][first]} ({len(changed)} items "
                "changed); deliver it as it was, or give the new vectors a storage.root of their own and ingest again"
            )


def _vectors(storage: Storage, table: schema.Table, names: Sequence[str] | None = None) -> pa.Table:
    names = storage.list(_VECTORS) if names is None else names
    stored = [storage.read_table(f"{_VECTORS}/{name}").select(table.names).cast(table.arrow) for name in names]
    return pa.concat_tables([table.arrow.empty_table(), *stored])


def _record_vectors(storage: Storage, kind: Kind, delivered: pa.Table, day: date) -> None:
    table, paths = _vector_table(kind), [f"{_VECTORS}/{name}" for name in storage.list(_VECTORS)]
    known = storage.dataset(paths, pa.schema([table.arrow.field(kind.key)])).to_table()[kind.key].combine_chunks()
    new = delivered.select(table.names).cast(table.arrow).filter(pc.invert(pc.is_in(delivered[kind.key], value_set=known)))
    if new.num_rows:
        path = f"{_VECTORS}/dt={day.isoformat()}.parquet"
        before = [storage.read_table(path).cast(table.arrow)] if storage.exists(path) else []
        found = pa.concat_tables([*before, new]).sort_by(kind.key)
        # Arrow cannot read a null of a fixed-size list from Parquet (25.0).
        lists = [pa.list_(field.type.value_type) if field.name != kind.key else field.type for field in found.schema]
        storage.write_table(path, found.cast(pa.schema(list(zip(found.column_names, lists, strict=True)))))


def _vector_names(kind: Kind) -> tuple[str, ...]:
    return kind.delivered.names[len(kind.catalogue.names) :]


def _vector_table(kind: Kind) -> schema.Table:
    wanted = (kind.key, *_vector_names(kind))
    return replace(kind.delivered, columns=tuple(column for column in kind.delivered.columns if column.name in wanted))


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
    if _vector_names(kind):
        _record_vectors(storage, kind, delivered, day)
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
