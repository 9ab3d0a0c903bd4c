"""Scoring many tasks at once equals scoring each alone, in the order they were given."""

import numpy as np
import pytest
import torch

from limaml.features.encoder import Encoder
from limaml.models.network import build_network
from limaml.tasks.protocols import as_served
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows
from limaml.training import scoring


@pytest.fixture
def scored(planted_logged, small_config):
    cfg = small_config()
    encoder = Encoder.fit(planted_logged, cfg)
    rows = TaskRows.from_logged(planted_logged, encoder, cfg.task_kind)
    network = build_network(cfg, encoder.dims, seed=2)
    specs = as_served(rows, from_us=0, support_rows=12)
    # Long and short supports mixed, and not sorted by size.
    return network, rows, [specs[at] for at in np.random.default_rng(0).permutation(len(specs))[:40]]


def test_embeddings_of_many_tasks_equal_those_of_each_alone(scored, monkeypatch):
    network, rows, specs = scored
    assert len({spec.support_size for spec in specs}) > 5
    alone = torch.cat([scoring.embed_specs(network, rows, [spec]) for spec in specs])
    # float32 sums over supports padded to another width.
    torch.testing.assert_close(scoring.embed_specs(network, rows, specs), alone, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(scoring, "_TASKS_PER_BATCH", 7)
    torch.testing.assert_close(scoring.embed_specs(network, rows, specs), alone, atol=1e-6, rtol=1e-5)


def test_scores_stand_in_the_order_of_specs_and_their_queries(scored, monkeypatch):
    network, rows, specs = scored
    monkeypatch.setattr(scoring, "_ROWS_PER_BATCH", 11)
    scores = scoring.score_specs(network, rows, specs)
    expected = []
    for spec in specs:
        embedding = scoring.embed_specs(network, rows, [spec])
        at = spec.query
        encoded = rows.encoded.take(at)
        expected += torch.sigmoid(network(Rows.from_encoded(encoded), {network.kind: embedding})).detach()[0].tolist()
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scoring.score_specs(network, rows, []).shape == (0,)
