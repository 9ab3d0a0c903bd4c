"""What the poller makes of the registry, the catalogue and the online store, one poll at a time, without a server."""

import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from limaml import registry
from limaml.errors import DataError, StoreError
from serving.champion import Champion
from serving.features import OnlineFeatures
from serving.metrics import Metrics
from tests.polling import wait_for

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    """Two versions: blue, which is the champion when a test begins, and green."""
    world = make_world(tmp_path_factory.mktemp("champion"))
    world.build()
    world.blue = world.register(seed=1, slot="blue", complete_through=NOW - DAY)
    world.green = world.register(seed=2, slot="green", complete_through=NOW)
    return world


class Polled:
    """A poller whose thread was never started, and its metrics."""

    def __init__(self, cfg):
        self.samples = CollectorRegistry()
        self.champion = Champion(cfg, Metrics(self.samples))

    def poll(self):
        self.champion.poll()
        return self.champion.loaded

    def metric(self, name, **labels):
        return self.samples.get_sample_value(name, labels)


@pytest.fixture
def poller(world):
    """`poller(**serving)` makes one; the blue version is the champion."""
    world.registry.set_champion(world.blue)
    made = []

    def make(cfg=world.cfg, **serving):
        made.append(Polled(cfg.model_copy(update={"serving": cfg.serving.model_copy(update=serving)})))
        return made[-1]

    yield make
    for polled in made:
        polled.champion.stop()


def test_a_poll_is_told_with_the_version_its_slot_and_how_far_it_is_published(poller):
    polled, before = poller(), datetime.now(UTC).timestamp()
    loaded = polled.poll()
    assert (loaded.slot, loaded.complete_through) == ("blue", NOW - DAY)
    assert polled.metric("limaml_registry_poll_timestamp_seconds") >= before
    assert polled.metric("limaml_model_info", version=loaded.version, slot="blue") == 1.0
    through = polled.metric("limaml_embeddings_complete_through_timestamp_seconds", slot="blue")
    assert through == (NOW - DAY).timestamp()


def test_a_version_that_was_filled_into_the_other_slot_is_read_there(world, poller):
    polled = poller()
    assert polled.poll().slot == "blue"
    world.registry.set_tags(world.blue, {registry.SLOT: "green"})
    try:
        loaded = polled.poll()
        assert (loaded.version, loaded.slot, loaded.features.slot) == (world.blue, "green", "green")
    finally:
        world.registry.set_tags(world.blue, {registry.SLOT: "blue"})


def test_a_reader_is_given_back_when_another_version_serves(world, poller, monkeypatch):
    closed, close = [], OnlineFeatures.close
    monkeypatch.setattr(OnlineFeatures, "close", lambda reader: closed.append(reader) or close(reader))
    polled = poller()
    before = polled.poll().features
    closed.clear()
    world.registry.set_champion(world.green)
    after = polled.poll().features
    assert closed[-1] is before is not after


@pytest.mark.parametrize("slot", [None, "red"])
def test_a_champion_without_a_slot_does_not_serve_and_is_told_until_the_alias_is_back(world, poller, slot):
    polled = poller()
    polled.poll()
    world.registry.set_tags(world.green, {registry.SLOT: slot})
    try:
        world.registry.set_champion(world.green)
        assert polled.poll().version == world.blue
        assert polled.metric("limaml_champion_load_failed") == 1.0
        assert poller().poll() is None, "none serves before: then none does"
    finally:
        world.registry.set_tags(world.green, {registry.SLOT: "green"})
    world.registry.set_champion(world.blue)
    assert polled.poll().version == world.blue
    assert polled.metric("limaml_champion_load_failed") == 0.0


def test_a_champion_of_other_task_kinds_does_not_serve(world, poller):
    kind = world.cfg.task_kind.model_copy(update={"name": "member"})
    polled = poller(world.cfg.model_copy(update={"task_kinds": (kind,)}))
    with capture_logs() as said:
        assert polled.poll() is None
    [failed] = [line["error"] for line in said if line["event"] == "champion_load_failed"]
    assert "task_kinds must be the champion's, ['user'], got ['member']" in failed
    assert polled.metric("limaml_champion_load_failed") == 1.0


