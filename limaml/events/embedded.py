"""Vectors of items that `limaml embed-items` made: where they are kept, and what ingestion reads of them.

embedded/<feature>/encoder.json          what makes them: name, version, digest, width, licence, attribution
embedded/<feature>/part-NNNNNN.parquet   items in the order in which they became known, each once: ITEMS

They reach the rest of the system as a column of the delivered catalogue.
"""

import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import Config
from limaml.errors import DataError
from limaml.events.casting import with_types
from limaml.io.storage import Storage

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        # SHA-256 of the encoder's digest and of what was encoded.
        pa.field("digest", pa.binary(32), nullable=False),
        # Null: there is nothing that it could be made of.
        pa.field("vector", pa.list_(pa.float32())),
    ]
)


def encoder_path(feature: str) -> str:
    return f"embedded/{feature}/encoder.json"


def encoder_digest(storage: Storage, feature: str) -> str | None:
    """SHA-256 (hex) over the files of the encoder that makes a vector; None for one that is delivered."""
    path = encoder_path(feature)
    return str(storage.read_json(path)["digest"]) if storage.exists(path) else None


def part_path(feature: str, number: int) -> str:
    return f"embedded/{feature}/part-{number:06d}.parquet"


def parts(storage: Storage, feature: str) -> list[str]:
    """Paths of all parts, the oldest first."""
    return [f"embedded/{feature}/{name}" for name in storage.list(f"embedded/{feature}") if name.endswith(".parquet")]


def read(storage: Storage, feature: str, *columns: str) -> pa.Table:
    """Columns of every item that has been looked at, with or without a vector."""
    return storage.dataset(parts(storage, feature), ITEMS).to_table(columns=list(columns))


def ids_of(items: pa.Table) -> pa.Array | None:
    """Ids of a delivered catalogue as text; None if it has none, which its gate says."""
    if "item_id" not in items.column_names:
        return None
    key = schema.Table("items", (schema.Column("item_id", pa.string()),))
    ids = with_types(items.select(["item_id"]), key)["item_id"].combine_chunks()
    return ids if ids.type == pa.string() else None


def with_embedded(cfg: Config, items: pa.Table) -> pa.Table:
    """A delivered catalogue of items with the vectors of `[[transfer]]` as columns.

    Raises DataError if an item has not been looked at yet, or if the catalogue has a column of such a vector already.
    """
    ids = ids_of(items) if cfg.transfer else None
    if ids is None:
        return items
    storage, declared = Storage(cfg.storage.root), {feature.name: feature for feature in cfg.features}
    for feature in (declared[each.feature] for each in cfg.transfer):
        if feature.source_column in items.column_names:
            raise DataError(
                f"{feature.source_column} must not be a column of the delivered items, because [[transfer]] makes "
                f"{feature.name}, got one; remove either"
            )
        known = read(storage, feature.name, "item_id", "vector")
        places = pc.index_in(ids, value_set=known["item_id"].combine_chunks())
        new = ids.filter(pc.and_(pc.is_null(places), pc.is_valid(ids)))
        if len(new):
            raise DataError(
                f"{feature.name} must have been made of every item before it is ingested, got none for item_id {new[0]} and "
                f"{len(new) - 1} others; run limaml embed-items"
            )
        items = items.append_column(feature.source_column, known["vector"].take(places))
    return items
