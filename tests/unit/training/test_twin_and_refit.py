"""Two fits in one run: resume, seeds, early stopping, checkpoints without pickles."""

import dataclasses
import math

import pytest
import torch

from limaml.errors import TrainingError
from limaml.features.encoder import Encoder
from limaml.models.network import build_network
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import split_events
from limaml.training import shrinkage
from limaml.training.checkpoint import load_state, save_state
from limaml.training.step import Workers
from limaml.training.twin_and_refit import TrainingData, train_twin_and_refit
from limaml.training.validation import OBJECTIVE, Validator

CPU = torch.device("cpu")


def prepare(logged, cfg) -> TrainingData:
    split = split_events(logged, cfg.evaluation)
    twin, refit = Encoder.fit(split.train_rows(logged), cfg), Encoder.fit(logged, cfg)
    return TrainingData(
        twin_rows=TaskRows.from_logged(split.train_rows(logged), twin, cfg.task_kind),
        twin_dims=twin.dims,
        validator=Validator(
            TaskRows.from_logged(split.validation_rows(logged), twin, cfg.task_kind), cfg, split.validate_from_us
        ),
        refit_rows=TaskRows.from_logged(logged, refit, cfg.task_kind),
        refit_dims=refit.dims,
    )


def run(cfg, data, *, resume=None, save=lambda state: None):
    return train_twin_and_refit(cfg, data, Workers(), CPU, resume=resume, save=save)


def assert_same(one, two):
    for part in ("network", "twin"):
        weights, others = getattr(one, part), getattr(two, part)
        assert weights.keys() == others.keys()
        for name, value in weights.items():
            assert torch.equal(value, others[name]), name


def without_times(progress):
    return [{key: value for key, value in entry.items() if key != "tasks_per_s"} for entry in progress.history]


def test_a_seed_gives_the_same_model_twice_and_another_seed_another(planted_logged, small_config):
    cfg = small_config()
    data = prepare(planted_logged, cfg)
    one, two = run(cfg, data), run(cfg, data)
    assert_same(one, two)
    assert without_times(one.twin_progress) == without_times(two.twin_progress)
    other = cfg.model_copy(update={"training": cfg.training.model_copy(update={"seed": 1})})
    assert not torch.equal(
        one.network["global_block.mlp.layers.0.weight"], run(other, data).network["global_block.mlp.layers.0.weight"]
    )


@pytest.mark.fault(
    "a training that dies after any of its checkpoints", after="resumed, its weights equal an uninterrupted run's, bit for bit"
)
def test_a_run_resumed_from_any_checkpoint_equals_the_uninterrupted_one(planted_logged, small_config, tmp_path):
    cfg = small_config(
        training={"validate_every": 4, "checkpoint_every": 3, "patience": 100}
    )  # checkpoints fall inside windows
    data = prepare(planted_logged, cfg)
    folders = []

    def save(state):
        folders.append(tmp_path / str(len(folders)))
        folders[-1].mkdir()
        save_state(state, folders[-1])

    whole = run(cfg, data, save=save)
    states = [load_state(folder) for folder in folders]
    assert [state.phase for state in states[:3]] == ["twin"] * 3
    assert states[-1].phase == "done"
    assert "refit" in {state.phase for state in states}
    for state in states:
        resumed = run(cfg, data, resume=state)
        assert_same(resumed, whole)
        assert without_times(resumed.twin_progress) == without_times(whole.twin_progress)
        assert without_times(resumed.progress) == without_times(whole.progress)


