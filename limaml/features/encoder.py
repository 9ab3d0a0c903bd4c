"""Columns of logged rows or of a request as fixed-width arrays: one encoder for training, evaluation, adaptation and serving.

It knows numpy and pyarrow only, and is JSON-serialisable, so that a server can load it without the training stack. Which
features there are, and in which order, their declarations say. An item that is in the catalogue but not in the vocabulary gets
index 0, the trained unknown row; an entity likewise. A null profile (no snapshot knows the entity) is all zeros, which no known
profile is.

A row's context holds what a request has once, and behind it what it has for every candidate: the context of one, what the user
did with its item, and the days since an item's last event.

    R rows, F features
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import Config, FeatureConfig
from limaml.features.columns import (
    CategoryEncoder,
    ColumnEncoder,
    Floats,
    Indices,
    VectorEncoder,
    column_from_dict,
    distinct,
    fit_column,
    index_of,
    look_up,
)
from limaml.features.derived import Derived, column_of, day_of, one_array, with_clocks
from limaml.features.item_table import ItemTable
from limaml.features.shared import SharedRows, Sharing

_PART_ROWS = 65_536
"""Rows encoded at a time, where not all are held as they are encoded."""


@dataclass(frozen=True)
class EncodedRows:
    """What the model reads of R rows; row axis first."""

    item_index: Indices
    """(R,) index into the item embedding; 0 is the unknown row."""
    item_dense: Floats | SharedRows
    """Without vectors, which no row holds: `item_features` puts them in their place."""
    user_dense: Floats | SharedRows
    context: Floats
    item_row: Indices | None = None
    """(R,) row of `item_table`; None where no vector is declared, as the table."""
    item_table: ItemTable | None = None

    def __len__(self) -> int:
        return len(self.item_index)

    @property
    def item_width(self) -> int:
        """F of `item_features`."""
        return int(self.item_dense.shape[1]) + (0 if self.item_table is None else self.item_table.width)

    def item_features(self, at: Indices | slice = slice(None)) -> Floats:
        """(..., F) all numbers of the items of rows `at`. Without a vector a slice is a view."""
        if self.item_table is None or self.item_row is None:
            return self.item_dense[at]
        return self.item_table.beside(self.item_dense[at], self.item_row[at])

    def take(self, at: Indices) -> Self:
        """Rows `at`, in that order."""
        row = None if self.item_row is None else self.item_row[at]
        return replace(
            self,
            item_index=self.item_index[at],
            item_dense=self.item_dense.take(at) if isinstance(self.item_dense, SharedRows) else self.item_dense[at],
            user_dense=self.user_dense.take(at) if isinstance(self.user_dense, SharedRows) else self.user_dense[at],
            context=self.context[at],
            item_row=row,
        )


@dataclass(frozen=True)
class EncoderDims:
    """The widths a network must be built with; indices run from 0 (unknown) to the count."""

    num_items: int
    num_entities: int
    item_dense: int
    user_dense: int
    context: int
    candidate: int = 0
    """Of `context`, last: what a request has for every candidate."""
    item_static: int = 0
    """Of `item_dense`, first: what does not change with time, and so says what an item is."""
    item_sets: int = 0
    """Of `item_static`, first: places of sets of categories."""
    vectors: int = 0
    """Of `item_static`, last."""
    categories: Mapping[str, int] = field(default_factory=dict)
    """Category that tasks may hang on -> values that training saw."""

    @property
    def num_features(self) -> int:
        """F, of item, user and context side by side."""
        return self.item_dense + self.user_dense + self.context

    def num_entities_of(self, column: str) -> int:
        """Entities of a column that training saw."""
        return self.categories.get(column, self.num_items if column == "item_id" else self.num_entities)


@dataclass(frozen=True)
class Encoder:
    """Vocabularies and standardisation constants, learnt from the training rows alone."""

    features: tuple[FeatureConfig, ...]
    items: tuple[str, ...]
    entities: tuple[str, ...]
    """Entities of the first task kind seen in training; an unseen one has index 0."""
    columns: Mapping[str, ColumnEncoder]
    """Feature -> its encoder."""
    item_table: ItemTable | None = field(default=None, compare=False, repr=False)
    """Vectors of the known items (`with_items`): no part of what was learnt, and not in its JSON."""

    @classmethod
    def fit(cls, logged: pa.Table, cfg: Config, items: pa.Table | None = None) -> Self:
        """Learn vocabularies and constants from logged events (`schema.Tables.logged_events`).

        `items` holds the known items' vectors (`schema.Tables.item_vectors`), where one is declared; constants are those of the
        items that have events.
        """
        tables, ids = schema.tables(cfg.features), distinct(logged["item_id"])
        columns = {
            feature.name: fit_column(feature, pa.chunked_array([values]))
            for feature, values in _values(schema.tables(cfg.features), logged)
        }
        if tables.vectors:
            known = _declared_items(items)
            seen = known.filter(pc.is_in(known["item_id"], value_set=pa.array(ids, pa.string())))
            columns |= {feature.name: fit_column(feature, seen[feature.name]) for feature in tables.vectors}
        return cls(cfg.features, ids, distinct(logged[cfg.task_kind.entity_column]), columns)

    def grown(self, logged: pa.Table, cfg: Config) -> Self:
        """The encoder with the items and entities of `logged` that it does not know, behind those it knows; constants and
        categories stay, so that what it encoded is encoded as before.
        """
        items, entities = distinct(logged["item_id"]), distinct(logged[cfg.task_kind.entity_column])
        return replace(self, items=_with_new(self.items, items), entities=_with_new(self.entities, entities))

    def with_items(self, items: pa.Table | None) -> Self:
        """The encoder with the vectors of `items` (`schema.Tables.item_vectors`): rows are encoded with these and no other.

        Without a declared vector it is as it was, and `items` may be None.
        """
        vectors = self._tables.vectors
        if not vectors:
            return self
        place = self._parts["item"].width_of(lambda feature: not feature.aggregate)
        encoders = {feature.name: cast(VectorEncoder, self.columns[feature.name]) for feature in vectors}
        return replace(self, item_table=ItemTable.build(vectors, encoders, _declared_items(items), place))

    @property
    def dims(self) -> EncoderDims:
        user, item, context, candidate = (self._parts[part] for part in PARTS)
        vectors = sum(self.columns[feature.name].width for feature in self._tables.vectors)
        return EncoderDims(
            num_items=len(self.items),
            num_entities=len(self.entities),
            item_dense=item.width + vectors,
            user_dense=user.width,
            context=context.width + candidate.width,
            candidate=candidate.width,
            item_static=item.width_of(lambda feature: not feature.aggregate) + vectors,
            item_sets=item.width_of(lambda feature: feature.type == "categories"),
            vectors=vectors,
            categories={name: len(index) for name, index in self._categories.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values; `from_dict` gives an equal encoder."""
        return {
            "features": [feature.model_dump(mode="json") for feature in self.features],
            "items": list(self.items),
            "entities": list(self.entities),
            "columns": {name: column.to_dict() for name, column in self.columns.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError if a part is missing or of another shape."""
        features = tuple(FeatureConfig.model_validate(feature) for feature in values["features"])
        read = [feature for feature in features if feature.is_read]
        columns = {feature.name: column_from_dict(feature, values["columns"][feature.name]) for feature in read}
        return cls(features, tuple(values["items"]), tuple(values["entities"]), columns)

    # Made once: a server encodes requests of a hundred rows against a vocabulary of thousands.

    @cached_property
    def _item_index(self) -> dict[str, int]:
        return index_of(self.items)

    @cached_property
    def _entity_index(self) -> dict[str, int]:
        return index_of(self.entities)

    @cached_property
    def _categories(self) -> dict[str, dict[str, int]]:
        """Category that tasks may hang on -> the index of its values."""
        names = [feature.name for feature in self.features if feature.is_entity]
        return {name: cast(CategoryEncoder, self.columns[name]).index for name in names}

    @cached_property
    def _parts(self) -> dict[str, "_Parts"]:
        return {part: _Parts.of(_features_of(self._tables, part), self.columns) for part in PARTS}

    @cached_property
    def _tables(self) -> schema.Tables:
        return schema.tables(self.features)

    @cached_property
    def _derived(self) -> Derived:
        return Derived(self._tables)

    def entity_index(self, entities: Sequence[str] | pa.Array | pa.ChunkedArray, column: str | None = None) -> Indices:
        """(R,) index of each entity of a column, by default the first kind's; 0 where training never saw it."""
        index = self._item_index if column == "item_id" else self._categories.get(column or "", self._entity_index)
        return look_up(_strings(entities), index)

    def encode(self, columns: Mapping[str, Any], num_rows: int, day: Indices | int | None = None) -> EncodedRows:
        """Encode `num_rows` rows of `columns`: item_id and the declared features, as they are stored.

        `day` (since 1970-01-01) is that of each row, or of all, from which days since an event count. A column is a sequence
        or array of `num_rows` values, any of them None; one plain value stands for all rows, and a column that is not there is
        None throughout. Raises ValueError for a column of another length, and where a vector is declared and no items are
        there (`with_items`).
        """
        item_ids = column_of(columns, "item_id", pa.string(), num_rows)
        if self.item_table is None and self._tables.vectors:
            raise ValueError("rows of items with vectors must be encoded with them, got none; encode with encoder.with_items")
        return EncodedRows(
            item_index=look_up(item_ids, self._item_index),
            item_dense=self._dense(("item",), columns, num_rows, day),
            user_dense=self._dense(("user",), columns, num_rows, day),
            context=self._dense(("context", "candidate"), columns, num_rows, day),
            item_row=None if self.item_table is None else self.item_table.rows(item_ids),
            item_table=self.item_table,
        )

    def encode_table(self, logged: pa.Table | pa.RecordBatch) -> EncodedRows:
        """Encode logged events; the context is the timestamp's. Strings may be dictionary-encoded."""
        columns, day = with_clocks(self._tables, logged)
        return self.encode(columns, logged.num_rows, day)

    def encode_ordered(self, logged: pa.Table, order: Indices) -> EncodedRows:
        """As `encode_table` of rows `order` of logged events; what is static of a user or an item is held once."""
        keys = {entity: logged[f"{entity}_id"].combine_chunks().dictionary_encode() for entity in ("user", "item")}
        sharing = {
            entity: Sharing(self._parts[entity].width_of(lambda feature: not feature.aggregate), len(ids.dictionary))
            for entity, ids in keys.items()
        }
        codes = {entity: ids.indices.to_numpy(zero_copy_only=False) for entity, ids in keys.items()}
        parts = []
        for start in range(0, max(len(order), 1), _PART_ROWS):
            at = order[start : start + _PART_ROWS]
            part = self.encode_table(logged.take(at))
            for entity, dense in (("user", part.user_dense), ("item", part.item_dense)):
                sharing[entity].add(np.asarray(dense), codes[entity][at])
            parts.append(part)
        rows = [part.item_row for part in parts if part.item_row is not None]
        return EncodedRows(
            item_index=np.concatenate([part.item_index for part in parts]),
            item_dense=sharing["item"].rows(),
            user_dense=sharing["user"].rows(),
            context=np.concatenate([part.context for part in parts]),
            item_row=np.concatenate(rows) if rows else None,
            item_table=self.item_table,
        )

    def values(self, logged: pa.Table | pa.RecordBatch) -> dict[str, pa.Array]:
        """Every feature of logged events with its values, as numbers and categories are made of them."""
        return {feature.name: values for feature, values in _values(self._tables, logged)}

    def values_of(self, feature: FeatureConfig, logged: pa.Table) -> pa.Array:
        """As `values` of one feature."""
        columns, day = with_clocks(self._tables, logged)
        return self._derived.values(feature, columns, logged.num_rows, day)

    def encode_user(self, user: Mapping[str, Any], at: datetime) -> Floats:
        """(F,) what `encode` makes of one user's features, without a column for each: 6 us of a request instead of 400."""
        return self._one("user", user, day_of(at))

    def encode_context(self, given: Mapping[str, Any], at: datetime) -> tuple[dict[str, Any], Floats]:
        """What a request has once: its values, those of the clock where it gives none, and (F,) what `encode` makes of them."""
        context = {
            feature.name: schema.clock_value(feature.clock, at)
            if feature.clock and given.get(feature.name) is None
            else given.get(feature.name)
            for feature, _, _ in self._parts["context"].places
        }
        return context, self._one("context", context, day_of(at))

    def unknown(self, given: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
        """Of features with values that training never saw, the name and how many; `given` has one value each, or several."""
        for part in ("user", "context", "candidate"):
            for feature, encoder, _ in self._parts[part].places:
                if isinstance(encoder, CategoryEncoder) and (number := encoder.num_unknown(given.get(feature.name))):
                    yield feature.name, number

    @cached_property
    def has_candidates(self) -> bool:
        """Whether anything is declared that a request has for every candidate."""
        return bool(self._parts["candidate"].places)

    def encode_candidates(self, columns: Mapping[str, Any], num_rows: int, at: datetime) -> Floats:
        """(R, F) what `encode` makes of a request's candidates, behind its context."""
        return self._dense(("candidate",), columns, num_rows, day_of(at))

    def _one(self, part: str, values: Mapping[str, Any], day: int) -> Floats:
        parts = self._parts[part]
        dense = [0.0] * parts.width
        for feature, encoder, at in parts.places:
            encoder.encode_one(self._derived.value(feature, values.get(feature.name), day), dense, at)
        return np.array(dense, np.float32)

    def _dense(self, wanted: Sequence[str], columns: Mapping[str, Any], num_rows: int, day: Indices | int | None) -> Floats:
        parts = [self._parts[part] for part in wanted]
        dense = np.zeros((num_rows, sum(part.width for part in parts)), np.float32)
        start = 0
        for part in parts:
            for feature, encoder, at in part.places:
                column = self._derived.values(feature, columns, num_rows, day)
                encoder.encode(column, dense[:, start + at : start + at + encoder.width])
            start += part.width
        return dense


@dataclass(frozen=True)
class _Parts:
    """Where each feature of one entity stands among its numbers."""

    places: tuple[tuple[FeatureConfig, ColumnEncoder, int], ...]
    width: int

    @classmethod
    def of(cls, features: Sequence[FeatureConfig], columns: Mapping[str, ColumnEncoder]) -> Self:
        encoders = [columns[feature.name] for feature in features]
        *starts, width = accumulate((encoder.width for encoder in encoders), initial=0)
        return cls(tuple(zip(features, encoders, starts, strict=True)), width)

    def width_of(self, wanted: Callable[[FeatureConfig], bool]) -> int:
        return sum(encoder.width for feature, encoder, _ in self.places if wanted(feature))


PARTS = ("user", "item", "context", "candidate")
"""Where features stand among what a network reads."""


def _features_of(tables: schema.Tables, part: str) -> tuple[FeatureConfig, ...]:
    """Features of a part, in their order."""
    if part == "item":
        return tuple(feature for feature in tables.of("item") if feature.aggregate != "days_since")
    if part == "context":
        return tuple(feature for feature in tables.of("context") if not feature.per_candidate)
    if part == "candidate":
        context = tuple(feature for feature in tables.of("context") if feature.per_candidate)
        affinities = tuple(feature for affinity in tables.affinities for feature in affinity.features)
        return (*context, *(feature for feature in tables.of("item") if feature.aggregate == "days_since"), *affinities)
    return tables.of(part)


def _values(tables: schema.Tables, logged: pa.Table | pa.RecordBatch) -> Iterator[tuple[FeatureConfig, pa.Array]]:
    """Every feature of logged events with its values."""
    derived, (columns, day) = Derived(tables), with_clocks(tables, logged)
    for part in PARTS:
        for feature in _features_of(tables, part):
            yield feature, derived.values(feature, columns, logged.num_rows, day)


def _declared_items(items: pa.Table | None) -> pa.Table:
    if items is None:
        raise ValueError("items must hold the declared vectors, got none; read them with events.catalogue.item_vectors")
    return items


def _with_new(known: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *found)))


def _strings(values: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return one_array(values)
    return values if isinstance(values, pa.Array) else pa.array(values, pa.string())
