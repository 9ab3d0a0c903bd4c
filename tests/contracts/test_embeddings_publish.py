"""One rule decides which row replaces which, and it is the same on every online store (contract 5).

Every test runs on SQLite; the same tests run on a real Redis server with `-m services` (make test-services).
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import Config, EmbeddingsConfig, FeastConfig, ModelConfig, SourceConfig, StorageConfig
from limaml.data.feature_store import apply, open_store
from limaml.embeddings.lease import Held, lease
from limaml.embeddings.publish import OnlineRow, OnlineView, publish, replaces, require_published, sample
from limaml.errors import BusyError, StoreError

DIM = 3
NOW = datetime(2026, 1, 10, tzinfo=UTC)
DAY = timedelta(days=1)
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a Redis server of our own, empty and without files."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail("redis-server must be installed for this test: apt-get install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_redis(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def wait_for_redis(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16) == b"+PONG\r\n":
                    return
        except ConnectionRefusedError:
            continue
    pytest.fail(f"redis-server on port {port} did not answer within {DEADLINE_S:g} s (exit code {process.poll()})")


@pytest.fixture(scope="module", params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
def cfg(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("store")
    connection = str(root / "online.db") if request.param == "sqlite" else request.getfixturevalue("redis_server")
    return Config(
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
    for other, difference in [
        (embeddings("u", "v", "w", first=0.50001), "u differs in embedding"),
        (embeddings("u", "v", "w", version="2"), "u differs in model_version"),
        (embeddings("u", "v", "w", as_of=NOW + DAY), "u is stamped 2026-01-10T00:00:00.00:00 instead of 2026-01-11"),
        (embeddings("u", "v", "w", "x").slice(3), "x is missing"),
    ]:
        with pytest.raises(StoreError, match=rf"of {other.num_rows} read back otherwise, e\.g\. entity {difference}"):
            require_published(view, other, 2)


def test_nothing_is_written_without_the_lease(view: OnlineView, cfg: Config) -> None:
    with lease(cfg, "publish of run-1") as lost:
        pass
    with lease(cfg, "fill of run-2"), pytest.raises(BusyError, match="publish of run-1 has lost the lease"):
        publish(view, embeddings("u"), lost, 10)
    assert stored(view, "u") == [None]


def test_snapshots_follow_the_same_rule(store: Any, held: Held) -> None:
    """They have no version: newer, or equal and different. Nulls and lists come back as they were."""
    items = OnlineView(store, schema.ITEM_FEATURES.name)
    items.clear()

    def snapshot(at: datetime, events: int) -> pa.Table:
        rows = [
            {
                "item_id": "i1",
                "event_timestamp": at,
                "year": None,
                "genres": [],
                "item_events": events,
                "item_positive_rate": 0.1,
            },
            {
                "item_id": "i2",
                "event_timestamp": at,
                "year": 1995,
                "genres": ["Drama", "War"],
                "item_events": events,
                "item_positive_rate": 0.7,
            },
        ]
        return pa.Table.from_pylist(rows, schema=schema.ITEM_FEATURES.arrow)

    for at, events, written in [(NOW, 3, 2), (NOW, 3, 0), (NOW - DAY, 9, 0), (NOW, 4, 2), (NOW + DAY, 4, 2)]:
        assert publish(items, snapshot(at, events), held, 10).num_rows == written
    require_published(items, snapshot(NOW + DAY, 4), 10)


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
    assert replaces(OnlineRow(NOW, {}), None)


def test_a_sample_is_spread_over_the_table() -> None:
    table = embeddings(*(f"u{number:03}" for number in range(100)))
    assert sample(table, 100) == table
    assert sample(table, 4)["user_id"].to_pylist() == ["u000", "u033", "u066", "u099"]
    assert sample(table, 1)["user_id"].to_pylist() == ["u000"]
