"""Where data lies, and where events come from."""

from typing import Annotated, Literal

from pydantic import Field

from limaml.config.section import Count, Positive, PositiveCount, Section, Share


class StorageConfig(Section):
    """Where partitions, snapshots and quarantine live."""

    root: str = ".run/data"
    """Folder or fsspec/pyarrow URL (`s3://bucket/prefix`)."""


class SourceConfig(Section):
    """Where events come from, and what a normal day of that source looks like."""

    kind: Literal["movielens", "completejourney", "synthetic", "parquet"]
    """The adapter: recorded data of two packages, a generated world, or your own Parquet."""
    path: str = ""
    """parquet: folder or URL with `events/dt=*/`, `users.parquet`, `items.parquet`. movielens, completejourney: the
    folder of their files; the installed wheel's if empty."""
    min_rows_ratio: Share = 0.1
    """A day must have at least this share of the median of the days before it (`rows_window_days`)."""
    rows_window_days: PositiveCount = 14
    """How many days before it the median is taken of."""
    max_rows_ratio: Positive = 20.0
    """A day must have at most so many times that median."""
    max_gap_days: PositiveCount = 366
    """parquet: after more days than this without a folder, what lies beyond counts as misplaced: it is named and left out."""
    min_label_rate: Share = 0.0
    """Least share of positive labels of a day."""
    max_label_rate: Share = 1.0
    """Largest share of positive labels of a day."""
    min_rows_for_label_rate: PositiveCount = 30
    """Label rate is not judged on days with fewer rows: a rate of 5 rows says nothing."""
    completejourney_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the households, by hash of the id, whose baskets are events; the catalogue knows all of them."""
    synthetic_users: PositiveCount = 200
    """Users of the generated world."""
    synthetic_items: PositiveCount = 100
    """Its items."""
    synthetic_days: PositiveCount = 30
    """Its days."""
    synthetic_rows_per_user: PositiveCount = 40
    """Rows of a user in the mean; half of them on the day of arrival."""
    synthetic_factors: Count = 1
    """Planted: dimensions of the taste."""
    synthetic_level: Annotated[float, Field(ge=0.0)] = 0.0
    """Planted: standard deviation of what a user adds to every item's logit alike; 0: none."""
    synthetic_drift: Annotated[float, Field(ge=0.0)] = 0.0
    """Planted: weight of what is new in taste and level each day; 0: they stay."""
    synthetic_session_rows: PositiveCount = 4
    """Rows of one visit after the day of arrival; a user comes at most once a day."""
    synthetic_pace_s: PositiveCount = 1
    """Seconds between the pairs of rows of a visit."""
    synthetic_seed: Count = 0
    """Seed of everything that is drawn."""
