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
    path: str = ""
    """parquet: folder or URL with `events/dt=*/`, `users.parquet`, `items.parquet`. movielens, completejourney: the
    folder of their files; the installed wheel's if empty."""
    min_rows_ratio: Share = 0.1
    """A day must have at least this share of the median of the days before it (`rows_window_days`)."""
    rows_window_days: PositiveCount = 14
    max_rows_ratio: Positive = 20.0
    max_gap_days: PositiveCount = 366
    """parquet: after more days than this without a folder, what lies beyond counts as misplaced: it is named and left out."""
    min_label_rate: Share = 0.0
    max_label_rate: Share = 1.0
    min_rows_for_label_rate: PositiveCount = 30
    """Label rate is not judged on days with fewer rows: a rate of 5 rows says nothing."""
    completejourney_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the households, by hash of the id, whose baskets are events; the catalogue knows all of them."""
    synthetic_users: PositiveCount = 200
    synthetic_items: PositiveCount = 100
    synthetic_days: PositiveCount = 30
    synthetic_rows_per_user: PositiveCount = 40
    synthetic_factors: Count = 1
    synthetic_level: Annotated[float, Field(ge=0.0)] = 0.0
    """Planted: dimensions of the taste, and standard deviation of what a user adds to every item's logit alike; 0: none."""
    synthetic_drift: Annotated[float, Field(ge=0.0)] = 0.0
    synthetic_session_rows: PositiveCount = 4
    synthetic_pace_s: PositiveCount = 1
    """Rows of one visit after the day of arrival (a user comes at most once a day), and seconds between its pairs of rows."""
    synthetic_seed: Count = 0
