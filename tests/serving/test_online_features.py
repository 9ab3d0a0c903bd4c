"""Reading Feast's online store: what is found, what is missing, and what is garbage.

Runs on SQLite; the same tests run on a real Redis server with `-m services` (make test-services).
"""

import asyncio
import sqlite3
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast.protos.feast.types.Value_pb2 import Value

from limaml.config import ServingConfig
from limaml.errors import StoreError
from limaml.features.online.wire import string_keys
from serving.features import OnlineFeatures
from serving.store_calls import StoreCalls
from tests import declared

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


@pytest.fixture(scope="module")
def calls():
    calls = StoreCalls(ServingConfig(store_timeout_s=4.0, breaker_failures=1000))
    yield calls
    calls.stop()


@pytest.fixture(scope="module")
def run():
    """Runs coroutines on one event loop, which a reader's connections belong to."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def read(online, calls, run):
    yield lambda user: run(online.read_user(user, calls))
    online.close()


def test_a_known_user_is_found_with_the_embedding(read, stored):
    fetched = read("much")
    assert fetched.available
    assert dict(fetched.user) == stored.user_features["much"]
    assert fetched.user_at is not None
    row = fetched.embeddings["user"]
    assert list(row.vector) == VECTOR
    assert row.vector.dtype == np.float32
    assert (row.model_version, row.as_of, row.last_event_at) == ("7", NOW, NOW - timedelta(days=30))


def test_items_are_found_in_reads_of_some_at_a_time(online, stored, monkeypatch):
    monkeypatch.setattr("serving.features._READ_ITEMS", 3)
    found = online.read_items([*stored.items, "nowhere"])
    assert list(found) == [*stored.items, "nowhere"]
    unknown = dict.fromkeys(stored.item_features["i1"])
    for item, (values, at) in found.items():
        assert (at is None) == (item not in stored.item_features)
        expected = stored.item_features.get(item, unknown)
        assert dict(zip(declared.ITEM_FEATURE_NAMES, values, strict=True)) == expected | {
            "item_positive_rate": expected["item_positive_rate"] and pytest.approx(expected["item_positive_rate"])
        }


def test_it_reads_what_feast_reads(read, stored):
    """Feast's own answer for the same keys, through `get_online_features`."""
    names = [f"user_features:{name}" for name in stored.user_features["much"]]
    for user in ("much", "bare", "nobody"):
        theirs = stored.store.get_online_features(names, [{"user_id": user}]).to_dict()
        assert dict(read(user).user) == {name: theirs[name][0] for name in stored.user_features["much"]}


def test_what_is_missing_is_none_and_not_an_embedding(read):
    fetched = read("nobody")
    assert set(fetched.user.values()) == {None}
    assert fetched.embeddings == {"user": None}
    assert read("bare").embeddings == {"user": None}


def test_the_other_slot_is_not_read(stored, calls, run):
    green = OnlineFeatures(stored.cfg, "green")
    green.open()
    assert run(green.read_user("much", calls)).embeddings == {"user": None}
    green.close()


def test_look_ups_at_once_share_a_reader(online, stored, calls, run):
    users = ["much", "bare", "nobody"] * 50

    async def all_at_once():
        return await asyncio.gather(*(online.read_user(user, calls) for user in users))

    nothing = dict.fromkeys(stored.user_features["much"])
    for user, fetched in zip(users, run(all_at_once()), strict=True):
        assert dict(fetched.user) == stored.user_features.get(user, nothing)
        assert (fetched.embeddings["user"] is None) == (user != "much")
    online.close()


def test_a_reader_that_is_closed_while_it_reads_gives_its_answers(online, stored, calls, run):
    async def close_in_between():
        await online.read_user("much", calls)
        pending = [asyncio.ensure_future(online.read_user("much", calls)) for _ in range(8)]
        await asyncio.sleep(0)
        online.close()
        return await asyncio.gather(*pending)

    assert [dict(fetched.user) for fetched in run(close_in_between())] == [stored.user_features["much"]] * 8


def test_a_store_that_was_never_opened_is_a_failed_one(stored, calls, run):
    unopened = OnlineFeatures(stored.cfg, "blue")
    with pytest.raises(StoreError, match="must be open"):
        run(unopened.read_user("much", calls))
    with pytest.raises(StoreError, match="must be open"):
        unopened.read_items(["i1"])


def put(stored, user, feature, value):
    """Overwrite one stored value of a user's with bytes that Feast would not have written there."""
    view, name = feature.split(":")
    store = stored.store
    key = string_keys("user_id", pa.chunked_array([[user]]), 3)[0]
    online, config = store.provider.online_store, store.config
    if stored.cfg.feast.online_store == "redis":
        field = online._fields(config, store.get_feature_view(view), [name])[0]
        online._get_client(config.online_store).hset(key + config.project.encode(), field, value)
    else:
        connection = sqlite3.connect(stored.cfg.feast.online_connection)
        with connection:
            connection.execute(
                f'UPDATE "{config.project}_{view}" SET value = ? WHERE entity_key = ? AND feature_name = ?', (value, key, name)
            )
        connection.close()


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        ("user_features:gender", b"\xff\xff garbage", "bytes that are none"),
        ("user_features:user_events", Value(string_val="many").SerializeToString(), "user_events .* must be a int64_val"),
        ("meta_embedding_user_blue:embedding", Value(int64_val=3).SerializeToString(), "embedding .* must be a float_list_val"),
    ],
)
def test_garbage_is_an_error_of_the_row_and_not_of_the_store(online, stored, run, feature, value, message):
    stored.publish_features()
    stored.publish("blue", "7", {"old": VECTOR}, as_of=NOW)
    calls = StoreCalls(ServingConfig(store_timeout_s=4.0, breaker_failures=1))
    assert run(online.read_user("old", calls)).available
    put(stored, "old", feature, value)
    for _ in range(3):
        with pytest.raises(StoreError, match=message):
            run(online.read_user("old", calls))
    assert run(online.read_user("much", calls)).available, "others are read on"
    online.close()
    calls.stop()
