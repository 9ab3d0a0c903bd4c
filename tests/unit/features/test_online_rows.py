"""Serialised columns and keys equal what Feast's own conversion gives, byte for byte."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import schema
from limaml.features.feature_store import import_feast
from limaml.features.online.rows import serialised, values
from limaml.features.online.wire import float_lists, is_float_vectors, string_keys

import_feast()
from feast.infra.key_encoding_utils import serialize_entity_key  # noqa: E402
from feast.protos.feast.types.EntityKey_pb2 import EntityKey  # noqa: E402
from feast.type_map import python_values_to_proto_values  # noqa: E402
from feast.value_type import ValueType  # noqa: E402

INT64 = st.integers(-(2**63), 2**63 - 1)
# Bounds of what pandas, which `write_to_online_store` passes through, can hold as nanoseconds.
INSTANTS_US = st.integers(-(2**63) // 1000 + 1, (2**63 - 1) // 1000)


def by_feast(plain: Any, value_type: ValueType) -> list[bytes]:
    return [value.SerializeToString() for value in python_values_to_proto_values(plain, value_type)]


@st.composite
def vectors(draw: st.DrawFn) -> pa.FixedSizeListArray:
    """Vectors of a drawn width, and often a slice of them, whose buffer starts elsewhere."""
    width, rows = draw(st.integers(1, 70)), draw(st.integers(0, 4))
    size = st.lists(st.floats(width=32), min_size=width * rows, max_size=width * rows)
    array = pa.FixedSizeListArray.from_arrays(pa.array(draw(size), pa.float32()), width)
    return array.slice(draw(st.integers(0, rows)))


@settings(deadline=None)  # the first example imports Feast's messages
@given(vectors())
def test_vectors_have_feasts_bytes(array: pa.FixedSizeListArray) -> None:
    assert float_lists(array) == by_feast(array.to_pylist(), ValueType.FLOAT_LIST)


# 16,384 bytes is where the length of the length in front of the floats changes.
@pytest.mark.parametrize("width", [1, 31, 32, 64, 1024, 4095, 4096])
def test_long_vectors_have_feasts_bytes(width: int) -> None:
    floats = np.random.default_rng(width).standard_normal(2 * width, dtype=np.float32)
    floats[:2] = -0.0, np.float32(1e-45)
    array = pa.FixedSizeListArray.from_arrays(pa.array(floats), width)
    assert float_lists(array) == by_feast(array.to_pylist(), ValueType.FLOAT_LIST)


def test_chunks_of_a_column_come_in_order() -> None:
    table = pa.table({"v": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2))})
    parts = pa.concat_tables([table.slice(2), table.slice(0, 2)])["v"]
    assert serialised(parts, ValueType.FLOAT_LIST) == by_feast([[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]], ValueType.FLOAT_LIST)


@pytest.mark.parametrize("rows", [[None, [1.0, 2.0]], [[1.0, None]]])
def test_a_null_in_a_vector_is_left_to_feast(rows: list[Any]) -> None:
    assert not is_float_vectors(pa.chunked_array([pa.array(rows, pa.list_(pa.float32(), 2))]))


@settings(deadline=None)
@given(st.lists(st.none() | st.text()))
def test_strings_have_feasts_bytes(plain: list[str | None]) -> None:
    column = pa.chunked_array([pa.array(plain, pa.string())])
    assert serialised(column, ValueType.STRING) == by_feast(column.to_numpy(), ValueType.STRING)


@settings(deadline=None)
@given(st.lists(st.none() | INT64))
def test_integers_have_feasts_bytes(plain: list[int | None]) -> None:
    assert serialised(pa.chunked_array([pa.array(plain, pa.int64())]), ValueType.INT64) == by_feast(plain, ValueType.INT64)


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(width=32)), st.integers(0, 2))
def test_numbers_have_feasts_bytes(plain: list[float | None], start: int) -> None:
    column = pa.chunked_array([pa.array(plain, pa.float32()).slice(start)])
    assert serialised(column, ValueType.FLOAT) == by_feast(column.to_pylist(), ValueType.FLOAT)


@pytest.mark.parametrize("plain", [[0.0, -0.0, 1.5], [1.0, None], [1.0, float("nan")]])
def test_numbers_beside_a_null_or_a_nan_have_feasts_bytes(plain: list[float | None]) -> None:
    assert serialised(pa.chunked_array([pa.array(plain, pa.float32())]), ValueType.FLOAT) == by_feast(plain, ValueType.FLOAT)


def test_values_that_repeat_come_in_the_order_of_their_rows() -> None:
    plain = ["b", "a", None, "b", "", None, "a"]
    column = pa.chunked_array([pa.array(plain[:3], pa.string()), pa.array(plain[3:], pa.string())])
    assert serialised(column, ValueType.STRING) == by_feast(column.to_numpy(), ValueType.STRING)


@settings(deadline=None)
@given(st.lists(st.none() | INSTANTS_US))
def test_timestamps_have_feasts_bytes(plain: list[int | None]) -> None:
    column = pa.chunked_array([pa.array(plain, pa.int64()).cast(schema.TIMESTAMP)])
    assert serialised(column, ValueType.UNIX_TIMESTAMP) == by_feast(column.to_numpy(), ValueType.UNIX_TIMESTAMP)


def test_a_null_timestamp_is_the_smallest_integer_as_feast_has_it() -> None:
    column = pa.chunked_array([pa.array([None, datetime(2026, 1, 1, 0, 0, 0, 999_999, UTC)], schema.TIMESTAMP)])
    assert [value.unix_timestamp_val for value in values(column, ValueType.UNIX_TIMESTAMP)] == [-(2**63), 1_767_225_600]


@settings(deadline=None)
@given(st.lists(st.text()), st.integers(0, 3))
def test_keys_have_feasts_bytes(texts: list[str], start: int) -> None:
    column = pa.chunked_array([pa.array(texts, pa.string()).slice(start)])
    protos = python_values_to_proto_values(texts[start:], ValueType.STRING)
    expected = [serialize_entity_key(EntityKey(join_keys=["user_id"], entity_values=[value]), 3) for value in protos]
    assert string_keys("user_id", column, 3) == expected
