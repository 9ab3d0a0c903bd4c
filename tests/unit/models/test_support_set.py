"""The set block, which takes no inner step, and the hybrid, whose steps begin where it ends."""

from dataclasses import replace

import pytest
import torch

from limaml.config import MetaConfig
from limaml.meta.engine import embed_tasks
from limaml.models.network import build_network
from tests.unit.models.test_blocks import DIMS, _config, _randomise, _rows


def make_network(block, **meta):
    cfg = _config(meta_block=block, item_vectors="learned").model_copy(update={"meta": MetaConfig(**meta)})
    return _randomise(build_network(cfg, DIMS))


def embedded(network, rows, **steps):
    return embed_tasks(network, "user", rows, torch.zeros(rows.num_tasks, dtype=torch.long), **steps)


@pytest.fixture
def rows():
    return replace(_rows(real=[3, 4]), label_TR=torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]))


def test_the_embedding_is_the_prior_and_a_shrunk_mean_over_rows(rows):
    network = make_network("set")
    block, state = network.block("user"), network.global_block.encode(rows)
    x_RI = torch.cat([rows.dense[0, :3], state.vectors["user"][0, :3, :-1], rows.label_TR[0, :3, None]], dim=1)
    hidden_RH = torch.relu(x_RI @ block.mlp["weight0"] + block.mlp["bias0"])
    rows_RD = hidden_RH @ block.mlp["weight1"] + block.mlp["bias1"]
    expected = network.priors()["user"] + rows_RD.sum(dim=0) / (3 + 10)
    torch.testing.assert_close(embedded(network, rows)[0], expected.detach())


@pytest.mark.parametrize("inner_step", ["gradient", "newton"])
def test_it_takes_no_step_however_many_are_configured(rows, inner_step):
    network = make_network("set", inner_steps=5, inner_step=inner_step)
    first = embedded(network, rows, num_steps=0)
    assert torch.equal(embedded(network, rows), first)
    assert torch.equal(embedded(network, rows, num_steps=3), first)


def test_the_order_of_rows_does_not_count(rows):
    network, order = make_network("set"), torch.tensor([2, 0, 1, 3])
    moved = replace(rows, **{name: getattr(rows, name)[:, order] for name in rows.__dataclass_fields__})
    torch.testing.assert_close(embedded(network, moved), embedded(network, rows))
    flipped = replace(rows, label_TR=1 - rows.label_TR)
    assert not torch.allclose(embedded(network, flipped), embedded(network, rows))


def test_the_hybrid_starts_where_the_set_ends_and_goes_on(rows):
    """At the labels' side: its first step lowers the support's loss."""
    encoder, hybrid = make_network("set"), make_network("hybrid", inner_lr=0.1, factor_inner_lr=0.1)
    weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("inner_steps")}
    hybrid.load_state_dict(weights, strict=False)
    start = embedded(encoder, rows)
    assert torch.equal(embedded(hybrid, rows, num_steps=0), start)
    losses = []
    for num_steps in range(4):
        logits = hybrid(rows, {"user": embedded(hybrid, rows, num_steps=num_steps)}).detach()
        loss_TR = torch.nn.functional.binary_cross_entropy_with_logits(logits, rows.label_TR, reduction="none")
        losses.append((loss_TR * rows.mask_TR).sum().item())
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[0] - 1e-3
