"""A kind of task that hangs on a category of items, their studio: filled, published day by day, and corrected."""

from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
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
from tests.contracts.embedding_world import STUDIO, World, flipped, without

MAKER = TaskKindConfig(name="maker", entity_column="studio", active_days=4, support_rows=3)
STUDIOS = sorted({studio for studio in STUDIO.values() if studio})


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, "", MAKER)
    version = world.new_version(1)
    world.fill(version)
    cut_over(world.cfg, version, "train-run")
    return world


def partition(world: World, day: date, name: str = "shard-000") -> dict[str, list]:
    return world.storage.read_table(f"embeddings/kind=maker/version=1/dt={day}/{name}.parquet").to_pydict()


def studios_of(events: pa.Table, user: str) -> list[str]:
    items = events.filter(pc.equal(events["user_id"], user))["item_id"].to_pylist()
    return sorted({studio for item in items if (studio := STUDIO[item])})


def require_online(world: World) -> None:
    """Every studio is online as an adaptation of now makes it, from the last rows of all its items."""
    bundle = load(world.registry.download("1", world.root / "loaded"), parts=("refit",))
    view = OnlineView(open_store(world.cfg), schema.embedding_view("maker", "blue"))
    fresh = adapt(world.storage, bundle, "1", MAKER, STUDIOS, schema.day_end(world.last), 5).read_all()
    assert fresh["support_size"].to_pylist() == [3] * len(STUDIOS)
    at = view.codec.names.index("embedding")
    for row, found in zip(view.rows(fresh), view.read(view.keys(fresh)), strict=True):
        assert found is not None
        assert found.values[at] == row.values[at]


def test_a_fill_holds_every_studio_and_nothing_of_items_without_one(world: World) -> None:
    shards = [partition(world, world.last, name)["studio"] for name in ("shard-000", "shard-001")]
    assert sorted(shards[0] + shards[1]) == STUDIOS
    require_online(world)
    logged = world.storage.read_table(f"logged/dt={world.last}/" + world.storage.list(f"logged/dt={world.last}")[0])
    assert logged["studio"].null_count


def test_a_day_re_adapts_the_studios_of_its_rows(world: World) -> None:
    day = world.next_day()
    world.daily(day)
    rows = world.storage.read_table(f"logged/dt={day}/" + world.storage.list(f"logged/dt={day}")[0])
    assert partition(world, day)["studio"] == sorted(pc.unique(rows["studio"].drop_null()).to_pylist())
    require_online(world)


def test_a_correction_re_adapts_the_studios_of_the_rows_it_changed(world: World) -> None:
    day = world.next_day()
    world.daily(day)
    world.daily(world.next_day())
    table = pq.read_table(world.delivered / "events" / f"dt={day}" / "events.parquet").cast(schema.EVENTS.arrow)
    studios = {user: studios_of(table, user) for user in pc.unique(table["user_id"]).to_pylist()}
    user = next(user for user, mine in studios.items() if 0 < len(mine) < len(STUDIOS))
    world.correct(day, flipped(table, user))
    world.daily(day)
    assert partition(world, day, "shard-000-r0002")["studio"] == studios[user]
    require_online(world)
    # Rows that are gone changed their studios too.
    world.correct(day, without(table, user))
    world.daily(day)
    assert partition(world, day, "shard-000-r0003")["studio"] == studios[user]
    require_online(world)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            [{}, {"name": "maker", "entity_column": "genres"}],
            "must be user_id, item_id or a declared category of items",
        ),
        ([{}, {"name": "maker", "entity_column": "gender"}], "got 'gender'; declare it, or choose another"),
        ([{"name": "maker", "entity_column": "studio"}], "must hold the kind of user_id first"),
        ([{}, {"name": "a", "entity_column": "studio"}, {"name": "b", "entity_column": "studio"}], "one kind a column"),
    ],
)
def test_what_no_kind_can_hang_on_is_refused(kinds: list[dict[str, str]], message: str) -> None:
    features = [*declared.FEATURES, {"entity": "item", "name": "studio", "type": "category"}]
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"source": {"kind": "synthetic"}, "features": features, "task_kinds": kinds})
