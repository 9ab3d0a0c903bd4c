"""Rows into the online store: one rule decides, for every store alike, which row replaces which (contract 5).

Stores disagree on their own (Feast 0.67): SQLite lets an older row overwrite a newer one, Redis drops a row of an equal
timestamp, and a missing key reads back as absent from one and as nulls at the epoch from the other. So the publisher, who
holds the lease, reads what is there, decides by `replaces`, and writes what is left in short batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from limaml.embeddings.lease import Held
from limaml.errors import StoreError

if TYPE_CHECKING:
    from feast import FeatureStore

VERSION_FEATURE = "model_version"
_EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class OnlineRow:
    """One entity's row of one view: serialised feature values by name, and the instant it describes."""

    timestamp: datetime
    values: dict[str, bytes]

    @property
    def version(self) -> bytes | None:
        """Model version, as stored; None in a view of features, which has none."""
        return self.values.get(VERSION_FEATURE)


def replaces(new: OnlineRow, stored: OnlineRow | None) -> bool:
    """The rule: another model version, or a newer instant, or the same instant with other bytes."""
    if stored is None or new.version != stored.version:
        return True
    if new.timestamp != stored.timestamp:
        return new.timestamp > stored.timestamp
    return new.values != stored.values


class OnlineView:
    """One Feast view in the online store. Tables carry its entity key, its features and its timestamp column."""

    def __init__(self, store: "FeatureStore", name: str) -> None:
        from feast.errors import FeatureViewNotFoundException

        self.name = name
        self._config = store.config
        self._provider: Any = store.provider
        try:
            self._view: Any = store.get_feature_view(name)
        except FeatureViewNotFoundException:
            raise StoreError(f"view {name} must be in the feature registry, but is not; run limaml apply") from None
        self._timestamp: str = self._view.batch_source.timestamp_field
        self._types = {field.name: field.dtype.to_value_type() for field in self._view.features}
        self._keys = {field.name: field.dtype.to_value_type() for field in self._view.entity_columns}

    def keys(self, table: pa.Table) -> list[Any]:
        """Feast entity keys of the table's rows."""
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey

        columns = [_protos(table[name], kind) for name, kind in self._keys.items()]
        names = list(self._keys)
        return [EntityKey(join_keys=names, entity_values=values) for values in zip(*columns, strict=True)]

    def rows(self, table: pa.Table) -> list[OnlineRow]:
        """The table's rows as they would be stored."""
        columns = {name: _protos(table[name], kind) for name, kind in self._types.items()}
        stamps = table[self._timestamp].to_pylist()
        return [
            OnlineRow(stamp, {name: column[at].SerializeToString(deterministic=True) for name, column in columns.items()})
            for at, stamp in enumerate(stamps)
        ]

    def read(self, keys: Sequence[Any]) -> list[OnlineRow | None]:
        """What is stored for each key, None if nothing is."""
        if not keys:
            return []
        found = self._provider.online_read(self._config, self._view, list(keys), list(self._types))
        return [self._stored(timestamp, values) for timestamp, values in found]

    def write(self, keys: Sequence[Any], rows: Sequence[OnlineRow]) -> None:
        """Write rows as they are; whoever calls has decided that they replace what is there, and holds the lease."""
        from feast.protos.feast.types.Value_pb2 import Value

        data = [
            (key, {name: Value.FromString(value) for name, value in row.values.items()}, row.timestamp, None)
            for key, row in zip(keys, rows, strict=True)
        ]
        self._provider.online_write_batch(self._config, self._view, data, None)

    def clear(self) -> None:
        """Remove every row of the view."""
        change = {"entities_to_delete": [], "entities_to_keep": [], "partial": True}
        online = self._provider.online_store
        # Two calls: SQLite's one call would create the table first and drop it last.
        online.update(self._config, tables_to_delete=[self._view], tables_to_keep=[], **change)
        online.update(self._config, tables_to_delete=[], tables_to_keep=[self._view], **change)

    def _stored(self, timestamp: datetime | None, values: dict[str, Any] | None) -> OnlineRow | None:
        """Redis gives nulls at the epoch for a key it lacks, and for one that only other views have."""
        if timestamp is None or timestamp == _EPOCH or values is None:
            return None
        return OnlineRow(
            timestamp, {name: values[name].SerializeToString(deterministic=True) for name in self._types if name in values}
        )


def publish(view: OnlineView, table: pa.Table, held: Held, batch_rows: int) -> pa.Table:
    """Write the table's rows that replace what is stored, and return them. The lease is checked before each write."""
    written = [table.slice(0, 0)]
    for part in _batches(table, batch_rows):
        keys, rows = view.keys(part), view.rows(part)
        chosen = [at for at, stored in enumerate(view.read(keys)) if replaces(rows[at], stored)]
        if chosen:
            held.check()
            view.write([keys[at] for at in chosen], [rows[at] for at in chosen])
            written.append(part.take(chosen))
    return pa.concat_tables(written)


def require_published(view: OnlineView, table: pa.Table, batch_rows: int) -> None:
    """Read the table's rows back and compare them bit for bit: every feature and the timestamp.

    Raises StoreError that names the first row that differs, and how many do.
    """
    wrong: list[str] = []
    for part in _batches(table, batch_rows):
        keys, rows = view.keys(part), view.rows(part)
        for key, row, stored in zip(keys, rows, view.read(keys), strict=True):
            if stored != row:
                wrong.append(f"{key.entity_values[0].string_val} {_difference(row, stored)}")
    if wrong:
        raise StoreError(
            f"view {view.name} must hold the published rows, but {len(wrong)} of {table.num_rows} read back otherwise, "
            f"e.g. entity {wrong[0]}; publish again, and look for a second writer"
        )


def sample(table: pa.Table, num_rows: int) -> pa.Table:
    """At most `num_rows` rows, evenly spread over the table, first and last among them; the same ones each time."""
    if table.num_rows <= num_rows:
        return table
    if num_rows == 1:
        return table.slice(0, 1)
    return table.take([at * (table.num_rows - 1) // (num_rows - 1) for at in range(num_rows)])


def _batches(table: pa.Table, batch_rows: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, batch_rows):
        yield table.slice(start, batch_rows)


def _protos(column: pa.ChunkedArray, value_type: Any) -> list[Any]:
    """Feast values of a column; a null is an empty value. Python objects, because numpy turns integers with nulls to floats."""
    from feast.type_map import python_values_to_proto_values

    values: list[Any] = python_values_to_proto_values(column.to_pylist(), value_type)
    return values


def _difference(row: OnlineRow, stored: OnlineRow | None) -> str:
    if stored is None:
        return "is missing"
    names = [name for name in row.values if row.values[name] != stored.values.get(name)]
    if row.timestamp != stored.timestamp:
        return f"is stamped {stored.timestamp.isoformat()} instead of {row.timestamp.isoformat()}"
    return f"differs in {', '.join(names)}"
