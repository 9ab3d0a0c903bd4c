"""Users and items filled, published, corrected and rolled back under one lease; each kind has its own slots and instants."""

from datetime import date
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from limaml import registry, schema
from limaml.config import TaskKindConfig
from limaml.embeddings import daily
from limaml.embeddings.adapt import adapt
from limaml.embeddings.cutover import cut_over, rollback
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.embeddings.fill import fill_shard, plan_fill
from limaml.embeddings.publish import OnlineView
from limaml.embeddings.slot_state import READY, RETIRED
from limaml.errors import ConfigError, DataError, StoreError
from limaml.features.feature_store import open_store
from limaml.models.bundle import load
from limaml.monitoring.export import Gauges
from limaml.monitoring.published import record_publication
from tests.contracts.embedding_world import ITEMS, USERS, World, die, flipped

ITEM = TaskKindConfig(name="item", entity_column="item_id", active_days=4, support_rows=3)
USER_TAG, ITEM_TAG = registry.COMPLETE_THROUGH, "limaml.complete_through.item"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, "", ITEM)


def served(world: World) -> World:
    """With a champion."""
    version = world.new_version(1)
    world.fill(version)
    cut_over(world.cfg, version, "train-run")
    return world


def published(world: World, version: str, kind: TaskKindConfig, through: date) -> None:
    """Every entity with an event in time is online as an adaptation of now makes it; nobody else is."""
    bundle = load(world.registry.download(version, world.root / "loaded"), parts=("refit",))
    view = OnlineView(open_store(world.cfg), schema.embedding_view(kind.name, world.tags(version)[registry.SLOT]))
    entities = USERS if kind.entity_column == "user_id" else ITEMS
    as_of = schema.day_end(through)
    fresh = adapt(world.storage, bundle, version, kind, entities, as_of, 5).read_all()
    stored = view.read(view.keys(fresh))
    names = view.codec.names
    num_online = 0
    for row, size, found in zip(view.rows(fresh), fresh["support_size"].to_pylist(), stored, strict=True):
        if found is not None:
            num_online += 1
            assert size > 0
            assert [v for n, v in zip(names, found.values, strict=True) if n != "last_event_at"] == [
                v for n, v in zip(names, row.values, strict=True) if n != "last_event_at"
            ]
    assert num_online >= len(entities) - 2  # One user is silent; an item may be.


def test_a_fill_and_a_day_bring_both_kinds(world: World) -> None:
    served(world)
    version = world.champion().version
    for kind in world.cfg.task_kinds:
        published(world, version, kind, world.last)
    before = world.online(schema.embedding_view("item", "blue"))
    result = world.daily(world.next_day())
    after = world.online(schema.embedding_view("item", "blue"))
    assert before != after
    day = world.last
    for kind in world.cfg.task_kinds:
        published(world, version, kind, day)
    tags = world.champion().tags
    assert tags[USER_TAG] == tags[ITEM_TAG] == schema.day_end(day).isoformat()
    rows = world.storage.read_table(f"logged/dt={day}/" + world.storage.list(f"logged/dt={day}")[0])
    assert result["entities"] == sum(pc.count_distinct(rows[column]).as_py() for column in ("user_id", "item_id"))
    folders = {f"embeddings/kind={kind}/version={version}/dt={day}/shard-000.parquet" for kind in ("user", "item")}
    assert all(world.storage.exists(path) for path in folders)
    gauges = Gauges()
    record_publication(world.cfg, gauges, 1.0)


def test_an_item_s_support_is_its_own_number_of_rows(world: World) -> None:
    served(world)
    [path] = [
        path
        for path in world.storage.walk(f"embeddings/kind=item/version={world.champion().version}")
        if path.endswith("shard-000.parquet")
    ]
    assert pc.max(world.storage.read_table(path)["support_size"]).as_py() == 3


