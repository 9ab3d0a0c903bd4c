"""The real service while Redis is down, slow, restarting or full of garbage: the prior ranks, and all is found again."""

import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from limaml.features.online.wire import string_keys
from tests.proxy import Proxy

pytestmark = pytest.mark.services

NOW = datetime.now(UTC).replace(microsecond=0)
MUCH, OLD = [2.0, -1.0, 0.5, 1.5], [-1.0, 1.0, 1.0, 0.0]
ITEMS = ["i1", "i4", "i7"]
TOLERANCE = 1e-6
SLOW_S = 2.0
BREAKER = "limaml_online_store_breaker_open"


@pytest.fixture(scope="module")
def proxy(redis_server):
    proxy = Proxy(redis_server)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory, redis_server, proxy):
    """Published straight to Redis; served through the proxy."""
    world = make_world(tmp_path_factory.mktemp("store"), redis=redis_server)
    assert world.registry.champion() is None
    world.build()
    return world


@pytest.fixture(scope="module")
def server(world, proxy, start_server):
    # Not 20 ms: on a busy machine a healthy read may take longer.
    serving = {"store_timeout_s": 0.2, "breaker_failures": 3, "breaker_open_s": 0.2, "items_refresh_s": 0.5}
    cfg = world.cfg.model_copy(
        update={
            "serving": world.cfg.serving.model_copy(update=serving),
            "feast": world.cfg.feast.model_copy(update={"online_connection": proxy.address}),
        }
    )
    return start_server(cfg, world.folder)


@pytest.fixture(scope="module")
def version(world, server):
    version = world.register(seed=1, slot="blue", complete_through=NOW - timedelta(days=1))
    world.publish("blue", version, {"much": MUCH, "old": OLD}, as_of=NOW - timedelta(days=1))
    world.registry.set_champion(version)
    server.wait_until("/readyz", 200)
    return version


@pytest.fixture
def healthy(world, server, version):
    """A version whose embeddings are served when the test begins."""
    world.publish_features()
    world.publish("blue", version, {"much": MUCH, "old": OLD}, as_of=NOW - timedelta(days=1))
    personal(world, server, version)
    return version


def scores(answer):
    return {entry["item_id"]: entry["score"] for entry in answer["items"]}


def personal(world, server, version, user="much", vector=MUCH):
    answer = server.ranked_when(lambda answer: answer["embeddings"]["user"]["fallback"] is None, user, ITEMS)
    assert scores(answer) == pytest.approx(world.expected(version, user, ITEMS, vector), abs=TOLERANCE)


def unpersonal(world, server, version):
    """Many requests at once, each answered from the prior, with the items' features, and none of them late."""
    # The first may have a read under way that still succeeds.
    server.ranked_when(lambda answer: answer["embeddings"]["user"]["fallback"] == "store_error", "much", ITEMS)
    expected = pytest.approx(world.expected(version, "nobody", ITEMS), abs=TOLERANCE)
    took = []
    for _ in range(30):
        started = time.perf_counter()
        answer = server.ranked("much", ITEMS)
        took.append(time.perf_counter() - started)
        assert answer["embeddings"]["user"]["fallback"] == "store_error"
        assert scores(answer) == expected
    # A wait is 0.2 s at most, and once the breaker is open only a probe waits.
    assert max(took) < SLOW_S / 2
    assert sorted(took)[len(took) // 2] < 0.1
    assert server.client.get("/readyz").status_code == 200


@pytest.mark.fault("Redis slow by seconds while serving", after="meanwhile the prior ranks, in time; then scores are as before")
def test_a_slow_store_is_not_waited_for(world, server, healthy, proxy):
    proxy.delay_s = SLOW_S
    try:
        unpersonal(world, server, healthy)
        assert server.metric(BREAKER) == 1.0
    finally:
        proxy.delay_s = 0.0
    personal(world, server, healthy)
    assert server.metric(BREAKER) == 0.0


@pytest.mark.fault("Redis cut off while serving", after="meanwhile the prior ranks, in time; then scores are as before")
def test_a_store_that_is_down_is_found_again(world, server, healthy, proxy):
    proxy.down()
    try:
        unpersonal(world, server, healthy)
        assert server.metric(BREAKER) == 1.0
    finally:
        proxy.up()
    personal(world, server, healthy)
    assert server.metric(BREAKER) == 0.0


@pytest.mark.fault(
    "Redis restarted without its data while serving",
    after="the prior ranks until rows are published again; then scores are as before",
)
def test_a_store_that_comes_back_empty_is_a_store_without_the_user(world, server, healthy, proxy):
    """A restart without persistence; what is published again is used again."""
    proxy.down()
    unpersonal(world, server, healthy)
    client(world).flushall()
    proxy.up()
    server.ranked_when(lambda answer: answer["embeddings"]["user"]["fallback"] == "missing", "much", ITEMS)
    world.publish_features()
    world.publish("blue", healthy, {"much": MUCH}, as_of=NOW - timedelta(days=1))
    answered = world.expected(healthy, "much", ITEMS, MUCH)
    server.ranked_when(lambda answer: scores(answer) == pytest.approx(answered, abs=TOLERANCE), "much", ITEMS)


def client(world):
    return world.store.provider.online_store._get_client(world.store.config.online_store)


def redis_key(world, user):
    return string_keys("user_id", pa.chunked_array([[user]]), 3)[0] + world.store.config.project.encode()


def garbage_values(world):
    key = redis_key(world, "much")
    client(world).hset(key, mapping=dict.fromkeys(client(world).hkeys(key), b"\xff\xff\xff"))


def wrong_redis_type(world):
    client(world).delete(redis_key(world, "much"))
    client(world).set(redis_key(world, "much"), b"not a hash")


@pytest.mark.parametrize("spoil", [garbage_values, wrong_redis_type])
@pytest.mark.fault("garbage in Redis while serving", after="it is not used; published again, scores are as before")
def test_garbage_is_not_used(world, server, healthy, spoil):
    spoil(world)
    unpersonal(world, server, healthy)
    client(world).delete(redis_key(world, "much"))
    # The breaker, which the garbage opened, lets others through again.
    personal(world, server, healthy, "old", OLD)
    world.publish_features()
    world.publish("blue", healthy, {"much": MUCH}, as_of=NOW - timedelta(days=1))
    personal(world, server, healthy)
