"""An experiment over HTTP, from the split to the comparison: response, metrics and log agree, and `compare-arms` reads them.

Three arms: nobody personalised, the champion, and the version before it. Everybody has a stored embedding of both versions.
"""

import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from limaml import registry
from limaml.arms import Arms
from limaml.config import Config
from limaml.events.day_store import DayManifest, EventStore, canonical
from limaml.io.storage import Storage
from tests import declared
from tests.polling import wait_for

ROOT = Path(__file__).parents[2]
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
USERS = [f"p{number}" for number in range(60)]
ITEMS = ["i1", "i2", "i3"]
BLUE, GREEN = [2.0, -1.0, 0.5, 1.5], [-2.0, 1.0, -0.5, 1.0]
ARMS = [
    {"name": "prior", "share": 0.4, "personalise": False},
    {"name": "champion", "share": 0.4},
    {"name": "before", "share": 0.2, "version": "previous"},
]
# Both sides compute in float32, in batches of different sizes.
TOLERANCE = 1e-6


class Experiment:
    """A server whose champion is green, blue ready beside it."""

    def __init__(self, world, start_server):
        self.world = world
        values = world.cfg.model_dump(mode="json")
        values["serving"] |= {"log_share": 1.0, "log_path": str(world.folder / "requests")}
        values["experiment"] = {"salt": "over HTTP", "arms": ARMS, "outcome_days": 1}
        self.cfg = Config.model_validate(values)
        self.arms = Arms(self.cfg.experiment)
        assert world.registry.champion() is None  # creates the registry's tables
        self.server = start_server(self.cfg, world.folder)
        world.build()
        self.blue = world.register(seed=1, slot="blue", complete_through=NOW - DAY)
        self.green = world.register(seed=2, slot="green", complete_through=NOW - DAY)
        world.publish("blue", self.blue, dict.fromkeys(USERS, BLUE), as_of=NOW - DAY)
        world.publish("green", self.green, dict.fromkeys(USERS, GREEN), as_of=NOW - DAY)
        world.registry.set_champion(self.green)
        self.server.wait_until("/readyz", 200)
        before = next(user for user in USERS if self.arm_of(user) == "before")
        self.server.ranked_when(lambda answer: answer["model_version"] == self.blue, before, ITEMS)
        self.answers = {user: self.server.ranked(user, ITEMS) for user in USERS}

    def arm_of(self, user):
        return self.arms.of(user).name

    def expected(self, arm, user):
        """Version, vector and fallback that an arm's user is scored with."""
        of = {"prior": (self.green, None, "withheld"), "champion": (self.green, GREEN, None), "before": (self.blue, BLUE, None)}
        return of[arm]

    def answered(self, arm, answer):
        return self.server.metric("limaml_arm_requests_total", arm=arm, answer=answer)


@pytest.fixture(scope="module")
def experiment(make_world, start_server, tmp_path_factory):
    return Experiment(make_world(tmp_path_factory.mktemp("arms")), start_server)


def scores(answer):
    return {entry["item_id"]: entry["score"] for entry in answer["items"]}


def test_every_arm_is_answered_as_it_says(experiment):
    seen = Counter(answer["arm"] for answer in experiment.answers.values())
    assert set(seen) == {arm["name"] for arm in ARMS}
    for user, answer in experiment.answers.items():
        assert answer["arm"] == experiment.arm_of(user)
        version, vector, fallback = experiment.expected(answer["arm"], user)
        assert answer["model_version"] == version
        assert answer["embeddings"]["user"]["fallback"] == fallback
        assert answer["embeddings"]["user"]["age_s"] > 0.0
        assert scores(answer) == pytest.approx(experiment.world.expected(version, user, ITEMS, vector), abs=TOLERANCE)


