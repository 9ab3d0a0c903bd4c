"""The catalogue's scorer gives what the network's own forward pass does, whatever the shape of the global block."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from limaml import schema
from limaml.config import FeatureConfig, TaskKindConfig
from limaml.features.columns import VectorEncoder
from limaml.features.encoder import Encoder
from limaml.models.network import build_network
from limaml.tasks.rows import Rows
from serving.items import ItemRow, Items
from serving.scorer import NetworkScorer, PlannedScorer, catalogue_scorer
from tests import declared

USER = "much"
HOUR = 21
NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("scorer"))


USER_AND_ITEM = (TaskKindConfig(), TaskKindConfig(name="item", entity_column="item_id"))


def make_network(world, scale, encoder=None, kinds=None, **model):
    """Parameters that all differ from zero, so that each of them moves the scores; `encoder` and `kinds` instead of the
    world's."""
    own = {"model": world.cfg.model.model_copy(update=model), "task_kinds": kinds or world.cfg.task_kinds}
    cfg = world.cfg.model_copy(update=own)
    network, generator = build_network(cfg, (encoder or world.encoder).dims), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.global_block.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def at_hour(world):
    """The context's numbers."""
    return world.encoder.encode({"hour": HOUR}, 1).context[0]


def catalogue_of(world):
    rows = {
        item: ItemRow(tuple(features[name] for name in declared.ITEM_FEATURE_NAMES), None)
        for item, features in world.item_features.items()
    }
    return Items(declared.ITEM_FEATURE_NAMES, tuple(world.items), rows)


def scored(world, network, items, vector, scorer_of=catalogue_scorer):
    catalogue = catalogue_of(world)
    scorer = scorer_of(network, catalogue.encode(world.encoder))
    user = world.encoder.encode_user(world.user_features[USER], NOON)
    return scorer.score(catalogue.find(items), user, at_hour(world), {"user": vector})


def expected(world, network, items, vector):
    with torch.no_grad():
        logits = network(asked(world, items), {"user": torch.from_numpy(vector)[None]})
    return torch.sigmoid(logits)[0].numpy()


def asked(world, items):
    """A request's rows, as they are encoded where there is no catalogue in memory."""
    rows = [
        world.item_features.get(item, dict.fromkeys(["year", "genres", "item_events", "item_positive_rate"])) for item in items
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {**world.user_features[USER], "item_id": items, "hour": HOUR}
    return Rows.from_encoded(world.encoder.encode(columns, len(items)))


@pytest.mark.parametrize("interaction", ["product", "concat", "both"])
@pytest.mark.parametrize("hidden", [(8,), (16, 8, 4)])
def test_every_interaction_scores_as_the_network_does(world, interaction, hidden):
    network = make_network(world, 0.6, interaction=interaction, global_hidden=hidden)
    items, vector = ["i8", "i2", "i7", "i1", "i5"], np.float32([0.7, -1.2, 0.4, -0.3])
    found = scored(world, network, items, vector)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(world, network, items, vector), rtol=0, atol=1e-6)
    np.testing.assert_allclose(scored(world, network, items, vector, NetworkScorer), found, rtol=0, atol=1e-6)
    assert found.std() > 0.01
    other = scored(world, network, items, -vector)
    assert np.abs(other - found).max() > 0.01


def test_a_network_without_a_plan_is_asked_itself(world, monkeypatch):
    network, items = make_network(world, 0.6), catalogue_of(world).encode(world.encoder)
    assert isinstance(catalogue_scorer(network, items), PlannedScorer)
    monkeypatch.setattr(network, "serving_plan", lambda: None)
    assert isinstance(catalogue_scorer(network, items), NetworkScorer)


