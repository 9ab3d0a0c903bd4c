"""How wide Newton's prior is, and how many rows the prior counts as, is what validates best."""

import pytest
import torch

from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network, build_network
from limaml.training import shrinkage

DIMS = EncoderDims(num_items=5, num_entities=4, item_dense=3, user_dense=2, context=3, item_static=2)


def make_network(inner_step: str = "newton", block: str = "task_vector") -> Network:
    model = {"meta_block": block, "embedding_dim": 3, "meta_hidden": (4,)}
    cfg = {"source": {"kind": "synthetic"}, "model": model, "meta": {"inner_step": inner_step, "prior_std": 0.8}}
    return build_network(Config.model_validate(cfg), DIMS)


def widths(network: Network) -> dict[str, float]:
    step = network.step("user")
    assert isinstance(step, NewtonStep)
    return {name: float(step.log_std[name].detach().exp()) for name in step.names}


@pytest.mark.parametrize(("best", "expected"), [(0.8, 1.0), (0.2, 0.25), (0.0, 0.01)])
def test_each_tensor_gets_the_factor_that_validates_best(best, expected):
    """The value falls with the distance of the factors' width from `best`; the level's is best as it is."""
    network = make_network()

    def value() -> float:
        found = widths(network)
        return -abs(found["factors"] - best) - abs(found["level"] - 0.8)

    chosen = shrinkage.choose(network, value)
    assert chosen == {"user.factors": expected, "user.level": 1.0}
    assert widths(network) == pytest.approx({"factors": 0.8 * expected, "level": 0.8})


def test_it_stops_at_the_first_that_is_no_better():
    network, seen = make_network(), []

    def value() -> float:
        seen.append(widths(network)["factors"])
        return 0.0

    assert set(shrinkage.choose(network, value).values()) == {1.0}
    assert seen == pytest.approx([0.8, 0.4, 0.8])


def test_many_tensors_share_a_factor():
    network = make_network(block="row_mlp")
    chosen = shrinkage.choose(network, lambda: -sum(widths(network).values()))
    assert set(chosen) == {f"user.{name}" for name in ("weight0", "bias0", "weight1", "bias1")}
    assert set(chosen.values()) == {0.01}


def test_the_same_factors_apply_to_another_network():
    twin, refit = make_network(), make_network()
    shrinkage.apply(refit, shrinkage.choose(twin, lambda: -widths(twin)["level"]))
    assert widths(refit) == pytest.approx(widths(twin))
    assert widths(refit)["level"] == pytest.approx(0.008)


def test_a_gradients_step_has_no_prior_and_is_not_validated_again():
    network = make_network("gradient")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert shrinkage.choose(network, lambda: pytest.fail("asked for a value")) == {}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def rows_of(network: Network) -> list[float]:
    return network.prior_rows("user").tolist()


@pytest.mark.parametrize(("best", "expected"), [(0.0, 0.0), (5.0, 5.0), (100.0, 40.0)])
def test_the_priors_rows_are_those_that_validate_best(best, expected):
    network = make_network()
    chosen = shrinkage.choose_prior_rows(network, lambda: -abs(rows_of(network)[0] - best) - rows_of(network)[-1])
    assert chosen == {"user.level": 0.0, "user.factors": expected}
    assert rows_of(network) == [expected, expected, 0.0]


def test_more_rows_are_taken_where_they_cost_next_to_nothing():
    """Each row of the level costs a twentieth of what may be lost: 20 rows are taken, 40 are not."""
    network, a_row = make_network(), shrinkage.PRIOR_ROWS_MAY_COST / 20.5
    chosen = shrinkage.choose_prior_rows(network, lambda: -a_row * rows_of(network)[-1] - rows_of(network)[0])
    assert chosen == {"user.level": 20.0, "user.factors": 0.0}


def test_each_part_may_cost_as_much_of_its_own():
    """Ten rows of the level cost what may be lost, and ten rows of the factors once more."""
    network, a_row = make_network(), shrinkage.PRIOR_ROWS_MAY_COST / 10.5
    chosen = shrinkage.choose_prior_rows(network, lambda: -a_row * (rows_of(network)[-1] + rows_of(network)[0]))
    assert chosen == {"user.level": 10.0, "user.factors": 10.0}


def test_without_a_product_an_embedding_has_one_share_and_without_a_value_none():
    model = {"meta_block": "row_mlp", "interaction": "concat", "embedding_dim": 3, "meta_hidden": (4,)}
    network = build_network(Config.model_validate({"source": {"kind": "synthetic"}, "model": model}), DIMS)
    assert shrinkage.choose_prior_rows(network, lambda: float("nan")) == {"user.embedding": 0.0}
    shrinkage.apply_prior_rows(network, {"user.embedding": 5.0})
    assert rows_of(network) == [5.0] * 3


def test_what_few_rows_say_counts_for_less():
    """A number of an embedding by its own c, a full support of 64 rows as it is; without c all of it bit for bit."""
    network = make_network()
    embedding_TD = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rows_T = torch.tensor([0.0, 1.0, 5.0, 64.0])
    assert torch.equal(network.held_back("user", embedding_TD, rows_T), embedding_TD)
    shrinkage.apply_prior_rows(network, {"user.factors": 5.0})
    prior_D, found = network.block("user").prior().detach(), network.held_back("user", embedding_TD, rows_T)
    for task, share in enumerate((0.0, 1 / 6 * 69 / 64, 0.5 * 69 / 64, 1.0)):
        wanted = prior_D[:-1] + share * (embedding_TD[task, :-1] - prior_D[:-1])
        torch.testing.assert_close(found[task, :-1], wanted)
    assert torch.equal(found[:, -1], embedding_TD[:, -1])
