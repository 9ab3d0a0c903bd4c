"""Known users and items: as they are now, and every change with the day it was delivered.

catalogue/{users,items}.parquet              as last delivered
catalogue_history/{user,item}/dt=D.parquet   rows new or changed in the delivery of day D; stamped with that day's end
"""

from dataclasses import dataclass
from datetime import date

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.errors import DataError
from limaml.io.storage import Storage


@dataclass(frozen=True)
class Kind:
    """How one kind of entity is stored: its catalogue, its snapshot table, and the names of its aggregates."""

    name: str
    catalogue: schema.Table
    features: schema.Table

    @property
    def key(self) -> str:
        return self.catalogue.columns[0].name

    @property
    def file(self) -> str:
        return f"catalogue/{self.catalogue.name}.parquet"

    @property
    def static(self) -> tuple[str, ...]:
        """Catalogue columns that are features."""
        return tuple(name for name in self.catalogue.names[1:] if name in self.features.names)


USER = Kind("user", schema.USERS, schema.USER_FEATURES)
ITEM = Kind("item", schema.ITEMS, schema.ITEM_FEATURES)
KINDS = {kind.name: kind for kind in (USER, ITEM)}


def read(storage: Storage, kind: str) -> pa.Table:
    """The catalogue of `kind` ('user' or 'item') as last delivered. Raises DataError before the first ingestion."""
    if not storage.exists(KINDS[kind].file):
        raise DataError(f"{storage.path(KINDS[kind].file)} must exist, but nothing was ingested yet; run limaml ingest first")
    return storage.read_table(KINDS[kind].file)


def history(storage: Storage, kind: Kind) -> pa.Table:
    """Every catalogue row ever delivered, with `day` (days since the epoch) of its delivery."""
    base = f"catalogue_history/{kind.name}"
    tables = [
        table.append_column("day", pa.array([_number(name)] * table.num_rows, pa.int64()))
        for name in storage.list(base)
        for table in [storage.read_table(f"{base}/{name}")]
    ]
    empty = kind.catalogue.arrow.append(pa.field("day", pa.int64())).empty_table()
    return pa.concat_tables([empty, *[table.cast(empty.schema) for table in tables]])


def record(storage: Storage, kind: Kind, delivered: pa.Table, day: date) -> bool:
    """Keep a delivered catalogue and, under `day`, its rows that are new or changed; returns whether there were any.

    Idempotent: what is already known is not recorded again.
    """
    delivered = delivered.select(kind.catalogue.names).cast(kind.catalogue.arrow)
    known = history(storage, kind)
    with duckdb.connect() as connection:
        connection.register("delivered", delivered)
        connection.register("known", known)
        columns = ", ".join(kind.catalogue.names)
        changed = connection.sql(
            f"SELECT {columns} FROM delivered EXCEPT SELECT {columns} FROM"  # noqa: S608  names come from the schema
            f" (SELECT * FROM known QUALIFY row_number() OVER (PARTITION BY {kind.key} ORDER BY day DESC) = 1)"
            f" ORDER BY {kind.key}"
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
    return (date.fromisoformat(name.removeprefix("dt=").removesuffix(".parquet")) - date(1970, 1, 1)).days
