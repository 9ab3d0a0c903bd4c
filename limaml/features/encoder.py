"""Columns of logged rows or of a request as fixed-width arrays: one encoder for training, evaluation, adaptation and serving.

It knows numpy and pyarrow only, and is JSON-serialisable, so that a server can load it without the training stack.
An item that is in the catalogue but not in the vocabulary gets index 0, the trained unknown row; an entity likewise. A null
profile (no snapshot knows the entity) is all zeros, which no known profile is.

    R rows, F features
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml.config import Config
from limaml.schema import AGE_BANDS, USERS

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

UNKNOWN = 0
_MICROSECONDS_PER_HOUR = 3_600_000_000
_USER_CATEGORIES = tuple(name for name in USERS.names if name != "user_id")
_USER_NUMBERS = ("user_events", "user_positive_rate")
_ITEM_NUMBERS = ("year", "item_events", "item_positive_rate")
_COUNTS = ("user_events", "item_events")
_RATES = ("user_positive_rate", "item_positive_rate")
CONTEXT_WIDTH = 3
"""sin and cos of the hour's angle, and whether the hour is known."""


@dataclass(frozen=True)
class EncodedRows:
    """What the model reads of R rows; row axis first."""

    item_index: Indices
    """(R,) index into the item embedding; 0 is the unknown row."""
    item_dense: Floats
    user_dense: Floats
    context: Floats

    def __len__(self) -> int:
        return len(self.item_index)


@dataclass(frozen=True)
class EncoderDims:
    """The widths a network must be built with; indices run from 0 (unknown) to the count."""

    num_items: int
    num_entities: int
    item_dense: int
    user_dense: int
    context: int
    num_genres: int = 0
    """The first entries of item_dense are the genres."""


