"""Meta blocks, the global block and the joined network: shapes, priors, what each part reads, and repeatable weights."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from limaml.config import Config, MetaConfig
from limaml.features.encoder import EncoderDims
from limaml.meta.engine import embed_tasks
from limaml.models import blocks
from limaml.models.inner_step import NewtonStep
from limaml.models.network import build_network
from limaml.tasks.rows import Rows

DIMS = EncoderDims(num_items=5, num_entities=4, item_dense=3, user_dense=2, context=3, item_static=2, item_sets=2)
BLOCKS = ("task_vector", "posterior", "id_mlp", "row_mlp", "sequence", "set", "hybrid")


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


def _embed(network, entity_index, rows, **steps):
    """Embeddings before any inner step, of rows whose labels alternate."""
    rows = replace(rows, label_TR=(torch.arange(rows.mask_TR.shape[1]) % 2).float().expand_as(rows.mask_TR))
    return embed_tasks(network, "user", rows, entity_index, **({"num_steps": 0} | steps))


def _prior(network):
    return network.priors()["user"].detach()


@pytest.mark.parametrize("block", BLOCKS)
def test_embedding_of_an_empty_support_is_the_prior(block):
    """For every task, whatever stands in its padding; an entity unseen in training for the ID block."""
    network = _randomise(build_network(_config(meta_block=block), DIMS))
    unknown = torch.zeros(2, dtype=torch.long)
    embedding = _embed(network, unknown, _rows(real=[0, 0]))
    assert embedding.shape == (2, 3)
    assert _prior(network).shape == (3,)
    torch.testing.assert_close(embedding, _prior(network).expand(2, 3))
    assert _prior(network).abs().min() > 0
    torch.testing.assert_close(_embed(network, unknown, _rows(real=[0, 0]), num_steps=3), embedding)


def test_every_block_that_a_configuration_can_name_is_tested():
    assert set(BLOCKS) == set(blocks.BLOCKS)


def test_a_block_that_nobody_wrote_is_refused_by_name():
    with pytest.raises(ValidationError, match=r"model\.meta_block\n.*must be one of \['task_vector', .*\]; correct it"):
        _config(meta_block="oracle")


@pytest.mark.parametrize("inner_step", ["gradient", "newton"])
@pytest.mark.parametrize("block", BLOCKS)
def test_rates_have_the_shape_of_one_tasks_parameters(block, inner_step):
    cfg = _config(meta_block=block).model_copy(update={"meta": MetaConfig(inner_step=inner_step)})
    network = build_network(cfg, DIMS)
    step = network.step("user")
    assert isinstance(step, NewtonStep) == (inner_step == "newton" or block == "posterior")
    shapes = {
        "id_mlp": {"id": (2,), "weight0": (2, 4), "bias0": (4,), "weight1": (4, 3), "bias1": (3,)},
        "row_mlp": {"weight0": (9, 4), "bias0": (4,), "weight1": (4, 3), "bias1": (3,)},
        "sequence": {"bias": (3,), "weight": (32, 3)},
    }
    expected = shapes.get(block, {"factors": (2,), "level": (1,)})
    assert {name: tuple(rate.shape) for name, rate in step.log_rates.items()} == expected
    if isinstance(step, NewtonStep):
        assert {name: tuple(std.shape) for name, std in step.log_std.items()} == dict.fromkeys(expected, ())


def test_a_step_is_the_rate_over_the_damped_number_of_rows():
    """The task vector's factors start with a rate and a damping of their own; every other parameter with the common ones."""
    meta = {"inner_step": "gradient", "inner_lr": 2.0, "damping": 4.0, "factor_inner_lr": 30.0, "factor_damping": 100.0}
    for block in ("task_vector", "id_mlp", "row_mlp", "sequence", "hybrid"):
        network = build_network(_config(meta_block=block).model_copy(update={"meta": MetaConfig(**meta)}), DIMS)
        for count in (0.0, 1.0, 20.0):
            for name, size in network.step("user").sizes(torch.tensor(count)).items():
                rate, damping = (30.0, 100.0) if name == "factors" else (2.0, 4.0)
                torch.testing.assert_close(size, torch.full(size.shape, rate / (count + damping)))


