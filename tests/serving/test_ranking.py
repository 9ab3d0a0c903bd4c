"""From fetched features to an answer, without a server: the clock, the order, one vector a task kind."""

from datetime import UTC, datetime, timedelta
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limaml.config import ArmConfig
from limaml.models.network import build_network
from serving.api import RankResponse
from serving.features import Fetched, ItemRow
from serving.freshness import Lookup, StoredEmbedding
from serving.items import Items
from serving.loaded import Loaded
from serving.ranking import look_up, respond, score
from serving.scorer import catalogue_scorer
from tests import declared

NOW = datetime(2026, 3, 1, 14, 59, tzinfo=UTC)
VECTOR = np.float32([2.0, -1.0, 0.5, 1.5])


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("ranking"))


@pytest.fixture(scope="module")
def loaded(world):
    network = build_network(world.cfg, world.encoder.dims, seed=1)
    world.networks["1"] = network
    prior = {"user": network.priors()["user"].detach().numpy()}
    rows = {
        item: ItemRow(tuple(features[name] for name in declared.ITEM_FEATURE_NAMES), None)
        for item, features in world.item_features.items()
    }
    items = Items(declared.ITEM_FEATURE_NAMES, tuple(world.items), rows)
    scorer = catalogue_scorer(network, items.encode(world.encoder))
    return Loaded("1", "blue", NOW - timedelta(hours=15), network, world.encoder, prior, items, scorer, None)


def fetched(world, row=None, *, available=True):
    return Fetched(world.user_features["much"], {"user": row}, available)


def answered(items, scores, lookups):
    return RankResponse.model_validate_json(respond("1", items, scores, lookups))


def at_hour(loaded, hour):
    """The context's numbers."""
    return loaded.encoder.encode_context({"hour": hour}, NOW)[1]


def test_the_hour_counts(loaded, world):
    lookups, numbers = {"user": Lookup("missing")}, loaded.items.find(["i1", "i2"])
    afternoon, night = (score(loaded, numbers, fetched(world), lookups, at_hour(loaded, hour), NOW) for hour in (14, 2))
    assert (afternoon != night).all()


def test_items_are_gathered_from_the_encoded_catalogue(loaded, world):
    items = ["i8", "i2", "i7", "i1"]
    scores = score(loaded, loaded.items.find(items), fetched(world), {"user": Lookup("missing")}, at_hour(loaded, 12), NOW)
    assert scores == pytest.approx(list(world.expected("1", "much", items).values()), abs=1e-6)


def test_the_vector_looked_up_is_the_one_scored_with(loaded, world):
    row = StoredEmbedding(VECTOR, "1", NOW - timedelta(days=9), None)
    lookups = look_up(loaded, fetched(world, row), world.cfg, NOW)
    # The slot is complete through 15 hours ago, which is later than the row.
    assert lookups == {"user": Lookup("fresh", row.vector, 15 * 3600.0, None)}
    scores = score(loaded, [0], fetched(world), lookups, at_hour(loaded, 3), NOW)
    assert scores == pytest.approx(list(world.expected("1", "much", ["i1"], VECTOR, hour=3).values()), abs=1e-6)


@pytest.mark.parametrize(("when_stale", "fallback"), [("prior", "stale"), ("use", None)])
def test_a_stale_embedding_is_used_or_not_as_configured_and_said_to_be_stale(loaded, world, when_stale, fallback):
    kind = world.cfg.task_kind.model_copy(update={"when_stale": when_stale})
    cfg = world.cfg.model_copy(update={"task_kinds": (kind,)})
    lookups = look_up(loaded, fetched(world, StoredEmbedding(VECTOR, "1", NOW, None)), cfg, NOW + timedelta(days=20))
    assert lookups["user"].status == "stale"
    scores = score(loaded, [0], fetched(world), lookups, at_hour(loaded, 3), NOW)
    used = VECTOR if when_stale == "use" else None
    assert scores == pytest.approx(list(world.expected("1", "much", ["i1"], used, hour=3).values()), abs=1e-6)
    answer = answered(["i1"], scores, lookups).embeddings["user"]
    assert (answer.fallback, answer.stale, answer.age_s) == (fallback, True, 20 * 86400.0)


