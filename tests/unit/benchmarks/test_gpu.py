"""What `make bench-gpu` does, on a CPU; the lines that need a card are a graph's capture and a device's name."""

import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import torch

from benchmarks import gpu
from benchmarks.card_rows import CardRows
from benchmarks.options import ROOT
from benchmarks.work import ROWS
from limaml.features.encoder import Encoder
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import split_events
from limaml.training.twin_and_refit import TrainingData
from limaml.training.validation import OBJECTIVE, Validator


def bench(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_gpu_nothing_is_measured(tmp_path):
    """The lock holds torch's CPU build, which sees no GPU on any machine."""
    done = bench("--out", tmp_path)
    assert done.returncode == 2
    assert "needs a GPU that torch sees, got none" in done.stdout
    done = bench("--device", "cpu", "--out", tmp_path)
    assert done.returncode == 2
    assert "is for --quick alone" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_quick_run_goes_through_every_part_and_writes_nothing(tmp_path):
    done = bench("--device", "cpu", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert not list(tmp_path.iterdir())
    assert found["device"] == "cpu"
    assert not found["skipped"]
    assert max(found["max_gradient_error"].values()) < 1e-4
    for row in ROWS:
        assert found["tasks_per_s"][row]["4"]["1"] > 0
        assert found["tasks_per_s_of"]["torch_func"][row]["4"]["1"] > 0
        assert found["tasks_per_s_of"]["jax"][row]["4"]["1"] == "ModuleNotFoundError: No module named 'jax'"
        assert found["share_of_bandwidth"][row]["4"]["1"] > 0
    assert found["tasks_per_s_compiled"]["task_vector"]["4"]["1"] > 0
    assert set(found["fill_entities_per_s"]) == {"task_vector", "paper"}


def test_rows_gathered_on_the_device_are_those_that_training_gathers(planted_logged, small_config):
    cfg = small_config()
    rows = TaskRows.from_logged(planted_logged, Encoder.fit(planted_logged, cfg), cfg.task_kind)
    at = np.array([[0, 1, 2], [5, 6, 0]])
    mask, as_of_us = np.array([[1, 1, 1], [1, 1, 0]], np.float32), rows.timestamp_us[[3, 7]]
    expected = Rows.gather(rows, at, mask, as_of_us)
    found = CardRows.of(rows, "cpu").gather(*map(torch.from_numpy, (at, mask, as_of_us)))
    for field in fields(Rows):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_a_training_on_the_device_says_how_long_it_took_and_what_it_reached(planted_logged, small_config):
    cfg = small_config()
    split = split_events(planted_logged, cfg.evaluation)
    encoder = Encoder.fit(split.train_rows(planted_logged), cfg)
    twin, validated = (
        TaskRows.from_logged(part(planted_logged), encoder, cfg.task_kind) for part in (split.train_rows, split.validation_rows)
    )
    validator = Validator(validated, cfg, split.validate_from_us)
    found = gpu.training(cfg, TrainingData(twin, encoder.dims, validator, twin, encoder.dims), "cpu", steps=2)
    assert found["steps"] == 2
    assert found["seconds"] > 0
    assert 0 < found[OBJECTIVE] < 1
