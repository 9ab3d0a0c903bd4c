"""Meta blocks, the global block and the joined network: shapes, priors, what each part reads, and repeatable weights."""

from dataclasses import replace

import pytest
import torch

from limaml.config import Config, MetaConfig
from limaml.errors import ConfigError
from limaml.features.encoder import EncoderDims
from limaml.models.network import build_network
from limaml.tasks.rows import Rows

DIMS = EncoderDims(num_items=5, num_entities=4, item_dense=3, user_dense=2, context=3, item_static=2, item_sets=2)
BLOCKS = ("task_vector", "id_mlp", "row_mlp")


def _config(**model):
    values = {"embedding_dim": 3, "id_dim": 2, "meta_hidden": (4,), "global_hidden": (6, 4)} | model
    return Config.model_validate({"source": {"kind": "synthetic"}, "model": values})


def _rows(num_tasks=2, width=4, real=None):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(num_tasks, width) if real is None else (torch.arange(width)[None] < torch.tensor(real)[:, None]).float()
    return Rows(
        item_index_TR=torch.randint(1, 6, (num_tasks, width), generator=generator),
        item_dense_TRF=torch.randn(num_tasks, width, 3, generator=generator),
        user_dense_TRF=torch.randn(num_tasks, width, 2, generator=generator),
        context_TRF=torch.randn(num_tasks, width, 3, generator=generator),
        mask_TR=mask,
        gap_s_TR=torch.rand(num_tasks, width, generator=generator) * 1e6,
    )


def _randomise(network):
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    return network


def _embed(network, entity_index, rows):
    """Embeddings before any inner step."""
    return network.meta.start(entity_index, rows, network.step_sizes(rows.mask_TR.sum(dim=1))).embed()


@pytest.mark.parametrize("block", BLOCKS)
def test_embedding_of_an_empty_support_is_the_prior(block):
    """For every task, whatever stands in its padding; an entity unseen in training for the ID block."""
    network = _randomise(build_network(_config(meta_block=block), DIMS))
    unknown = torch.zeros(2, dtype=torch.long)
    embedding = _embed(network, unknown, _rows(real=[0, 0]))
    assert embedding.shape == (2, 3)
    assert network.prior().shape == (3,)
    torch.testing.assert_close(embedding, network.prior().expand(2, 3))
    assert network.prior().abs().min() > 0


@pytest.mark.parametrize("block", BLOCKS)
def test_rates_have_the_shape_of_one_tasks_parameters(block):
    network = build_network(_config(meta_block=block), DIMS)
    rows = _rows()
    adapted = network.meta.start(torch.tensor([1, 2]), rows, network.step_sizes(rows.mask_TR.sum(dim=1)))
    moves = adapted.pull(torch.ones_like(adapted.embed()))
    adapted.move(moves)
    assert adapted.embed().shape == (2, 3)
    assert len(moves) == {"task_vector": 1, "id_mlp": 3, "row_mlp": 2}[block]
    assert sum(rate.numel() for rate in network.rates().values()) == sum(
        p.numel() // (len(p) if name.endswith("table") else 1)
        for name, p in network.meta.named_parameters()
        if not name.endswith("empty")
    )


def test_one_step_size_for_all_weights_is_kept_as_one_number():
    """A Gram matrix can then stand for a task's own weights; sizes that are learned keep one number a weight."""
    meta = {"learn_inner_lr": False, "learn_damping": False}
    for learned, shape in ((meta, (2, 1, 1)), ({}, (2, 9, 4))):
        network = build_network(_config(meta_block="row_mlp").model_copy(update={"meta": MetaConfig(**learned)}), DIMS)
        assert network.step_sizes(torch.tensor([1.0, 2.0]))["weight0"].shape == shape


def test_a_step_is_the_rate_over_the_damped_number_of_rows():
    """The task vector's factors start with a rate and a damping of their own; every other parameter with the common ones."""
    meta = {"inner_lr": 2.0, "damping": 4.0, "factor_inner_lr": 30.0, "factor_damping": 100.0}
    for block in BLOCKS:
        network = build_network(_config(meta_block=block).model_copy(update={"meta": MetaConfig(**meta)}), DIMS)
        for name, size in network.step_sizes(torch.tensor([0.0, 1.0, 20.0])).items():
            empty, one, many = (torch.full(size.shape[1:], value) for value in (0.0, 2 / 5, 2 / 24))
            expected = torch.stack([empty, one, many])
            if name == "vector":
                expected[:, :2] = torch.tensor([[0.0], [30 / 101], [30 / 120]])
            torch.testing.assert_close(size, expected)


def test_the_id_block_reads_the_entitys_own_row():
    network = build_network(_config(meta_block="id_mlp"), DIMS)
    embedding = _embed(network, torch.tensor([3, 0, 3]), _rows(num_tasks=3))
    assert not torch.allclose(embedding[0], embedding[1])
    torch.testing.assert_close(embedding[0], embedding[2])
    torch.testing.assert_close(embedding[1], network.prior())


def test_the_row_block_averages_real_rows():
    network = _randomise(build_network(_config(meta_block="row_mlp"), DIMS))
    entity, rows = torch.tensor([1, 1]), _rows(real=[2, 4])
    embedding = _embed(network, entity, rows)
    cut = {name: value[:, :2] for name in rows.__dataclass_fields__ if (value := getattr(rows, name)) is not None}
    torch.testing.assert_close(embedding[0], _embed(network, entity, replace(rows, **cut))[0])


