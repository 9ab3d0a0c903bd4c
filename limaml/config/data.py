"""Where data lies, and where events come from."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.governance import Use
from limaml.config.names import SourceKind
from limaml.config.section import Count, OpenShare, Positive, PositiveCount, Section, Share


class StorageConfig(Section):
    """Where partitions, snapshots and quarantine live."""

    root: str = ".run/data"
    """Folder or pyarrow URL: `s3://bucket/prefix`, of another S3 server
    `s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http&region=NAME`. Keys come from the environment."""


class TableColumns(Section):
    """Which columns of a table of events are which: each a column's name, or a SQL expression of the table's columns."""

    user_id: str = "user_id"
    """Whole numbers or text; 1 and "1" are the same id, "01" is another."""
    item_id: str = "item_id"
    """As the user's."""
    timestamp: str = "timestamp"
    """With a zone, naive (`source.timezone` then says whose clock), ISO text, or a number since 1970: below 1e11 seconds, below
    1e14 milliseconds, below 1e17 microseconds, above nanoseconds. A plain column lets a day be read without the other days."""
    label: str = ""
    """Boolean, or 0 and 1, e.g. `stars >= 4`. Empty: every row is positive, and `source.negatives` must be set."""
    event_id: str = ""
    """Empty: a digest of the row's user, item, time and its rank among equal ones, the same in every delivery."""
    day: str = ""
    """A date at most one day from the row's UTC day, such as a Hive partition's column; other folders are then not opened."""


class UserColumns(Section):
    """The key of a table of users."""

    user_id: str = "user_id"
    """A column's name or a SQL expression, with the ids of the events."""
    more: dict[str, str] = Field(default_factory=dict)
    """Columns made for features, each a SQL expression of the table's: `segment = "coalesce(tier, plan)"`. One with the name of
    a column of the table stands in its place."""


class ItemColumns(Section):
    """The key of a table of items."""

    item_id: str = "item_id"
    """A column's name or a SQL expression, with the ids of the events."""
    more: dict[str, str] = Field(default_factory=dict)
    """As the users': `tags = "string_split(tags, ',')"` makes a set of texts of one text."""


class NegativesConfig(Section):
    """Rows that are sampled for a source that says only what happened."""

    per_positive: PositiveCount = 4
    """How many, for each that happened."""
    by: Literal["uniform", "popularity"] = "uniform"
    """Every item known on the day alike, or by its rows up to that day."""
    seed: Count = 0
    """The sample is a function of the event and this alone."""


