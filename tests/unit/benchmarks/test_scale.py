"""The world of many entities is the one that is said to be measured, and figures are carried along a line."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from benchmarks import scale_world
from benchmarks.scale_world import LAST, NEXT, ROWS_A_ENTITY, World
from limaml.events.day_store import EventStore
from limaml.events.logged import read_logged
from tools import scale


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("scale"), 2000, "127.0.0.1:1", 4)
    scale_world.write(world)
    return world


def test_entities_have_a_long_tail_of_sixteen_rows_in_the_mean(world: World) -> None:
    logged = read_logged(world.storage, world.tables, through=LAST)
    counts = np.sort(np.array([each.as_py() for each in logged["user_id"].value_counts().field("counts")]))
    assert len(counts) == world.entities
    # Half a row for the rounding of each entity's count to whole rows.
    assert counts.mean() == pytest.approx(ROWS_A_ENTITY, abs=0.5)
    assert counts[-20:].sum() > 0.05 * counts.sum(), "the busiest 1 % have over a twentieth of the rows"
    assert np.median(counts) < 0.8 * counts.mean()
    assert len(logged) == sum(manifest.rows for day, manifest in EventStore(world.storage).manifests().items() if day <= LAST)
    assert pc.count_distinct(logged["event_id"]).as_py() == len(logged)


def test_two_in_a_hundred_have_rows_on_the_day_after(world: World) -> None:
    changed = EventStore(world.storage, world.tables.events).changed_entities(NEXT, 1, since=0)
    assert len(changed["user_id"]) == 0.02 * world.entities


def test_the_same_entities_give_the_same_rows(world: World, tmp_path: Path) -> None:
    again = World(tmp_path, world.entities, "127.0.0.1:1", 4)
    scale_world.write(again)
    assert read_logged(again.storage, again.tables, through=NEXT) == read_logged(world.storage, world.tables, through=NEXT)


def results(**figures: float) -> scale.Results:
    """Each figure: 1 + its value for every 1,000 entities."""

    def at(size: int, name: str) -> float:
        return 1.0 + figures.get(name, 0.0) * size / 1000

    sizes = (100, 1000, 10_000)
    verbs = ("plan", "fill", "cut_over", "adapt_day", "publish_day")
    return {
        "seconds": {str(size): at(size, "seconds") for size in sizes},
        "redis_mib": {str(size): at(size, "redis_mib") for size in sizes},
        "verbs": {
            str(size): {verb: {"cpu_s": at(size, f"{verb}_cpu_s"), "peak_mib": at(size, f"{verb}_peak_mib")} for verb in verbs}
            for size in sizes
        },
        "parts": {
            str(size): {
                "fill": {"publish_embeddings": at(size, "publish"), "adapt_and_gate": at(size, "adapt")},
                "cut_over": {"read_back": at(size, "back")},
            }
            for size in sizes
        },
    }


def test_figures_are_carried_along_the_line_through_what_was_measured() -> None:
    lines = scale.carried(results(publish=0.06, redis_mib=1.024, plan_peak_mib=0.0))
    cells = {line.split(" | ")[0].strip("| "): line.strip(" |").split(" | ")[1:] for line in lines if line.startswith("| ")}
    # 1 s and 0.06 ms an entity; 1 MiB and a thousandth of a GiB for every 1,000.
    assert cells["publishing, one shard at a time, minutes"] == ["1.0", "10.0", "100.0"]
    assert cells["Redis, GiB"] == ["1.0", "10.0", "100.0"]
    assert cells["plan-fill's memory, GiB"] == ["0.0", "0.0", "0.0"]
    assert cells["cut-over, reading all back, minutes"] == ["0.0", "0.0", "0.0"]
