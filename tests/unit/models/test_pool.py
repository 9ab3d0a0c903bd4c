"""The pool of what somebody took: its numbers by plain Python, and what the blocks make of it."""

import math
from dataclasses import replace

import pytest
import torch

from limaml.config import Config
from limaml.meta.engine import embed_tasks
from limaml.models.blocks import Support
from limaml.models.blocks.pool import Pool
from limaml.models.network import build_network
from tests.unit.models.test_blocks import DIMS, _randomise, _rows

DAY_S = 86_400.0
HALF_LIFE = 2.0
POOL = Pool(width=2, first=1, half_life_days=HALF_LIFE)
VECTOR = {"entity": "item", "name": "text", "type": "vector", "width": 1, "encoder": "noise-1", "licence": "MIT"}
# Of three numbers of an item, its vector is the second and, as "is it known", the third.
WITH_VECTOR = replace(DIMS, item_static=3, item_sets=1, vectors=2)
READERS = ("task_vector", "posterior", "sequence", "set", "hybrid")
X = [[0.3, -1.0, 1.0], [0.1, 2.0, 1.0], [0.9, 5.0, 1.0], [0.0, 0.0, 0.0], [0.7, -3.0, 1.0]]
GAP_DAYS = [9.0, 8.0, 8.0, 5.0, 4.0]
LABEL = [1.0, 1.0, 0.0, 1.0, 1.0]


def config(**model):
    values = {"embedding_dim": 3, "id_dim": 2, "meta_hidden": (4,), "global_hidden": (6, 4), "pool_half_life_days": HALF_LIFE}
    return Config.model_validate({"source": {"kind": "synthetic"}, "features": [VECTOR], "model": values | model})


def support(num_rows=5, padding=0, **changed):
    def padded(values):
        return torch.tensor(values[:num_rows] + [values[0]] * padding, dtype=torch.float64)

    parts = {
        "dense_SF": padded(X),
        "vector_SK": padded(X)[:, :0],
        "mask_S": torch.tensor([1.0] * num_rows + [0.0] * padding, dtype=torch.float64),
        "gap_s_S": padded(GAP_DAYS) * DAY_S,
        "label_S": padded(LABEL),
        "entity_index": torch.tensor(0),
    }
    return Support(**(parts | changed))


def by_hand(num_rows):
    """After so many rows, the newest of which is today's."""
    weights = [LABEL[row] * 0.5 ** ((GAP_DAYS[row] - GAP_DAYS[num_rows - 1]) / HALF_LIFE) for row in range(num_rows)]
    return [math.fsum(w * X[row][at] for row, w in enumerate(weights)) / (math.fsum(weights) + 10.0) for at in (1, 2)]


@pytest.mark.parametrize("padding", [0, 3])
def test_it_is_the_shrunk_mean_of_what_was_taken_newer_rows_counting_for_more(padding):
    for num_rows in range(1, 6):
        given = support(num_rows, padding)
        assert POOL.whole(given).tolist() == pytest.approx(by_hand(num_rows), abs=1e-15)
        running = POOL.running(given)[:num_rows].tolist()
        for row in range(num_rows):
            assert running[row] == pytest.approx(by_hand(row + 1), abs=1e-15)


def test_without_anything_taken_it_is_zero():
    nothing = torch.zeros(5, dtype=torch.float64)
    for given in (support(label_S=nothing), support(mask_S=nothing)):
        assert not POOL.whole(given).any()
        assert not POOL.running(given).any()


def test_rows_of_one_instant_count_in_any_order_and_time_without_rows_changes_nothing():
    order = torch.tensor([0, 2, 1, 3, 4])
    given = support()
    moved = given._replace(**{name: getattr(given, name)[order] for name in ("dense_SF", "gap_s_S", "label_S")})
    torch.testing.assert_close(POOL.whole(moved), POOL.whole(given), rtol=0, atol=1e-15)
    later = given._replace(gap_s_S=given.gap_s_S + 30 * DAY_S)
    torch.testing.assert_close(POOL.whole(later), POOL.whole(given), rtol=0, atol=1e-12)
    torch.testing.assert_close(POOL.running(later), POOL.running(given), rtol=0, atol=1e-12)


def rows_and_labels(**kwargs):
    rows = _rows(**kwargs)
    return replace(rows, label_TR=(torch.arange(rows.mask_TR.shape[1]) % 2).float().expand_as(rows.mask_TR))