@pytest.mark.parametrize("learned", [True, False])
def test_what_an_inner_loop_learns_is_learned_if_so_configured(learned):
    for inner_step in ("gradient", "newton"):
        meta = MetaConfig(inner_step=inner_step, learn_inner_lr=learned, learn_damping=not learned)
        step = build_network(_config().model_copy(update={"meta": meta}), DIMS).step("user")
        of_rates = [p.requires_grad for name, p in step.named_parameters() if "log_rates" in name]
        others = [p.requires_grad for name, p in step.named_parameters() if "log_rates" not in name]
        assert (of_rates, others) == ([learned] * 2, [not learned] * 2)


def test_the_prior_of_newtons_step_is_as_wide_as_it_moves_logits():
    network = build_network(_config(meta_block="posterior").model_copy(update={"meta": MetaConfig(prior_std=0.6)}), DIMS)
    step = network.step("user")
    step.put_gains({"factors": torch.tensor(4.0), "level": torch.tensor(0.0)})
    # A gain of 0 is one that nothing could be measured of.
    for name, expected in (("factors", 0.3), ("level", 0.6)):
        torch.testing.assert_close(step.scales()[name], torch.tensor(expected))
    assert {name for name in network.state_dict() if "gain" in name} == {
        "inner_steps.user.gain_factors",
        "inner_steps.user.gain_level",
    }


def test_the_id_block_reads_the_entitys_own_row():
    network = build_network(_config(meta_block="id_mlp"), DIMS)
    embedding = _embed(network, torch.tensor([3, 0, 3]), _rows(num_tasks=3))
    assert not torch.allclose(embedding[0], embedding[1])
    torch.testing.assert_close(embedding[0], embedding[2])
    torch.testing.assert_close(embedding[1], _prior(network))


@pytest.mark.parametrize("block", ["row_mlp", "set"])
def test_a_pooled_embedding_is_of_real_rows_in_any_order(block):
    network = _randomise(build_network(_config(meta_block=block), DIMS))
    entity, rows = torch.tensor([1, 1]), _rows(real=[2, 4])
    embedding = _embed(network, entity, rows)
    cut = {name: value[:, :2] for name in rows.__dataclass_fields__ if (value := getattr(rows, name)) is not None}
    torch.testing.assert_close(embedding[0], _embed(network, entity, replace(rows, **cut))[0])
    # Labels alternate: rows change places with those of the same label.
    order = torch.tensor([2, 3, 0, 1])
    moved = {name: value[:, order] for name in rows.__dataclass_fields__ if (value := getattr(rows, name)) is not None}
    torch.testing.assert_close(_embed(network, entity, replace(rows, **moved))[1], embedding[1])


@pytest.mark.parametrize("row_age", [True, False])
def test_the_row_block_reads_the_rows_age_if_told_to(row_age):
    network = _randomise(build_network(_config(meta_block="row_mlp", row_age=row_age), DIMS))
    entity, rows = torch.tensor([1, 1]), _rows()
    embedding, older = _embed(network, entity, rows), replace(rows, gap_s_TR=rows.gap_s_TR * 30)
    assert torch.allclose(embedding, _embed(network, entity, older)) != row_age
    # While no row comes, an embedding stays as it is.
    torch.testing.assert_close(_embed(network, entity, replace(rows, gap_s_TR=rows.gap_s_TR + 30 * 86_400)), embedding)


def test_the_row_block_is_the_mean_of_its_mlp():
    network = _randomise(build_network(_config(meta_block="row_mlp", row_age=True), DIMS))
    block, rows = network.block("user"), _rows(num_tasks=1)
    x_RF = torch.cat([rows.dense[0], torch.log1p((rows.gap_s_TR[0] - rows.gap_s_TR[0].min()) / 86_400)[:, None]], dim=1)
    hidden_RH = torch.relu(x_RF @ block.mlp["weight0"] + block.mlp["bias0"])
    expected = (hidden_RH @ block.mlp["weight1"] + block.mlp["bias1"]).mean(dim=0)
    torch.testing.assert_close(_embed(network, torch.tensor([1]), rows)[0], expected.detach())


