"""Kinds of task that hang on a category of rows: their items' studio, and the place that events bring. Filled, published day
by day, and corrected.
"""

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.config import Config, TaskKindConfig
from limaml.embeddings.adapt import adapt
from limaml.embeddings.cutover import cut_over
from limaml.embeddings.publish import OnlineView
from limaml.features.feature_store import open_store
from limaml.models.bundle import load
from tests import declared
from tests.contracts.embedding_world import PLACES, STUDIO, USERS, World, flipped, place_of, without

MAKER = TaskKindConfig(name="maker", entity_column="studio", active_days=4, support_rows=3)
WHERE = TaskKindConfig(name="where", entity_column="place", active_days=4, support_rows=3)
KINDS = {"maker": sorted({studio for studio in STUDIO.values() if studio}), "where": list(PLACES)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, "", MAKER, WHERE)
    version = world.new_version(1)
    world.fill(version)
    cut_over(world.cfg, version, "train-run")
    return world


def partition(world: World, kind: TaskKindConfig, day: date, name: str = "shard-000") -> list[str]:
    path = f"embeddings/kind={kind.name}/version=1/dt={day}/{name}.parquet"
    found: list[str] = world.storage.read_table(path)[kind.entity_column].to_pylist()
    return found


def logged(world: World, day: date) -> pa.Table:
    return world.storage.read_table(f"logged/dt={day}/" + world.storage.list(f"logged/dt={day}")[0])


def of_rows(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Kind -> the entities of some events."""
    studios, places = {STUDIO[row["item_id"]] for row in rows}, {place_of(row) for row in rows}
    return {"maker": sorted(filter(None, studios)), "where": sorted(filter(None, places))}


def require_online(world: World) -> None:
    """Every entity is online as an adaptation of now makes it, from the last rows of all users with it."""
    bundle = load(world.registry.download("1", world.root / "loaded"), parts=("refit",))
    for kind in (MAKER, WHERE):
        view = OnlineView(open_store(world.cfg), schema.embedding_view(kind.name, "blue"))
        fresh = adapt(world.storage, bundle, "1", kind, KINDS[kind.name], schema.day_end(world.last), 5).read_all()
        assert fresh["support_size"].to_pylist() == [3] * 3
        at = view.codec.names.index("embedding")
        for row, found in zip(view.rows(fresh), view.read(view.keys(fresh)), strict=True):
            assert found is not None
            assert found.values[at] == row.values[at]


def test_a_fill_holds_every_entity_and_nothing_of_rows_without_one(world: World) -> None:
    for kind in (MAKER, WHERE):
        shards = [partition(world, kind, world.last, name) for name in ("shard-000", "shard-001")]
        assert sorted(shards[0] + shards[1]) == KINDS[kind.name]
        assert logged(world, world.last)[kind.entity_column].null_count
    require_online(world)


def test_a_day_re_adapts_the_entities_of_its_rows(world: World) -> None:
    day = world.next_day()
    world.daily(day)
    for kind, entities in of_rows(logged(world, day).to_pylist()).items():
        assert partition(world, {"maker": MAKER, "where": WHERE}[kind], day) == entities
    require_online(world)


def test_a_correction_re_adapts_the_entities_of_the_rows_it_changed(world: World) -> None:
    day = world.next_day()
    world.daily(day)
    world.daily(world.next_day())
    table = pq.read_table(world.delivered / "events" / f"dt={day}" / "events.parquet").select(schema.EVENTS.names)
    rows = table.to_pylist()
    mine = {user: of_rows([row for row in rows if row["user_id"] == user]) for user in USERS}
    user = next(user for user in USERS if 0 < len(mine[user]["maker"]) < 3 and mine[user]["where"])

    def correct(events: pa.Table, revision: int, places: list[str]) -> None:
        world.correct(day, events)
        world.daily(day)
        found = [partition(world, kind, day, f"shard-000-r{revision:04}") for kind in (MAKER, WHERE)]
        assert found == [mine[user]["maker"], places]
        require_online(world)

    correct(flipped(table, user), 2, mine[user]["where"])
    # Rows that were elsewhere, so that nothing else of them differs: those of both places changed.
    elsewhere = next(place for place in PLACES if place not in mine[user]["where"])
    moved = pa.array([elsewhere if row["user_id"] == user else place_of(row) for row in rows], pa.string())
    correct(flipped(table, user).append_column("place", moved), 3, sorted([*mine[user]["where"], elsewhere]))
    # Rows that are gone changed their entities, too.
    correct(without(table, user), 4, [elsewhere])


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            [{}, {"name": "maker", "entity_column": "genres"}],
            "must be user_id, item_id or a declared category of items or the context, one of .'studio', 'place'., got 'genres'",
        ),
        ([{}, {"name": "maker", "entity_column": "gender"}], "got 'gender', a category of the user; declare it, or choose"),
        ([{}, {"name": "dear", "entity_column": "price"}], "got 'price', a number of the context; declare it, or choose"),
        ([{}, {"name": "when", "entity_column": "hour"}], "got 'hour', a cycle of the context; declare it, or choose"),
        ([{}, {"name": "shop", "entity_column": "shop"}], "got 'shop'; declare it, or choose another"),
        ([{"name": "where", "entity_column": "place"}], "must hold the kind of user_id first"),
        ([{"name": "maker", "entity_column": "studio"}], "must hold the kind of user_id first"),
        ([{}, {"name": "a", "entity_column": "studio"}, {"name": "b", "entity_column": "studio"}], "one kind a column"),
    ],
)
def test_what_no_kind_can_hang_on_is_refused(kinds: list[dict[str, str]], message: str) -> None:
    features = [
        *declared.FEATURES,
        {"entity": "item", "name": "studio", "type": "category"},
        {"entity": "context", "name": "place", "type": "category"},
        {"entity": "context", "name": "price", "type": "number"},
    ]
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"source": {"kind": "synthetic"}, "features": features, "task_kinds": kinds})