def pooled_by_hand(rows, task):
    age_days = (rows.gap_s_TR[task] - rows.gap_s_TR[task].min()) / DAY_S
    weights = rows.label_TR[task] * rows.mask_TR[task] * 0.5 ** (age_days / HALF_LIFE)
    return (weights[:, None] * rows.item_dense_TRF[task, :, 1:3]).sum(dim=0) / (weights.sum() + 10.0)


@pytest.mark.parametrize("block", ["task_vector", "posterior"])
def test_a_task_vector_starts_at_the_prior_and_a_map_of_the_pool_that_begins_at_zero(block):
    network, rows = build_network(config(meta_block=block), WITH_VECTOR), rows_and_labels()
    index = torch.zeros(2, dtype=torch.long)
    assert torch.equal(embed_tasks(network, "user", rows, index, num_steps=0), network.priors()["user"].expand(2, -1))
    _randomise(network)
    start_TD = embed_tasks(network, "user", rows, index, num_steps=0)
    for task in range(2):
        moved_K = pooled_by_hand(rows, task) @ network.block("user").pool_weights
        expected_D = network.priors()["user"] + torch.cat([moved_K, torch.zeros(1)])
        torch.testing.assert_close(start_TD[task], expected_D.detach())


def test_the_set_reads_every_row_beside_the_pool():
    network, rows = _randomise(build_network(config(meta_block="set"), WITH_VECTOR)), rows_and_labels(num_tasks=1)
    block = network.block("user")
    item_RK = network.global_block.encode(rows).vectors["user"][0, :, :-1]
    pool_RV = pooled_by_hand(rows, 0).expand(4, -1)
    x_RI = torch.cat([rows.dense[0], item_RK, rows.label_TR[0, :, None], pool_RV], dim=1)
    rows_RD = torch.relu(x_RI @ block.mlp["weight0"] + block.mlp["bias0"]) @ block.mlp["weight1"] + block.mlp["bias1"]
    expected_D = network.priors()["user"] + rows_RD.sum(dim=0) / 14
    torch.testing.assert_close(embed_tasks(network, "user", rows, torch.tensor([0]))[0], expected_D.detach())


@pytest.mark.parametrize("adapts", ["all", "last", "bias"])
def test_no_row_of_a_sequence_is_scored_with_a_pool_that_has_read_its_label(adapts):
    """With every other way for a label closed: its own input has no weight."""
    network = _randomise(build_network(config(meta_block="sequence", sequence_adapts=adapts, sequence_width=8), WITH_VECTOR))
    block = network.block("user").double()
    inputs = block.transformer.rows.weight
    with torch.no_grad():
        inputs[:, -3] = 0.0
    values = torch.randn(5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = support(dense_SF=values[:, :8], vector_SK=values[:, 8:])
    read = block.read(given)
    rows_SD = block.embed_rows(block.start(read), read)
    for row in range(5):
        flipped = given.label_S.clone()
        flipped[row] = 1 - flipped[row]
        other = block.read(given._replace(label_S=flipped))
        other_SD = block.embed_rows(block.start(other), other)
        assert torch.equal(other_SD[: row + 1], rows_SD[: row + 1])
        assert ((other_SD[row + 1 :] - rows_SD[row + 1 :]).abs().amax(dim=1) > 1e-6).all()


@pytest.mark.parametrize("block", READERS)
def test_a_block_that_reads_a_pool_is_the_prior_where_there_are_no_rows(block):
    network = _randomise(build_network(config(meta_block=block), WITH_VECTOR))
    rows = rows_and_labels(real=[0, 3])
    embedding_TD = embed_tasks(network, "user", rows, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(embedding_TD[0], network.priors()["user"].detach())
    # Where there are, their age counts.
    other = replace(rows, gap_s_TR=rows.gap_s_TR * 30)
    assert not torch.equal(embed_tasks(network, "user", other, torch.zeros(2, dtype=torch.long))[1], embedding_TD[1])


@pytest.mark.parametrize("block", ["id_mlp", "row_mlp"])
def test_a_pool_that_nobody_reads_or_that_has_no_vectors_is_refused(block):
    with pytest.raises(ValueError, match=f"needs a meta block that reads pools, got {block} of kind user"):
        config(meta_block=block)
    with pytest.raises(
        ValueError, match=r"pool_half_life_days must pool a declared vector, got 2 and no feature of type vector"
    ):
        Config.model_validate({"source": {"kind": "synthetic"}, "model": {"pool_half_life_days": 2.0, "meta_block": block}})
