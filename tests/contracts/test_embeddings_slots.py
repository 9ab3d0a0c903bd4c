"""Filling a slot, cutting over, and the daily run, on a small delivered data set: nothing stands in for anything.

Source files, gates, Feast on SQLite, MLflow on SQLite and an untrained network. The file is long because its tests share one
world, which takes as long to build as all of them to run. Each leaves it consistent: the champion is complete through the
last ingested day.
"""

import sqlite3
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import registry, schema
from limaml.config import (
    Config,
    EmbeddingsConfig,
    FeastConfig,
    MetaConfig,
    ModelConfig,
    RegistryConfig,
    SourceConfig,
    StorageConfig,
    TaskKindConfig,
)
from limaml.data.encoding import Encoder
from limaml.data.feature_store import apply
from limaml.data.ingest import ingest_day, ingest_history
from limaml.data.logged import read_logged
from limaml.data.storage import Storage
from limaml.embeddings.adapt import adapt
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.embeddings.publish import OnlineView
from limaml.embeddings.slots import Places, cut_over, fill_shard, plan_fill
from limaml.errors import BusyError, DataError, GateError, NothingToDo, StoreError
from limaml.models.bundle import Bundle, Model, save
from limaml.models.network import build_network
from limaml.registry import Registry

FIRST = date(2026, 1, 5)
HISTORY_DAYS = 5
TODAY = date(2026, 6, 1)
USERS = [f"u{number:02}" for number in range(14)]
ITEMS = [f"i{number}" for number in range(10)]
SILENT = USERS[-1]
"""Has rows on the first day only, and so is not active in a window of four days."""
ONE_DAY = timedelta(days=1)

Dump = dict[tuple[bytes, str], tuple[bytes, int]]


def day_of_events(day: date) -> pa.Table:
    """About half of the users, two to four rows each, several in the same second."""
    rng = np.random.default_rng(day.toordinal())
    users = USERS if day == FIRST else sorted(rng.choice(USERS[:-1], 6, replace=False).tolist())
    rows = []
    for number, user in enumerate(users):
        for k in range(int(rng.integers(2, 5))):
            rows.append(
                {
                    "event_id": f"{day}-{user}-{k}",
                    "user_id": user,
                    "item_id": str(rng.choice(ITEMS)),
                    "timestamp": datetime(day.year, day.month, day.day, 8, tzinfo=UTC)
                    + timedelta(minutes=number, seconds=k // 2),
                    "label": int(rng.integers(0, 2)),
                }
            )
    return pa.Table.from_pylist(rows, schema=schema.EVENTS.arrow)


class World:
    """A source that delivers day after day, and the installation that follows it."""

    def __init__(self, root: Path) -> None:
        self.delivered = root / "source"
        self.cfg = Config(
            source=SourceConfig(kind="parquet", path=str(self.delivered)),
            storage=StorageConfig(root=str(root / "data")),
            task_kinds=(TaskKindConfig(active_days=4),),
            model=ModelConfig(embedding_dim=4, global_hidden=(8,)),
            meta=MetaConfig(support_rows=5),
            registry=RegistryConfig(tracking_uri=f"sqlite:///{root}/mlflow.db", artifact_root=str(root / "artifacts")),
            feast=FeastConfig(registry=str(root / "registry.db"), online_connection=str(root / "online.db")),
            embeddings=EmbeddingsConfig(
                lease_url=f"sqlite:///{root}/lease.db",
                lease_wait_s=0,
                min_dwell_s=0,
                write_batch_rows=4,
                batch_entities=5,
                min_norm=0,  # an untrained network gives a zero vector where all its rectifiers are shut
            ),
        )
        self.storage = Storage(self.cfg.storage.root)
        self.registry = Registry(self.cfg.registry)
        self.last = FIRST + (HISTORY_DAYS - 1) * ONE_DAY
        self.uncorrected: list[date] = []
        """Days that a daily run published, as they were delivered first."""
        self.root = root
        users = [{"user_id": u, "age_band": "25_34", "gender": "F", "occupation": "writer"} for u in USERS]
        items = [{"item_id": i, "title": f"Title {i}", "year": 1995, "genres": ["Drama"]} for i in ITEMS]
        self.delivered.mkdir()
        pq.write_table(pa.Table.from_pylist(users, schema=schema.USERS.arrow), self.delivered / "users.parquet")
        pq.write_table(pa.Table.from_pylist(items, schema=schema.ITEMS.arrow), self.delivered / "items.parquet")
        for offset in range(HISTORY_DAYS):
            self.deliver(FIRST + offset * ONE_DAY)
        apply(self.cfg)
        ingest_history(self.cfg, self.last, TODAY)

    def deliver(self, day: date, table: pa.Table | None = None) -> None:
        folder = self.delivered / "events" / f"dt={day}"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(day_of_events(day) if table is None else table, folder / "events.parquet")

    def next_day(self) -> date:
        """Deliver and ingest the day after the last."""
        self.last += ONE_DAY
        self.deliver(self.last)
        ingest_day(self.cfg, self.last, TODAY)
        return self.last

    def daily(self, day: date) -> dict[str, Any]:
        adapt_day(self.cfg, day)
        result = publish_day(self.cfg, day, "daily-run")
        if not result["corrected"]:
            self.uncorrected.append(day)
        return result

    def published_days(self, count: int) -> list[date]:
        """The first days that a daily run published and nobody has corrected; at least one later day is published too."""
        while len(self.uncorrected) < count + 1:
            self.daily(self.next_day())
        return self.uncorrected[:count]

    def correct(self, day: date, table: pa.Table) -> None:
        self.deliver(day, table)
        assert ingest_day(self.cfg, day, TODAY)["status"] == "corrected"
        if day in self.uncorrected:
            self.uncorrected.remove(day)

    def new_version(self, seed: int) -> str:
        logged = read_logged(self.storage, through=FIRST + ONE_DAY)
        encoder = Encoder.fit(logged, self.cfg)
        model = Model(build_network(self.cfg, encoder.dims, seed), encoder)
        folder = self.root / f"bundle-{seed}"
        save(Bundle(config=self.cfg, refit=model, twin=model), folder)
        return self.registry.register(folder, self.registry.start_run("train"), {})

    def fill(self, version: str, run: str = "train-run") -> dict[str, Any]:
        plan = plan_fill(self.cfg, version, self.last, run)
        for shard in plan["shards"]:
            fill_shard(self.cfg, version, shard, run)
        return plan

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.registry.get(version).tags)

    def champion(self) -> registry.ModelVersion:
        champion = self.registry.champion()
        assert champion is not None
        return champion

    def online(self, view: str = "") -> Dump:
        """Every stored value of a view (of the champion's slot by default), as SQLite holds it."""
        name = view or schema.embedding_view("user", self.champion().tags[registry.SLOT])
        connection = sqlite3.connect(self.cfg.feast.online_connection)
        try:
            rows = connection.execute(f'SELECT entity_key, feature_name, value, event_ts FROM "limaml_{name}"').fetchall()
        finally:
            connection.close()
        return {(key, feature): (value, stamp) for key, feature, value, stamp in rows}

    def everything(self) -> dict[str, Dump]:
        slots = [schema.embedding_view("user", slot) for slot in schema.SLOTS]
        return {view: self.online(view) for view in (*slots, schema.USER_FEATURES.name, schema.ITEM_FEATURES.name)}