def test_an_arm_may_withhold_the_embedding_and_says_so(loaded, world):
    arm = ArmConfig(name="prior", share=0.5, personalise=False)
    row = StoredEmbedding(VECTOR, "1", NOW - timedelta(days=9), None)
    lookups = look_up(loaded, fetched(world, row), world.cfg, NOW, arm=arm)
    assert lookups == {"user": Lookup("withheld", None, 15 * 3600.0, None)}
    scores = score(loaded, [0], fetched(world), lookups, at_hour(loaded, 3), NOW)
    assert scores == pytest.approx(list(world.expected("1", "much", ["i1"], hour=3).values()), abs=1e-6)
    answer = RankResponse.model_validate_json(respond("1", ["i1"], scores, lookups, "prior"))
    assert (answer.arm, answer.embeddings["user"].fallback) == ("prior", "withheld")


@pytest.mark.parametrize(
    ("row", "when_stale", "status"),
    [
        (None, None, "missing"),
        (StoredEmbedding(VECTOR, "2", NOW, None), None, "version_mismatch"),
        (StoredEmbedding(VECTOR, "1", NOW - timedelta(days=30), None), None, "stale"),
        (StoredEmbedding(VECTOR, "1", NOW - timedelta(days=30), None), "use", "stale"),
    ],
)
def test_what_is_not_fresh_keeps_its_own_reason(loaded, world, row, when_stale, status):
    """A stale one is not used either, whatever else the arm says of it."""
    arm = ArmConfig(name="prior", share=0.5, personalise=False, when_stale=when_stale)
    found = look_up(loaded, fetched(world, row), world.cfg, NOW + timedelta(days=20), arm=arm)["user"]
    assert (found.status, found.vector) == (status, None)


@pytest.mark.parametrize(
    ("of_kind", "of_arm", "is_used"), [("prior", "use", True), ("use", "prior", False), ("use", None, True)]
)
def test_an_arm_s_policy_for_stale_embeddings_comes_before_the_kind_s(loaded, world, of_kind, of_arm, is_used):
    kind = world.cfg.task_kind.model_copy(update={"when_stale": of_kind})
    cfg = world.cfg.model_copy(update={"task_kinds": (kind,)})
    row, arm = StoredEmbedding(VECTOR, "1", NOW, None), ArmConfig(name="a", share=0.5, when_stale=of_arm)
    found = look_up(loaded, fetched(world, row), cfg, NOW + timedelta(days=20), arm=arm)["user"]
    assert (found.status, found.vector is not None) == ("stale", is_used)


def test_without_arms_no_answer_has_one():
    assert b"arm" not in respond("1", ["i1"], np.float32([0.5]), {"user": Lookup("missing")})


def test_a_store_that_did_not_answer_is_a_store_error(loaded, world):
    row = StoredEmbedding(VECTOR, "1", NOW, None)
    assert look_up(loaded, fetched(world, row, available=False), world.cfg, NOW) == {"user": Lookup("store_error")}


def test_candidates_come_best_first_and_equal_ones_by_id():
    lookups = {"user": Lookup("missing")}
    answer = answered(["i3", "i1", "i2", "i4"], np.float32([0.25, 0.25, 0.75, 0.125]), lookups)
    assert [(entry.item_id, entry.score) for entry in answer.items] == [
        ("i2", 0.75),
        ("i1", 0.25),
        ("i3", 0.25),
        ("i4", 0.125),
    ]
    assert answer.model_version == "1"
    assert answer.embeddings["user"].fallback == "missing"
    assert not answer.embeddings["user"].stale


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=3), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, unique_by=itemgetter(0)
    )
)
def test_any_candidates_are_sorted_as_pairs(candidates):
    answer = answered([item for item, _ in candidates], np.float32([score for _, score in candidates]), {})
    ranked = sorted(candidates, key=lambda pair: (-pair[1], pair[0]))
    assert [(entry.item_id, entry.score) for entry in answer.items] == ranked
