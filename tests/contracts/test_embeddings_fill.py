"""Filling a slot, cutting over, and the daily run, on the small installation of `embedding_world`.

The file is long because its tests share one world, which takes as long to build as all of them to run. Each leaves it
consistent: the champion is complete through the last ingested day.
"""

import sqlite3
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from limaml import registry, schema
from limaml.config import Config
from limaml.embeddings.adapt import adapt
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.cutover import cut_over
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.embeddings.fill import fill_shard, plan_fill
from limaml.embeddings.publish import OnlineView
from limaml.errors import BusyError, ConfigError, DataError, GateError, NothingToDo, StoreError
from limaml.events.ingest import ingest_day
from limaml.events.logged import read_logged
from limaml.registry import Registry
from tests import declared
from tests.contracts.embedding_world import (
    FIRST,
    HISTORY_DAYS,
    ONE_DAY,
    SILENT,
    TODAY,
    USERS,
    World,
    changed_users,
    day_of_events,
    die,
    files,
    flipped,
    users_in,
    without,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    built = World(tmp_path_factory.mktemp("world"))
    with pytest.raises(NothingToDo, match="there is no champion to publish for"):
        adapt_day(built.cfg, built.last)
    version = built.new_version(seed=1)
    built.fill(version)
    cut_over(built.cfg, version, "train-run")
    return built


@pytest.fixture
def with_settings(world: World) -> Callable[..., Config]:
    def change(**settings: Any) -> Config:
        return world.cfg.model_copy(update={"embeddings": world.cfg.embeddings.model_copy(update=settings)})

    return change


def test_the_first_fill_puts_active_entities_and_all_features_online(world: World) -> None:
    champion = world.champion()
    assert champion.tags[registry.SLOT] == "blue"
    assert champion.tags[registry.STATE] == "ready"
    assert champion.tags[registry.FILL_DAY] == str(FIRST + (HISTORY_DAYS - 1) * ONE_DAY)
    assert users_in(world.online(declared.USER_FEATURES.name)) == set(USERS)
    online = users_in(world.online())
    assert SILENT not in online
    as_of = schema.day_end(FIRST + (HISTORY_DAYS - 1) * ONE_DAY)
    window = read_logged(
        world.storage, declared.TABLES, first=(as_of - timedelta(days=4)).date(), through=as_of.date() - ONE_DAY
    )
    assert online == set(window["user_id"].to_pylist())


def test_a_day_changes_its_entities_only_and_moves_complete_through(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, features = world.online(), world.online(declared.USER_FEATURES.name)
    order: list[str] = []
    write = OnlineView.write

    def recorded(view: OnlineView, *arguments: Any) -> None:
        order.append(view.name)
        write(view, *arguments)

    def recorded_tags(*arguments: Any) -> None:
        order.append("tags")
        set_tags(*arguments)

    set_tags = Registry.set_tags
    monkeypatch.setattr(OnlineView, "write", recorded)
    monkeypatch.setattr(Registry, "set_tags", recorded_tags)
    day = world.next_day()
    result = world.daily(day)
    # A reader never has an embedding of a day whose features it lacks (contract 8).
    # What says that the day is online comes last.
    assert list(dict.fromkeys(order)) == ["user_features", "item_features", "meta_embedding_user_blue", "tags"]
    users = set(day_of_events(day)["user_id"].to_pylist())
    assert changed_users(before, world.online()) == users
    assert changed_users(features, world.online(declared.USER_FEATURES.name)) == users
    assert world.champion().tags[registry.COMPLETE_THROUGH] == schema.day_end(day).isoformat()
    assert (result["entities"], result["written"], result["versions"][0]["corrected"]) == (len(users), len(users), False)


def test_what_is_online_is_what_the_model_gives_for_the_days_so_far(world: World) -> None:
    [day] = world.published_days(1)
    context = EmbeddingContext.of(world.cfg)
    champion = world.champion()
    users = sorted(set(day_of_events(day)["user_id"].to_pylist()))
    bundle = context.bundle(champion.version)
    as_of = datetime.fromisoformat(champion.tags[registry.COMPLETE_THROUGH])
    expected = adapt(world.storage, bundle, champion.version, world.cfg.task_kind, users, as_of, 512).read_all()
    store = context.store()
    view = schema.embedding_view("user", champion.tags[registry.SLOT])
    answer = store.get_online_features([f"{view}:embedding", f"{view}:support_size"], [{"user_id": u} for u in users]).to_dict()
    # Batches of 5 and of 512 entities sum in different orders; contract 5 allows 1e-6.
    np.testing.assert_allclose(np.array(answer["embedding"]), np.array(expected["embedding"].to_pylist()), atol=1e-6, rtol=0)
    assert answer["support_size"] == expected["support_size"].to_pylist()


def test_the_same_day_twice_writes_the_same_bytes(world: World) -> None:
    day = world.next_day()
    folder = Path(world.storage.path("embeddings"))
    adapt_day(world.cfg, day)
    once = files(folder)
    adapt_day(world.cfg, day)
    assert files(folder) == once
    assert any(name.endswith(f"dt={day}/shard-000.parquet") for name in once)
    publish_day(world.cfg, day, "daily-run")
    once, online = files(folder), world.everything()
    for again in (lambda: adapt_day(world.cfg, day), lambda: publish_day(world.cfg, day, "daily-run")):
        with pytest.raises(NothingToDo, match=f"day {day} is online for version 1 already, and unchanged"):
            again()
    assert (files(folder), world.everything()) == (once, online)


def test_an_older_day_again_after_a_newer_one_changes_nothing(world: World) -> None:
    [older] = world.published_days(1)
    online, tags = world.everything(), world.champion().tags
    for day in (FIRST, older):
        assert ingest_day(world.cfg, day, TODAY)["status"] == "unchanged"
        with pytest.raises(NothingToDo):
            world.daily(day)
    assert (world.everything(), world.champion().tags) == (online, tags)


def test_a_corrected_older_day_changes_exactly_its_entities(world: World) -> None:
    [day] = world.published_days(1)
    before, tags = world.online(), world.champion().tags
    original = day_of_events(day)
    relabelled, removed, *_ = sorted(set(original["user_id"].to_pylist()))
    world.correct(day, without(flipped(original, relabelled), removed))
    result = world.daily(day)

    after = world.online()
    assert changed_users(before, after) == {relabelled, removed}
    [version] = result["versions"]
    assert (version["corrected"], version["entities"], version["as_of"]) == (True, 2, tags[registry.COMPLETE_THROUGH])
    assert world.champion().tags == tags
    stamps = {stamp for (key, _), (_, stamp) in after.items() if relabelled.encode() in key}
    assert stamps == {int(datetime.fromisoformat(tags[registry.COMPLETE_THROUGH]).timestamp())}
    with pytest.raises(NothingToDo):
        world.daily(day)
    assert world.online() == after


def test_a_day_corrected_twice_before_it_is_published_changes_the_entities_of_both(world: World) -> None:
    [day] = world.published_days(1)
    before = world.online()
    table = day_of_events(day)
    first, second, *_ = sorted(set(table["user_id"].to_pylist()))
    for user in (first, second):
        table = flipped(table, user)
        world.correct(day, table)
    world.daily(day)
    assert changed_users(before, world.online()) == {first, second}


def test_a_day_corrected_before_it_is_published_is_published_once_as_corrected(world: World) -> None:
    day = world.next_day()
    adapt_day(world.cfg, day)
    user = day_of_events(day)["user_id"][0].as_py()
    world.deliver(day, flipped(day_of_events(day), user))
    ingest_day(world.cfg, day, TODAY)
    with pytest.raises(
        DataError, match=r"shard-000.parquet must hold embeddings .* 'revision': 2\}.*adapt \(or fill\) it again"
    ):
        publish_day(world.cfg, day, "daily-run")
    assert world.daily(day)["entities"] == len(set(day_of_events(day)["user_id"].to_pylist()))


def test_days_follow_without_a_gap_and_days_without_data_count(world: World) -> None:
    skipped = world.last + ONE_DAY
    world.last = skipped
    later, online = world.next_day(), world.everything()
    with pytest.raises(DataError, match=f"and {skipped} was not ingested; run limaml_daily for {skipped} first"):
        world.daily(later)
    assert world.everything() == online
    world.deliver(skipped)
    ingest_day(world.cfg, skipped, TODAY)
    [published] = world.daily(later)["versions"]
    assert (published["days"], published["corrected"]) == (2, False)
    world.last += ONE_DAY
    empty = world.last
    with pytest.raises(DataError, match=f"day {empty} must have passed its gate .* was not ingested"):
        adapt_day(world.cfg, empty)
    assert ingest_day(world.cfg, empty, TODAY)["status"] == "no_data"
    world.daily(world.next_day())
    assert world.champion().tags[registry.COMPLETE_THROUGH] == schema.day_end(world.last).isoformat()
    with pytest.raises(NothingToDo):
        world.daily(empty)


def test_a_day_without_data_alone_moves_complete_through_and_nothing_else(world: World) -> None:
    online = world.everything()
    world.last += ONE_DAY
    ingest_day(world.cfg, world.last, TODAY)
    world.daily(world.last)
    assert world.everything() == online
    assert world.champion().tags[registry.COMPLETE_THROUGH] == schema.day_end(world.last).isoformat()


def test_a_day_in_quarantine_is_not_published(world: World) -> None:
    day = world.last + ONE_DAY
    world.deliver(day, day_of_events(day).set_column(4, "label", pa.array([2] * day_of_events(day).num_rows, pa.int8())))
    with pytest.raises(GateError):
        ingest_day(world.cfg, day, TODAY)
    online = world.everything()
    for verb in (lambda: adapt_day(world.cfg, day), lambda: publish_day(world.cfg, day, "daily-run")):
        with pytest.raises(DataError, match=rf"day {day} must have passed its gate .* is in quarantine \(.*label"):
            verb()
    assert world.everything() == online
    world.last = day
    later = world.next_day()
    with pytest.raises(DataError, match=rf"and {day} is in quarantine \(.*label.*\); run limaml_daily for {day} first"):
        world.daily(later)
    world.deliver(day)
    ingest_day(world.cfg, day, TODAY)
    assert world.daily(later)["versions"][0]["days"] == 2


@pytest.mark.fault(
    "a publication that dies half way", after="the next one completes it: rows equal an undisturbed run's, byte for byte"
)
def test_a_publication_that_dies_half_way_is_completed_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    day = world.next_day()
    adapt_day(world.cfg, day)
    tags = world.champion().tags
    with monkeypatch.context() as broken:
        broken.setattr(Registry, "set_tags", die)
        with pytest.raises(KeyboardInterrupt):
            publish_day(world.cfg, day, "daily-run")
    assert world.champion().tags == tags
    publish_day(world.cfg, day, "daily-run")
    assert world.champion().tags[registry.COMPLETE_THROUGH] == schema.day_end(day).isoformat()


def test_a_day_is_not_published_if_its_partition_fails_its_gate_or_somebody_holds_the_lease(
    world: World, with_settings: Callable[..., Config]
) -> None:
    day, online = world.next_day(), world.everything()
    for bound in ({"max_norm": 1e-9}, {"min_norm": 1e2}):
        with pytest.raises(GateError, match="embedding_norm"):
            adapt_day(with_settings(**bound), day)
    assert list(Path(world.storage.path("embeddings")).rglob(f"dt={day}/shard-000.gate.html"))
    with pytest.raises(DataError, match="must hold embeddings that passed their gate"):
        publish_day(world.cfg, day, "daily-run")
    adapt_day(world.cfg, day)
    with (
        EmbeddingContext.of(world.cfg).writing("fill", "train-run"),
        pytest.raises(BusyError, match=r"busy: fill of train-run \(.*since"),
    ):
        publish_day(world.cfg, day, "daily-run")
    assert world.everything() == online
    publish_day(world.cfg, day, "daily-run")


def test_a_second_version_is_filled_in_the_other_slot_as_of_the_champions_day(
    world: World, with_settings: Callable[..., Config]
) -> None:
    first, second, third = world.champion().version, world.new_version(seed=2), world.new_version(seed=3)
    blue = world.online()
    with pytest.raises(BusyError, match=rf"busy: switch to version {first} since .*Z; servers may read the other slot until"):
        plan_fill(with_settings(min_dwell_s=1e6), second, FIRST, "run-2")
    with pytest.raises(StoreError, match=f"version {second} must be filling, its state is None; run limaml plan-fill"):
        fill_shard(world.cfg, second, 0, "run-2")

    plan = plan_fill(world.cfg, second, FIRST, "run-2")
    assert (plan["slot"], plan["as_of_day"], plan["shards"]) == ("green", str(world.last), [0, 1])
    with pytest.raises(BusyError, match=f"busy: fill of version {second} by run-2 since"):
        plan_fill(world.cfg, third, FIRST, "run-3")
    seen = datetime.fromisoformat(world.tags(second)[registry.FILL_SEEN_AT])
    fill_shard(world.cfg, second, 0, "run-2")
    assert datetime.fromisoformat(world.tags(second)[registry.FILL_SEEN_AT]) > seen, "a fill that goes on is alive"
    with pytest.raises(DataError, match=r"shard must be below the fill's 2 shards, got 2"):
        fill_shard(world.cfg, second, 2, "run-2")
    with pytest.raises(DataError, match=r"shard-001.parquet must hold embeddings that passed their gate"):
        cut_over(world.cfg, second, "run-2")
    assert world.champion().version == first
    for shard in (1, 0):
        fill_shard(world.cfg, second, shard, "run-2")
    green = world.online(schema.embedding_view("user", "green"))
    outcome = cut_over(world.cfg, second, "run-2")

    assert world.online(schema.embedding_view("user", "blue")) == blue
    assert world.champion().version == second
    with pytest.raises(StoreError, match=f"version {second} must be filling, its state is ready"):
        fill_shard(world.cfg, second, 0, "run-2")
    assert (world.tags(first)[registry.STATE], world.tags(second)[registry.STATE]) == ("ready", "ready")
    assert outcome["complete_through"] == schema.day_end(world.last).isoformat()
    again = cut_over(world.cfg, second, "run-2")
    assert again == {name: outcome[name] for name in again} | {"status": "unchanged"}
    assert world.online() == green
    for verb in (lambda: plan_fill(world.cfg, second, FIRST, "run-2"), lambda: adapt_day(world.cfg, world.last)):
        with pytest.raises(NothingToDo):
            verb()

    # The next version takes the slot that the champion does not use: what held it is retired, and the slot is empty.
    plan_fill(world.cfg, third, FIRST, "run-3")
    assert world.tags(first)[registry.STATE] == "retired"
    assert world.online(schema.embedding_view("user", "blue")) == {}
    assert world.online() == green


@pytest.mark.fault(
    "a training's run that dies while it fills", after="planned again, its rows equal an undisturbed fill's, byte for byte"
)
def test_a_fill_planned_again_after_its_run_died_gives_the_same_end(world: World) -> None:
    version = world.new_version(seed=4)
    plan_fill(world.cfg.model_copy(update={"embeddings": world.cfg.embeddings.model_copy(update={"fill_timeout_s": 1e-6})}),
              version, world.last, "run-4")  # fmt: skip
    fill_shard(world.cfg, version, 0, "run-4")
    once = world.fill(version, "run-5")
    slot = world.online(schema.embedding_view("user", once["slot"]))
    assert world.fill(version, "run-5") == once
    assert world.online(schema.embedding_view("user", once["slot"])) == slot


def test_the_alias_moves_last_so_a_cut_over_that_dies_changes_nothing_for_a_reader(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, version = world.champion().version, world.new_version(seed=5)
    plan_fill(world.cfg.model_copy(update={"embeddings": world.cfg.embeddings.model_copy(update={"fill_timeout_s": 1e-6})}),
              version, world.last, "run-6")  # fmt: skip
    world.fill(version, "run-6")
    # The first time at the tag that accepts the fill, the last time at those of the switch.
    for step in ("set_tags", "set_champion", "set_tags"):
        with monkeypatch.context() as broken:
            broken.setattr(Registry, step, die)
            with pytest.raises(KeyboardInterrupt):
                cut_over(world.cfg, version, "run-6")
        assert world.champion().version == champion
    cut_over(world.cfg, version, "run-6")
    assert world.champion().version == version


def test_a_row_that_changed_behind_the_fill_stops_the_cut_over(world: World, with_settings: Callable[..., Config]) -> None:
    champion, version = world.champion().version, world.new_version(seed=6)
    plan = plan_fill(with_settings(fill_timeout_s=1e-6), version, world.last, "run-7")
    for shard in plan["shards"]:
        fill_shard(world.cfg, version, shard, "run-7")
    view = schema.embedding_view("user", plan["slot"])
    connection = sqlite3.connect(world.cfg.feast.online_connection)
    try:
        with connection:
            user = next(user for user in USERS if user in users_in(world.online(view)))
            connection.execute(f'DELETE FROM "limaml_{view}" WHERE instr(entity_key, ?) > 0', (user.encode(),))
    finally:
        connection.close()
    with pytest.raises(StoreError, match=rf"view {view} must hold the published rows, .* entity {user} is missing"):
        cut_over(world.cfg, version, "run-7")
    assert world.champion().version == champion


def test_a_version_is_not_adapted_for_other_features_than_it_was_trained_on(world: World) -> None:
    version = world.champion().version
    age_band = next(feature for feature in world.cfg.features if feature.name == "age_band")
    other = age_band.model_copy(update={"values": age_band.values[1:]})
    features = tuple(other if feature is age_band else feature for feature in world.cfg.features)
    with pytest.raises(ConfigError, match=f"as version {version} was trained with, but age_band changed; restore the decl"):
        EmbeddingContext.of(world.cfg.model_copy(update={"features": features})).bundle(version)


def test_a_planned_entity_that_its_partition_lost_stops_the_cut_over(
    world: World, with_settings: Callable[..., Config]
) -> None:
    champion, version = world.champion().version, world.new_version(seed=7)
    plan = plan_fill(with_settings(fill_timeout_s=1e-6), version, world.last, "run-8")
    for shard in plan["shards"]:
        fill_shard(world.cfg, version, shard, "run-8")
    path = f"embeddings/kind=user/version={version}/dt={world.last}/shard-001.parquet"
    whole = world.storage.read_table(path)
    world.storage.write_table(path, whole.slice(1))
    with pytest.raises(
        StoreError,
        match=f"must hold its {plan['entities']} planned entities, 1 are missing, e.g. {whole['user_id'][0]}; fill its shards",
    ):
        cut_over(world.cfg, version, "run-8")
    assert world.champion().version == champion
    fill_shard(world.cfg, version, 1, "run-8")
    assert cut_over(world.cfg, version, "run-8")["status"] == "cut_over"
