"""From declared features to every table that holds them (contract 10)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa

from limaml.config import FeatureConfig
from limaml.config.names import FEATURE_TYPES
from limaml.errors import ConfigError
from limaml.schema.affinities import Affinity, affinities
from limaml.schema.columns import (
    AFFINITY_VIEW,
    EVENTS,
    FETCHED_EMBEDDING,
    ITEM_VIEW,
    SLOTS,
    TIMESTAMP,
    USER_VIEW,
    Column,
    Table,
)

_STAMP = Column("event_timestamp", TIMESTAMP)
"""A snapshot row is an entity's state at this instant, the end of a day, over events before it only."""
_TYPES = {
    "number": pa.float64(),
    "category": pa.string(),
    "categories": pa.list_(pa.string()),
    "cycle": pa.int64(),
    "text": pa.string(),
}
# days_since: the day of the last event (since 1970-01-01), of which a moment of use makes a number of days.
_AGGREGATES = {"count": pa.int64(), "rate": pa.float32(), "mean": pa.float32(), "days_since": pa.int64()}


def add_type(name: str, stored: pa.DataType) -> None:
    """Let there be another feature type, whose values are stored as one of the Arrow types that are stored already.

    Raises ConfigError for another Arrow type, and if there is a feature type of that name.
    """
    known = set(_TYPES.values())
    if stored not in known:
        found = ", ".join(sorted(map(str, known)))
        raise ConfigError(f"feature type {name} must be stored as one of {found}, got {stored}; choose one of them")
    FEATURE_TYPES.add(name)
    _TYPES[name] = stored


def arrow_type(feature: FeatureConfig) -> pa.DataType:
    """Type of the feature's values wherever they are stored or sent."""
    if feature.type == "vector":
        return pa.list_(pa.float32(), feature.width)
    return _AGGREGATES[feature.aggregate] if feature.aggregate else _TYPES[feature.type]


