"""`limaml compare-arms` on logged requests and ingested events: users, outcomes and figures as a plain loop has them.

The log is written by the service's own writer, the events by the event store's.
"""

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from limaml import cli, metrics, schema
from limaml.arms import Arms
from limaml.config import Config
from limaml.errors import ConfigError, DataError, NothingToDo
from limaml.events.day_store import DayManifest, EventStore, canonical
from limaml.io.storage import Storage
from limaml.monitoring.arms import compare_arms
from limaml.monitoring.sequential import difference
from serving.request_log import LoggedEmbedding, LoggedRequest, RequestLog
from tests import declared

FIRST, NUM_DAYS = date(2026, 3, 2), 6
THROUGH = FIRST + timedelta(days=NUM_DAYS - 1)
NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
ITEMS = [f"i{number}" for number in range(12)]
TWO = [{"name": "prior", "share": 0.5, "personalise": False}, {"name": "adapted", "share": 0.5}]
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class World:
    """Requests and events of one folder; what is added is written by `compare`."""

    def __init__(self, folder, **experiment):
        self.cfg = Config.model_validate(
            {
                "features": declared.FEATURES,
                "source": {"kind": "synthetic"},
                "storage": {"root": str(folder / "data")},
                "serving": {"log_share": 1.0, "log_path": str(folder / "requests")},
                "experiment": {"salt": "s", "arms": TWO, "outcome_days": 2} | experiment,
            }
        )
        self.storage = Storage(self.cfg.storage.root)
        self.arms = Arms(self.cfg.experiment)
        self.requests, self.events, self.ingested = [], [], [FIRST + timedelta(days=number) for number in range(NUM_DAYS)]

    def ask(self, user, at, items=ITEMS[:4], scores=None, arm="as configured", version="3"):
        self.requests.append((user, at, list(items), scores or [0.5] * len(items), self.arm_of(user, arm), version))

    def arm_of(self, user, arm="as configured"):
        return self.arms.of(user).name if arm == "as configured" else arm

    def happen(self, user, at, item, label=1):
        self.events.append((user, at, item, label))

    def compare(self, through=THROUGH, first=FIRST):
        log = RequestLog(self.cfg, max_queued=100_000)
        for request in self.requests:
            log.record(_logged(*request))
        log.close()
        self.requests = []
        store, events = EventStore(self.storage, declared.TABLES.events), declared.TABLES.events
        for day in self.ingested:
            rows = [row for row in self.events if row[1].date() == day]
            names = ("user_id", "timestamp", "item_id", "label")
            values = [{"event_id": f"{day}-{at}", **dict(zip(names, row, strict=True))} for at, row in enumerate(rows)]
            store.place(day, canonical(pa.Table.from_pylist(values, events.arrow), events), 1)
            store.commit(DayManifest(day, "passed", 1, len(rows)))
        return compare_arms(self.cfg, first, through)

    def users_of(self, arm, number):
        """The first ids that are in an arm."""
        found = [user for user in map("u{}".format, range(10_000)) if self.arm_of(user) == arm]
        return found[:number]


def _logged(user, at, items, scores, arm, version):
    nothing = {name: [None] * len(items) for name in declared.ITEM_FEATURE_NAMES}
    return LoggedRequest(
        at=at,
        user_id=user,
        model_version=version,
        slot="blue",
        complete_through=None,
        context={"at": at, "hour": at.hour},
        user=None,
        user_at=None,
        item_ids=items,
        items=nothing,
        items_at=None,
        embeddings=[LoggedEmbedding("user", "missing")],
        scores=scores,
        arm=arm,
    )


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def by_arm(found):
    return {arm["arm"]: arm for arm in found["arms"]}


def random_traffic(world, rng, num_users=300):
    """Users who ask one to five times, and what some of them do before, between and after, on items named or not."""
    requests, events = [], []
    for number in range(num_users):
        user, first = f"u{number}", NOON + MINUTE * int(rng.integers(0, 5 * 24 * 60))
        for _ in range(int(rng.integers(1, 6))):
            at = first + MINUTE * int(rng.integers(0, 3 * 24 * 60))
            items = rng.choice(ITEMS, size=int(rng.integers(1, 6)), replace=False).tolist()
            requests.append((user, at, items, rng.random(len(items)).tolist()))
        for _ in range(int(rng.integers(0, 8))):
            at = first + MINUTE * int(rng.integers(-600, 4 * 24 * 60))
            events.append((user, at, str(rng.choice(ITEMS)), int(rng.random() < 0.4)))
    for user, at, items, scores in requests:
        world.ask(user, at, items, scores)
    for event in events:
        world.happen(*event)
    return requests, events