def test_a_champion_that_was_trained_on_other_features_does_not_serve(world, poller):
    first, *others = world.cfg.features
    polled = poller(world.cfg.model_copy(update={"features": tuple(others)}))
    with capture_logs() as said:
        assert polled.poll() is None
    [failed] = [line["error"] for line in said if line["event"] == "champion_load_failed"]
    assert f"features must be declared as version {world.blue} was trained with, but {first.name} changed" in failed


def test_a_champion_that_cannot_score_does_not_serve(world, poller, monkeypatch):
    """Warming up is the trial: a version is let in once it has scored."""

    def fail(*_):
        raise ValueError("shapes do not fit")

    polled = poller()
    assert polled.poll().version == world.blue
    world.registry.set_champion(world.green)
    with monkeypatch.context() as broken:
        broken.setattr("serving.champion.ranking.score", fail)
        assert polled.poll().version == world.blue
        assert polled.metric("limaml_champion_load_failed") == 1.0
    assert polled.poll().version == world.green


def rename_tables(world, old, new):
    connection = sqlite3.connect(world.cfg.feast.online_connection)
    with connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name.startswith(old):
                connection.execute(f'ALTER TABLE "{name}" RENAME TO "{new}{name.removeprefix(old)}"')
    connection.close()


@pytest.fixture
def lost_tables(world):
    """The online store's tables, gone until `found` is called."""
    rename_tables(world, "limaml_", "lost_")
    found = [lambda: rename_tables(world, "lost_", "limaml_")]
    yield lambda: found.pop()()
    for restore in found:
        restore()


def test_items_that_could_not_be_read_are_read_at_the_next_poll(poller, lost_tables):
    polled = poller(items_refresh_s=3600.0)
    assert not polled.poll().items.rows
    lost_tables()
    rows = polled.poll().items.rows
    assert rows["i1"].at is not None
    assert polled.poll().items.rows is rows, "and then not before items_refresh_s"


def test_items_are_read_anew_every_so_often_and_stay_as_last_read_while_the_store_is_away(world, poller):
    polled = poller(items_refresh_s=1e-9)
    rows = polled.poll().items.rows
    rename_tables(world, "limaml_", "lost_")
    try:
        assert polled.poll().items.rows == rows
    finally:
        rename_tables(world, "lost_", "limaml_")
    world.item_features["i1"]["item_events"] += 7
    try:
        world.publish_features()
        assert polled.poll().items.rows["i1"].values != rows["i1"].values
    finally:
        world.item_features["i1"]["item_events"] -= 7
        world.publish_features()


def test_items_are_read_anew_though_the_registry_is_away(world, poller, monkeypatch):
    def away(*_):
        raise StoreError("the registry does not answer")

    champion = poller(items_refresh_s=1e-9, poll_interval_s=0.01).champion
    champion.start()
    before = wait_for(lambda: champion.loaded, "a champion").items.rows["i1"].values
    monkeypatch.setattr(registry.Registry, "champion", away)
    world.item_features["i1"]["item_events"] += 7
    try:
        world.publish_features()
        wait_for(lambda: champion.loaded.items.rows["i1"].values != before, "an item's new features")
    finally:
        world.item_features["i1"]["item_events"] -= 7
        world.publish_features()


def test_a_store_that_failed_is_opened_anew(world, poller, monkeypatch):
    """It may be another file when it is back."""
    opened, open_ = [], OnlineFeatures.open
    monkeypatch.setattr(OnlineFeatures, "open", lambda reader: opened.append(reader) or open_(reader))
    polled = poller(items_refresh_s=1e-9)
    features = polled.poll().features
    polled.poll()
    assert opened == [features], "one that answers is not"
    rename_tables(world, "limaml_", "lost_")
    try:
        polled.poll()
    finally:
        rename_tables(world, "lost_", "limaml_")
    polled.poll()
    assert opened == [features] * 2
    polled.poll()
    assert opened == [features] * 2


