import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from limaml.data.encoding import Encoder
from limaml.data.tasks import TaskRows, meta_batch
from limaml.errors import TrainingError
from limaml.models.network import build_network
from limaml.training.step import Workers, make_optimizer, outer_step

_spec = importlib.util.spec_from_file_location("gradient_of_worker", Path(__file__).with_name("gradient_of_worker.py"))
worker_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker_script)


@pytest.fixture
def fitted(planted_logged, small_config):
    # Dropout masks are drawn by each worker for its own tasks; without it the gradient is the same sum in another order.
    cfg = small_config(model={"embedding_dim": 4, "global_hidden": [16], "dropout": 0.0})
    encoder = Encoder.fit(planted_logged, cfg)
    return cfg, encoder, TaskRows.from_logged(planted_logged, encoder, cfg.task_kind)


def test_two_workers_draw_the_tasks_of_one_and_get_its_gradient(fitted, planted_logged, tmp_path):
    cfg, _, _ = fitted
    tasks, flat, loss = worker_script.gradient(cfg, planted_logged, Workers())
    (tmp_path / "config.json").write_text(cfg.model_dump_json())
    pq.write_table(planted_logged, tmp_path / "logged.parquet")
    commands = [[sys.executable, worker_script.__file__, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0][0] == tasks[0::2]
    assert found[1][0] == tasks[1::2]
    for _, theirs, their_loss in found:
        # float64 sums in another order: 1e-12 is far above rounding, far below any re-weighting of a task.
        assert theirs == pytest.approx(flat, abs=1e-12, rel=0)
        assert their_loss == pytest.approx(loss, abs=1e-12, rel=0)
    assert max(map(abs, flat)) > 1e-3


def test_a_step_lowers_the_loss_and_repeats_exactly(fitted):
    cfg, encoder, rows = fitted
    runs = []
    for _ in range(2):
        network = build_network(cfg, encoder.dims, seed=1)
        optimizer = make_optimizer(network, cfg.training)
        runs.append([outer_step(network, optimizer, rows, cfg, step, Workers()) for step in range(30)])
    assert runs[0] == runs[1]
    assert sum(runs[0][-5:]) < sum(runs[0][:5]) - 0.05


def test_a_loss_that_is_not_finite_stops_and_names_step_and_tasks(fitted):
    cfg, encoder, rows = fitted
    network = build_network(cfg, encoder.dims, seed=1)
    optimizer = make_optimizer(network, cfg.training)
    before = [p.detach().clone() for p in network.parameters()]
    broken = rows.entities[meta_batch(rows, cfg, seed=0, step=4)[0].entity]
    for spec in meta_batch(rows, cfg, seed=0, step=4):
        if rows.entities[spec.entity] == broken:
            rows.encoded.item_dense[spec.query] = math.nan
    with pytest.raises(TrainingError, match=rf"got loss nan .* at step 4 \(tasks {broken}[,)]") as caught:
        outer_step(network, optimizer, rows, cfg, 4, Workers())
    assert "lower meta.inner_lr" in str(caught.value)
    for p, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)


def test_vectors_and_scalars_are_not_decayed(fitted):
    cfg, encoder, _ = fitted
    groups = make_optimizer(build_network(cfg, encoder.dims), cfg.training).param_groups
    assert {p.ndim > 1 for p in groups[0]["params"]} == {True}
    assert {p.ndim > 1 for p in groups[1]["params"]} == {False}
    assert groups[0]["weight_decay"] == cfg.training.weight_decay
    assert groups[1]["weight_decay"] == 0.0