def test_a_run_that_dies_between_kinds_leaves_the_first_behind_and_is_caught_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's tag moves last: what it says is true of items too."""
    served(world)
    before = world.champion().tags
    day = world.next_day()
    adapt_day(world.cfg, day)
    plain = daily.publish

    def dies_at_users(view, *rest):
        return die() if "user" in view.name and "embedding" in view.name else plain(view, *rest)

    monkeypatch.setattr(daily, "publish", dies_at_users)
    with pytest.raises(KeyboardInterrupt):
        publish_day(world.cfg, day, "dies")
    monkeypatch.undo()
    tags = world.champion().tags
    assert (tags[USER_TAG], tags[ITEM_TAG]) == (before[USER_TAG], schema.day_end(day).isoformat())
    result = publish_day(world.cfg, day, "again")
    assert result["versions"][0]["days"] == 1
    tags = world.champion().tags
    assert tags[USER_TAG] == tags[ITEM_TAG] == schema.day_end(day).isoformat()
    for kind in world.cfg.task_kinds:
        published(world, world.champion().version, kind, day)


def test_a_correction_re_adapts_the_items_it_changed(world: World) -> None:
    served(world)
    day = world.next_day()
    world.daily(day)
    world.daily(world.next_day())
    delivered = world.delivered / "events" / f"dt={day}" / "events.parquet"
    table = pq.read_table(delivered).cast(schema.EVENTS.arrow)
    user = table["user_id"][0].as_py()
    items = set(table.filter(pc.equal(table["user_id"], user))["item_id"].to_pylist())
    world.correct(day, flipped(table, user))
    result = world.daily(day)
    assert result["entities"] == 1 + len(items)
    for kind in world.cfg.task_kinds:
        published(world, world.champion().version, kind, world.last)


def test_cut_over_waits_for_every_kind_and_roll_back_catches_both_up(world: World) -> None:
    served(world)
    first = world.champion().version
    second = world.new_version(2)
    plan = plan_fill(world.cfg, second, world.last, "train-run")
    fill_shard(world.cfg, second, plan["shards"][0], "train-run")
    with pytest.raises(DataError, match=r"kind=user/.* must hold embeddings that passed their gate"):
        cut_over(world.cfg, second, "train-run")
    assert world.champion().version == first
    assert ITEM_TAG not in world.tags(second)
    fill_shard(world.cfg, second, plan["shards"][1], "train-run")
    # An item's row is missing: users alone are no fill.
    view = OnlineView(open_store(world.cfg), schema.embedding_view("item", plan["slot"]))
    view.clear()
    with pytest.raises(StoreError, match="meta_embedding_item"):
        cut_over(world.cfg, second, "train-run")
    for shard in plan["shards"]:
        fill_shard(world.cfg, second, shard, "train-run")
    world.next_day()
    world.daily(world.last)  # For the first version alone: the second is not ready.
    assert cut_over(world.cfg, second, "train-run")["days_caught_up"] == 1
    for kind in world.cfg.task_kinds:
        published(world, second, kind, world.last)
    world.daily(world.next_day())
    assert rollback(world.cfg, None, "operator")["version"] == first
    for kind in world.cfg.task_kinds:
        published(world, first, kind, world.last)
    assert {world.tags(version)[registry.STATE] for version in (first, second)} == {READY}


def test_a_version_of_other_kinds_is_not_filled_and_one_that_serves_goes_on(world: World) -> None:
    """A kind that is new in the configuration: the champion has none of it until a version that was trained with it."""
    both = world.cfg
    world.cfg = both.model_copy(update={"task_kinds": both.task_kinds[:1]})
    served(world)
    alone = world.new_version(2)
    world.cfg = both
    plan = plan_fill(both, alone, world.last, "train-run")
    with pytest.raises(ConfigError, match=r"trained with, \['user'\], got \['user', 'item'\]"):
        fill_shard(both, alone, plan["shards"][0], "train-run")
    day = world.next_day()
    world.daily(day)
    tags = world.champion().tags
    assert tags[USER_TAG] == schema.day_end(day).isoformat()
    assert ITEM_TAG not in tags
    world.registry.set_tags(alone, {registry.STATE: RETIRED})
    joint = world.new_version(3)
    world.fill(joint)
    cut_over(both, joint, "train-run")
    assert world.daily(world.next_day())["versions"][0]["version"] == joint
    for kind in both.task_kinds:
        published(world, joint, kind, world.last)