@pytest.mark.parametrize("interaction", ["product", "concat", "both"])
def test_scores_follow_every_input(interaction):
    network = _randomise(build_network(_config(interaction=interaction), DIMS))
    rows, embedding = _rows(), torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    logits = network(rows, {"user": embedding})
    assert logits.shape == (2, 4)
    for name in ("item_dense_TRF", "user_dense_TRF", "context_TRF"):
        assert not torch.allclose(network(replace(rows, **{name: getattr(rows, name) + 1.0}), {"user": embedding}), logits), (
            name
        )
    anonymous = network(replace(rows, item_index_TR=torch.zeros(2, 4, dtype=torch.long)), {"user": embedding})
    assert torch.allclose(anonymous, logits) == (interaction == "concat")
    assert not torch.allclose(network(rows, {"user": embedding + 1.0}), logits)


def test_the_last_entry_shifts_all_items_alike_and_the_others_can_change_a_ranking():
    network = _randomise(build_network(_config(), DIMS))
    rows, zero = _rows(num_tasks=1), torch.zeros(1, 3)
    spread = []
    for entry in range(3):
        shift = network(rows, {"user": zero.index_fill(1, torch.tensor([entry]), 1.0)}) - network(rows, {"user": zero})
        spread.append((shift.max() - shift.min()).item())
    # float32 leaves about 1e-6 of a difference of two logits of the order of 1.
    assert spread[2] < 1e-5
    assert min(spread[:2]) > 1e-2


def test_an_unknown_item_gets_its_vector_from_its_genres():
    """Two new items of the same genres score alike however they are told apart; of other genres they do not."""
    network = _randomise(build_network(_config(), DIMS))
    rows, embedding = replace(_rows(num_tasks=1, width=2), item_index_TR=torch.zeros(1, 2, dtype=torch.long)), torch.ones(1, 3)
    vectors = network.global_block.encode(rows).vectors["user"][0, :, :-1]
    expected = rows.item_dense_TRF[0, :, :2] @ network.global_block.items.content + network.global_block.items.unknown_item
    torch.testing.assert_close(vectors, expected)
    known = replace(rows, item_index_TR=torch.tensor([[2, 5]]))
    torch.testing.assert_close(
        network.global_block.encode(known).vectors["user"][0, :, :-1], network.global_block.items.item[[2, 5]]
    )
    assert not torch.allclose(network(rows, {"user": embedding}), network(known, {"user": embedding}))


@pytest.mark.parametrize(("item_vectors", "trained"), [("fitted", False), ("learned", True)])
def test_fitted_item_vectors_stay_as_they_are(item_vectors, trained):
    network = build_network(_config(item_vectors=item_vectors), DIMS)
    network(_rows(), {"user": torch.ones(2, 3)}).sum().backward()
    assert network.global_block.items.item.requires_grad == trained
    assert network.global_block.items.content.requires_grad == trained
    assert network.global_block.items.unknown_item.requires_grad


def test_dropout_only_where_a_generator_is_given_and_repeatably():
    network = build_network(_config(dropout=0.5), DIMS)
    rows, embedding = _rows(), torch.ones(2, 3)
    plain = network(rows, {"user": embedding})
    dropped = [network(rows, {"user": embedding}, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(plain, network(rows, {"user": embedding}))
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    assert not torch.equal(dropped[0], plain)


def test_dropout_keeps_the_mean():
    """Of the last hidden layer, which the logit is linear in."""
    network = build_network(_config(dropout=0.5, global_hidden=(6,)), DIMS)
    rows, generator = _rows(num_tasks=1, width=1), torch.Generator().manual_seed(0)
    plain = network(rows, {"user": torch.zeros(1, 3)})
    draws = torch.stack([network(rows, {"user": torch.zeros(1, 3)}, generator) for _ in range(4000)])
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
    assert not torch.equal(states[0]["meta_blocks.user.table"], states[2]["meta_blocks.user.table"])


def test_several_kinds_have_the_user_s_first_and_one_kind_a_column():
    user, item = {"name": "user"}, {"name": "item", "entity_column": "item_id"}
    for kinds in ([item, user], [user, {"name": "member"}], [item, {"name": "advert", "entity_column": "item_id"}]):
        with pytest.raises(ValueError, match="must hold the kind of user_id first, and one kind a column, got"):
            Config.model_validate({"source": {"kind": "synthetic"}, "task_kinds": kinds})
    network = build_network(Config.model_validate({"source": {"kind": "synthetic"}, "task_kinds": [user, item]}), DIMS)
    assert list(network.priors()) == ["user", "item"]


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