def plainly(world, requests, events, through, outcome):
    """The same by loops: users in order with arm and outcome, and the candidates that events followed."""
    window, complete = timedelta(days=world.cfg.experiment.outcome_days), schema.day_end(through)
    asked = defaultdict(list)
    for number, (user, at, items, scores) in enumerate(requests):
        if FIRST <= at.date() <= through:
            asked[user].append((at, number, items, scores))
    users, followed = [], {}
    for user, mine in asked.items():
        mine.sort(key=lambda request: request[:2])
        first = mine[0][0]
        for _, at, item, label in (event for event in events if event[0] == user and FIRST <= event[1].date() <= through):
            before = [request for request in mine if request[0] <= at and item in request[2]]
            if before and at < first + window:
                _, number, items, scores = before[-1]
                _, positive = followed.get((number, item), (0.0, False))
                followed[number, item] = scores[items.index(item)], positive or label == 1
        if first + window <= complete:
            positives = [
                (sum(followed.get((number, item), (0, False))[1] for item in items), len(items))
                for at, number, items, _ in mine
                if at < first + window
            ]
            outcomes = [min(1, count) if outcome == "any" else count / of for count, of in positives]
            users.append((first, user, world.arm_of(user), float(np.mean(outcomes))))
    users.sort()
    judged = defaultdict(list)
    for (number, _), (score, positive) in followed.items():
        judged[world.arm_of(requests[number][0])].append((positive, score))
    return users, judged, len(asked)


@pytest.mark.parametrize("outcome", ["any", "share"])
def test_figures_are_those_of_a_plain_loop(tmp_path, outcome):
    world = World(tmp_path, outcome=outcome)
    requests, events = random_traffic(world, np.random.default_rng(5))
    found = world.compare()
    users, judged, num_users = plainly(world, requests, events, THROUGH, outcome)
    arms = by_arm(found)
    assert sum(arm["users"] for arm in found["arms"]) == num_users
    assert 50 < len(users) < num_users
    for name, arm in arms.items():
        mine = [value for _, _, of, value in users if of == name]
        assert arm["users_counted"] == len(mine)
        assert arm["outcome"] == pytest.approx(np.mean(mine), abs=1e-12)
        positives, scores = zip(*judged[name], strict=True)
        assert arm["positive_rate"] == pytest.approx(np.mean(positives), abs=1e-12)
        assert arm["auc"] == pytest.approx(metrics.auc(positives, scores), abs=1e-12)
    values, treated = [value for *_, value in users], [of == "adapted" for _, _, of, _ in users]
    expected = difference(values, treated, share=0.5, level=0.05)
    adapted = arms["adapted"]
    assert (adapted["difference"], adapted["low"], adapted["high"], adapted["p"]) == pytest.approx(
        (expected.value, expected.low, expected.high, expected.p), abs=1e-9
    )
    assert world.storage.read_json(f"arms/from={FIRST}/dt={THROUGH}/summary.json")["arms"] == found["arms"]


def test_a_later_look_changes_nothing_of_the_users_that_an_earlier_one_counted(world):
    requests, events = random_traffic(world, np.random.default_rng(6))
    looks = [world.compare(FIRST + timedelta(days=number)) for number in range(2, NUM_DAYS)]
    counted = [sum(arm["users_counted"] for arm in look["arms"]) for look in looks]
    assert counted == sorted(counted)
    assert counted[0] < counted[-1]
    seen = [plainly(world, requests, events, FIRST + timedelta(days=number), "any")[0] for number in range(2, NUM_DAYS)]
    for earlier, later in pairwise(seen):
        assert later[: len(earlier)] == earlier
    ps = [by_arm(look)["adapted"]["p"] for look in looks]
    assert ps == sorted(ps, reverse=True)


def outcome_of(world, *, arm="adapted", **found):
    return by_arm(world.compare(**found))[arm]["outcome"]


def test_an_event_belongs_to_the_last_request_that_named_its_item(world):
    [user] = world.users_of("adapted", 1)
    world.ask(user, NOON)
    world.ask(user, NOON + HOUR)
    world.ask(user, NOON + 2 * HOUR, items=["i9"])
    world.happen(user, NOON + 3 * HOUR, "i0")
    assert outcome_of(world) == pytest.approx(1 / 3)
    world.happen(user, NOON, "i1")  # at the very instant of the first
    assert outcome_of(world) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("at", "item", "label"),
    [
        (NOON - MINUTE, "i0", 1),  # before it
        (NOON + 2 * DAY, "i0", 1),  # after the user's days
        (NOON + HOUR, "i8", 1),  # not asked for
        (NOON + HOUR, "i0", 0),  # not liked
    ],
)
def test_what_is_no_success(world, at, item, label):
    [user] = world.users_of("adapted", 1)
    world.ask(user, NOON)
    world.happen(user, at, item, label)
    assert outcome_of(world) == 0.0


def test_a_user_waits_until_the_days_are_over_and_ingested(world):
    [user] = world.users_of("adapted", 1)
    world.ask(user, NOON)
    world.happen(user, NOON + HOUR, "i0")
    assert outcome_of(world, through=FIRST + DAY) is None
    assert outcome_of(world, through=FIRST + 2 * DAY) == 1.0


