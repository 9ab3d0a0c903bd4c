"""Reading Feast's online store: what is found, what is missing, and what a request gets when the store does not answer.

Runs on SQLite; the same tests run on a real Redis server with `-m services` (make test-services).
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from serving.features import OnlineFeatures
from serving.freshness import StoredEmbedding

NOW = datetime(2026, 3, 1, tzinfo=UTC)
VECTOR = [0.25, -1.5, 0.0, 3.0]


@pytest.fixture(scope="module", params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
def stored(request, make_world, tmp_path_factory):
    """A world whose online store holds features, and an embedding of `much` in slot blue."""
    redis = request.getfixturevalue("redis_server") if request.param == "redis" else None
    world = make_world(tmp_path_factory.mktemp(request.param), redis=redis)
    world.build()
    world.publish("blue", "7", {"much": VECTOR}, as_of=NOW)
    return world


@pytest.fixture
def online(stored):
    with ThreadPoolExecutor(stored.cfg.serving.store_threads) as pool:
        features = OnlineFeatures(stored.cfg, "blue", pool)
        features.open()
        yield features


def test_a_known_user_and_known_items_are_found(online, stored):
    fetched = online.read("much", ["i4", "i2"])
    assert dict(fetched.user) == stored.user_features["much"]
    for name, values in fetched.items.items():
        expected = [stored.item_features[item][name] for item in ("i4", "i2")]
        assert values == (pytest.approx(expected) if name == "item_positive_rate" else expected)
    assert fetched.embeddings == {"user": StoredEmbedding(VECTOR, "7", NOW, NOW - timedelta(days=30))}
    assert fetched.available


def test_what_is_missing_is_none_and_not_an_embedding(online):
    fetched = online.read("nobody", ["i1", "i8"])
    assert set(fetched.user.values()) == {None}
    assert {name: values[1] for name, values in fetched.items.items()} == dict.fromkeys(fetched.items)
    assert fetched.items["year"][0] == 1980
    assert fetched.embeddings == {"user": None}


def test_the_other_slot_is_not_read(stored):
    with ThreadPoolExecutor(1) as pool:
        green = OnlineFeatures(stored.cfg, "green", pool)
        green.open()
        assert green.read("much", ["i1"]).embeddings == {"user": None}


def test_a_store_that_hangs_is_waited_for_no_longer_than_configured(online):
    known = online.read("much", ["i3"])
    release = threading.Event()
    # Every thread of the pool is busy, as when the store does not answer.
    busy = [online.pool.submit(release.wait) for _ in range(online.cfg.serving.store_threads)]
    impatient = online.cfg.serving.model_copy(update={"store_timeout_s": 0.05})
    online.cfg = online.cfg.model_copy(update={"serving": impatient})
    try:
        fetched = asyncio.run(online.fetch("much", ["i3", "i4"]))
    finally:
        release.set()
    assert all(job.result() for job in busy)
    assert (fetched.available, fetched.user, fetched.embeddings) == (False, {}, {})
    # The item read before keeps its features, the other one has none.
    assert {name: values[0] for name, values in fetched.items.items()} == {n: v[0] for n, v in known.items.items()}
    assert {values[1] for values in map(tuple, fetched.items.values())} == {None}
    assert online.failed


def test_a_store_that_answers_again_is_used_again(online):
    online.failed = True
    assert asyncio.run(online.fetch("much", ["i3"])).available
    assert not online.failed


def test_after_warming_up_every_item_is_known_without_the_store(online, stored):
    online.warm_up(sorted(stored.items))
    online.pool.shutdown()
    fetched = asyncio.run(online.fetch("much", ["i1", "i7"]))
    assert not fetched.available
    assert fetched.items["item_events"] == [0, 30]
    assert fetched.items["genres"] == [["Drama"], ["Drama"]]


def test_a_store_that_was_never_opened_is_a_failed_one(stored):
    with ThreadPoolExecutor(1) as pool:
        unopened = OnlineFeatures(stored.cfg, "blue", pool)
        assert not asyncio.run(unopened.fetch("much", ["i1"])).available
        assert unopened.failed
