"""From columns as they are stored to the values that encoders take: one implementation for events, requests and single users.

Most are the same. Days since an event count from the moment of use, and what a user did with an item is a few counts.

    R rows
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limaml import schema
from limaml.config import FeatureConfig
from limaml.features.columns import Indices

_CLOCKS = {"hour": (3_600_000_000, 0, 24), "weekday": (86_400_000_000, 3, 7)}
"""Microseconds a step, steps from 1970 to the cycle's 0 (1970-01-01 was a Thursday), period."""


class Derived:
    """Values of declared features."""

    def __init__(self, tables: schema.Tables) -> None:
        self._affinities = {feature.name: affinity for affinity in tables.affinities for feature in affinity.features}
        self._item_rate = schema.rate_feature(tables.features, "item")

    def values(self, feature: FeatureConfig, columns: Mapping[str, Any], num_rows: int, day: Indices | int | None) -> pa.Array:
        """(R,) values of a feature; `columns` are as `Encoder.encode` takes them, `day` is each row's (since 1970-01-01)."""
        if feature.by:
            return self._of_entry(feature, columns, num_rows, day)
        if feature.aggregate == "days_since":
            return _days_since(column_of(columns, feature.name, pa.int64(), num_rows), day)
        return column_of(columns, feature.name, schema.arrow_type(feature), num_rows)

    def value(self, feature: FeatureConfig, stored: Any, day: int) -> Any:
        """As `values` of one row, of a feature that one stored value says."""
        return day - stored if feature.aggregate == "days_since" and stored is not None else stored

    def _of_entry(
        self, feature: FeatureConfig, columns: Mapping[str, Any], num_rows: int, day: Indices | int | None
    ) -> pa.Array:
        """Of a user's entry for the row's item; without one there were no events."""
        affinity = self._affinities[feature.name]
        if feature.aggregate == "days_since":
            name = affinity.last_day(positive=feature.positive)
            return _days_since(column_of(columns, name, pa.int64(), num_rows), day)
        events = _counts(columns, affinity.events(feature.window_days), num_rows)
        if feature.aggregate == "count":
            return pa.array(events)
        positives = _counts(columns, affinity.positives(feature.window_days), num_rows)
        prior = np.full(num_rows, feature.prior)
        if self._item_rate is not None:
            known = column_of(columns, self._item_rate.name, pa.float32(), num_rows).cast(pa.float64())
            prior = known.fill_null(feature.prior).to_numpy()
        return pa.array((positives + prior * feature.prior_rows) / (events + feature.prior_rows))


def _counts(columns: Mapping[str, Any], name: str, num_rows: int) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = column_of(columns, name, pa.int64(), num_rows).fill_null(0).to_numpy()
    return counts


def _days_since(last_day: pa.Array, day: Indices | int | None) -> pa.Array:
    """Null where there was no event, or no day is known."""
    if day is None:
        return pa.nulls(len(last_day), pa.int64())
    known = last_day.is_valid().to_numpy(zero_copy_only=False)
    return pa.array(day - last_day.fill_null(0).to_numpy(), mask=~known)


def column_of(columns: Mapping[str, Any], name: str, kind: pa.DataType, num_rows: int) -> pa.Array:
    """A column of `num_rows` values as one array; see `Encoder.encode`."""
    value = columns.get(name)
    if value is None:
        return pa.nulls(num_rows, kind)
    if isinstance(value, pa.ChunkedArray):
        value = one_array(value)
    if isinstance(value, pa.Array):
        array = value if _is_coded(value.type) else value.cast(kind)
    elif isinstance(value, (str, int, float)):
        array = pa.repeat(pa.scalar(value, kind), num_rows)
    else:
        array = pa.array(value, kind, from_pandas=True)
    if len(array) != num_rows:
        raise ValueError(f"column {name} must hold {num_rows} values, one a row, got {len(array)}; pad it with None")
    return array


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column's values in one piece."""
    # combine_chunks would copy the only chunk.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _is_coded(kind: pa.DataType) -> bool:
    """Whether a column is dictionary-encoded strings, or lists of them; other columns are cast to their type."""
    return bool(pa.types.is_dictionary(kind.value_type if pa.types.is_list(kind) else kind))


def with_clocks(tables: schema.Tables, logged: pa.Table | pa.RecordBatch) -> tuple[dict[str, Any], Indices]:
    """Columns of logged events, what their timestamps say among them, and the day of each."""
    time_us = timestamps_us(logged)
    columns = {name: logged[name] for name in logged.schema.names}
    for feature in tables.of("context"):
        if feature.clock:
            step_us, ahead, period = _CLOCKS[feature.clock]
            columns[feature.name] = pa.array((time_us // step_us + ahead) % period)
    return columns, time_us // _CLOCKS["weekday"][0]


def day_of(at: datetime) -> int:
    """Days since 1970-01-01."""
    return int(at.timestamp() // 86_400)


def timestamps_us(logged: pa.Table | pa.RecordBatch, missing: int | None = None) -> Indices:
    """(R,) microseconds since 1970 (UTC); `missing` for a null, if one is given."""
    column = logged["timestamp"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    values: Indices = (column.fill_null(missing) if missing is not None else column).to_numpy()
    return values