def test_days_that_were_not_ingested_are_named_and_nothing_behind_the_last_one_is_counted(world):
    [user] = world.users_of("adapted", 1)
    world.ask(user, NOON)
    world.ingested = [FIRST, FIRST + 3 * DAY]
    found = world.compare()
    assert found["complete_through"] == str(FIRST + 3 * DAY)
    assert found["missing_days"] == [str(FIRST + DAY), str(FIRST + 2 * DAY)]
    world.ingested = [FIRST]
    EventStore(world.storage).commit(DayManifest(FIRST + 3 * DAY, "quarantined", 1))
    found = world.compare()
    assert found["complete_through"] == str(FIRST)
    assert by_arm(found)["adapted"]["users_counted"] == 0


def add_users(world, counts, success):
    """Users of each arm, one request each, of whom a share succeeds."""
    for name, count in counts.items():
        for number, user in enumerate(world.users_of(name, count)):
            at = NOON + MINUTE * number
            world.ask(user, at)
            if number % 10 < 10 * success[name]:
                world.happen(user, at + MINUTE, "i1")


def test_an_arm_that_is_better_is_said_to_be(world):
    add_users(world, {"prior": 400, "adapted": 400}, {"prior": 0.3, "adapted": 0.6})
    found = world.compare()
    adapted = by_arm(found)["adapted"]
    assert (adapted["decision"], found["split_is_broken"]) == ("better", False)
    assert adapted["difference"] == pytest.approx(0.3)
    assert 0.1 < adapted["low"] < 0.3 < adapted["high"] < 0.5
    assert adapted["p"] < 1e-4
    assert "decision" not in by_arm(found)["prior"]


def test_of_several_arms_each_is_held_to_its_part_of_the_level(tmp_path):
    """p lies between half the level and the level."""
    shares = [{"name": name, "share": share} for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25))]
    world = World(tmp_path, arms=shares)
    add_users(world, {"a": 200, "b": 100, "c": 100}, {"a": 0.4, "b": 0.7, "c": 0.3})
    p = by_arm(world.compare())["b"]["p"]
    for level, decision in ((p * 1.5, "open"), (p * 2.5, "better")):
        world.cfg = world.cfg.model_copy(update={"experiment": world.cfg.experiment.model_copy(update={"level": level})})
        arms = by_arm(world.compare())
        assert arms["b"]["decision"] == decision
        assert arms["c"]["decision"] == "open"


def test_a_broken_split_is_said_and_decides_nothing(world, capsys):
    add_users(world, {"prior": 250, "adapted": 400}, {"prior": 0.2, "adapted": 0.7})
    with capture_logs() as said:
        found = world.compare()
    assert found["split_is_broken"]
    assert found["split_p"] < 1e-6
    assert by_arm(found)["adapted"]["decision"] == "split broken"
    [error] = [line for line in said if line["log_level"] == "error"]
    assert (error["event"], error["users"]) == ("arms_split_broken", {"prior": 250, "adapted": 400})
    cli.compare_arms(world.cfg, FIRST, THROUGH)
    printed = capsys.readouterr().out
    assert "THE SPLIT IS BROKEN" in printed
    assert "adapted" in printed


def test_requests_from_before_the_experiment_do_not_count(world):
    """They have no arm; nor has a file of a release that knew none."""
    [user] = world.users_of("adapted", 1)
    world.ask(user, NOON, arm=None)
    with pytest.raises(NothingToDo, match=r"no request of an arm was logged"):
        world.compare()
    storage = Storage(world.cfg.serving.log_path)
    [path] = storage.walk(".")
    storage.write_table(path, storage.read_table(path).drop_columns("arm"))
    world.ask(user, NOON + DAY)
    world.happen(user, NOON + DAY + HOUR, "i0")
    adapted = by_arm(world.compare())["adapted"]
    assert (adapted["users"], adapted["requests"], adapted["outcome"]) == (1, 1, 1.0)


def test_users_of_another_split_are_refused(world):
    users = world.users_of("adapted", 3)
    for user in users:
        world.ask(user, NOON)
    world.ask(users[0], NOON + HOUR, arm="prior")
    world.ask(users[1], NOON + HOUR, arm="gone")
    with pytest.raises(DataError, match=r"2 of 3 users were answered in another one; restore the settings"):
        world.compare()


def test_versions_that_answered_are_shown(world):
    [user] = world.users_of("adapted", 1)
    world.ask(user, NOON)
    world.ask(user, NOON + HOUR, version="4")
    assert by_arm(world.compare())["adapted"]["versions"] == {"3": 1, "4": 1}


def test_without_arms_or_with_days_exchanged_it_is_a_usage_error(world):
    with pytest.raises(ConfigError, match="exchange them"):
        compare_arms(world.cfg, THROUGH, FIRST)
    without = world.cfg.model_copy(update={"experiment": type(world.cfg.experiment)()})
    with pytest.raises(ConfigError, match=r"experiment.arms must be declared to be compared"):
        compare_arms(without, FIRST, THROUGH)
