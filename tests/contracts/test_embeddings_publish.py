"""One rule decides which row replaces which, and it is the same on every online store (contract 5).

Every test runs on SQLite; the same tests run on a real Redis server with `-m services` (make test-services).
"""

import gc
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import Config, EmbeddingsConfig, FeastConfig, ModelConfig, SourceConfig, StorageConfig
from limaml.embeddings.publish import OnlineView, publish, replaces, require_published, sample
from limaml.errors import BusyError, StoreError
from limaml.features.feature_store import apply, open_store, repo_config
from limaml.features.online.rows import OnlineRow
from limaml.io.lease import Held, lease
from tests import declared

DIM = 3
NOW = datetime(2026, 1, 10, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
def cfg(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("store")
    connection = str(root / "online.db") if request.param == "sqlite" else request.getfixturevalue("redis_server")
    return Config(
        features=declared.FEATURES,
        source=SourceConfig(kind="synthetic"),
        storage=StorageConfig(root=str(root / "data")),
        model=ModelConfig(embedding_dim=DIM),
        feast=FeastConfig(registry=str(root / "registry.db"), online_store=request.param, online_connection=connection),
        embeddings=EmbeddingsConfig(lease_url=f"sqlite:///{root}/lease.db"),
    )


@pytest.fixture(scope="module")
def store(cfg: Config) -> Any:
    apply(cfg)
    return open_store(cfg)


@pytest.fixture
def held(cfg: Config) -> Iterator[Held]:
    with lease(cfg, "publish of a test") as holding:
        yield holding


@pytest.fixture
def view(store: Any) -> OnlineView:
    empty = OnlineView(store, schema.embedding_view("user", "blue"))
    empty.clear()
    return empty


def embeddings(*users: str, version: str = "1", as_of: datetime = NOW, first: float = 0.5) -> pa.Table:
    rows = [
        {
            "user_id": user,
            "kind": "user",
            "embedding": [first, -0.1, 1e-8],
            "model_version": version,
            "support_size": 4,
            "as_of": as_of,
            "last_event_at": as_of - timedelta(hours=3),
        }
        for user in users
    ]
    return pa.Table.from_pylist(rows, schema=schema.embeddings("user_id", DIM).arrow)


def stored(view: OnlineView, *users: str) -> list[OnlineRow | None]:
    return view.read(view.keys(pa.table({"user_id": list(users)})))


# What is stored, what is published, and whether it replaces it.
RULE = [
    pytest.param({}, {}, False, id="the same row changes nothing"),
    pytest.param({}, {"first": 0.25}, True, id="equal as_of, other bytes"),
    pytest.param({}, {"first": -0.5}, True, id="equal as_of, only a sign differs"),
    pytest.param({"first": 0.0}, {"first": -0.0}, True, id="equal as_of, minus zero is other bytes"),
    pytest.param({}, {"as_of": NOW + DAY}, True, id="newer as_of"),
    pytest.param({}, {"as_of": NOW - DAY}, False, id="older as_of"),
    pytest.param({}, {"as_of": NOW - DAY, "first": 0.25}, False, id="older as_of, other bytes"),
    pytest.param({}, {"version": "2"}, True, id="another version"),
    pytest.param({}, {"version": "2", "as_of": NOW - DAY}, True, id="another version, older as_of"),
    pytest.param({"version": "10"}, {"version": "9"}, True, id="a lower version number is another version"),
]


@pytest.mark.parametrize(("before", "new", "written"), RULE)
def test_which_row_replaces_which(
    view: OnlineView, held: Held, before: dict[str, Any], new: dict[str, Any], written: bool
) -> None:
    assert publish(view, embeddings("u", **before), held, 10).num_rows == 1
    assert publish(view, embeddings("u", **new), held, 10).num_rows == int(written)
    expected = embeddings("u", **(new if written else before))
    assert stored(view, "u") == view.rows(expected)


def test_a_key_that_only_another_view_has_is_missing(store: Any, view: OnlineView, held: Held) -> None:
    """On Redis both views share one hash, so this key reads back as nulls at the epoch."""
    green = OnlineView(store, schema.embedding_view("user", "green"))
    publish(green, embeddings("u"), held, 10)
    assert stored(view, "u", "nobody") == [None, None]
    assert publish(view, embeddings("u", as_of=NOW - DAY), held, 10).num_rows == 1


def test_only_rows_that_replace_are_written_and_in_short_batches(view: OnlineView, held: Held) -> None:
    users = [f"u{number}" for number in range(7)]
    publish(view, embeddings(*users), held, 3)
    mixed = pa.concat_tables([embeddings(*users[:5]), embeddings(*users[5:], first=9.0)])
    assert publish(view, mixed, held, 3).equals(mixed.slice(5))
    require_published(view, mixed, 3)


def test_clearing_a_slot_leaves_the_other_and_can_be_filled_again(store: Any, view: OnlineView, held: Held) -> None:
    green = OnlineView(store, schema.embedding_view("user", "green"))
    for slot in (view, green):
        publish(slot, embeddings("u", "v"), held, 10)
    for _ in range(2):
        view.clear()
        assert stored(view, "u", "v") == [None, None]
    require_published(green, embeddings("u", "v"), 10)
    assert publish(view, embeddings("u", as_of=NOW - DAY), held, 10).num_rows == 1


def test_reading_back_names_the_row_that_differs(view: OnlineView, held: Held) -> None:
    table = embeddings("u", "v", "w")
    publish(view, table, held, 10)
    require_published(view, table, 2)
    only_as_of = table.set_column(5, table.schema.field("as_of"), pa.array([NOW + DAY] * 3, schema.TIMESTAMP))
    for other, difference in [
        (only_as_of, "u is stamped 2026-01-10T00:00:00.00:00 instead of 2026-01-11"),
        (embeddings("u", "v", "w", first=0.50001), "u differs in embedding"),
        (embeddings("u", "v", "w", version="2"), "u differs in model_version"),
        (embeddings("u", "v", "w", as_of=NOW + DAY), "u is stamped 2026-01-10T00:00:00.00:00 instead of 2026-01-11"),
        (embeddings("u", "v", "w", "x").slice(3), "x is missing"),
    ]:
        count = other.num_rows
        with pytest.raises(StoreError, match=rf"but {count} of {count} read back otherwise, e\.g\. entity {difference}"):
            require_published(view, other, 2)


def test_nothing_is_written_without_the_lease(view: OnlineView, cfg: Config) -> None:
    with lease(cfg, "publish of run-1") as lost:
        pass
    with lease(cfg, "fill of run-2"), pytest.raises(BusyError, match="publish of run-1 has lost the lease"):
        publish(view, embeddings("u"), lost, 10)
    assert stored(view, "u") == [None]


def items_snapshot(at: datetime, events: int) -> pa.Table:
    rows = [
        {"item_id": "i1", "event_timestamp": at, "year": None, "genres": [], "item_events": events, "item_positive_rate": 0.1},
        {
            "item_id": "i2",
            "event_timestamp": at,
            "year": 1995,
            "genres": ["Drama", "War"],
            "item_events": events,
            "item_positive_rate": 0.7,
        },
    ]
    return pa.Table.from_pylist(rows, schema=declared.ITEM_FEATURES.arrow)


def users_snapshot() -> pa.Table:
    plain = {"event_timestamp": NOW, "user_events": 0, "user_positive_rate": 0.0}
    rows = [
        plain | {"user_id": "ü", "age_band": None, "gender": "", "occupation": "écrivaine"},
        plain | {"user_id": "v", "age_band": "25_34", "gender": "F", "occupation": None},
    ]
    return pa.Table.from_pylist(rows, schema=declared.USER_FEATURES.arrow)


def mixed_embeddings() -> pa.Table:
    """Keys of many scripts and lengths in several chunks, a null, a negative zero, two instants, two versions."""
    empty = embeddings("", "never").set_column(6, "last_event_at", pa.array([None, None], schema.TIMESTAMP))
    return pa.concat_tables(
        [
            embeddings("u", "ü", "用户-1", "🙂", "a" * 300, first=-0.0),
            empty.cast(schema.embeddings("user_id", DIM).arrow),
            embeddings("v", version="11", as_of=NOW + DAY, first=float("inf")),
        ]
    )


def test_snapshots_follow_the_same_rule(store: Any, held: Held) -> None:
    """They have no version: newer, or equal and different. Nulls and lists come back as they were."""
    items = OnlineView(store, declared.ITEM_FEATURES.name)
    items.clear()
    for at, events, written in [(NOW, 3, 2), (NOW, 3, 0), (NOW - DAY, 9, 0), (NOW, 4, 2), (NOW + DAY, 4, 2)]:
        assert publish(items, items_snapshot(at, events), held, 10).num_rows == written
    require_published(items, items_snapshot(NOW + DAY, 4), 10)


def contents(cfg: Config, store: Any, view: OnlineView) -> Any:
    """Everything that the store holds for the view, read without Feast's or our code for reading."""
    if cfg.feast.online_store == "sqlite":
        with sqlite3.connect(cfg.feast.online_connection) as connection:
            table = f'"{cfg.feast.project}_{view.name}"'
            return connection.execute(f"SELECT * FROM {table} ORDER BY entity_key, feature_name").fetchall()
    from feast.infra.online_stores.helpers import _mmh3

    client = store.provider.online_store._get_client(store.config.online_store)
    fields = {_mmh3(f"{view.name}:{name}") for name in view.codec.names} | {f"_ts:{view.name}".encode()}
    rows = {key: {name: value for name, value in client.hgetall(key).items() if name in fields} for key in client.scan_iter()}
    return {key: row for key, row in rows.items() if row}


TABLES = [
    pytest.param(schema.embedding_view("user", "blue"), mixed_embeddings(), id="embeddings"),
    pytest.param(schema.embedding_view("user", "blue"), embeddings("one"), id="one row"),
    pytest.param(declared.ITEM_FEATURES.name, items_snapshot(NOW, 3), id="items"),
    pytest.param(declared.USER_FEATURES.name, users_snapshot(), id="users"),
]


@pytest.mark.parametrize(("name", "table"), TABLES)
@pytest.mark.parametrize("over", [False, True], ids=["into an empty view", "over other rows"])
def test_the_store_holds_what_feasts_own_write_puts_there(
    cfg: Config, store: Any, held: Held, name: str, table: pa.Table, over: bool
) -> None:
    view = OnlineView(store, name)
    view.clear()
    if over:
        column = view._view.batch_source.timestamp_field
        older = pa.array([NOW - DAY] * table.num_rows, schema.TIMESTAMP)
        table_before = table.take(list(reversed(range(table.num_rows))))
        at = table.schema.get_field_index(column)
        publish(view, table_before.set_column(at, table.schema.field(at), older), held, 100)
    assert publish(view, table, held, 3).num_rows == table.num_rows
    ours = contents(cfg, store, view)
    view.clear()
    assert not contents(cfg, store, view)
    store.write_to_online_store(name, table.to_pandas())
    assert contents(cfg, store, view) == ours
    assert len(ours) == table.num_rows * (len(view.codec.names) if cfg.feast.online_store == "sqlite" else 1)
    require_published(view, table, 3)


def test_a_store_without_the_bulk_path_serves_the_same(cfg: Config, store: Any, view: OnlineView, held: Held) -> None:
    """Values, statuses and timestamps, a missing entity's too, by Feast's plain `sqlite` or `redis` store."""
    from feast import FeatureStore, RepoConfig

    ours = repo_config(cfg.feast)
    online = ours.online_store.model_dump() | {"type": cfg.feast.online_store}
    settings = ours.model_dump(include={"project", "provider", "entity_key_serialization_version"})
    plain = FeatureStore(
        config=RepoConfig(
            **settings, registry=ours.registry.model_dump(), online_store=online, offline_store={"type": "duckdb"}
        )
    )
    assert type(plain.provider.online_store).__module__.startswith("feast.")
    table, features = mixed_embeddings(), [f"{view.name}:{name}" for name in schema.EMBEDDING_FEATURE_NAMES]
    asked = {"user_id": [*table["user_id"].to_pylist(), "nobody"]}
    publish(view, table, held, 3)
    answers = [reader.get_online_features(features, asked).proto for reader in (store, plain)]
    view.clear()
    plain.write_to_online_store(view.name, table.to_pandas())
    expected = plain.get_online_features(features, asked).proto
    names = list(expected.metadata.feature_names.val)
    assert set(names) == {"user_id", *schema.EMBEDDING_FEATURE_NAMES}
    for answer in answers:
        assert by_name(answer) == by_name(expected)
    at = names.index("embedding")
    vectors = [list(value.float_list_val.val) for value in expected.results[at].values]
    assert vectors == [*table["embedding"].to_pylist(), []]


def by_name(answer: Any) -> dict[str, bytes]:
    """Each feature's values, statuses and timestamps; their order in an answer is not the order asked for."""
    vectors = zip(answer.metadata.feature_names.val, answer.results, strict=True)
    return {name: vector.SerializeToString(deterministic=True) for name, vector in vectors}


def test_what_is_set_aside_from_garbage_collection_is_collected_again_afterwards(view: OnlineView, held: Held) -> None:
    publish(view, embeddings("u"), held, 10)
    assert gc.get_freeze_count() == 0
    with pytest.raises(StoreError):
        require_published(view, embeddings("v"), 10)
    assert gc.get_freeze_count() == 0


def test_publishing_nothing_writes_nothing(cfg: Config, store: Any, view: OnlineView, held: Held) -> None:
    empty = mixed_embeddings().slice(0, 0)
    assert publish(view, empty, held, 10).equals(empty)
    require_published(view, empty, 10)
    assert not contents(cfg, store, view)


def test_a_batch_that_fails_leaves_no_row_in_part(cfg: Config, store: Any, view: OnlineView, held: Held) -> None:
    """The last feature of the second row cannot be written."""
    publish(view, embeddings("u"), held, 10)
    before = contents(cfg, store, view)
    rows = view.rows(embeddings("u", "v", first=9.0))
    rows[1] = rows[1]._replace(values=(*rows[1].values[:-1], object()))  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"type 'object' is not supported|must be str, int, float or bytes"):
        view.write(view.keys(embeddings("u", "v")), rows)
    assert contents(cfg, store, view) == before


def test_what_feast_serves_is_what_was_published(store: Any, view: OnlineView, held: Held) -> None:
    publish(view, embeddings("u"), held, 10)
    features = [f"{view.name}:{name}" for name in schema.EMBEDDING_FEATURE_NAMES]
    answer = store.get_online_features(features, [{"user_id": "u"}]).to_dict()
    assert answer["embedding"] == [pa.array([0.5, -0.1, 1e-8], pa.float32()).to_pylist()]
    assert (answer["model_version"], answer["support_size"]) == (["1"], [4])
    assert answer["last_event_at"] == [NOW - timedelta(hours=3)]


def test_an_unknown_view_names_the_remedy(store: Any) -> None:
    with pytest.raises(StoreError, match="view nothing must be in the feature registry, but is not; run limaml apply"):
        OnlineView(store, "nothing")


def test_a_new_row_always_replaces_nothing() -> None:
    assert replaces(OnlineRow(0, None, ()), None)


def test_a_sample_is_spread_over_the_table() -> None:
    table = embeddings(*(f"u{number:03}" for number in range(100)))
    assert sample(table, 100) == table
    assert sample(table, 4)["user_id"].to_pylist() == ["u000", "u033", "u066", "u099"]
    assert sample(table, 1)["user_id"].to_pylist() == ["u000"]