def users_in(dump: Dump) -> set[str]:
    return {user for user in USERS for key, _ in dump if user.encode() in key}


def changed_users(before: Dump, after: Dump) -> set[str]:
    return users_in({key: value for key, value in after.items() if before.get(key) != value})


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


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
    assert users_in(world.online(schema.USER_FEATURES.name)) == set(USERS)
    online = users_in(world.online())
    assert SILENT not in online
    as_of = schema.day_end(FIRST + (HISTORY_DAYS - 1) * ONE_DAY)
    window = read_logged(world.storage, first=(as_of - timedelta(days=4)).date(), through=as_of.date() - ONE_DAY)
    assert online == set(window["user_id"].to_pylist())


def test_a_day_changes_its_entities_only_and_moves_complete_through(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, features = world.online(), world.online(schema.USER_FEATURES.name)
    order: list[str] = []
    write = OnlineView.write

    def recorded(view: OnlineView, *arguments: Any) -> None:
        order.append(view.name)
        write(view, *arguments)

    monkeypatch.setattr(OnlineView, "write", recorded)
    day = world.next_day()
    result = world.daily(day)
    # A reader never has an embedding of a day whose features it lacks (contract 8).
    assert list(dict.fromkeys(order)) == ["user_features", "item_features", "meta_embedding_user_blue"]
    users = set(day_of_events(day)["user_id"].to_pylist())
    assert changed_users(before, world.online()) == users
    assert changed_users(features, world.online(schema.USER_FEATURES.name)) == users
    assert world.champion().tags[registry.COMPLETE_THROUGH] == schema.day_end(day).isoformat()
    assert (result["entities"], result["written"], result["corrected"]) == (len(users), len(users), False)


def test_what_is_online_is_what_the_model_gives_for_the_days_so_far(world: World) -> None:
    [day] = world.published_days(1)
    places = Places.of(world.cfg)
    champion = world.champion()
    users = sorted(set(day_of_events(day)["user_id"].to_pylist()))
    bundle = places.bundle(champion.version)
    as_of = datetime.fromisoformat(champion.tags[registry.COMPLETE_THROUGH])
    expected = adapt(world.storage, bundle, champion.version, world.cfg.task_kind, users, as_of, 512).read_all()
    store = places.store()
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


def flipped(table: pa.Table, user: str) -> pa.Table:
    rows = [row | {"label": 1 - row["label"]} if row["user_id"] == user else row for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=schema.EVENTS.arrow)


def without(table: pa.Table, user: str) -> pa.Table:
    return table.filter(pa.array([name != user for name in table["user_id"].to_pylist()]))


def test_a_corrected_older_day_changes_exactly_its_entities(world: World) -> None:
    [day] = world.published_days(1)
    before, tags = world.online(), world.champion().tags
    original = day_of_events(day)
    relabelled, removed, *_ = sorted(set(original["user_id"].to_pylist()))
    world.correct(day, without(flipped(original, relabelled), removed))
    result = world.daily(day)

    after = world.online()
    assert changed_users(before, after) == {relabelled, removed}
    assert (result["corrected"], result["entities"], result["as_of"]) == (True, 2, tags[registry.COMPLETE_THROUGH])
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
    skipped, later = world.next_day(), world.next_day()
    online = world.everything()
    with pytest.raises(DataError, match=f"{skipped} is not online; run limaml_daily for {skipped} first"):
        world.daily(later)
    assert world.everything() == online
    for day in (skipped, later):
        world.daily(day)
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
    world.daily(world.next_day())


def die(*_: Any) -> None:
    raise KeyboardInterrupt


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
    with pytest.raises(GateError, match="embedding_norm"):
        adapt_day(with_settings(max_norm=1e-9), day)
    assert list(Path(world.storage.path("embeddings")).rglob(f"dt={day}/shard-000.gate.html"))
    with pytest.raises(DataError, match="must hold embeddings that passed their gate"):
        publish_day(world.cfg, day, "daily-run")
    adapt_day(world.cfg, day)
    with (
        Places.of(world.cfg).writing("fill", "train-run"),
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
    with pytest.raises(BusyError, match=rf"busy: cut-over to version {first} since .*Z; servers may read the other slot until"):
        plan_fill(with_settings(min_dwell_s=1e6), second, FIRST, "run-2")
    with pytest.raises(StoreError, match=f"version {second} must be filling, its state is None; run limaml plan-fill"):
        fill_shard(world.cfg, second, 0, "run-2")

    plan = plan_fill(world.cfg, second, FIRST, "run-2")
    assert (plan["slot"], plan["as_of_day"], plan["shards"]) == ("green", str(world.last), [0, 1])
    with pytest.raises(BusyError, match=f"busy: fill of version {second} by run-2 since"):
        plan_fill(world.cfg, third, FIRST, "run-3")
    fill_shard(world.cfg, second, 0, "run-2")
    with pytest.raises(DataError, match=r"shard-001.parquet must hold embeddings that passed their gate"):
        cut_over(world.cfg, second, "run-2")
    assert world.champion().version == first
    for shard in (1, 0):
        fill_shard(world.cfg, second, shard, "run-2")
    green = world.online(schema.embedding_view("user", "green"))
    outcome = cut_over(world.cfg, second, "run-2")

    assert world.online(schema.embedding_view("user", "blue")) == blue
    assert world.champion().version == second
    assert (world.tags(first)[registry.STATE], world.tags(second)[registry.STATE]) == ("ready", "ready")
    assert outcome["complete_through"] == schema.day_end(world.last).isoformat()
    assert cut_over(world.cfg, second, "run-2") == outcome | {"status": "unchanged"}
    assert world.online() == green
    for verb in (lambda: plan_fill(world.cfg, second, FIRST, "run-2"), lambda: adapt_day(world.cfg, world.last)):
        with pytest.raises(NothingToDo):
            verb()

    # The next version takes the slot that the champion does not use: what held it is retired, and the slot is empty.
    plan_fill(world.cfg, third, FIRST, "run-3")
    assert world.tags(first)[registry.STATE] == "retired"
    assert world.online(schema.embedding_view("user", "blue")) == {}
    assert world.online() == green


def test_a_fill_planned_again_after_its_run_died_gives_the_same_end(world: World) -> None:
    version = world.new_version(seed=4)
    plan_fill(world.cfg.model_copy(update={"embeddings": world.cfg.embeddings.model_copy(update={"fill_timeout_s": 1e-6})}),
              version, world.last, "run-4")  # fmt: skip
    fill_shard(world.cfg, version, 0, "run-4")
    once = world.fill(version, "run-5")
    slot = world.online(schema.embedding_view("user", once["slot"]))
    assert world.fill(version, "run-5") == once
    assert world.online(schema.embedding_view("user", once["slot"])) == slot


def test_a_fill_that_the_champion_has_overtaken_is_refused_and_can_be_planned_again(
    world: World, with_settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, version = world.champion().version, world.new_version(seed=5)
    plan_fill(with_settings(fill_timeout_s=1e-6), version, world.last, "run-6")
    for shard in (0, 1):
        fill_shard(world.cfg, version, shard, "run-6")
    world.daily(world.next_day())
    with pytest.raises(
        StoreError, match=f"the champion {champion} is complete through {world.last}, and readers would lose days"
    ):
        cut_over(world.cfg, version, "run-6")
    assert world.champion().version == champion
    world.fill(version, "run-6")
    # The alias moves last: whatever was done before it changes nothing for a reader, and is done again.
    for step in ("set_tags", "set_champion"):
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
