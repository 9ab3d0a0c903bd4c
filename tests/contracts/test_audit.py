"""What is stored about whom is found where it lies: a user in every place, and nowhere any more where it was deleted."""

import json
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import Config
from limaml.embeddings import cutover, fill
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.events.day_store import EventStore
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.events.sources import open_source
from limaml.features.feature_store import apply
from limaml.governance.retention import retain
from limaml.io.storage import Storage
from limaml.monitoring.audit import Audit, Place, audit
from limaml.registry import Registry
from limaml.training.candidate import BUNDLE
from tests import declared
from tests.contracts.small_world import ROOT, config_of, train

TODAY, RUN = date(2026, 3, 2), "a run"
SAID = {"purpose": "Taste differs by age.", "consent": "registration", "retention_days": 4}


class World:
    """An installation that serves, and one day's requests of one user."""

    def __init__(self, folder: Path) -> None:
        cfg = config_of(folder, serving={"log_path": str(folder / "requests")})
        features = tuple(f.model_copy(update=SAID) if f.name == "age_band" else f for f in declared.FEATURES)
        self.cfg: Config = cfg.model_copy(update={"features": features})
        self.days = open_source(self.cfg, TODAY).days()[:11]
        self.storage, through = Storage(self.cfg.storage.root), self.days[-2]
        apply(self.cfg)
        ingest_history(self.cfg, through, TODAY)
        candidate = train(self.cfg, through, folder / "candidate")
        self.version = Registry(self.cfg.registry).register(candidate / BUNDLE, Registry(self.cfg.registry).start_run(RUN), {})
        for shard in fill.plan_fill(self.cfg, self.version, through, RUN)["shards"]:
            fill.fill_shard(self.cfg, self.version, shard, RUN)
        cutover.cut_over(self.cfg, self.version, RUN)
        ingest_day(self.cfg, self.days[-1], TODAY)
        adapt_day(self.cfg, self.days[-1])
        publish_day(self.cfg, self.days[-1], RUN)
        self.logged = read_logged(self.storage, schema.tables(self.cfg.features), through=self.days[-1])
        self.user = self.logged["user_id"][0].as_py()
        requests = Storage(self.cfg.serving.log_path)
        requests.write_table(f"dt={self.days[0]}/part-1.parquet", pa.table({"user_id": [self.user, self.user]}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("audit"))


def by_name(found: Audit) -> dict[str, Place]:
    return {place.name: place for place in found.places}


def test_every_place_is_counted(world: World) -> None:
    found, days = by_name(audit(world.cfg)), EventStore(world.storage).days("passed")
    users = len(set(world.logged["user_id"].to_pylist()))
    for name in ("events", "logged"):
        place = found[name]
        assert (place.rows, place.users, place.oldest, place.newest) == (world.logged.num_rows, users, days[0], days[-1])
    known = {"catalogue", "catalogue_history/user", "snapshots/user", "state/user"}
    online = {f"online {name}" for name in ("user_features", "meta_embedding_user_blue")}
    embedded = f"embeddings/kind=user/version={world.version}"
    assert found.keys() == {"events", "logged", "request log", f"model version {world.version}", embedded} | known | online
    assert found["online meta_embedding_user_blue"].users == found[embedded].users == users
    assert found["request log"].users == 1


def test_one_user_is_found_everywhere_and_nobody_else(world: World) -> None:
    every, mine = by_name(audit(world.cfg)), by_name(audit(world.cfg, world.user))
    assert mine.keys() == every.keys()
    assert {place.users for place in mine.values()} == {1}
    rows = [user == world.user for user in world.logged["user_id"].to_pylist()]
    assert mine["logged"].rows == mine["events"].rows == sum(rows) < every["logged"].rows
    assert mine["request log"].rows == 2
    assert audit(world.cfg, "nobody").places == ()


def test_values_say_why_and_until_when(world: World, tmp_path: Path) -> None:
    found = {value.feature: value for value in audit(world.cfg).values}
    assert found.keys() == {feature.name for feature in world.cfg.features}
    age = found["age_band"]
    assert (age.purpose, age.consent, age.retention_days) == tuple(SAID.values())
    assert (age.oldest, age.next_dropped) == (world.days[0], world.days[0] + timedelta(days=4))
    assert (found["gender"].oldest, found["gender"].next_dropped) == (world.days[0], None)
    text = "\n".join(audit(world.cfg).lines())
    assert f"age_band (user): purpose: Taste differs by age.; basis: registration; kept 4 days, oldest {world.days[0]}" in text
    assert "hour (context): purpose: not declared; basis: not declared; kept as long as the rows" in text
    whole = audit(world.cfg).to_dict()
    assert json.loads(json.dumps(whole)) == whole
    assert len(json.dumps(audit(world.cfg).summary())) < 2048


def test_the_verbs_say_it(world: World, tmp_path: Path) -> None:
    path, whole = tmp_path / "config.json", tmp_path / "audit.json"
    path.write_text(world.cfg.model_dump_json())

    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "limaml.cli", *arguments, "--config", str(path), "--result", str(tmp_path / "result")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    listed = said("audit", "--user", world.user, "--out", str(whole))
    assert f"Stored about user {world.user}" in listed
    assert json.loads(whole.read_text()) == audit(world.cfg, world.user).to_dict()
    assert json.loads((tmp_path / "result").read_text())["places"]["request log"] == 2
    shown = said("card")
    assert shown.startswith(f"Model version {world.version}\nTrained for: research\n")
    assert "licence: Apache-2.0, generated by limaml (permits any)" in shown
    assert json.loads((tmp_path / "result").read_text())["limaml.card.use"].startswith("for research")


def test_what_was_dropped_is_no_longer_listed(world: World) -> None:
    last = world.days[-1]
    assert by_name(audit(world.cfg))["request log"].next_deleted == world.days[0] + timedelta(days=4)
    retain(world.cfg, last)
    after = audit(world.cfg)
    age = next(value for value in after.values if value.feature == "age_band")
    assert (age.oldest, age.next_dropped) == (last - timedelta(days=3), last + timedelta(days=1))
    assert "request log" not in by_name(after)


def test_a_day_is_adapted_and_published_after_values_were_dropped(world: World) -> None:
    """A null is a value that the network knows, and newest rows are read without the base that was made of them."""
    day = open_source(world.cfg, TODAY).days()[11]
    ingest_day(world.cfg, day, TODAY)
    adapt_day(world.cfg, day)
    assert publish_day(world.cfg, day, RUN)["written"] > 0
    assert datetime.fromisoformat(Registry(world.cfg.registry).get(world.version).tags["limaml.complete_through"]) > datetime(
        day.year, day.month, day.day, tzinfo=UTC
    )
