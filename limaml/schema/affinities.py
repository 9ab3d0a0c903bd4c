"""What a user did with one item, or with items of one category: the columns that hold it (contract 10).

Offline one row a user and key, whenever it changes; online one map a user; with an event, the entry of its own item. All hold
the same counts, which the encoder makes numbers of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from limaml.config import FeatureConfig
from limaml.schema.columns import TIMESTAMP, Column, Table

NO_NUMBER = -1
"""Online, in place of a null: a list in Feast's stores has none, and what comes behind one would move up."""


@dataclass(frozen=True)
class Affinity:
    """Everything that is kept of a user's events by one attribute of their items."""

    by: str
    """`item_id`, or the name of an item's category."""
    features: tuple[FeatureConfig, ...]

    @property
    def name(self) -> str:
        """Of its folder of snapshots, and of its Feast view."""
        return f"user_by_{self.by}"

    @property
    def max_keys(self) -> int:
        return self.features[0].max_keys

    @property
    def windows(self) -> tuple[int, ...]:
        """Days of each window, ascending; 0 is all time."""
        return tuple(sorted({feature.window_days for feature in self.features if feature.aggregate != "days_since"}))

    def events(self, window_days: int) -> str:
        """Column: events with the key."""
        return f"by_{self.by}_events" + (f"_{window_days}" if window_days else "")

    def positives(self, window_days: int) -> str:
        """Column: those of them with a positive label."""
        return f"by_{self.by}_positives" + (f"_{window_days}" if window_days else "")

    def last_day(self, *, positive: bool) -> str:
        """Column: day (since 1970-01-01) of the last event with the key, or of the last positive one."""
        return f"by_{self.by}_last_{'positive_' if positive else ''}day"

    @property
    def counts(self) -> tuple[str, ...]:
        """Columns of an entry."""
        sums = [name for days in self.windows for name in (self.events(days), self.positives(days))]
        kinds = sorted({feature.positive for feature in self.features if feature.aggregate == "days_since"})
        return (*sums, *(self.last_day(positive=positive) for positive in kinds or [False]))

    @property
    def joined(self) -> tuple[Column, ...]:
        """Columns of an event; null where the user has no entry for its item."""
        return tuple(Column(name, pa.int64(), nullable=True, minimum=0) for name in self.counts)

    @property
    def snapshots(self) -> Table:
        """An entry at the end of a day; its counts are null from the day on which it was dropped."""
        keys = Column("user_id", pa.string()), Column(self.by, pa.string()), Column("event_timestamp", TIMESTAMP)
        return Table(self.name, (*keys, *self.joined))

    @property
    def keys_column(self) -> str:
        """Online: the keys, in the order of the other columns' numbers."""
        return f"by_{self.by}_keys"

    @property
    def online(self) -> tuple[Column, ...]:
        numbers = (Column(name, pa.list_(pa.int64()), nullable=True) for name in self.counts)
        return (Column(self.keys_column, pa.list_(pa.string()), nullable=True), *numbers)


def affinities(features: Sequence[FeatureConfig]) -> tuple[Affinity, ...]:
    """One for every attribute that features are declared by."""
    attributes = dict.fromkeys(feature.by for feature in features if feature.by)
    return tuple(Affinity(by, tuple(feature for feature in features if feature.by == by)) for by in attributes)
