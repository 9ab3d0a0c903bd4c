"""Two versions kept up to date side by side, and the pointer moved between them (contract 4).

The tests share one world and follow each other: each leaves a champion and a ready version before it, and says with `both`
what it needs.
"""

import json
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from limaml import cli, registry, schema, telemetry
from limaml.config import Config
from limaml.embeddings import cutover, daily, fill, slot_state
from limaml.embeddings.context import EmbeddingContext
from limaml.embeddings.publish import OnlineView
from limaml.errors import BusyError, DataError, GateError, NothingToDo, StoreError
from limaml.io.lease import Held
from limaml.local.status import read_status
from limaml.monitoring.export import Gauges
from limaml.registry import ModelVersion, Registry
from limaml.verb_result import RESULT_LIMIT_BYTES
from tests.contracts.embedding_world import (
    ONE_DAY,
    TODAY,
    Dump,
    World,
    changed_users,
    day_of_events,
    die,
    flipped,
    users_in,
)

RUN = "run-of-a-test"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    built = World(tmp_path_factory.mktemp("world"))
    with pytest.raises(StoreError, match="roll-back needs a champion to go back from, but there is none; limaml_train makes"):
        cutover.rollback(built.cfg, None, RUN)
    first, second = built.new_version(seed=1), built.new_version(seed=2)
    built.fill(first)
    cutover.cut_over(built.cfg, first, RUN)
    with pytest.raises(StoreError, match=f"ready beside the champion {first}, but slot green was never filled"):
        cutover.rollback(built.cfg, None, RUN)
    built.fill(second)
    cutover.cut_over(built.cfg, second, RUN)
    return built


@pytest.fixture
def with_settings(world: World) -> Callable[..., Config]:
    def change(**settings: Any) -> Config:
        return world.cfg.model_copy(update={"embeddings": world.cfg.embeddings.model_copy(update=settings)})

    return change


def both(world: World) -> tuple[ModelVersion, ModelVersion]:
    """The champion and the ready version beside it, each with its tags as they are now."""
    champion = world.champion()
    previous = slot_state.ready_beside(world.registry, champion)
    assert previous is not None
    return champion, previous


def online(world: World, version: str) -> Dump:
    return world.online(schema.embedding_view("user", world.tags(version)[registry.SLOT]))


def through(world: World, version: str) -> str:
    return world.tags(version)[registry.COMPLETE_THROUGH]


def users_of(day: date) -> set[str]:
    return set(day_of_events(day)["user_id"].to_pylist())


def stamps(dump: Dump) -> dict[bytes, int]:
    """Entity key -> as_of of its row, in seconds since 1970."""
    return {key: stamp for (key, _), (_, stamp) in dump.items()}


@pytest.fixture
def behind(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[date]]:
    """Publishes days for the champion alone, as if its neighbour had failed each time; returns the days."""

    def run(count: int) -> list[date]:
        days = []
        with monkeypatch.context() as alone:
            alone.setattr(daily, "ready_beside", lambda *_: None)
            for _ in range(count):
                days.append(world.next_day())
                world.daily(days[-1])
        return days

    return run


def test_a_day_is_published_for_the_champion_and_the_ready_version_before_it(world: World) -> None:
    champion, previous = both(world)
    before = {version.version: online(world, version.version) for version in (champion, previous)}
    day = world.next_day()
    result = world.daily(day)
    assert [entry["version"] for entry in result["versions"]] == [champion.version, previous.version]
    for version, dump in before.items():
        assert changed_users(dump, online(world, version)) == users_of(day)
        assert through(world, version) == schema.day_end(day).isoformat()
    with pytest.raises(NothingToDo, match=f"for version {champion.version} and {previous.version} already, and unchanged"):
        world.daily(day)


def test_the_status_names_the_version_to_roll_back_to(world: World) -> None:
    champion, previous = both(world)
    cfg = world.cfg.model_copy(update={"local": world.cfg.local.model_copy(update={"daily_days": 1})})
    status = read_status(cfg, TODAY)
    assert (status.champion, status.previous) == (champion.version, previous.version)
    assert status.to_dict()["previous"] == previous.version


