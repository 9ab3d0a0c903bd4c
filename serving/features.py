"""The user's features and embeddings from Feast's online store, in one read; and item features, many at a time.

Rows are read by the bulk path of `limaml.features.online`: the bytes are Feast's own, without the response that
`get_online_features` builds of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limaml import schema, telemetry
from limaml.config import Config
from limaml.errors import StoreError
from limaml.features.online.rows import EntityReader
from limaml.features.online.wire import LENGTH, string_key_header, string_keys
from serving.freshness import StoredEmbedding
from serving.store_calls import StoreCalls

log = telemetry.get_logger(__name__)

READ_TIMEOUT_S = 1.0
"""A read that nobody waits for any more gives its thread back after this."""
_READ_ITEMS = 200
"""Items a read: short enough for a busy store, and the interpreter is left to requests in between."""
_US_PER_S = 1e6
_FIELD = {
    pa.string(): "string_val",
    pa.int64(): "int64_val",
    pa.float32(): "float_val",
    pa.float64(): "double_val",
    pa.list_(pa.string()): "string_list_val",
    pa.list_(pa.int64()): "int64_list_val",
}
_EMBEDDING_FIELDS = {
    "embedding": "float_list_val",
    "model_version": "string_val",
    "support_size": "int64_val",
    "last_event_at": "unix_timestamp_val",
}


class ItemRow(NamedTuple):
    """One item's features, in the order of `schema.Tables.names("item")`; None for what the store does not know."""

    values: tuple[Any, ...]
    at: datetime | None
    """Event timestamp of the row; None if the store has none."""


@dataclass(frozen=True)
class Fetched:
    """What the store knew of a user: one value a feature, one row or None a task kind of users."""

    user: Mapping[str, Any]
    embeddings: Mapping[str, StoredEmbedding | None]
    available: bool = True
    """False when the store did not answer: then both are empty."""
    user_at: datetime | None = None
    """Event timestamp of the user's row; None if there is none."""
    affinities: Mapping[str, Any] = field(default_factory=dict)
    """Columns of `schema.Tables.affinity_rows`: keys, and their counts in the same order."""
    affinities_at: datetime | None = None


UNAVAILABLE = Fetched({}, {}, available=False)


class OnlineFeatures:
    """Reads the views of one slot; `open` before use."""

    def __init__(self, cfg: Config, slot: str) -> None:
        self.slot = slot
        self._cfg = cfg
        self._tables = schema.tables(cfg.features)
        self._user_fields = _fields(self._tables, "user")
        self._affinity_fields = {
            column.name: _FIELD[column.type] for affinity in self._tables.affinities for column in affinity.online
        }
        self._kinds = [kind.name for kind in cfg.task_kinds if kind.entity_column == "user_id"]
        self._held_kinds = {kind.name: kind.entity_column for kind in cfg.task_kinds if kind.entity_column != "user_id"}
        self._key_header = b""
        self._reader: EntityReader | None = None
        self._last_garbage = ""
        self._read_items: Callable[[Sequence[str]], list[Any]] | None = None
        self._read_embeddings: dict[str, Callable[[Sequence[str]], list[Any]]] = {}

    @property
    def is_open(self) -> bool:
        return self._reader is not None

    def open(self) -> None:
        """Open the store and look the views up. Raises whatever Feast raises."""
        from limaml.features.feature_store import open_store

        store: Any = open_store(_with_timeouts(self._cfg))
        online, config = store.provider.online_store, store.config
        version = config.entity_key_serialization_version
        views = [(store.get_feature_view(schema.USER_VIEW), self._tables.names("user"))]
        if self._affinity_fields:
            views.append((store.get_feature_view(schema.AFFINITY_VIEW), tuple(self._affinity_fields)))
        views += [
            (store.get_feature_view(schema.embedding_view(kind, self.slot)), schema.EMBEDDING_FEATURE_NAMES)
            for kind in self._kinds
        ]
        items = store.get_feature_view(schema.ITEM_VIEW)
        self._read_items = _reader(online, config, items, version, "item_id", self._tables.names("item"))
        self._read_embeddings = {
            kind: _reader(online, config, store.get_feature_view(schema.embedding_view(kind, self.slot)), version, column)
            for kind, column in self._held_kinds.items()
        }
        self._key_header = string_key_header("user_id", version)
        self.close()
        self._reader = online.entity_reader(config, views)

    def close(self) -> None:
        """Give the user reader's connections back."""
        if self._reader is not None:
            self._reader.close()

    async def read_user(self, user_id: str, calls: StoreCalls) -> Fetched:
        """One read of a user's features and embeddings.

        Raises StoreError for values that Feast would not have written, and whatever `calls` raises. The former is the fault of
        one row, so it is not counted against the store.
        """
        if self._reader is None:
            raise StoreError("the online store must be open before it is read; the poller tries again")
        text = user_id.encode()
        user, *rows = await calls.call(self._reader.read, self._key_header + LENGTH.pack(len(text)) + text)
        affinities = rows.pop(0) if self._affinity_fields else None
        try:
            return Fetched(
                user=_values(user, self._user_fields),
                embeddings={kind: _embedding(row) for kind, row in zip(self._kinds, rows, strict=True)},
                user_at=_event_timestamp(user),
                affinities=_values(affinities, self._affinity_fields),
                affinities_at=_event_timestamp(affinities),
            )
        except StoreError as error:
            self._say_garbage(error)
            raise

    def read_items(self, item_ids: Sequence[str]) -> dict[str, ItemRow]:
        """Features of many items, read some at a time. Raises whatever the store raises."""
        if self._read_items is None:
            raise StoreError("the online store must be open before it is read; the poller tries again")
        fields = _fields(self._tables, "item")
        return {
            item: ItemRow(tuple(_values(row, fields).values()), _event_timestamp(row))
            for item, row in _read_by_part(self._read_items, item_ids)
        }

    def read_embeddings(self, kind: str, entities: Sequence[str]) -> dict[str, StoredEmbedding | None]:
        """Rows of a kind that is held in memory, read some at a time; one that Feast would not have written is left out.

        Raises whatever the store raises.
        """
        if kind not in self._read_embeddings:
            raise StoreError("the online store must be open before it is read; the poller tries again")
        found: dict[str, StoredEmbedding | None] = {}
        for entity, row in _read_by_part(self._read_embeddings[kind], entities):
            try:
                found[entity] = _embedding(row)
            except StoreError as error:
                self._say_garbage(error)
        return found

    def _say_garbage(self, error: StoreError) -> None:
        """Once for a series of equal errors."""
        if str(error) != self._last_garbage:
            log.warning("online_store_garbage", error=str(error))
        self._last_garbage = str(error)


