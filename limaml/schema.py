"""The tables: names, types and ranges of their columns; and what Feast's objects are called.

Gates, the feature repository, the request log and the API's context are built from them. The encoder names the features again
(limaml.features.encoder), each with what is made of it: a new one is not added here alone (contract 10).
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")
SLOTS = ("blue", "green")


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

AGE_BANDS = ("under_18", "18_24", "25_34", "35_44", "45_49", "50_55", "56_and_over")

USERS = Table(
    "users",
    (
        Column("user_id", pa.string(), unique=True),
        Column("age_band", pa.string(), nullable=True, allowed=AGE_BANDS),
        Column("gender", pa.string(), nullable=True),
        Column("occupation", pa.string(), nullable=True),
    ),
    key="user_id",
)

ITEMS = Table(
    "items",
    (
        Column("item_id", pa.string(), unique=True),
        Column("title", pa.string()),
        Column("year", pa.int64(), nullable=True, minimum=1850, maximum=2100),
        Column("genres", pa.list_(pa.string())),
    ),
    key="item_id",
)

# A snapshot row is an entity's state at the end of a day (`event_timestamp`), over events before that instant only.
_SNAPSHOT_TIME = Column("event_timestamp", TIMESTAMP)

USER_FEATURES = Table(
    "user_features",
    (
        Column("user_id", pa.string()),
        _SNAPSHOT_TIME,
        *USERS.columns[1:],
        Column("user_events", pa.int64(), minimum=0),
        Column("user_positive_rate", pa.float32(), minimum=0.0, maximum=1.0),
    ),
    key="user_id",
)

ITEM_FEATURES = Table(
    "item_features",
    (
        Column("item_id", pa.string()),
        _SNAPSHOT_TIME,
        Column("year", pa.int64(), nullable=True, minimum=1850, maximum=2100),
        Column("genres", pa.list_(pa.string())),
        Column("item_events", pa.int64(), minimum=0),
        Column("item_positive_rate", pa.float32(), minimum=0.0, maximum=1.0),
    ),
    key="item_id",
)

USER_FEATURE_NAMES = tuple(n for n in USER_FEATURES.names if n not in ("user_id", "event_timestamp"))
ITEM_FEATURE_NAMES = tuple(n for n in ITEM_FEATURES.names if n not in ("item_id", "event_timestamp"))


def _feature_fields(table: Table, names: tuple[str, ...]) -> tuple[Column, ...]:
    """Joined feature columns are nullable: an entity that no snapshot knows has none."""
    return tuple(Column(c.name, c.type, nullable=True) for c in table.columns if c.name in names)


# An event with the features it was logged with: what training and adaptation read.
LOGGED_EVENTS = Table(
    "logged_events",
    (
        *EVENTS.columns,
        *_feature_fields(USER_FEATURES, USER_FEATURE_NAMES),
        *_feature_fields(ITEM_FEATURES, ITEM_FEATURE_NAMES),
    ),
)


def support_columns(entity_column: str) -> list[str]:
    """What adaptation reads of LOGGED_EVENTS, the entity first."""
    features = (*USER_FEATURE_NAMES, *ITEM_FEATURE_NAMES)
    return [entity_column, *(name for name in ("item_id", "timestamp", "label", *features) if name != entity_column)]


# Request context the model reads; an event's context is derived from its timestamp by `context_hour`.
CONTEXT = Table("context", (Column("hour", pa.int64(), nullable=True, minimum=0, maximum=23),))


def context_hour(timestamp: datetime) -> int:
    """Hour of the day (UTC, 0 to 23)."""
    return timestamp.astimezone(UTC).hour


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


def _fetched(table: Table, names: tuple[str, ...]) -> pa.DataType:
    """A row of a view as a server fetched it; all null where the store has none. A null timestamp: not known."""
    stamp = Column(_SNAPSHOT_TIME.name, TIMESTAMP, nullable=True)
    return pa.struct([pa.field(c.name, c.type) for c in (stamp, *_feature_fields(table, names))])


FETCHED_EMBEDDING = pa.struct(
    [
        ("kind", pa.string()),
        ("status", pa.string()),
        ("model_version", pa.string()),
        ("as_of", TIMESTAMP),
        ("embedding", pa.list_(pa.float32())),
    ]
)
"""The stored embedding of one task kind as a server fetched it, used or not; only kind and status where there is none."""

# A ranking request as it was answered: what the service logs of a share of users, and `limaml consistency` compares.
REQUEST_LOG = Table(
    "request_log",
    (
        Column("logged_at", TIMESTAMP),
        Column("user_id", pa.string()),
        Column("model_version", pa.string()),
        Column("slot", pa.string(), allowed=SLOTS),
        # End of the last day that the server knew to be published whole.
        Column("complete_through", TIMESTAMP, nullable=True),
        Column("hour", pa.int64(), nullable=True, minimum=0, maximum=23),
        # Null: the store did not answer.
        Column("user", _fetched(USER_FEATURES, USER_FEATURE_NAMES), nullable=True),
        Column("item_ids", pa.list_(pa.string())),
        Column("items", pa.list_(_fetched(ITEM_FEATURES, ITEM_FEATURE_NAMES))),
        Column("embeddings", pa.list_(FETCHED_EMBEDDING)),
        Column("scores", pa.list_(pa.float64())),
    ),
)


EMBEDDING_FEATURE_NAMES = ("embedding", "model_version", "support_size", "last_event_at")


def embedding_view(kind: str, slot: str) -> str:
    """Name of the Feast view that holds one slot of one task kind; its event timestamp is the row's `as_of`."""
    return f"meta_embedding_{kind}_{slot}"


def ranking_service(slot: str) -> str:
    """Name of the Feast feature service a server on `slot` reads."""
    return f"ranking_{slot}"


TRAINING_SERVICE = "training"


def day_start(day: date) -> datetime:
    """First instant of a day (UTC)."""
    return datetime.combine(day, time(), tzinfo=UTC)


def day_end(day: date) -> datetime:
    """Exclusive end of a day: the first instant of the next one; snapshots and embeddings of `day` are stamped with it."""
    return day_start(day + timedelta(days=1))