@pytest.mark.parametrize("row_age", [True, False])
def test_the_row_block_reads_the_rows_age_if_told_to(row_age):
    network = _randomise(build_network(_config(meta_block="row_mlp", row_age=row_age), DIMS))
    entity, rows = torch.tensor([1, 1]), _rows()
    older = replace(rows, gap_s_TR=rows.gap_s_TR + 30 * 86_400)
    assert torch.allclose(_embed(network, entity, rows), _embed(network, entity, older)) != row_age


@pytest.mark.parametrize("interaction", ["product", "concat", "both"])
def test_scores_follow_every_input(interaction):
    network = _randomise(build_network(_config(interaction=interaction), DIMS))
    rows, embedding = _rows(), torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    logits = network(rows, embedding)
    assert logits.shape == (2, 4)
    for name in ("item_dense_TRF", "user_dense_TRF", "context_TRF"):
        assert not torch.allclose(network(replace(rows, **{name: getattr(rows, name) + 1.0}), embedding), logits), name
    anonymous = network(replace(rows, item_index_TR=torch.zeros(2, 4, dtype=torch.long)), embedding)
    assert torch.allclose(anonymous, logits) == (interaction == "concat")
    assert not torch.allclose(network(rows, embedding + 1.0), logits)


def test_the_last_entry_shifts_all_items_alike_and_the_others_can_change_a_ranking():
    network = _randomise(build_network(_config(), DIMS))
    rows, zero = _rows(num_tasks=1), torch.zeros(1, 3)
    spread = []
    for entry in range(3):
        shift = network(rows, zero.index_fill(1, torch.tensor([entry]), 1.0)) - network(rows, zero)
        spread.append((shift.max() - shift.min()).item())
    # float32 leaves about 1e-6 of a difference of two logits of the order of 1.
    assert spread[2] < 1e-5
    assert min(spread[:2]) > 1e-2


def test_an_unknown_item_gets_its_vector_from_its_genres():
    """Two new items of the same genres score alike however they are told apart; of other genres they do not."""
    network = _randomise(build_network(_config(), DIMS))
    rows, embedding = replace(_rows(num_tasks=1, width=2), item_index_TR=torch.zeros(1, 2, dtype=torch.long)), torch.ones(1, 3)
    vectors = network.global_block.encode(rows).item_TRK[0]
    expected = rows.item_dense_TRF[0, :, :2] @ network.global_block.content + network.global_block.unknown_item
    torch.testing.assert_close(vectors, expected)
    known = replace(rows, item_index_TR=torch.tensor([[2, 5]]))
    torch.testing.assert_close(network.global_block.encode(known).item_TRK[0], network.global_block.item[[2, 5]])
    assert not torch.allclose(network(rows, embedding), network(known, embedding))


@pytest.mark.parametrize(("item_vectors", "trained"), [("fitted", False), ("learned", True)])
def test_fitted_item_vectors_stay_as_they_are(item_vectors, trained):
    network = build_network(_config(item_vectors=item_vectors), DIMS)
    network(_rows(), torch.ones(2, 3)).sum().backward()
    assert network.global_block.item.requires_grad == trained
    assert network.global_block.content.requires_grad == trained
    assert network.global_block.unknown_item.requires_grad


def test_dropout_only_where_a_generator_is_given_and_repeatably():
    network = build_network(_config(dropout=0.5), DIMS)
    rows, embedding = _rows(), torch.ones(2, 3)
    plain = network(rows, embedding)
    dropped = [network(rows, embedding, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(plain, network(rows, embedding))
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    assert not torch.equal(dropped[0], plain)


def test_dropout_keeps_the_mean():
    """Of the last hidden layer, which the logit is linear in."""
    network = build_network(_config(dropout=0.5, global_hidden=(6,)), DIMS)
    rows, generator = _rows(num_tasks=1, width=1), torch.Generator().manual_seed(0)
    plain = network(rows, torch.zeros(1, 3))
    draws = torch.stack([network(rows, torch.zeros(1, 3), generator) for _ in range(4000)])
    # Five standard errors of 4,000 draws.
    assert (draws.mean() - plain).abs().item() < 5 * draws.std().item() / 4000**0.5
    assert draws.std() > 0.01


def test_weights_are_a_function_of_the_seed_and_leave_the_callers_randomness_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    networks = [build_network(_config(meta_block="id_mlp"), DIMS, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["meta.table"], states[2]["meta.table"])


def test_several_task_kinds_are_refused_by_name():
    kinds = [{"name": "user"}, {"name": "item", "entity_column": "item_id"}]
    cfg = Config.model_validate({"source": {"kind": "synthetic"}, "task_kinds": kinds})
    with pytest.raises(ConfigError, match=r"task_kinds must hold one kind for now, got \['user', 'item'\]"):
        build_network(cfg, DIMS)


@pytest.mark.parametrize("interaction", ["concat", "both"])
def test_an_embedding_beside_the_features_needs_a_hidden_layer(interaction):
    with pytest.raises(ValueError, match=rf"at least one width where interaction is {interaction}, got none"):
        _config(interaction=interaction, global_hidden=())


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"damping": 0.0}, "damping and factor_damping must be > 0 where their logarithm is learned"),
        ({"day_boundary_probability": 0.7, "zero_support_probability": 0.7}, "must be <= 1, got 1.4"),
    ],
)
def test_settings_of_the_inner_loop_that_cannot_work_are_refused(meta, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"source": {"kind": "synthetic"}, "meta": meta})