def _reader(
    online: Any, config: Any, view: Any, key_version: int, column: str, names: Sequence[str] = schema.EMBEDDING_FEATURE_NAMES
) -> Callable[[Sequence[str]], list[Any]]:
    def read(entities: Sequence[str]) -> list[Any]:
        keys = string_keys(column, pa.chunked_array([pa.array(entities, pa.string())]), key_version)
        rows: list[Any] = online.read_rows(config, view, tuple(names), keys)
        return rows

    return read


def _read_by_part(read: Callable[[Sequence[str]], list[Any]], entities: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for start in range(0, len(entities), _READ_ITEMS):
        part = entities[start : start + _READ_ITEMS]
        yield from zip(part, read(part), strict=True)


def _with_timeouts(cfg: Config) -> Config:
    """Redis gives up by itself, after this long unless the connection says otherwise; SQLite's reader does anyway."""
    connection = cfg.feast.online_connection
    if cfg.feast.online_store != "redis" or "socket_timeout" in connection:
        return cfg
    connection += f",socket_timeout={READ_TIMEOUT_S:g},socket_connect_timeout={READ_TIMEOUT_S:g}"
    return cfg.model_copy(update={"feast": cfg.feast.model_copy(update={"online_connection": connection})})


def _fields(tables: schema.Tables, entity: str) -> dict[str, str]:
    """Feature -> field of Feast's value that must hold it."""
    return {feature.name: _FIELD[schema.arrow_type(feature)] for feature in tables.of(entity)}


def _event_timestamp(row: Any) -> datetime | None:
    return None if row is None else datetime.fromtimestamp(row[0] / _US_PER_S, UTC)


def _values(row: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    """A stored row as Python has it; nothing becomes None. Raises StoreError for what is not Feast's value of the field."""
    from feast.protos.feast.types.Value_pb2 import Value

    found: dict[str, Any] = dict.fromkeys(fields)
    if row is not None:
        for (name, field), serialised in zip(fields.items(), row[1], strict=True):
            if serialised is not None:
                found[name] = _plain(Value, serialised, name, field)
    return found


def _plain(value_type: Any, serialised: bytes, name: str, field: str) -> Any:
    try:
        value = value_type.FromString(serialised)
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError, or whatever it says of what is no bytes
        raise StoreError(f"{name} in the online store must be Feast's value, got bytes that are none: {error}") from None
    found = value.WhichOneof("val")
    if found is None or found == "null_val":
        return None
    if found != field:
        raise StoreError(f"{name} in the online store must be a {field}, got a {found}; publish it again with limaml")
    plain = getattr(value, field)
    if field == "float_list_val":
        return np.array(plain.val, np.float32)
    return list(plain.val) if field.endswith("_list_val") else plain


def _embedding(row: Any) -> StoredEmbedding | None:
    """An entity's row of an embedding view, None if there is none. TTLs are not enforced on reads."""
    values = _values(row, _EMBEDDING_FIELDS)
    vector: npt.NDArray[np.float32] | None = values["embedding"]
    if row is None or vector is None:
        return None
    return StoredEmbedding(
        vector=vector,
        model_version=values["model_version"] or "",
        as_of=datetime.fromtimestamp(row[0] / _US_PER_S, UTC),
        last_event_at=_instant(values["last_event_at"]),
    )


def _instant(seconds: int | None) -> datetime | None:
    """A Feast timestamp (whole seconds since 1970); its null is the smallest number a timestamp column can hold."""
    if seconds is None or seconds <= 0:
        return None
    return datetime.fromtimestamp(seconds, UTC)