def test_a_version_is_given_every_day_after_its_own_complete_through(world: World, behind: Callable[[int], list[date]]) -> None:
    champion, previous = both(world)
    reached = through(world, previous.version)
    missed = behind(2)
    assert through(world, previous.version) == reached
    before = {version.version: online(world, version.version) for version in (champion, previous)}
    # The champion is up to date; that does not stop the other.
    result = world.daily(missed[-1])
    [only] = result["versions"]
    assert (only["version"], only["days"], only["corrected"]) == (previous.version, 2, False)
    assert online(world, champion.version) == before[champion.version]
    assert changed_users(before[previous.version], online(world, previous.version)) == users_of(missed[0]) | users_of(missed[1])
    assert stamps(online(world, previous.version)) == stamps(online(world, champion.version))
    assert through(world, previous.version) == through(world, champion.version)


def test_a_correction_reaches_both_versions_and_one_that_has_it_does_not_stop_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, previous = both(world)
    world.published_days(1)
    day = world.last - ONE_DAY
    first, second = sorted(users_of(day))[:2]
    before = {version.version: online(world, version.version) for version in (champion, previous)}
    once = flipped(day_of_events(day), first)
    world.correct(day, once)
    world.daily(day)
    for version, dump in before.items():
        assert changed_users(dump, online(world, version)) == {first}

    before = {version.version: online(world, version.version) for version in (champion, previous)}
    world.correct(day, flipped(once, second))
    with monkeypatch.context() as alone:
        alone.setattr(daily, "ready_beside", lambda *_: None)
        world.daily(day)
    assert online(world, previous.version) == before[previous.version]
    [only] = world.daily(day)["versions"]
    assert (only["version"], only["corrected"], only["entities"]) == (previous.version, True, 1)
    assert changed_users(before[previous.version], online(world, previous.version)) == {second}


