"""Features of every origin: Feast's join defines them, plain Python counts them again, and each day follows from the last."""

import random
from collections import defaultdict
from datetime import date, timedelta

import pyarrow as pa
import pytest

from limaml import schema
from limaml.errors import GateError
from limaml.events import ingest, snapshots
from limaml.events.logged import read_logged
from limaml.features.feature_store import join_features, open_store
from tests.contracts.ingestion.rich import KINDS, MAX_KEYS, Shop

FIRST = date(2026, 5, 1)
DAYS = [FIRST + timedelta(days=n) for n in range(8)]
EPOCH = date(1970, 1, 1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Shop(tmp_path_factory.mktemp("shop"), DAYS)
    for day in DAYS:
        found.deliver(day)
    ingest.ingest_history(found.cfg, DAYS[-1], found.today)
    return found


@pytest.fixture(scope="module")
def tables(shop):
    return schema.tables(shop.cfg.features)


def test_logged_features_are_those_of_feasts_join_row_for_row(shop, tables):
    logged = read_logged(shop.storage, tables, through=DAYS[-1])
    events = logged.select(tables.events.names)
    assert logged.equals(join_features(open_store(shop.cfg), events, tables))
    entries = [column.name for affinity in tables.affinities for column in affinity.joined]
    for name in [*tables.names("user"), *tables.names("item"), *entries, "place", "temperature", "price"]:
        assert len(set(logged[name].to_pylist())) > 1, f"{name} says nothing"


def test_features_are_what_plain_python_counts(shop, tables):
    history, now, past = [], {}, set()
    for day in DAYS:
        for row in read_logged(shop.storage, tables, first=day, through=day).to_pylist():
            now[row["event_id"]] = row
        for row in now.values():
            if row["timestamp"].date() == day:
                expect(row, day, history)
                past |= {(name, day) for name in ("seen", "unsold") if row[name] is None and day > DAYS[1]}
        history += [(row["timestamp"].date(), row) for row in now.values() if row["timestamp"].date() == day]
    assert {name for name, _ in past} == {"seen", "unsold"}, "of both some value was past its retention"


def expect(row, day, history):
    def last(days, rows):
        return [r for at, r in rows if not days or at >= day - timedelta(days=days)]

    def number(at):
        return (at - EPOCH).days

    mine = [(at, r) for at, r in history if r["user_id"] == row["user_id"]]
    of_item = [(at, r) for at, r in history if r["item_id"] == row["item_id"]]
    # Kept a day: an event of the day before is needed.
    yesterday = day - timedelta(days=1)
    assert row["seen"] == (len(mine) if not mine or mine[-1][0] == yesterday else None)
    two = last(2, mine)
    assert row["bought_of_two"] == pytest.approx((sum(r["label"] for r in two) + 2.0) / (len(two) + 10.0), rel=1e-6)
    for name, rows in (("paid", last(0, mine)), ("paid_of_two", two)):
        prices = [r["price"] for r in rows if r["price"] is not None]
        assert row[name] == (pytest.approx(sum(prices) / len(prices), rel=1e-6) if prices else None)
    assert row["away"] == (number(max(at for at, _ in mine)) if mine else None)
    bought = [at for at, r in mine if r["label"]]
    assert row["bought"] == (number(max(bought)) if bought else None)
    assert row["unsold"] == (number(yesterday) if of_item and of_item[-1][0] == yesterday else None)
    assert row["popular"] == pytest.approx((sum(r["label"] for _, r in of_item) + 1.2) / (len(of_item) + 4.0), rel=1e-6)
    kind = KINDS[int(row["item_id"][1:]) % len(KINDS)]
    for by, key, most in (("item_id", row["item_id"], MAX_KEYS), ("sort", kind, 2)):
        entry = newest_keys(mine, by, most).get(key) if key else None
        assert row[f"by_{by}_events"] == (len(entry) if entry else None)
        assert row[f"by_{by}_last_day"] == (number(max(at for at, _ in entry)) if entry else None)
        if by == "item_id":
            bought = [at for at, r in entry or [] if r["label"]]
            assert row["by_item_id_last_positive_day"] == (number(max(bought)) if bought else None)
            three = last(3, entry or [])
            assert row["by_item_id_positives_3"] == (sum(r["label"] for r in three) if entry else None)
        else:
            assert row["by_sort_positives"] == (sum(r["label"] for _, r in entry) if entry else None)


def newest_keys(mine, by, most):
    """Key -> the events that count: a key that others drove out starts anew."""
    held = {}
    by_day = defaultdict(list)
    for at, r in mine:
        key = r["item_id"] if by == "item_id" else KINDS[int(r["item_id"][1:]) % len(KINDS)]
        if key is not None:
            by_day[at].append((key, r))
    for at in sorted(by_day):
        for key in sorted({key for key, _ in by_day[at]}):
            held[key] = held.pop(key, []) + [(at, r) for k, r in by_day[at] if k == key]
        while len(held) > most:
            del held[next(iter(held))]
    return held


def test_keys_were_dropped_and_came_again(shop, tables):
    """Otherwise the tests above would not see what dropping does."""
    span = snapshots.advance(shop.storage, tables, FIRST - timedelta(days=1), DAYS[-1])
    assert span.num_dropped["user_by_item_id"] > 5
    assert span.num_dropped["user_by_sort"] > 0
    assert span.num_dropped["user"] == 0


@pytest.mark.parametrize("wrong", [float("inf"), -1e16])
def test_a_number_that_no_sum_can_hold_refuses_its_day(tmp_path, wrong):
    shop = Shop(tmp_path, DAYS[:1])
    table = shop.events[FIRST]
    prices = [wrong, *table["price"].to_pylist()[1:]]
    shop.events[FIRST] = table.set_column(table.schema.get_field_index("price"), "price", pa.array(prices, pa.float64()))
    shop.deliver(FIRST)
    with pytest.raises(GateError, match=rf"between\(price\): min_value -1000000000000000.0, .*{wrong}".replace("+", r"\+")):
        ingest.ingest_day(shop.cfg, FIRST, shop.today)
    assert shop.storage.list("snapshots") == []


def test_a_user_has_a_row_on_every_day_on_which_an_entry_changes(shop, tables):
    """What goes online with a day is what its users' rows name; no window of a user's own is as long as an entry's."""
    span = snapshots.advance(shop.storage, tables, FIRST - timedelta(days=1), DAYS[-1] + timedelta(days=4))
    changed = {name: span.changes[name].select(["user_id", "day"]).to_pylist() for name in ("user", "user_by_item_id")}
    users, entries = ({(row["user_id"], row["day"]) for row in rows} for rows in changed.values())
    quiet = {day for _, day in entries} - {(day - EPOCH).days for day in DAYS}
    assert len(quiet) == 3, "days on which entries change by leaving a window alone"
    assert entries <= users


@pytest.mark.parametrize("seed", range(2))
def test_days_in_any_order_corrected_and_late_give_the_bytes_of_a_load_at_once(tmp_path, seed):
    """Every step starts from whatever state is kept; the result is a pure function of the events."""
    draw = random.Random(seed)
    steps = Shop(tmp_path / "steps", DAYS, seed)
    final = dict(steps.events)
    late, corrected = draw.choice(DAYS[1:-1]), draw.sample(DAYS, 2)
    for day in corrected:
        table = steps.events[day]
        steps.events[day] = table.slice(draw.randrange(1, 4))
    order = [*(day for day in DAYS if day != late), late, *corrected]
    missing = draw.choice([day for day in DAYS[1:-1] if day not in (late, *corrected)])
    for at, day in enumerate(order):
        if at >= len(DAYS):
            steps.events[day] = final[day]
        if day != missing:
            steps.deliver(day)
        ingest.ingest_day(steps.cfg, day, steps.today)
    at_once = Shop(tmp_path / "once", DAYS, seed)
    for day in DAYS:
        if day != missing:
            at_once.deliver(day)
    ingest.ingest_history(at_once.cfg, DAYS[-1], at_once.today)
    mine, theirs = (world.files("snapshots") for world in (steps, at_once))
    # What a correction took away leaves the rows that replace it online.
    extra = {path for path in mine if path not in theirs}
    assert not extra
    assert sorted(theirs) == sorted(mine)
    assert newest_state(steps) == newest_state(at_once)


def newest_state(shop):
    names = shop.storage.list("state")
    return {name: shop.storage.read_bytes(f"state/{name}/{shop.storage.list(f'state/{name}')[-1]}") for name in names}
