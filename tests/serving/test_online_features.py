"""Reading Feast's online store: what is found, what is missing, and what is garbage.

Runs on SQLite; the same tests run on a real Redis server with `-m services` (make test-services).
"""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast.protos.feast.types.Value_pb2 import Value

from limaml.data.online.wire import string_keys
from limaml.errors import StoreError
from serving.features import OnlineFeatures

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
    features = OnlineFeatures(stored.cfg, "blue")
    features.open()
    return features


def test_a_known_user_is_found_with_the_embedding(online, stored):
    fetched = online.read_user("much")
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
        assert dict(zip(expected, values, strict=True)) == expected | {
            "item_positive_rate": expected["item_positive_rate"] and pytest.approx(expected["item_positive_rate"])
        }


def test_it_reads_what_feast_reads(online, stored):
    """Feast's own answer for the same keys, through `get_online_features`."""
    names = [f"user_features:{name}" for name in stored.user_features["much"]]
    for user in ("much", "bare", "nobody"):
        theirs = stored.store.get_online_features(names, [{"user_id": user}]).to_dict()
        assert dict(online.read_user(user).user) == {name: theirs[name][0] for name in stored.user_features["much"]}


def test_what_is_missing_is_none_and_not_an_embedding(online):
    fetched = online.read_user("nobody")
    assert set(fetched.user.values()) == {None}
    assert fetched.embeddings == {"user": None}
    assert online.read_user("bare").embeddings == {"user": None}


def test_the_other_slot_is_not_read(stored):
    green = OnlineFeatures(stored.cfg, "green")
    green.open()
    assert green.read_user("much").embeddings == {"user": None}


def test_threads_share_a_reader(online, stored):
    with ThreadPoolExecutor(4) as pool:
        for user, fetched in zip(["much", "bare"] * 50, pool.map(online.read_user, ["much", "bare"] * 50), strict=True):
            assert dict(fetched.user) == stored.user_features[user]
            assert (fetched.embeddings["user"] is None) == (user == "bare")


def test_a_store_that_was_never_opened_is_a_failed_one(stored):
    unopened = OnlineFeatures(stored.cfg, "blue")
    with pytest.raises(StoreError, match="must be open"):
        unopened.read_user("much")
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
def test_garbage_is_an_error_of_the_store(online, stored, feature, value, message):
    stored.publish_features()
    stored.publish("blue", "7", {"old": VECTOR}, as_of=NOW)
    assert online.read_user("old").available
    put(stored, "old", feature, value)
    with pytest.raises(StoreError, match=message):
        online.read_user("old")