@dataclass(frozen=True)
class Encoder:
    """Vocabularies and standardisation constants, learnt from the training rows alone."""

    items: tuple[str, ...]
    entities: tuple[str, ...]
    """Entities of the task kind seen in training; an unseen one has index 0."""
    genres: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    moments: dict[str, tuple[float, float]]
    """Column -> (mean, standard deviation) after `_scale`."""

    @classmethod
    def fit(cls, logged: pa.Table, cfg: Config) -> Self:
        """Learn vocabularies and constants from logged events (schema.LOGGED_EVENTS)."""
        categories = {name: _distinct(logged[name]) for name in _USER_CATEGORIES}
        categories["age_band"] = AGE_BANDS
        return cls(
            items=_distinct(logged["item_id"]),
            entities=_distinct(logged[cfg.task_kind.entity_column]),
            genres=_distinct(pc.list_flatten(logged["genres"])),
            categories=categories,
            moments={name: _moments(name, logged[name]) for name in (*_USER_NUMBERS, *_ITEM_NUMBERS)},
        )

    @property
    def dims(self) -> EncoderDims:
        user = sum(len(values) for values in self.categories.values()) + len(_USER_NUMBERS) + 1
        item = len(self.genres) + len(_ITEM_NUMBERS) + 2
        return EncoderDims(len(self.items), len(self.entities), item, user, CONTEXT_WIDTH, len(self.genres))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values; `from_dict` gives an equal encoder."""
        return {
            "items": list(self.items),
            "entities": list(self.entities),
            "genres": list(self.genres),
            "categories": {name: list(values) for name, values in self.categories.items()},
            "moments": {name: list(pair) for name, pair in self.moments.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises KeyError or TypeError if a part is missing or of another shape."""
        return cls(
            items=tuple(values["items"]),
            entities=tuple(values["entities"]),
            genres=tuple(values["genres"]),
            categories={name: tuple(values["categories"][name]) for name in _USER_CATEGORIES},
            moments={name: (float(mean), float(std)) for name, (mean, std) in values["moments"].items()},
        )

    def __post_init__(self) -> None:
        # Look-up tables are built once: a server encodes requests of a hundred rows against a vocabulary of thousands.
        tables = {"item": _index_of(self.items), "entity": _index_of(self.entities), "genre": _index_of(self.genres)}
        tables |= {name: _index_of(values) for name, values in self.categories.items()}
        object.__setattr__(self, "_tables", tables)
        object.__setattr__(self, "_user_width", self.dims.user_dense)

    def entity_index(self, entities: Sequence[str] | pa.Array | pa.ChunkedArray) -> Indices:
        """(R,) index of each entity, 0 where training never saw it."""
        return _lookup(_strings(entities), self._table("entity"))

    def encode(self, columns: Mapping[str, Any], num_rows: int) -> EncodedRows:
        """Encode `num_rows` rows of `columns`: item_id, schema's user and item features, and hour.

        A column is a sequence or array of `num_rows` values, any of them None; one plain value stands for all rows, and a
        column that is not there is None throughout. Raises ValueError for a column of another length.
        """
        return self._encode(columns, num_rows, _context(_column(columns, "hour", num_rows)))

    def encode_table(self, logged: pa.Table | pa.RecordBatch) -> EncodedRows:
        """Encode logged events; the context's hour is the timestamp's (UTC). Strings may be dictionary-encoded."""
        columns = {name: logged[name] for name in _COLUMN_TYPES if name in logged.schema.names}
        # Looked up: the same bits as `_context`, without a sine a row.
        context = CONTEXT_OF_HOUR.take(timestamps_us(logged) // _MICROSECONDS_PER_HOUR % 24, axis=0)
        return self._encode(columns, logged.num_rows, context)

    def encode_user(self, user: Mapping[str, Any]) -> Floats:
        """(F,) what `encode` makes of one user's features, without a column for each: 6 us of a request instead of 400."""
        dense = [0.0] * self._user_width  # type: ignore[attr-defined]
        start = 0
        for name, values in self.categories.items():
            index = self._table(name).get(user.get(name), UNKNOWN)  # type: ignore[arg-type]
            if index != UNKNOWN:
                dense[start + index - 1] = 1.0
            start += len(values)
        for at, name in enumerate(_USER_NUMBERS, start):
            scaled = _scale_number(name, user.get(name))
            mean, std = self.moments[name]
            dense[at] = 0.0 if scaled is None else (scaled - mean) / std
            dense[-1] = float(scaled is not None)
        return np.array(dense, np.float32)

    def _encode(self, columns: Mapping[str, Any], num_rows: int, context: Floats) -> EncodedRows:
        column = {name: _column(columns, name, num_rows) for name in _COLUMN_TYPES if name != "hour"}
        return EncodedRows(
            item_index=_lookup(column["item_id"], self._table("item")),
            item_dense=self._item_dense(column, num_rows),
            user_dense=self._user_dense(column, num_rows),
            context=context,
        )

    def _table(self, name: str) -> dict[str, int]:
        table: dict[str, int] = self._tables[name]  # type: ignore[attr-defined]
        return table

    def _user_dense(self, column: Mapping[str, pa.Array], num_rows: int) -> Floats:
        dense, start, rows = np.zeros((num_rows, self.dims.user_dense), np.float32), 0, np.arange(num_rows)
        for name, values in self.categories.items():
            _mark(dense[:, start:], rows, _lookup(column[name], self._table(name)))
            start += len(values)
        known = self._numbers(column, _USER_NUMBERS, dense[:, start:])
        dense[:, -1] = known[-1]
        return dense

    def _item_dense(self, column: Mapping[str, pa.Array], num_rows: int) -> Floats:
        dense, lists = np.zeros((num_rows, self.dims.item_dense), np.float32), column["genres"]
        parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        _mark(dense, parents, _lookup(pc.list_flatten(lists), self._table("genre")))
        known = self._numbers(column, _ITEM_NUMBERS, dense[:, len(self.genres) :])
        # Two flags: year is missing for some known items, the aggregates only for items that no snapshot holds.
        dense[:, -2], dense[:, -1] = known[0], known[-1]
        return dense

    def _numbers(self, column: Mapping[str, pa.Array], names: tuple[str, ...], dense: Floats) -> list[npt.NDArray[np.bool_]]:
        """Put standardised values, 0 where unknown, into the first columns of `dense`; returns whether each is known."""
        flags = []
        for at, name in enumerate(names):
            scaled, known = _scale(name, column[name])
            mean, std = self.moments[name]
            dense[:, at] = np.where(known, (scaled - mean) / std, 0.0)
            flags.append(known)
        return flags


_COLUMN_TYPES: dict[str, pa.DataType] = {
    "item_id": pa.string(),
    "genres": pa.list_(pa.string()),
    "hour": pa.float64(),
    **{name: pa.string() for name in _USER_CATEGORIES},
    **{name: pa.float64() for name in (*_USER_NUMBERS, *_ITEM_NUMBERS)},
}


def timestamps_us(logged: pa.Table | pa.RecordBatch, missing: int | None = None) -> Indices:
    """(R,) microseconds since 1970 (UTC); `missing` for a null, if one is given."""
    column = logged["timestamp"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    values: Indices = (column.fill_null(missing) if missing is not None else column).to_numpy()
    return values


def _column(columns: Mapping[str, Any], name: str, num_rows: int) -> pa.Array:
    value, kind = columns.get(name), _COLUMN_TYPES[name]
    if value is None:
        return pa.nulls(num_rows, kind)
    if isinstance(value, pa.ChunkedArray):
        value = _one_array(value)
    if isinstance(value, pa.Array):
        array = value if _is_coded(value.type) else value.cast(kind)
    elif isinstance(value, (str, int, float)):
        array = pa.repeat(pa.scalar(value, kind), num_rows)
    else:
        array = pa.array(value, kind, from_pandas=True)
    if len(array) != num_rows:
        raise ValueError(f"column {name} must hold {num_rows} values, one a row, got {len(array)}; pad it with None")
    return array


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    # combine_chunks would copy the only chunk.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _is_coded(kind: pa.DataType) -> bool:
    """Whether a column is dictionary-encoded strings, or lists of them; other columns are cast to their type."""
    return bool(pa.types.is_dictionary(kind.value_type if pa.types.is_list(kind) else kind))


def _strings(values: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return _one_array(values)
    return values if isinstance(values, pa.Array) else pa.array(values, pa.string())


def _distinct(column: pa.ChunkedArray) -> tuple[str, ...]:
    return tuple(sorted(value for value in pc.unique(column).to_pylist() if value is not None))


def _index_of(values: Sequence[str]) -> dict[str, int]:
    return {value: index for index, value in enumerate(values, start=1)}


def _lookup(values: pa.Array, table: Mapping[str, int]) -> Indices:
    """Index of each value, 0 for null and for what the table lacks; costs one dictionary access per distinct value."""
    coded = values.dictionary_encode()
    found = np.array([table.get(value, UNKNOWN) for value in coded.dictionary.to_pylist()] + [UNKNOWN], np.int64)
    codes = coded.indices.fill_null(len(found) - 1) if coded.indices.null_count else coded.indices
    indices: Indices = found.take(codes.to_numpy())
    return indices


def _mark(dense: Floats, rows: Indices, index: Indices) -> None:
    """Put a 1 into column index - 1 of each row; index 0 is unknown and puts none."""
    if (index == UNKNOWN).any():
        rows, index = rows[index != UNKNOWN], index[index != UNKNOWN]
    dense[rows, index - 1] = 1.0


def _scale(name: str, values: pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Numbers (counts as logarithms, rates as logits) and whether each is known; a null or a NaN is not."""
    values = values.cast(pa.float64())
    return _scale_numbers(name, values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy())


def _scale_numbers(name: str, numbers: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    known = np.isfinite(numbers)
    filled = numbers if known.all() else np.where(known, numbers, 0.0)
    if name in _COUNTS:
        return np.log1p(np.maximum(filled, 0.0)), known
    if name in _RATES:
        inside = np.clip(filled, 1e-3, 1 - 1e-3)
        return np.log(inside / (1 - inside)), known
    return filled, known


def _scale_number(name: str, number: float | None) -> float | None:
    """As `_scale_numbers` of one number; None where it is not known."""
    if number is None or not math.isfinite(number):
        return None
    if name in _COUNTS:
        return math.log1p(max(number, 0.0))
    if name in _RATES:
        inside = min(max(number, 1e-3), 1 - 1e-3)
        return math.log(inside / (1 - inside))
    return number


def _moments(name: str, values: pa.ChunkedArray) -> tuple[float, float]:
    scaled, known = _scale(name, values.cast(pa.float64()))
    if not known.any():
        return 0.0, 1.0
    std = float(scaled[known].std())
    # A constant column carries nothing; dividing by 1 keeps it at zero.
    return float(scaled[known].mean()), std if std > 1e-8 else 1.0


def _context(hour: pa.Array) -> Floats:
    hours, known = _scale("hour", hour)
    angle = hours * (2 * math.pi / 24)
    columns = [np.where(known, np.sin(angle), 0.0), np.where(known, np.cos(angle), 0.0), known]
    return np.stack(columns, axis=1).astype(np.float32)


CONTEXT_OF_HOUR = _context(pa.array(range(24), pa.float64()))
"""(24, 3) context of each hour."""
