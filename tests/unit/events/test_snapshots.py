"""Daily snapshots against a plain second computation."""

from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from limaml import schema
from limaml.config import Config, FeatureConfig
from limaml.events import catalogue, snapshots, state
from limaml.events.day_store import EventStore, canonical
from limaml.events.synthetic import SyntheticSource
from limaml.io.storage import Storage
from tests import declared

RATE = {"prior": 0.4, "prior_rows": 3.0}
FEATURES = tuple(f.model_copy(update=RATE) if f.aggregate == "rate" else f for f in declared.FEATURES)
TABLES = schema.tables(FEATURES)
KINDS = catalogue.kinds(TABLES)


class World:
    """Five days of synthetic events in an event store, with the first catalogue recorded."""

    def __init__(self, folder):
        self.cfg = Config.model_validate(
            {
                "storage": {"root": str(folder)},
                "source": {
                    "kind": "synthetic",
                    "synthetic_users": 15,
                    "synthetic_items": 8,
                    "synthetic_days": 5,
                    "synthetic_rows_per_user": 12,
                },
                "features": FEATURES,
            }
        )
        self.storage = Storage(str(folder))
        self.source = SyntheticSource(self.cfg.source)
        self.days = self.source.days()
        self.before = self.days[0] - timedelta(days=1)
        for kind, table in zip(KINDS.values(), self.source.catalogue(), strict=True):
            catalogue.record(self.storage, kind, catalogue.declared(kind, TABLES, table)[0], self.before)
        for day in self.days:
            EventStore(self.storage).place(day, canonical(self.source.read_day(day), schema.EVENTS), 1)

    def files(self):
        return {path: self.storage.read_bytes(path) for path in self.storage.walk("snapshots")}


def write(storage, tables, first, through):
    state.forget(storage, first)
    span = snapshots.advance(storage, tables, first, through)
    rows = {name: span.rows(subject) for name, subject in snapshots.subjects(tables).items()}
    snapshots.write(storage, tables, span, span.changed(rows))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def plain_rate(labels):
    """(positives + prior * rows) / (rows + rows), in the configuration's numbers."""
    return (sum(labels) + 0.4 * 3.0) / (len(labels) + 3.0)


@pytest.mark.parametrize("kind", ["user", "item"])
def test_rows_are_the_running_state_of_entities_that_changed(world, kind):
    write(world.storage, TABLES, world.before, world.days[-1])
    static = {row[f"{kind}_id"]: row for row in catalogue.read(world.storage, kind).to_pylist()}
    history = {entity: [] for entity in static}
    first = snapshots.changed(world.storage, KINDS[kind], world.before)
    assert first[f"{kind}_id"].to_pylist() == sorted(static)
    assert set(first["event_timestamp"].to_pylist()) == {schema.day_start(world.days[0])}
    for day in world.days:
        for event in world.source.read_day(day).to_pylist():
            history[event[f"{kind}_id"]].append(event["label"])
        rows = snapshots.changed(world.storage, KINDS[kind], day).to_pylist()
        today = {event[f"{kind}_id"] for event in world.source.read_day(day).to_pylist()}
        assert [row[f"{kind}_id"] for row in rows] == sorted(today)
        for row in rows:
            labels = history[row[f"{kind}_id"]]
            assert row["event_timestamp"] == schema.day_end(day)
            assert row[f"{kind}_events"] == len(labels)
            # float32 holds 24 bits: relative 6e-8.
            assert row[f"{kind}_positive_rate"] == pytest.approx(plain_rate(labels), rel=1e-7)
            names = KINDS[kind].static
            assert {name: row[name] for name in names} == {name: static[row[f"{kind}_id"]][name] for name in names}


def test_catalogue_rows_start_with_the_prior_and_no_events(world):
    write(world.storage, TABLES, world.before, world.before)
    rows = snapshots.changed(world.storage, KINDS["item"], world.before)
    assert set(rows["item_events"].to_pylist()) == {0}
    assert rows["item_positive_rate"].to_pylist() == pytest.approx([0.4] * rows.num_rows, rel=1e-7)


def test_one_span_single_days_and_a_second_time_give_the_same_bytes(world):
    write(world.storage, TABLES, world.before, world.days[-1])
    at_once = world.files()
    write(world.storage, TABLES, world.days[2], world.days[3])
    assert world.files() == at_once
    world.storage.delete_dir("snapshots")
    for day in (world.before, *world.days):
        write(world.storage, TABLES, day, day)
    assert world.files() == at_once


def test_latest_is_the_newest_row_of_each_entity_up_to_a_day(world):
    write(world.storage, TABLES, world.before, world.days[-1])
    through = world.days[2]
    rows = snapshots.latest(world.storage, KINDS["user"], through)
    assert rows.schema.equals(declared.USER_FEATURES.arrow)
    everything = snapshots.between(world.storage, KINDS["user"], world.before, through).to_pylist()
    newest = {row["user_id"]: row for row in sorted(everything, key=lambda row: row["event_timestamp"])}
    assert rows.to_pylist() == [newest[user] for user in sorted(newest)]
    some = snapshots.latest(world.storage, KINDS["user"], through, ["u3", "u1", "nobody"])
    assert some.to_pylist() == [newest["u1"], newest["u3"]]
    assert snapshots.latest(world.storage, KINDS["user"], through, []).num_rows == 0


