"""Columns and tables that every data set has, and what Feast's objects are called."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")
SLOTS = ("blue", "green")
MAX_ID_LENGTH = 256
"""Characters of a user's or an item's id: what a request may hold."""


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type and the values it may hold."""

    name: str
    type: pa.DataType
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[object, ...] | None = None
    unique: bool = False


@dataclass(frozen=True)
class Table:
    """A named table of columns; `key` is its entity key where it has one."""

    name: str
    columns: tuple[Column, ...]
    key: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])


EVENTS = Table(
    "events",
    (
        Column("event_id", pa.string(), unique=True),
        Column("user_id", pa.string()),
        Column("item_id", pa.string()),
        Column("timestamp", TIMESTAMP),
        Column("label", pa.int8(), allowed=(0, 1)),
    ),
)

EVENT_ORDER = [("user_id", "ascending"), ("timestamp", "ascending"), ("event_id", "ascending")]
"""Row order of every partition and of what is read from it: an entity's events by (timestamp, event id)."""


def embeddings(entity_column: str, dim: int) -> Table:
    """A partition of meta embeddings (contract 3): one row an entity, sorted by entity."""
    return Table(
        "meta_embeddings",
        (
            Column(entity_column, pa.string(), unique=True),
            Column("kind", pa.string()),
            Column("embedding", pa.list_(pa.float32(), dim)),
            Column("model_version", pa.string()),
            Column("support_size", pa.int64(), minimum=0),
            Column("as_of", TIMESTAMP),
            Column("last_event_at", TIMESTAMP, nullable=True),
        ),
        key=entity_column,
    )


FETCHED_EMBEDDING = pa.struct(
    [
        ("kind", pa.string()),
        ("status", pa.string()),
        ("model_version", pa.string()),
        ("as_of", TIMESTAMP),
        ("embedding", pa.list_(pa.float32())),
    ]
)
"""A stored embedding of one task kind as a server fetched it, used or not; only kind and status where there is none. Of a kind
in whose entities candidates differ there is one a candidate, in their order."""

EMBEDDING_FEATURE_NAMES = ("embedding", "model_version", "support_size", "last_event_at")


def embedding_view(kind: str, slot: str) -> str:
    """Name of the Feast view that holds one slot of one task kind; its event timestamp is the row's `as_of`."""
    return f"meta_embedding_{kind}_{slot}"


def ranking_service(slot: str) -> str:
    """Name of the Feast feature service a server on `slot` reads."""
    return f"ranking_{slot}"


TRAINING_SERVICE = "training"
USER_VIEW, ITEM_VIEW = "user_features", "item_features"
AFFINITY_VIEW = "user_affinities"
"""A user's row of what is kept by an attribute of the items: one entry a key."""


def day_start(day: date) -> datetime:
    """First instant of a day (UTC)."""
    return datetime.combine(day, time(), tzinfo=UTC)


def day_end(day: date) -> datetime:
    """Exclusive end of a day: the first instant of the next one; snapshots and embeddings of `day` are stamped with it."""
    return day_start(day + timedelta(days=1))
