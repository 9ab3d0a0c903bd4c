"""What is timed computes the benchmark models: limaml's network, torch's vmap, and the modules that other peers adapt."""

import pytest
import torch

from benchmarks.engine_peers import check_gradients
from benchmarks.kinks import MARGIN, smallest_hidden
from benchmarks.options import BenchmarkError
from benchmarks.peers import modules, torch_func
from benchmarks.work import MODELS, ROWS, limaml_batch, limaml_gradients, limaml_network, make_work
from limaml.meta.engine import outer_loss

# The same sums in another order, float64.
EXACT = 1e-10
CASES = [(model, steps) for model in MODELS for steps in (0, 1, 3)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    model, steps = request.param
    return make_work(model, num_tasks=3, seed=1, dtype=torch.float64), steps


def error(found, wanted):
    assert set(found) == set(wanted)
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def test_limaml_computes_the_benchmark_model(case, plain):
    work, steps = case
    network = limaml_network(work)
    outer_loss(network, limaml_batch(work), num_steps=steps).loss.backward()
    assert error(limaml_gradients(network), plain(work, steps)) < EXACT


def test_torch_func_computes_the_benchmark_model(case, plain):
    work, steps = case
    assert error(torch_func.prepare(work, steps)(), plain(work, steps)) < EXACT


def test_the_modules_compute_the_benchmark_model(case, plain):
    work, _ = case
    problem = modules.make_problem(work)
    problem.begin()
    problem.outer_loss([problem.meta(x_SF) for x_SF in problem.support]).backward()
    assert error(problem.gradients(), plain(work, 0)) < EXACT


def test_the_modules_adapt_on_the_mean_support_loss(plain):
    """One step by hand through `support_loss`, as every library that adapts a module takes it."""
    work = make_work("reference", num_tasks=2, dtype=torch.float64)
    problem = modules.make_problem(work)
    problem.begin()
    embeddings = []
    for task, x_SF in enumerate(problem.support):
        theta = dict(problem.meta.named_parameters())
        gradients = torch.autograd.grad(problem.support_loss(task, problem.meta(x_SF)), list(theta.values()), create_graph=True)
        phi = {name: p - work.inner_lr * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        embeddings.append(torch.func.functional_call(problem.meta, phi, (x_SF,)))
    problem.outer_loss(embeddings).backward()
    assert error(problem.gradients(), plain(work, 1)) < EXACT


def test_no_task_comes_near_a_kink():
    """A task put on a kink by hand is found; what make_work draws has none."""
    work = make_work("reference", num_tasks=32)
    rows = work.support.x_TRF, work.support.label_TR, work.query.x_TRF
    assert smallest_hidden(work.weights, work.inner_lr, *rows).min() >= MARGIN
    # Moves row 0 of task 3 along a hidden unit's weights until the unit's input is 0.
    weight_F, bias = work.weights["meta.weight0"][:, 5], work.weights["meta.bias0"][5]
    x_F = work.support.x_TRF[3, 0]
    x_F -= weight_F * (x_F @ weight_F + bias) / (weight_F @ weight_F)
    found = smallest_hidden(work.weights, work.inner_lr, *rows) < MARGIN
    assert found.nonzero().flatten().tolist() == [3]


def test_the_work_is_a_function_of_its_arguments():
    first, again, other = make_work("task_vector", 2), make_work("task_vector", 2), make_work("task_vector", 2, seed=1)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert torch.equal(first.query.x_TRF, again.query.x_TRF)
    assert not torch.equal(first.query.x_TRF, other.query.x_TRF)
    assert first.support.x_TRF.shape == (2, ROWS, 60)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_gradient_that_differs_is_an_error(wrong):
    ours = {"meta.vector": torch.ones(3), "global.bias0": torch.ones(2)}
    assert check_gradients(ours, {name: value.numpy() for name, value in ours.items()}, "here") == 0.0
    with pytest.raises(BenchmarkError, match=r"here: gradient of global\.bias0 must equal ours to 0\.0001, got"):
        check_gradients(ours, ours | {"global.bias0": torch.ones(2) + wrong}, "here")
    with pytest.raises(BenchmarkError, match="must be of"):
        check_gradients(ours, {"meta.vector": torch.ones(3)}, "here")