def test_profile_change_is_a_row_with_the_counts_so_far(world):
    write(world.storage, TABLES, world.before, world.days[-1])
    users = catalogue.read(world.storage, "user")
    rows = users.to_pylist()
    quiet = next(  # Somebody without events on the last day.
        n for n, row in enumerate(rows) if row["user_id"] not in world.source.read_day(world.days[-1])["user_id"].to_pylist()
    )
    rows[quiet]["occupation"] = "gardener"
    changed = pa.Table.from_pylist(rows, declared.USERS.arrow)
    assert catalogue.record(world.storage, KINDS["user"], changed, world.days[-1])
    assert not catalogue.record(world.storage, KINDS["user"], changed, world.days[-1]), "known already"
    before = snapshots.latest(world.storage, KINDS["user"], world.days[-2], [rows[quiet]["user_id"]]).to_pylist()[0]
    write(world.storage, TABLES, world.days[-1], world.days[-1])
    after = snapshots.latest(world.storage, KINDS["user"], world.days[-1], [rows[quiet]["user_id"]]).to_pylist()[0]
    assert after == before | {"occupation": "gardener", "event_timestamp": schema.day_end(world.days[-1])}


@pytest.mark.parametrize("kind", ["user", "item"])
def test_an_entity_that_a_correction_took_out_of_a_day_keeps_a_row_of_it(world, kind):
    """Else the row that is online would never be replaced: its timestamp is the newest."""
    write(world.storage, TABLES, world.before, world.days[-1])
    last, key = world.days[-1], f"{kind}_id"
    rows = world.source.read_day(last)
    gone = rows[key][0].as_py()
    kept = rows.filter(pc.not_equal(rows[key], gone))
    EventStore(world.storage).place(last, canonical(kept, schema.EVENTS), 2)
    write(world.storage, TABLES, last, last)
    before = snapshots.latest(world.storage, KINDS[kind], world.days[-2], [gone]).to_pylist()[0]
    after = snapshots.latest(world.storage, KINDS[kind], last, [gone]).to_pylist()[0]
    assert after == before | {"event_timestamp": schema.day_end(last)}


WINDOWED = (
    *(feature for feature in declared.FEATURES if not feature.aggregate),
    FeatureConfig(entity="user", name="seen", type="number", aggregate="count"),
    FeatureConfig(entity="user", name="seen_of_two", type="number", aggregate="count", window_days=2),
    FeatureConfig(
        entity="user", name="rate_of_one", type="number", aggregate="rate", window_days=1, prior=0.25, prior_rows=2.0
    ),
    FeatureConfig(entity="item", name="rate_of_two", type="number", aggregate="rate", window_days=2),
)


@pytest.mark.parametrize("name", ["user", "item"])
def test_a_window_holds_its_days_and_changes_when_one_leaves_it(world, name):
    """Against plain sums over the events, on every day and two days after the last one."""
    kind = catalogue.kinds(schema.tables(WINDOWED))[name]
    last = world.days[-1] + timedelta(days=2)
    write(world.storage, schema.tables(WINDOWED), world.before, last)
    events = [event | {"day": day} for day in world.days for event in world.source.read_day(day).to_pylist()]

    def labels(entity, first, day):
        return [event["label"] for event in events if event[kind.key] == entity and first <= event["day"] <= day]

    leaving = 0
    for day in [*world.days, *(world.days[-1] + timedelta(days=n) for n in (1, 2))]:
        rows = snapshots.changed(world.storage, kind, day).to_pylist()
        for row in rows:
            entity = row[kind.key]
            in_two, in_one = labels(entity, day - timedelta(days=1), day), labels(entity, day, day)
            leaving += not in_one
            if name == "item":
                assert row["rate_of_two"] == pytest.approx((sum(in_two) + 5.0) / (len(in_two) + 10.0), rel=1e-6)
                continue
            assert (row["seen"], row["seen_of_two"]) == (len(labels(entity, world.before, day)), len(in_two))
            assert row["rate_of_one"] == pytest.approx((sum(in_one) + 0.5) / (len(in_one) + 2.0), rel=1e-6)
        changed = {row[kind.key] for row in rows}
        for entity in {event[kind.key] for event in events} - changed:
            for length in (1, 2):
                now, before = (labels(entity, end - timedelta(days=length - 1), end) for end in (day, day - timedelta(days=1)))
                assert now == before, "who changed has a row"
    assert leaving > 0
    before = world.files()
    for day in world.days[2:]:
        write(world.storage, schema.tables(WINDOWED), day, day)
    assert world.files() == before