@dataclass(frozen=True)
class Tables:
    """Every table that holds features; `tables` derives them."""

    features: tuple[FeatureConfig, ...]

    def of(self, entity: str) -> tuple[FeatureConfig, ...]:
        """What networks read of one entity, in its order in every table and in the encoder: what does not change with time
        first, sets of categories before the rest. Not what is kept of a user by an attribute of items, nor vectors (`vectors`).
        """
        mine = [f for f in self.features if f.entity == entity and f.type not in ("text", "vector") and not f.by]
        order = {"categories": 0, "category": 1}
        return tuple(sorted(mine, key=lambda feature: (feature.aggregate is not None, order.get(feature.type, 2))))

    @property
    def vectors(self) -> tuple[FeatureConfig, ...]:
        """Vectors of items: in the item table, in no other."""
        return tuple(feature for feature in self.features if feature.type == "vector")

    @property
    def item_vectors(self) -> Table:
        """The vectors of every item ever delivered."""
        return Table("item_vectors", (Column("item_id", pa.string(), unique=True), *self._vectors_of("item")), key="item_id")

    def _vectors_of(self, entity: str) -> tuple[Column, ...]:
        return tuple(_column(feature, nullable=True) for feature in self.vectors if feature.entity == entity)

    @property
    def title(self) -> str | None:
        """The catalogue's column that people know items by, if one is declared."""
        return next((feature.name for feature in self.features if feature.entity == "item" and feature.type == "text"), None)

    @functools.cached_property
    def affinities(self) -> tuple[Affinity, ...]:
        """What is kept of a user by an attribute of items."""
        return affinities(self.features)

    @functools.cached_property
    def events(self) -> Table:
        """An event: what every data set has, and its columns that features are declared of, by the features' names."""
        mine = (_column(feature, nullable=True) for feature in self.features if feature.is_delivered)
        return Table("events", (*EVENTS.columns, *mine))

    def names(self, entity: str) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.of(entity))

    def catalogue(self, entity: Literal["user", "item"]) -> Table:
        """What is kept of every known entity; a column has the name of its feature. Vectors are kept apart."""
        texts = [feature for feature in self.features if feature.entity == entity and feature.type == "text"]
        columns = [_column(feature, nullable=True) for feature in (*texts, *self.of(entity)) if not feature.aggregate]
        return Table(f"{entity}s", (Column(f"{entity}_id", pa.string(), unique=True), *columns), key=f"{entity}_id")

    def delivered(self, entity: Literal["user", "item"]) -> Table:
        """What a source delivers of every known entity."""
        kept = self.catalogue(entity)
        return replace(kept, columns=(*kept.columns, *self._vectors_of(entity)))

    def snapshots(self, entity: Literal["user", "item"]) -> Table:
        """An entity's state at the end of a day: its catalogue columns and its aggregates."""
        counts = ("count", "rate")
        columns = [_column(f, nullable=f.aggregate not in counts or f.retention_days > 0) for f in self.of(entity)]
        return Table(_VIEWS[entity], (Column(f"{entity}_id", pa.string()), _STAMP, *columns), key=f"{entity}_id")

    @property
    def joined(self) -> tuple[Column, ...]:
        """Features that an event is joined with; null where no snapshot knows the entity."""
        return (
            *self.features_of("user"),
            *self.features_of("item"),
            *(column for affinity in self.affinities for column in affinity.joined),
        )

    def features_of(self, entity: str) -> tuple[Column, ...]:
        """The features of one entity as columns of an event, or of a request."""
        return tuple(_column(feature, nullable=True) for feature in self.of(entity))

    @property
    def logged_events(self) -> Table:
        """An event with the features it was logged with: what training and adaptation read."""
        return Table("logged_events", (*self.events.columns, *self.joined))

    def support_columns(self, entity_column: str) -> list[str]:
        """What adaptation reads of `logged_events`, the entity first."""
        context = (f.name for f in self.of("context") if f.is_delivered)
        names = ("item_id", "timestamp", "label", *context, *(column.name for column in self.joined))
        return [entity_column, *(name for name in names if name != entity_column)]

    @property
    def affinity_rows(self) -> Table:
        """A user's maps as they are online."""
        columns = (column for affinity in self.affinities for column in affinity.online)
        return Table(AFFINITY_VIEW, (Column("user_id", pa.string()), _STAMP, *columns), key="user_id")

    def context(self, *, per_candidate: bool) -> Table:
        """What a request says of its moment, or of each candidate's."""
        mine = (feature for feature in self.of("context") if feature.per_candidate == per_candidate)
        return Table("context", tuple(_column(feature, nullable=True) for feature in mine))

    @property
    def of_candidates(self) -> Table:
        """What a request was scored from beside an item's features, a candidate: its context, and the user's entries for it."""
        entries = (column for affinity in self.affinities for column in affinity.joined)
        return Table("candidates", (*self.context(per_candidate=True).columns, *entries))

    @property
    def request_log(self) -> Table:
        """A ranking request as it was answered: what the service logs of a share of users."""
        return Table(
            "request_log",
            (
                Column("logged_at", TIMESTAMP),
                Column("user_id", pa.string()),
                Column("model_version", pa.string()),
                Column("slot", pa.string(), allowed=SLOTS),
                # Null where no experiment is configured.
                Column("arm", pa.string(), nullable=True),
                # End of the last day that the server knew to be published whole.
                Column("complete_through", TIMESTAMP, nullable=True),
                Column("context", _struct((Column("at", TIMESTAMP), *self.context(per_candidate=False).columns))),
                # Null: the store did not answer.
                Column("user", self._fetched("user"), nullable=True),
                Column("item_ids", pa.list_(pa.string())),
                Column("items", pa.list_(self._fetched("item"))),
                *self._logged_candidates,
                Column("embeddings", pa.list_(FETCHED_EMBEDDING)),
                Column("scores", pa.list_(pa.float64())),
            ),
        )

    @property
    def _logged_candidates(self) -> tuple[Column, ...]:
        """Of a candidate beside its item; nothing where nothing is declared of it."""
        if not self.of_candidates.columns:
            return ()
        # The end of the day that the user's entries are of, null where there are none.
        entries_at = Column("affinities_at", TIMESTAMP, nullable=True)
        return (entries_at, Column("candidates", pa.list_(_struct(self.of_candidates.columns))))

    def _fetched(self, entity: str) -> pa.DataType:
        """A row of a view as a server fetched it; all null where the store has none. A null timestamp: not known."""
        return pa.struct([pa.field(_STAMP.name, TIMESTAMP), *(pa.field(c.name, c.type) for c in self.features_of(entity))])


_VIEWS = {"user": USER_VIEW, "item": ITEM_VIEW}


def _struct(columns: Sequence[Column]) -> pa.DataType:
    return pa.struct([(column.name, column.type) for column in columns])


@functools.cache
def tables(features: tuple[FeatureConfig, ...]) -> Tables:
    """The tables that these features make."""
    return Tables(features)


def rate_feature(features: Sequence[FeatureConfig], entity: str) -> FeatureConfig | None:
    """The entity's smoothed rate of positive events, if one is declared."""
    rates = (feature for feature in features if feature.aggregate == "rate" and not feature.by)
    return next((feature for feature in rates if feature.entity == entity), None)


def own_rate_feature(features: Sequence[FeatureConfig]) -> FeatureConfig | None:
    """A user's smoothed rate of an item over all time, if one is declared."""
    rates = (feature for feature in features if feature.aggregate == "rate" and feature.by == "item_id")
    return next((feature for feature in rates if not feature.window_days), None)


def clock_value(clock: str, instant: datetime) -> int:
    """Hour of the day (UTC, 0 to 23), or day of the week (0: Monday)."""
    instant = instant.astimezone(UTC)
    return instant.hour if clock == "hour" else instant.weekday()


def _column(feature: FeatureConfig, *, nullable: bool) -> Column:
    return Column(
        feature.name,
        arrow_type(feature),
        nullable=nullable,
        minimum=feature.lowest,
        maximum=feature.highest,
        allowed=feature.values or None,
    )