# Of the context's numbers the last ones are taken to be a candidate's own; they differ from one to the next then.
@pytest.mark.parametrize("num_candidate", [0, 2])
@pytest.mark.parametrize("per_row", [{"item"}, set()], ids=["an embedding a candidate", "one for all"])
@pytest.mark.parametrize("hidden", [(8,), (16, 8, 4)])
@pytest.mark.parametrize("interaction", ["product", "concat", "both"])
def test_two_kinds_and_what_a_candidate_brings_score_as_the_block_does(world, interaction, hidden, per_row, num_candidate):
    network = make_network(world, 0.3, kinds=USER_AND_ITEM, interaction=interaction, global_hidden=hidden)
    catalogue = catalogue_of(world)
    asked_for, rng = ["i8", "i2", "i7", "i1", "i5"], np.random.default_rng(0)
    encoded, numbers = catalogue.encode(world.encoder), catalogue.find(asked_for)
    user, hour = world.encoder.encode_user(world.user_features[USER], NOON), at_hour(world)
    once, own = hour[: len(hour) - num_candidate], rng.normal(size=(5, num_candidate)).astype(np.float32)
    candidate = own if num_candidate else None
    embeddings = {kind: rng.normal(size=(5, 4) if kind in per_row else 4).astype(np.float32) for kind in ("user", "item")}
    found = [
        scorer.score(numbers, user, once, embeddings, candidate)
        for scorer in (PlannedScorer(network.serving_plan(), encoded, num_candidate), NetworkScorer(network, encoded))
    ]
    rows = asked(world, asked_for)
    context = torch.from_numpy(np.concatenate([np.tile(once, (5, 1)), own], axis=1))[None]
    given = {
        kind: torch.from_numpy(e)[None] if e.ndim == 2 else torch.from_numpy(e)[None, None] for kind, e in embeddings.items()
    }
    with torch.no_grad():
        wanted = torch.sigmoid(network(replace(rows, context_TRF=context), given))[0].numpy()
    for scores in found:
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=2e-6)
    assert wanted.std() > 0.01


def test_a_global_block_without_hidden_layers(world):
    network = make_network(world, 0.3, interaction="product", global_hidden=())
    vector = np.float32([0.7, -1.2, 0.4, -0.3])
    found = scored(world, network, world.items, vector)
    np.testing.assert_allclose(found, expected(world, network, world.items, vector), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("interaction", ["product", "concat"])
def test_saturated_layers_overflow_nowhere(world, interaction):
    network = make_network(world, 100.0, interaction=interaction, global_hidden=(16, 8))
    vector = np.float32([0.7, -1.2, 0.4, -0.3])
    found = scored(world, network, world.items, vector)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected(world, network, world.items, vector), rtol=0, atol=1e-6)


def test_scoring_leaves_the_catalogue_as_it_was(world):
    network = make_network(world, 0.3)
    catalogue = catalogue_of(world)
    scorer = catalogue_scorer(network, catalogue.encode(world.encoder))
    user, numbers = world.encoder.encode_user(world.user_features[USER], NOON), [3, 0, 7]
    once, again = (scorer.score(numbers, user, at_hour(world), {"user": np.ones(4, np.float32)}) for _ in range(2))
    np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize(
    "model",
    [{"interaction": "product"}, {"interaction": "concat"}, {"interaction": "both", "mlp_reads_vectors": False}],
    ids=["product", "concat", "outside the MLP"],
)
def test_vectors_are_scored_as_the_network_does_however_the_catalogue_is_cut(world, model, monkeypatch):
    vector = FeatureConfig(entity="item", name="text", type="vector", width=2, encoder="hashes-1", licence="MIT")
    cfg = world.cfg.model_copy(update={"features": (*world.cfg.features, vector)})
    # i1 has none, and i7, outside the vocabulary, has one.
    values = {"i1": None, **{item: [float(at), 3.0 - at] for at, item in enumerate(world.items) if item != "i1"}}
    items = pa.table({"item_id": list(values), "text": list(values.values())}, schema.tables(cfg.features).item_vectors.arrow)
    columns = {**world.encoder.columns, "text": VectorEncoder.fit(vector, items["text"])}
    encoder = Encoder(cfg.features, world.encoder.items, world.encoder.entities, columns).with_items(items)
    network = make_network(world, 0.6, encoder, **model)
    user = encoder.encode_user(world.user_features[USER], NOON)
    catalogue = catalogue_of(world)
    columns = {**catalogue.values(world.items), **world.user_features[USER], "item_id": world.items, "hour": HOUR}
    embedding = np.float32([0.7, -1.2, 0.4, -0.3])
    with torch.no_grad():
        encoded = Rows.from_encoded(encoder.encode(columns, len(world.items)))
        wanted = torch.sigmoid(network(encoded, {"user": torch.from_numpy(embedding)[None]}))[0].numpy()
    for part in (8192, 3):
        monkeypatch.setattr("serving.scorer._PART_ITEMS", part)
        scorer = catalogue_scorer(network, catalogue.encode(encoder))
        found = scorer.score(list(range(len(world.items))), user, at_hour(world), {"user": embedding})
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert wanted.std() > 0.01