def test_the_openapi_page_has_the_arm(experiment):
    page = experiment.server.client.get("/docs.json").json()
    schema = page["paths"]["/rank"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert "arm" in schema["properties"]
    assert "arm" not in schema["required"]


def test_metrics_count_every_arm_by_what_answered(experiment):
    arms = Counter(experiment.arm_of(user) for user in USERS)
    assert (experiment.answered("prior", "prior"), experiment.answered("prior", "personalised")) == (arms["prior"], 0.0)
    assert experiment.answered("champion", "personalised") == arms["champion"]
    for arm in ("prior", "champion"):
        assert experiment.server.metric("limaml_arm_seconds_count", arm=arm) == arms[arm]
    # It was asked until the version had been loaded.
    asked = experiment.answered("before", "personalised") + experiment.answered("before", "other_version")
    assert experiment.answered("before", "personalised") >= arms["before"]
    assert experiment.server.metric("limaml_arm_seconds_count", arm="before") == asked
    withheld = experiment.server.metric("limaml_meta_embedding_lookups_total", kind="user", status="withheld")
    assert withheld == arms["prior"]


def test_without_its_version_an_arm_is_answered_by_the_champion_and_counted(experiment):
    user = next(user for user in USERS if experiment.arm_of(user) == "before")
    experiment.world.registry.set_tags(experiment.blue, {registry.STATE: "retired"})
    try:
        answer = experiment.server.ranked_when(lambda answer: answer["model_version"] == experiment.green, user, ITEMS)
        assert answer["arm"] == "before"
        assert scores(answer) == pytest.approx(experiment.world.expected(experiment.green, user, ITEMS, GREEN), abs=TOLERANCE)
        counted = experiment.answered("before", "other_version")
        experiment.server.ranked(user, ITEMS)
        assert experiment.answered("before", "other_version") == counted + 1
    finally:
        experiment.world.registry.set_tags(experiment.blue, {registry.STATE: "ready"})
    experiment.server.ranked_when(lambda answer: answer["model_version"] == experiment.blue, user, ITEMS)


def test_a_roll_back_exchanges_what_the_arms_are_served_from(experiment):
    world = experiment.world
    champion, before = (next(user for user in USERS if experiment.arm_of(user) == arm) for arm in ("champion", "before"))
    world.registry.set_champion(experiment.blue)
    try:
        experiment.server.ranked_when(lambda answer: answer["model_version"] == experiment.blue, champion, ITEMS)
        answer = experiment.server.ranked_when(lambda answer: answer["model_version"] == experiment.green, before, ITEMS)
        assert scores(answer) == pytest.approx(world.expected(experiment.green, before, ITEMS, GREEN), abs=TOLERANCE)
    finally:
        world.registry.set_champion(experiment.green)
    experiment.server.ranked_when(lambda answer: answer["model_version"] == experiment.green, champion, ITEMS)
    experiment.server.ranked_when(lambda answer: answer["model_version"] == experiment.blue, before, ITEMS)


def test_the_log_has_the_arm_and_compare_arms_reads_it(experiment, tmp_path):
    """The server is ended, which writes its log. Then two of three users of the champion's arm like what came first."""
    experiment.server.stop()
    storage = Storage(experiment.cfg.serving.log_path)
    rows = wait_for(lambda: [row for path in storage.walk(".") for row in storage.read_table(path).to_pylist()], "the log")
    last = {row["user_id"]: row for row in rows}
    assert set(last) == set(USERS)
    for row in rows:
        assert row["arm"] == experiment.arm_of(row["user_id"])
    for user, answer in experiment.answers.items():
        row = last[user]
        [embedding] = row["embeddings"]
        assert embedding["status"] == ("withheld" if answer["arm"] == "prior" else "fresh")
        assert dict(zip(row["item_ids"], row["scores"], strict=True)) == pytest.approx(scores(answer), abs=TOLERANCE)
    in_arm = {arm["name"]: [user for user in USERS if experiment.arm_of(user) == arm["name"]] for arm in ARMS}
    pleased = set(in_arm["champion"][::3] + in_arm["champion"][1::3])
    events = [
        {
            "event_id": f"e{number}",
            "user_id": row["user_id"],
            "item_id": ITEMS[0],
            "timestamp": row["context"]["at"] + timedelta(seconds=1),
            "label": int(row["user_id"] in pleased),
        }
        for number, row in enumerate(last.values())
    ]
    first = min(row["logged_at"] for row in rows).date()
    _ingest(experiment.cfg, events, [first + DAY * number for number in range(4)])
    result = tmp_path / "result.json"
    days = ["--from", str(first), "--through", str(first + 3 * DAY)]
    told = ["--config", str(experiment.server.config_path), "--result", str(result)]
    command = [sys.executable, "-m", "limaml.cli", "compare-arms", *days, *told]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert {name: arm["users_counted"] for name, arm in arms.items()} == {name: len(users) for name, users in in_arm.items()}
    assert arms["prior"]["outcome"] == arms["before"]["outcome"] == 0.0
    # Some were asked several times, and only the last request led to something.
    asked = Counter(row["user_id"] for row in rows)
    outcomes = [(user in pleased) / asked[user] for user in in_arm["champion"]]
    assert arms["champion"]["outcome"] == pytest.approx(sum(outcomes) / len(outcomes))
    assert arms["champion"]["low"] < arms["champion"]["difference"] < arms["champion"]["high"]
    assert experiment.blue in arms["before"]["versions"]
    assert "champion" in done.stdout
    assert f"from {first} through {first + 3 * DAY}" in done.stdout


def _ingest(cfg, events, days):
    store, columns = EventStore(Storage(cfg.storage.root), declared.TABLES.events), declared.TABLES.events
    for day in days:
        rows = [event for event in events if event["timestamp"].date() == day]
        store.place(day, canonical(pa.Table.from_pylist(rows, columns.arrow), columns), 1)
        store.commit(DayManifest(day, "passed", 1, len(rows)))
