"""What is timed is what ships, and peers compute it: gradients against limaml's, which tests/numerics holds to account."""

from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.engine_peers import check_gradients
from benchmarks.formula import Formula, rows_of
from benchmarks.options import BenchmarkError
from benchmarks.peers import torch_func
from benchmarks.work import DIMS, ROWS, TASK_ROWS, limaml_gradients, make_work
from limaml import config

# The same sums in another order, float64; fixed rates are stored in float32, as logarithms.
EXACT = 1e-8
CASES = [(row, steps) for row in ROWS for steps in (0, 1, 3)]


def error(found, wanted):
    assert set(found) == set(wanted)
    zero = {name: torch.zeros_like(g) for name, g in found.items()}
    wanted = {name: zero[name] if g is None else g for name, g in wanted.items()}
    return max(float((found[name] - wanted[name]).norm() / max(wanted[name].norm(), 1e-12)) for name in wanted)


@pytest.mark.parametrize(("row", "steps"), CASES)
def test_torch_func_computes_what_ships(row, steps):
    work = make_work(row, 3, torch.float64)
    compared, timed = torch_func.prepare(work, steps)
    assert error(compared(), limaml_gradients(work, steps)) < EXACT
    # Its own masks make another gradient.
    assert error(timed(), limaml_gradients(work, steps)) > 1e-3


@pytest.mark.parametrize("row", ROWS)
def test_what_a_library_needs_that_adapts_a_module_is_the_same_loss(row):
    """One step by hand through `support_loss`, `sizes`, `embed` and `query_loss`, as learn2learn's peer calls them."""
    work = make_work(row, 2, torch.float64)
    formula, (support, query) = Formula(torch_func.TORCH, work), rows_of(work)
    trained, frozen = work.weights
    weights = trained | frozen
    losses = []
    for task in range(2):
        rows, asked = ({name: value[task] for name, value in side.items()} for side in (support, query))
        state, sizes = formula.read(weights, rows), formula.sizes(weights, rows)
        theta = {name: weights[name] for name in formula.adapted}
        gradients = torch.func.grad(partial(_support_loss, formula, weights, rows, state))(theta)
        phi = {name: p - sizes[name] * gradients[name] for name, p in theta.items()}
        embedding_D = formula.embed(weights | phi, rows, state)
        losses.append(formula.query_loss(weights, asked, embedding_D, [mask[task] for mask in work.keep]))
    whole = torch.func.vmap(partial(formula.task_loss, weights, 1))(support, query, work.keep)
    torch.testing.assert_close(torch.stack(losses), whole, rtol=1e-12, atol=0.0)


def _support_loss(formula, weights, rows, state, phi):
    return formula.support_loss(weights | phi, rows, state)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_its_configuration(row):
    path, settings = ROWS[row]
    work = make_work(row, 2)
    assert work.cfg == config.load(path, settings)
    assert work.network.dims == DIMS
    assert work.batch.support.dense.shape == work.batch.query.dense.shape == (2, TASK_ROWS, DIMS.num_features)
    assert [tuple(mask.shape) for mask in work.keep] == [(2, TASK_ROWS, width) for width in work.cfg.model.global_hidden]
    trained, frozen = work.weights
    assert set(trained) | set(frozen) == set(dict(work.network.named_parameters()))
    assert any("log_rates" in name for name in (trained if work.cfg.meta.learn_inner_lr else frozen))


def test_the_work_is_a_function_of_its_arguments():
    first, again = make_work("paper", 2), make_work("paper", 2)
    for name, weight in first.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name])
    assert torch.equal(first.batch.query.dense, again.batch.query.dense)
    assert torch.equal(first.keep[0], again.keep[0])


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_gradient_that_differs_is_an_error(wrong):
    ours = {"vector": torch.ones(3), "bias": torch.ones(2), "unread": None}
    theirs = {"vector": np.ones(3), "bias": np.ones(2), "unread": np.zeros(4)}
    assert check_gradients(ours, theirs, "here") == 0.0
    with pytest.raises(BenchmarkError, match=r"here: gradient of bias must equal ours to 1e-06, got"):
        check_gradients(ours, theirs | {"bias": np.ones(2) + wrong}, "here")
    with pytest.raises(BenchmarkError, match=r"here: gradient of unread must equal ours"):
        check_gradients(ours, theirs | {"unread": np.ones(4)}, "here")
    with pytest.raises(BenchmarkError, match="must be of"):
        check_gradients(ours, {"vector": torch.ones(3)}, "here")