def test_without_a_catalogue_nothing_is_loaded_and_a_lost_one_stays_as_last_read(world, poller):
    polled = poller(items_refresh_s=1e-9)
    catalogue = polled.poll().items.catalogue
    path = Path(world.cfg.storage.root) / "catalogue" / "items.parquet"
    hidden = path.rename(path.with_suffix(".hidden"))
    try:
        assert polled.poll().items.catalogue == catalogue
        other = poller()
        assert other.poll() is None
        with pytest.raises(DataError, match="nothing was ingested yet"):
            other.champion._catalogue()
    finally:
        hidden.rename(path)
    assert other.poll().items.catalogue == catalogue


@pytest.fixture
def two(world, poller):
    """A poller that keeps the version before the champion, too: green beside blue."""
    arms = [{"name": "now", "share": 0.5}, {"name": "before", "share": 0.5, "version": "previous"}]
    experiment = world.cfg.experiment.model_validate({"salt": "two", "arms": arms})
    return lambda **serving: poller(world.cfg.model_copy(update={"experiment": experiment}), **serving)


def test_the_ready_version_beside_the_champion_is_kept_where_an_arm_asks_for_it(world, poller, two):
    without, polled = poller(), two()
    without.poll()
    assert without.champion.previous is None
    polled.poll()
    previous = polled.champion.previous
    assert (previous.version, previous.slot, previous.complete_through) == (world.green, "green", NOW)
    assert previous.items is polled.champion.loaded.items
    # The champion is shown, and nothing else.
    assert polled.metric("limaml_model_info", version=world.green, slot="green") is None
    polled.poll()
    assert polled.champion.previous is previous, "it is loaded once"


def test_what_is_beside_the_champion_follows_its_tags(world, two):
    polled = two()
    polled.poll()
    world.registry.set_tags(world.green, {registry.COMPLETE_THROUGH: (NOW + DAY).isoformat()})
    try:
        polled.poll()
        assert polled.champion.previous.complete_through == NOW + DAY
        world.registry.set_tags(world.green, {registry.STATE: "retired"})
        polled.poll()
        assert polled.champion.previous is None
        assert polled.champion.loaded.version == world.blue
        world.registry.set_tags(world.green, {registry.STATE: "ready"})
        polled.poll()
        assert polled.champion.previous.version == world.green
    finally:
        world.registry.set_tags(world.green, {registry.STATE: "ready", registry.COMPLETE_THROUGH: NOW.isoformat()})


def test_a_cut_over_or_a_roll_back_exchanges_the_two(world, two):
    polled = two()
    polled.poll()
    for champion, previous in ((world.green, world.blue), (world.blue, world.green)):
        world.registry.set_champion(champion)
        polled.poll()
        assert (polled.champion.loaded.version, polled.champion.previous.version) == (champion, previous)


def test_its_items_are_read_anew_with_the_champion_s_and_its_reader_is_opened_anew(world, two, monkeypatch):
    polled = two(items_refresh_s=1e-9)
    polled.poll()
    opened, open_ = [], OnlineFeatures.open
    monkeypatch.setattr(OnlineFeatures, "open", lambda reader: opened.append(reader.slot) or open_(reader))
    before = polled.champion.previous
    polled.poll()
    assert polled.champion.previous is not before
    assert opened == []
    rename_tables(world, "limaml_", "lost_")
    try:
        polled.poll()
    finally:
        rename_tables(world, "lost_", "limaml_")
    polled.poll()
    assert set(opened) == {"blue", "green"}
    opened.clear()
    polled.poll()
    assert opened == []


def test_a_previous_version_that_cannot_be_loaded_leaves_the_champion_serving_and_is_told_once(world, two, monkeypatch):
    polled, download = two(), registry.Registry.download

    def broken(self, version, folder):
        if version == world.green:
            raise DataError("its bundle is gone")
        return download(self, version, folder)

    monkeypatch.setattr(registry.Registry, "download", broken)
    with capture_logs() as said:
        polled.poll()
        polled.poll()
    assert (polled.champion.loaded.version, polled.champion.previous) == (world.blue, None)
    assert [line["version"] for line in said if line["event"] == "previous_load_failed"] == [world.green]
    assert polled.metric("limaml_champion_load_failed") == 0.0
    monkeypatch.undo()
    polled.poll()
    assert polled.champion.previous.version == world.green