def test_checkpoints_hold_no_pickle_and_a_broken_one_says_what_to_do(planted_logged, small_config, tmp_path):
    cfg = small_config(training={"max_steps": 6})
    run(cfg, prepare(planted_logged, cfg), save=lambda state: save_state(state, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "tensors.safetensors"]
    (tmp_path / "tensors.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(TrainingError, match=r"must hold state.json and tensors.safetensors .* delete its run's folder"):
        load_state(tmp_path)


def test_training_stops_when_validation_does_not_improve_and_the_best_weights_are_kept(planted_logged, small_config):
    # A gradient's step: nothing is chosen by validations that follow.
    cfg = small_config(training={"max_steps": 60, "validate_every": 5, "patience": 2}, meta={"inner_step": "gradient"})
    data = prepare(planted_logged, cfg)
    # Values by validation: the best is the third, at step 15; two stale ones follow.
    values = iter([0.5, 0.6, 0.7, 0.65, 0.7, 0.9])
    seen = {}

    def scripted(network, workers):
        value = next(values)
        seen[value] = seen.get(value) or {name: w.clone() for name, w in network.state_dict().items()}
        return {OBJECTIVE: value}

    scripted.of_few_rows = lambda network, workers: 0.0 if not network.prior_rows("user").any() else -1.0
    done = run(cfg, dataclasses.replace(data, validator=scripted))
    assert done.twin_progress.best_step == 15
    assert done.twin_progress.step == 25
    assert done.progress.step == 15  # the refit takes the twin's best number of steps
    for name, value in done.twin.items():
        assert torch.equal(value, seen[0.7][name])


def test_training_learns_the_planted_users(small_config, make_planted):
    cfg = small_config(training={"max_steps": 100, "validate_every": 25, "patience": 6, "tasks_per_step": 16, "outer_lr": 0.01})
    data = prepare(make_planted(num_users=150, rows_per_user=40), cfg)
    done = run(cfg, data)
    history = done.twin_progress.history
    # 0.5 is chance; 0.66 to 0.67 with either kind of item vectors, and the seed is fixed.
    assert max(entry["validation_as_served_auc"] for entry in history) > 0.63
    assert all(entry["tasks_per_s"] > 0 for entry in history)
    # The refit has seen every item; the twin only those of its rows.
    assert done.network["global_block.items.item"].shape[0] == data.refit_dims.num_items + 1
    assert done.twin["global_block.items.item"].shape[0] == data.twin_dims.num_items + 1


def test_pairs_alone_are_calibrated_on_the_rows_that_validate_and_the_refit_gets_the_same(planted_logged, small_config):
    """The twin's mean score is the rows' label rate, and the refit has the level and the widths of priors that the twin got."""
    cfg = small_config(training={"max_steps": 20, "validate_every": 5}, meta={"pairwise_share": 1.0, "inner_step": "newton"})
    data = prepare(planted_logged, cfg)
    done = run(cfg, data)
    twin = build_network(cfg, data.twin_dims, 0)
    twin.load_state_dict(done.twin)
    assert done.twin_progress.level != 0.0
    assert data.validator.level(twin, Workers()) == pytest.approx(0.0, abs=1e-4)
    assert set(done.twin_progress.shrinkage) == {"user.factors", "user.level"}
    # Taken back, the refit is near where training leaves every network: the bias small, the prior's width at its start.
    refit = build_network(cfg, data.refit_dims, 0)
    refit.load_state_dict(done.network)
    shrinkage.apply(refit, {name: 1.0 / factor for name, factor in done.twin_progress.shrinkage.items()})
    for name, value in refit.step("user").log_std.items():
        assert float(value.detach()) == pytest.approx(math.log(cfg.meta.prior_std), abs=0.1), name
    bias = refit.global_block.mlp.linears[-1].bias
    bias = float(bias.detach())
    assert abs(bias - done.twin_progress.level) < abs(bias)


def test_the_refits_prior_counts_as_many_rows_as_the_twins(planted_logged, small_config):
    cfg = small_config(training={"max_steps": 10, "validate_every": 5})
    data = prepare(planted_logged, cfg)
    data.validator.of_few_rows = lambda network, workers: float(network.prior_rows("user").sum())
    done = run(cfg, data)
    assert done.twin_progress.prior_rows == {"user.level": 40.0, "user.factors": 40.0}
    for weights in (done.twin, done.network):
        assert (weights["prior_rows_user"] == 40.0).all()