class SourceConfig(Section):
    """Where events come from, and what a normal day of that source looks like."""

    kind: SourceKind
    """The adapter: recorded data of two packages, a generated world, or your own: day folders of Parquet, or any table.
    Or one that is registered (docs/extend.md)."""
    licence: str = ""
    """Under which the data may be used. Empty: movielens, completejourney and synthetic come with theirs; of any other source a
    model is neither trained nor served."""
    permitted_use: Use = "research"
    """With `licence`: what it permits, at least `governance.intended_use`. any covers all, non_commercial covers research and
    education."""
    attribution: str = ""
    """With `licence`: whom to name."""
    path: str = ""
    """parquet: folder or URL with `events/dt=*/`, `users.parquet`, `items.parquet`. movielens, completejourney: the
    folder of their files; the installed wheel's if empty. table: folder or URL below which relative names in `events`, `users`
    and `items` lie; the working folder if empty."""
    events: str = ""
    """table: a file, folder, pattern or URL of Parquet, CSV or JSON files, compressed ones too. Or a table or view of Postgres,
    `postgresql://USER:${NAME}@HOST/DATABASE?table=SCHEMA.TABLE`, with the password in the environment's variable NAME or where
    libpq finds it (`PGPASSWORD`, `PGPASSFILE`); a Delta table, `delta:PATH_OR_URL`; an Iceberg table,
    `iceberg:CATALOGUE.NAMESPACE.TABLE` as pyiceberg is configured, or `iceberg:PATH_OR_URL` of its folder or metadata file."""
    users: str = ""
    """table: the same, of what is known of users; empty: known are those that the events name, day by day."""
    items: str = ""
    """table: the same of items."""
    timezone: str = ""
    """table: where clocks showed the times that carry no zone, e.g. `Europe/Berlin`."""
    decimal: Literal[".", ","] = "."
    """table: what CSV files write before the decimals."""
    columns: TableColumns = TableColumns()
    user_columns: UserColumns = UserColumns()
    item_columns: ItemColumns = ItemColumns()
    negatives: NegativesConfig | None = None
    """table, without a label: the rows that did not happen."""
    min_rows_ratio: Share = 0.1
    """A day must have at least this share of the median of the days before it (`rows_window_days`)."""
    rows_window_days: PositiveCount = 14
    """How many days before it the median is taken of."""
    max_rows_ratio: Positive = 20.0
    """A day must have at most so many times that median."""
    max_gap_days: PositiveCount = 366
    """parquet, table: what lies beyond more days than this without data counts as misplaced: it is named and left out."""
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
    """Rows of a user in the mean."""
    synthetic_factors: Count = 1
    """Planted: dimensions of the taste."""
    synthetic_level: Annotated[float, Field(ge=0.0)] = 0.0
    """Planted: standard deviation of what a user adds to every item's logit alike; 0: none."""
    synthetic_drift: Annotated[float, Field(ge=0.0)] = 0.0
    """Planted: weight of what is new in taste and level each day; 0: they stay."""
    synthetic_label_rate: OpenShare = 0.5
    """Share of positive labels that is expected over all users and items."""
    synthetic_vector_scale: Annotated[float, Field(ge=0.0)] = 0.0
    """Items have a column `taste_vector` of `synthetic_factors` numbers, planted factors and noise, times this; 0: none."""
    synthetic_arrival_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Users arrive evenly over this share of the days, so that the last days hold returning users only."""
    synthetic_first_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of a user's rows on the day of arrival; the others lie on days of return, evenly over those that are left."""
    synthetic_session_rows: PositiveCount = 4
    """Rows of one visit after the day of arrival; a user comes at most once a day."""
    synthetic_pace_s: PositiveCount = 1
    """Seconds between the pairs of rows of a visit."""
    synthetic_seed: Count = 0
    """Seed of everything that is drawn."""

    @model_validator(mode="after")
    def _vector_has_numbers(self) -> Self:
        if self.synthetic_vector_scale and not self.synthetic_factors:
            raise ValueError(
                "synthetic_vector_scale must be 0 where synthetic_factors is 0, because the vector tells the factors, got "
                f"{self.synthetic_vector_scale:g}; plant a factor"
            )
        return self

    @model_validator(mode="after")
    def _made_of_a_table(self) -> Self:
        for name, columns in (("users", self.user_columns), ("items", self.item_columns)):
            if columns.more and not getattr(self, name):
                raise ValueError(
                    f"{name[:-1]}_columns.more must be empty where {name} names no table, got {', '.join(columns.more)}; name "
                    "the table, or remove them"
                )
        return self

    @model_validator(mode="after")
    def _passwords_are_named(self) -> Self:
        for name in ("events", "users", "items"):
            if self.holds_password(getattr(self, name)):  # The value stays out of the message.
                raise ValueError(
                    f"source.{name} must hold no password or key, got one; name an environment variable in its place, e.g. "
                    "postgresql://shop:${SHOP_PASSWORD}@host/db?table=events"
                )
        return self

    def location(self, name: Literal["events", "users", "items"]) -> str:
        """table: where the table lies, below `path` where that is set and the name is relative."""
        named = str(getattr(self, name))
        if not named or not self.path or named.startswith("/") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", named):
            return named
        folder, mark, parameters = self.path.partition("?") if "://" in self.path else (self.path, "", "")
        return f"{folder.rstrip('/')}/{named}{mark}{parameters}"

    def known_columns(self, name: Literal["users", "items"]) -> UserColumns | ItemColumns:
        return self.user_columns if name == "users" else self.item_columns

    @staticmethod
    def holds_password(location: str) -> bool:
        """Whether a table that is no file is named with a secret in plain text."""
        if not location.startswith(("postgres://", "postgresql://", "delta:", "iceberg:")):
            return False
        said = re.search(r"//[^/@]*:([^/]*)@", location) or re.search(r"[?&](?:ssl)?password=([^&]*)", location)
        return said is not None and re.fullmatch(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}", said[1]) is None