def test_what_fails_for_the_version_before_does_not_stop_the_champion(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    champion, previous = both(world)
    reached, day = through(world, previous.version), world.next_day()
    bundle = EmbeddingContext.bundle

    def gone(context: EmbeddingContext, version: str) -> Any:
        if version == previous.version:
            raise DataError(f"bundle of version {version} is gone")
        return bundle(context, version)

    with monkeypatch.context() as broken:
        broken.setattr(EmbeddingContext, "bundle", gone)
        result = daily.adapt_day(world.cfg, day)
        assert result["versions"][1] == {"version": previous.version, "error": f"bundle of version {previous.version} is gone"}
        gauges = Gauges()
        with pytest.raises(DataError, match=rf"version={previous.version}.*must hold embeddings that passed their gate"):
            cli.publish(world.cfg, gauges, day)
        assert gauges.values[telemetry.LAST_PUBLISHED_SECONDS], "the alert on stopped publishing looks at the champion"
        assert through(world, champion.version) == schema.day_end(day).isoformat()
        assert through(world, previous.version) == reached
        again = Gauges()
        with pytest.raises(DataError):
            cli.publish(world.cfg, again, day)
        assert not again.values, "the champion had the day: nothing was published"
        # Nothing else to do: now it is the error of the run.
        with pytest.raises(DataError, match="is gone"):
            daily.adapt_day(world.cfg, day)
    world.daily(day)
    assert through(world, previous.version) == schema.day_end(day).isoformat()


def test_a_publication_that_fails_for_the_champion_is_none(world: World) -> None:
    day, gauges = world.next_day(), Gauges()
    with pytest.raises(DataError, match="must hold embeddings that passed their gate"):
        cli.publish(world.cfg, gauges, day)
    assert not gauges.values
    world.daily(day)
    with pytest.raises(NothingToDo):
        cli.publish(world.cfg, gauges, day)
    assert not gauges.values, "what an earlier run exported stays"


def test_a_day_adapted_before_an_older_one_was_corrected_is_adapted_again(world: World) -> None:
    day = world.next_day()
    daily.adapt_day(world.cfg, day)
    older = day - ONE_DAY
    user = sorted(users_of(older))[0]
    world.correct(older, flipped(day_of_events(older), user))
    with pytest.raises(DataError, match=r"must hold embeddings .* made from .*adapt \(or fill\) it again"):
        daily.publish_day(world.cfg, day, RUN)
    for each in (older, day):
        world.daily(each)


def test_a_roll_back_moves_the_pointer_and_leaves_users_as_fresh_as_the_champion_left_them(world: World) -> None:
    champion, previous = both(world)
    for _ in range(3):
        world.daily(world.next_day())
    fresh = stamps(online(world, champion.version))
    outcome = cutover.rollback(world.cfg, None, RUN)
    assert outcome == {
        "status": "rolled_back",
        "version": previous.version,
        "previous": champion.version,
        "slot": previous.tags[registry.SLOT],
        "complete_through": schema.day_end(world.last).isoformat(),
        "days_caught_up": 0,
    }
    assert world.champion().version == previous.version
    assert stamps(world.online()) == fresh
    # The version that was left is ready, is still published every day, and the same verb goes forward again.
    day = world.next_day()
    assert len(world.daily(day)["versions"]) == 2
    assert through(world, champion.version) == schema.day_end(day).isoformat()
    assert cutover.rollback(world.cfg, None, RUN)["version"] == champion.version


def test_a_roll_back_to_a_named_version_can_be_repeated(world: World) -> None:
    champion, previous = both(world)
    with pytest.raises(
        StoreError,
        match=f"needs version 99 that is ready beside the champion {champion.version}, .* version {previous.version}, ready",
    ):
        cutover.rollback(world.cfg, "99", RUN)
    assert world.champion().version == champion.version
    assert cutover.rollback(world.cfg, previous.version, RUN)["status"] == "rolled_back"
    assert cutover.rollback(world.cfg, previous.version, RUN)["status"] == "unchanged"
    assert world.champion().version == previous.version
    # A cut-over to a version that is ready is the other way to go forward.
    assert cutover.cut_over(world.cfg, champion.version, RUN)["status"] == "cut_over"
    assert world.champion().version == champion.version


def test_a_roll_back_first_catches_up_days_and_corrections(world: World, behind: Callable[[int], list[date]]) -> None:
    champion, previous = both(world)
    corrected = world.last
    missed = behind(2)
    world.correct(corrected, flipped(day_of_events(corrected), sorted(users_of(corrected))[0]))
    outcome = cutover.rollback(world.cfg, None, RUN)
    assert (outcome["version"], outcome["days_caught_up"]) == (previous.version, 3)
    assert outcome["complete_through"] == schema.day_end(missed[-1]).isoformat() == through(world, champion.version)
    world.daily(corrected)  # the one that was left lacks the correction still
    assert stamps(online(world, previous.version)).keys() == stamps(online(world, champion.version)).keys()
    for day in (corrected, *missed):
        with pytest.raises(NothingToDo):
            world.daily(day)


def test_a_switch_that_cannot_catch_up_is_refused_with_the_remedy(
    world: World, behind: Callable[[int], list[date]], with_settings: Callable[..., Config]
) -> None:
    champion, previous = both(world)
    [day] = behind(1)
    strict = with_settings(max_norm=1e-9)
    for switching in (cutover.rollback, cutover.cut_over):
        with pytest.raises(
            DataError,
            match=rf"version {previous.version} is complete through {day - ONE_DAY}, the champion {champion.version} through "
            rf"{day}, and .*embedding_norm.* version {champion.version} stays the champion; .* anew with limaml plan-fill",
        ) as caught:
            switching(strict, previous.version, RUN)
        assert isinstance(caught.value.__cause__, GateError)
        assert world.champion().version == champion.version
    world.daily(day)


@pytest.mark.parametrize("step", ["set_tags", "set_champion"])
@pytest.mark.fault(
    "a roll-back that dies before the alias moves", after="readers see the version they saw; repeated, it ends well"
)
def test_a_roll_back_that_dies_changes_nothing_for_a_reader_and_can_be_repeated(
    world: World, behind: Callable[[int], list[date]], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    champion, previous = both(world)
    behind(1)
    with monkeypatch.context() as broken:
        broken.setattr(Registry, step, die)
        with pytest.raises(KeyboardInterrupt):
            cutover.rollback(world.cfg, None, RUN)
    assert world.champion().version == champion.version
    assert cutover.rollback(world.cfg, None, RUN)["version"] == previous.version
    assert through(world, previous.version) == schema.day_end(world.last).isoformat()


def test_a_cut_over_catches_its_target_up_and_goes_on_where_it_died(
    world: World, with_settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, version = world.champion().version, world.new_version(seed=3)
    world.fill(version)
    filled_through = world.last
    users = sorted(users_of(filled_through))
    world.correct(filled_through, flipped(day_of_events(filled_through), users[0]))
    days = [filled_through, *(world.next_day() for _ in range(2))]
    for day in days:
        world.daily(day)
    assert through(world, champion) == schema.day_end(days[-1]).isoformat()

    set_tags, calls = Registry.set_tags, []

    def until_the_second_day(store: Registry, name: str, tags: dict[str, str | None]) -> None:
        calls.append(tags)
        set_tags(store, name, tags)
        if tags.get(registry.COMPLETE_THROUGH) == schema.day_end(days[1]).isoformat():
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "set_tags", until_the_second_day)
        with pytest.raises(KeyboardInterrupt):
            cutover.cut_over(world.cfg, version, RUN)
    assert world.champion().version == champion
    # Its rows are newer than those of the fill by now: no shard may be published over them.
    with pytest.raises(StoreError, match=f"version {version} takes no shard any more, .* run limaml cut-over for it"):
        fill.fill_shard(world.cfg, version, 0, RUN)
    outcome = cutover.cut_over(world.cfg, version, RUN)
    assert (outcome["previous"], outcome["days_caught_up"]) == (champion, 1)
    assert through(world, version) == through(world, champion)
    for day in days:
        with pytest.raises(NothingToDo):
            world.daily(day)
    # What was caught up is what the daily runs gave: the same entities, as of the same instants.
    shared = stamps(online(world, champion)).items() & stamps(world.online()).items()
    assert {key for key, _ in shared} >= {
        key for key in stamps(world.online()) if any(u.encode() in key for u in users_of(days[1]))
    }


def test_a_fill_retires_the_version_before_and_waits_for_the_dwell_after_a_roll_back(
    world: World, with_settings: Callable[..., Config]
) -> None:
    champion, previous = both(world)
    cutover.rollback(world.cfg, None, RUN)
    rolled_back_at = datetime.fromisoformat(world.champion().tags[registry.CUT_OVER_AT])
    version = world.new_version(seed=4)
    with pytest.raises(
        BusyError, match=rf"busy: switch to version {previous.version} since {rolled_back_at:%Y-%m-%dT%H:%M:%SZ}"
    ):
        fill.plan_fill(with_settings(min_dwell_s=1e6), version, world.last, RUN)
    assert world.tags(champion.version)[registry.STATE] == "ready"

    fill.plan_fill(world.cfg, version, world.last, RUN)
    assert world.tags(champion.version)[registry.STATE] == "retired"
    slot = champion.tags[registry.SLOT]
    for name in (None, champion.version):
        wanted = "a version" if name is None else f"version {name}"
        with pytest.raises(
            StoreError,
            match=f"roll-back needs {wanted} that is ready beside the champion {previous.version}, but slot {slot} holds "
            f"version {version}, filling; .* limaml plan-fill, fill, cut-over",
        ):
            cutover.rollback(world.cfg, name, RUN)
    # A retired or filling version is not published to: its slot holds nothing yet.
    assert len(world.daily(world.next_day())["versions"]) == 1
    assert world.online(schema.embedding_view("user", slot)) == {}
    for shard in range(world.cfg.embeddings.num_shards):
        fill.fill_shard(world.cfg, version, shard, RUN)
    cutover.cut_over(world.cfg, version, RUN)


@pytest.mark.fault(
    "a plan of a fill that dies while it empties the slot", after="nothing is filled into it before it was planned again"
)
def test_a_slot_that_was_not_emptied_to_the_end_cannot_be_filled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, previous = both(world)
    version = world.new_version(seed=5)
    with monkeypatch.context() as broken:
        broken.setattr(OnlineView, "clear", die)
        with pytest.raises(KeyboardInterrupt):
            fill.plan_fill(world.cfg, version, world.last, RUN)
    assert world.tags(previous.version)[registry.STATE] == "retired"
    for verb in (lambda: fill.fill_shard(world.cfg, version, 0, RUN), lambda: cutover.cut_over(world.cfg, version, RUN)):
        with pytest.raises(StoreError, match=f"version {version} must be filling, its state is None"):
            verb()
    world.fill(version)
    # The same when it is planned once more: what was filled before may be gone.
    with monkeypatch.context() as broken:
        broken.setattr(OnlineView, "clear", die)
        with pytest.raises(KeyboardInterrupt):
            fill.plan_fill(world.cfg, version, world.last, RUN)
    with pytest.raises(StoreError, match=f"version {version} must be filling, its state is retired"):
        cutover.cut_over(world.cfg, version, RUN)
    world.fill(version)
    cutover.cut_over(world.cfg, version, RUN)
    assert users_in(world.online())


def test_a_shard_that_was_adapted_for_an_older_plan_is_not_published(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version, later = world.new_version(seed=8), world.next_day()
    fill.plan_fill(world.cfg, version, later - ONE_DAY, RUN)
    adapted = fill.write_partition

    def planned_again_meanwhile(*arguments: Any) -> Any:
        done = adapted(*arguments)
        assert fill.plan_fill(world.cfg, version, later, RUN)["as_of_day"] == str(later), "later than the champion's day"
        return done

    with monkeypatch.context() as raced:
        raced.setattr(fill, "write_partition", planned_again_meanwhile)
        with pytest.raises(StoreError, match=f"version {version} was planned again while shard 0 was adapted"):
            fill.fill_shard(world.cfg, version, 0, RUN)
    slot = world.tags(version)[registry.SLOT]
    assert world.online(schema.embedding_view("user", slot)) == {}
    world.daily(later)
    for shard in range(world.cfg.embeddings.num_shards):
        fill.fill_shard(world.cfg, version, shard, RUN)
    cutover.cut_over(world.cfg, version, RUN)


@pytest.mark.parametrize("lost", ["user_features", "meta_embedding"])
@pytest.mark.fault(
    "an online store that takes rows and does not keep them",
    after="whoever wrote them fails, and the day does not count as complete",
)
def test_rows_that_a_store_takes_and_does_not_keep_are_missed_by_whoever_wrote_them(
    world: World, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    both(world)
    day, version, write = world.next_day(), world.new_version(seed=9), OnlineView.write
    daily.adapt_day(world.cfg, day)
    reached = world.champion().tags[registry.COMPLETE_THROUGH]

    def forgetting(view: OnlineView, *arguments: Any) -> None:
        if not view.name.startswith(lost):
            write(view, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(OnlineView, "write", forgetting)
        with pytest.raises(StoreError, match=f"view {lost}.* must hold the published rows"):
            daily.publish_day(world.cfg, day, RUN)
        assert world.champion().tags[registry.COMPLETE_THROUGH] == reached
    world.daily(day)
    if lost == "meta_embedding":
        fill.plan_fill(world.cfg, version, day, RUN)
        with monkeypatch.context() as broken:
            broken.setattr(OnlineView, "write", forgetting)
            with pytest.raises(StoreError, match=f"view {lost}.* must hold the published rows"):
                fill.fill_shard(world.cfg, version, 0, RUN)
        for shard in range(world.cfg.embeddings.num_shards):
            fill.fill_shard(world.cfg, version, shard, RUN)
        cutover.cut_over(world.cfg, version, RUN)


def test_the_lease_is_checked_before_every_write_and_every_change_of_a_tag(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fencing: between any two changes of what is shared stands a check."""
    seen: list[str] = []

    def recorded(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **named: Any) -> Any:
            seen.append(what)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, wrapper)

    recorded(Held, "check", "check")
    for owner, name in [(OnlineView, "write"), (OnlineView, "clear"), (Registry, "set_tags"), (Registry, "set_champion"),
                        (fill, "write_plan"), (daily, "write_covered"), (cutover, "write_covered")]:  # fmt: skip
        recorded(owner, name, name)
    version = world.new_version(seed=6)
    world.fill(version)
    world.next_day()
    cutover.cut_over(world.cfg, version, RUN)
    world.daily(world.last)
    cutover.rollback(world.cfg, None, RUN)
    changes = [index for index, what in enumerate(seen) if what != "check"]
    assert {seen[index] for index in changes} == {
        "write", "clear", "set_tags", "set_champion", "write_plan", "write_covered"
    }  # fmt: skip
    assert [seen[index - 1] for index in changes] == ["check"] * len(changes)


@pytest.mark.fault("a writer that loses its lease before any of its writes", after="it writes nothing more")
def test_a_writer_that_lost_its_lease_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    champion, _ = both(world)
    day = world.next_day()
    daily.adapt_day(world.cfg, day)
    before, tags = world.everything(), world.tags(champion.version)

    def lost(held: Held) -> None:
        raise BusyError("has lost the lease")

    with monkeypatch.context() as broken:
        broken.setattr(Held, "check", lost)
        for verb in (
            lambda: daily.publish_day(world.cfg, day, RUN),
            lambda: cutover.rollback(world.cfg, None, RUN),
            lambda: fill.plan_fill(world.cfg, world.new_version(seed=7), day, RUN),
        ):
            with pytest.raises(BusyError, match="lost the lease"):
                verb()
    assert (world.everything(), world.tags(champion.version), world.champion().version) == (before, tags, champion.version)
    world.daily(day)


def test_results_stay_small_however_many_days_were_missed(world: World, behind: Callable[[int], list[date]]) -> None:
    missed = behind(4)
    results = [daily.adapt_day(world.cfg, missed[-1]), daily.publish_day(world.cfg, missed[-1], RUN)]
    assert results[0]["versions"][0]["days"] == 4
    # Paths are as long as the storage's root; a quarter of the limit is left for a longer one.
    assert all(len(json.dumps(result)) < RESULT_LIMIT_BYTES * 3 / 4 for result in results)
    assert all(Path(path).exists() for path in results[0]["paths"])
