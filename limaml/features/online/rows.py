"""Arrow rows as Feast stores them: serialised entity keys and serialised feature values, equal to Feast's bytes.

Feast is imported inside the functions: it takes seconds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from limaml import schema
from limaml.features.online.wire import float_lists, floats, is_float_vectors, is_floats, string_keys

VERSION_FEATURE = "model_version"
_PLAIN = {pa.string(): "STRING", pa.int64(): "INT64", schema.TIMESTAMP: "UNIX_TIMESTAMP"}
"""Columns whose values Feast stores as they are, by its type. Not floats: it stores a NaN as an empty value."""

Stored = tuple[int, tuple[bytes | None, ...]]
"""A row as a store holds it: its instant (microseconds since 1970) and serialised values, None for one that is not there."""


class EntityReader(Protocol):
    """Reads one entity's rows of several views, by its serialised key, at one go. For a server: it fails rather than try on."""

    def read(self, key: bytes) -> Any:
        """A row or None a view. Either it blocks, and threads may share it, or it is a coroutine function, for one loop."""

    def close(self) -> None:
        """Give its connections back, those in use after their read; from any thread."""


class BulkStore(Protocol):
    """What a Feast online store must be able to do, besides what Feast asks of it, so that rows can be published to it.

    Keys are Feast's serialised entity keys; `names` says which features, and in which order a row's values are.
    """

    def read_rows(self, config: Any, view: Any, names: Sequence[str], keys: Sequence[bytes]) -> list[Stored | None]:
        """What is stored for each key, None if nothing is."""

    def write_rows(
        self, config: Any, view: Any, names: Sequence[str], keys: Sequence[bytes], rows: Sequence["OnlineRow"]
    ) -> None:
        """Write rows as they are, none of them in part."""

    def entity_reader(self, config: Any, wanted: Sequence[tuple[Any, Sequence[str]]]) -> EntityReader:
        """Reader of the named features of several views of one entity; the rows come in the order of `wanted`."""


class OnlineRow(NamedTuple):
    """One entity's row of one view: the instant it describes, and its serialised feature values in the view's order."""

    timestamp_us: int
    """Microseconds since 1970."""
    version: bytes | None
    """Model version, as stored; None in a view of features, which has none."""
    values: tuple[bytes | None, ...]


class RowCodec:
    """Serialises tables of one Feast view, which carry its entity key, its features and its timestamp column."""

    def __init__(self, view: Any, key_version: int) -> None:
        self._key_version = key_version
        self._timestamp: str = view.batch_source.timestamp_field
        self._types = {field.name: field.dtype.to_value_type() for field in view.features}
        self._keys = {field.name: field.dtype.to_value_type() for field in view.entity_columns}
        self.names = tuple(self._types)
        self.key_names = tuple(self._keys)
        self._version_at = self.names.index(VERSION_FEATURE) if VERSION_FEATURE in self.names else None

    def keys(self, table: pa.Table) -> list[bytes]:
        """Serialised entity keys of the table's rows."""
        from feast.infra.key_encoding_utils import serialize_entity_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey

        if len(self._keys) == 1 and table[self.key_names[0]].type == pa.string():
            return string_keys(self.key_names[0], table[self.key_names[0]], self._key_version)
        columns = [values(table[name], kind) for name, kind in self._keys.items()]
        return [
            serialize_entity_key(EntityKey(join_keys=self.key_names, entity_values=row), self._key_version)
            for row in zip(*columns, strict=True)
        ]

    def rows(self, table: pa.Table) -> list[OnlineRow]:
        """The table's rows as they are stored."""
        stamps = table[self._timestamp].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_pylist()
        columns = [serialised(table[name], kind) for name, kind in self._types.items()]
        return [self.row(stamp, row) for stamp, row in zip(stamps, zip(*columns, strict=True), strict=True)]

    def row(self, timestamp_us: int, row: tuple[bytes | None, ...]) -> OnlineRow:
        """A row of values in the order of `names`."""
        return OnlineRow(timestamp_us, None if self._version_at is None else row[self._version_at], row)


def serialised(column: pa.ChunkedArray, value_type: Any) -> list[bytes]:
    """Feast's serialised values of a column. Of plain columns each distinct value is made once: 0.1 us where values repeat."""
    if is_float_vectors(column):
        return [value for chunk in column.chunks for value in float_lists(chunk)]
    if is_floats(column):
        return [value for chunk in column.chunks for value in floats(chunk)]
    if _PLAIN.get(column.type) != value_type.name:
        return [value.SerializeToString() for value in values(column, value_type)]
    coded = column.combine_chunks().dictionary_encode("encode")
    made = [value.SerializeToString() for value in values(pa.chunked_array([coded.dictionary]), value_type)]
    return [made[at] for at in coded.indices.to_pylist()]


def values(column: pa.ChunkedArray, value_type: Any) -> list[Any]:
    """Feast values of a column, equal to those that `write_to_online_store` makes of it; a null is an empty value.

    Plain columns are set field by field: 0.4 us a value, where Feast's conversion, which looks at each value's type, takes 2 to
    5. It gets Python objects, because numpy turns integers with nulls to floats.
    """
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import VALUE_TYPE_TO_PROTO_VALUE_MAP, python_values_to_proto_values

    plain = column.to_pylist() if not pa.types.is_timestamp(column.type) else _seconds(column)
    if _PLAIN.get(column.type) != value_type.name:
        converted: list[Any] = python_values_to_proto_values(plain, value_type)
        return converted
    build: Any = Value
    field = VALUE_TYPE_TO_PROTO_VALUE_MAP[value_type]
    return [Value() if value is None else build(**{field: value}) for value in plain]


def _seconds(column: pa.ChunkedArray) -> list[int]:
    """Whole seconds since 1970, as Feast keeps them; a null is the smallest integer, not an empty value."""
    seconds: list[int] = column.to_numpy(zero_copy_only=False).astype("datetime64[s]").astype(np.int64).tolist()
    return seconds
