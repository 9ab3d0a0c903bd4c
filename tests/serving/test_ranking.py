"""From fetched features to an answer, without a server: the clock, the order, one vector a task kind."""

from datetime import UTC, datetime, timedelta

import pytest

from limaml.models.network import build_network
from serving.api import RankRequest
from serving.champion import Loaded
from serving.features import Fetched
from serving.freshness import Lookup, StoredEmbedding
from serving.ranking import look_up, respond, score

NOW = datetime(2026, 3, 1, 14, 59, tzinfo=UTC)
VECTOR = [2.0, -1.0, 0.5, 1.5]


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("ranking"))


@pytest.fixture(scope="module")
def loaded(world):
    network = build_network(world.cfg, world.encoder.dims, seed=1)
    world.networks["1"] = network
    prior = {"user": network.prior().detach()}
    return Loaded("1", "blue", NOW - timedelta(hours=15), network, world.encoder, prior, frozenset(world.items), None)


def request(*items, **context):
    return RankRequest.model_validate({"user_id": "much", "item_ids": list(items), "context": context})


def fetched(world, *items, row=None, available=True):
    names = world.item_features["i1"]
    return Fetched(
        user=world.user_features["much"],
        items={name: [world.item_features[item][name] for item in items] for name in names},
        embeddings={"user": row},
        available=available,
    )


def test_without_an_hour_the_clock_is_read(loaded, world):
    lookups = {"user": Lookup("missing")}
    features = fetched(world, "i1", "i2")
    by_clock = score(loaded, request("i1", "i2"), features, lookups, NOW)
    assert by_clock == score(loaded, request("i1", "i2", hour=14), features, lookups, NOW)
    assert by_clock != score(loaded, request("i1", "i2", hour=2), features, lookups, NOW)


def test_the_vector_looked_up_is_the_one_scored_with(loaded, world):
    row = StoredEmbedding(VECTOR, "1", NOW - timedelta(days=9), None)
    lookups = look_up(loaded, fetched(world, "i1", row=row), world.cfg, NOW)
    # The slot is complete through 15 hours ago, which is later than the row.
    assert lookups == {"user": Lookup("fresh", VECTOR, 15 * 3600.0, None)}
    scores = score(loaded, request("i1", hour=3), fetched(world, "i1"), lookups, NOW)
    assert scores == pytest.approx(list(world.expected("1", "much", ["i1"], VECTOR, hour=3).values()), abs=1e-6)


def test_a_store_that_did_not_answer_is_a_store_error(loaded, world):
    row = StoredEmbedding(VECTOR, "1", NOW, None)
    assert look_up(loaded, fetched(world, "i1", row=row, available=False), world.cfg, NOW) == {"user": Lookup("store_error")}


def test_candidates_come_best_first_and_equal_ones_by_id(loaded):
    answer = respond(loaded, request("i3", "i1", "i2"), [0.25, 0.25, 0.75], {"user": Lookup("missing")})
    assert [(entry.item_id, entry.score) for entry in answer.items] == [("i2", 0.75), ("i1", 0.25), ("i3", 0.25)]
    assert answer.model_version == "1"
    assert answer.embeddings["user"].fallback == "missing"
