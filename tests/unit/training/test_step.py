import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from limaml.errors import TrainingError
from limaml.features.encoder import Encoder
from limaml.meta.engine import outer_loss
from limaml.models.network import build_network
from limaml.tasks.sampling import TaskRows, build_batch, meta_batch, sample_tasks
from limaml.training.optimizer import averaged_copy, make_optimizer, set_learning_rate, update_average
from limaml.training.step import Workers, backward, outer_step
from limaml.training.twin_and_refit import network_objective

_spec = importlib.util.spec_from_file_location("gradient_of_worker", Path(__file__).with_name("gradient_of_worker.py"))
worker_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker_script)


@pytest.fixture
def fitted(planted_logged, small_config):
    # Dropout masks are drawn by each worker for its own tasks; without it the gradient is the same sum in another order.
    cfg = small_config(
        model={"embedding_dim": 4, "global_hidden": [16], "dropout": 0.0}, training={"outer_lr": 0.01, "max_steps": 40}
    )
    encoder = Encoder.fit(planted_logged, cfg)
    return cfg, encoder, TaskRows.from_logged(planted_logged, encoder, cfg.task_kind)


@pytest.mark.parametrize("size", [2, 4])
def test_workers_divide_the_tasks_of_one_and_get_its_gradient(fitted, planted_logged, tmp_path, size):
    cfg, _, _ = fitted
    tasks, flat, loss = worker_script.gradient(cfg, planted_logged, Workers())
    assert len(tasks) == cfg.training.tasks_per_step
    (tmp_path / "config.json").write_text(cfg.model_dump_json())
    pq.write_table(planted_logged, tmp_path / "logged.parquet")
    commands = [[sys.executable, worker_script.__file__, str(rank), str(size), str(tmp_path)] for rank in range(size)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for rank, (mine, theirs, their_loss) in enumerate(found):
        assert mine == tasks[rank::size]
        # float64 sums in another order: 1e-12 is far above rounding, far below any re-weighting of a task.
        assert theirs == pytest.approx(flat, abs=1e-12, rel=0)
        assert their_loss == pytest.approx(loss, abs=1e-12, rel=0)
    assert max(map(abs, flat)) > 1e-3


@pytest.mark.parametrize("pass_rows", [0, 40, 10**9])
def test_the_gradient_of_an_epoch_does_not_depend_on_how_tasks_are_grouped(fitted, monkeypatch, pass_rows):
    """Every task of every meta-batch has the same weight, however long: each step's gradient is the unpadded tasks' mean."""
    cfg, encoder, rows = fitted
    monkeypatch.setattr("limaml.tasks.sampling._PASS_ROWS", pass_rows)
    network = build_network(cfg, encoder.dims, seed=1).double()
    parameters = [p for p in network.parameters() if p.requires_grad]
    epoch = [torch.zeros_like(p) for p in parameters]
    expected = [torch.zeros_like(p) for p in parameters]
    sizes = set()
    for step in range(5):
        network.zero_grad()
        backward(network, network_objective(network, rows, cfg, Workers()), cfg.training, step, Workers())
        specs = meta_batch(rows, cfg, seed=cfg.training.seed, step=step)
        sizes |= {spec.support_size for spec in specs}
        for spec in specs:
            alone = outer_loss(network, build_batch(rows, [spec]).to(dtype=torch.float64)).loss
            gradients = torch.autograd.grad(alone, parameters, allow_unused=True)
            for total, gradient in zip(expected, gradients, strict=True):
                total += 0 if gradient is None else gradient / len(specs)
        for total, p in zip(epoch, parameters, strict=True):
            total += p.grad
    assert len(sizes) > 5
    for found, wanted in zip(epoch, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_steps_lower_the_loss_and_repeat_exactly(fitted):
    cfg, encoder, rows = fitted
    fixed = build_batch(rows, sample_tasks(rows, cfg, np.random.default_rng(0), 200))
    runs = []
    for _ in range(2):
        network = build_network(cfg, encoder.dims, seed=1)
        optimizer = make_optimizer(network, cfg.training)
        before = float(outer_loss(network, fixed).loss.detach())
        objective = network_objective(network, rows, cfg, Workers())
        losses = [outer_step(network, optimizer, objective, cfg.training, step, Workers()) for step in range(40)]
        runs.append((losses, before, float(outer_loss(network, fixed).loss.detach())))
    assert runs[0] == runs[1]
    assert runs[0][2] < runs[0][1] - 0.01


def test_a_loss_that_is_not_finite_stops_and_names_step_and_tasks(fitted):
    cfg, encoder, rows = fitted
    network = build_network(cfg, encoder.dims, seed=1)
    optimizer = make_optimizer(network, cfg.training)
    before = [p.detach().clone() for p in network.parameters()]
    broken = rows.entities[meta_batch(rows, cfg, seed=0, step=4)[0].entity]
    for spec in meta_batch(rows, cfg, seed=0, step=4):
        if rows.entities[spec.entity] == broken:
            rows.encoded.item_dense.own[spec.query] = math.nan
    with pytest.raises(TrainingError, match=rf"got loss nan .* at step 4 \(tasks {broken}[,)]") as caught:
        outer_step(network, optimizer, network_objective(network, rows, cfg, Workers()), cfg.training, 4, Workers())
    assert "lower meta.inner_lr" in str(caught.value)
    for p, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)


def test_matrices_are_decayed_vectors_are_not_and_inner_rates_move_slowly(fitted):
    cfg, encoder, _ = fitted
    network = build_network(cfg, encoder.dims)
    groups = make_optimizer(network, cfg.training).param_groups
    assert [group["weight_decay"] for group in groups] == [cfg.training.weight_decay, 0.0, 0.0]
    assert [group["scale"] for group in groups] == [1.0, 1.0, cfg.training.inner_lr_scale]
    assert {p.ndim > 1 for p in groups[0]["params"]} == {True}
    assert {p.ndim > 1 for p in groups[1]["params"]} == {False}
    inner = {id(p) for name, p in network.named_parameters() if ".log_" in name}
    assert {id(p) for p in groups[2]["params"]} == inner
    trained = [p for p in network.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_the_rate_rises_then_falls_to_a_twentieth(fitted):
    cfg, encoder, _ = fitted
    optimizer = make_optimizer(build_network(cfg, encoder.dims), cfg.training)
    rates = []
    for step in range(201):
        set_learning_rate(optimizer, cfg.training, step, 200)
        rates.append([group["lr"] for group in optimizer.param_groups])
    top, warm = cfg.training.outer_lr, cfg.training.warmup_steps
    assert rates[0][0] == pytest.approx(top / warm)
    assert max(rates)[0] == rates[warm - 1][0] == pytest.approx(top, rel=0.03)
    assert rates[200][0] == pytest.approx(0.05 * top)
    assert rates[100][0] == pytest.approx(top * (0.05 + 0.95 / 2))
    assert all(rate[2] == pytest.approx(cfg.training.inner_lr_scale * rate[0]) for rate in rates)


def test_the_average_equals_its_plain_sum(fitted):
    cfg, encoder, _ = fitted
    network = build_network(cfg, encoder.dims).double()
    average = averaged_copy(network)
    expected = network.block("user").vector.detach().clone()
    for step in range(30):
        with torch.no_grad():
            network.block("user").vector.add_(step)
        update_average(average, network, cfg.training, step)
        decay = min(0.99, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * network.block("user").vector.detach()
    torch.testing.assert_close(average.block("user").vector, expected)
    assert not any(p.requires_grad for p in average.parameters())
