"""The outer loop: the twin until validation stops improving, then the refit for as many steps.

twin    fitted on the split's training rows, judged by evaluation
refit   fitted from scratch on all rows, same configuration, the twin's best number of steps; it is what serves
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from limaml import telemetry
from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.models.item_vectors import warm_start
from limaml.models.network import LiMAML, build_network
from limaml.tasks.sampling import TaskRows
from limaml.training.checkpoint import (
    Phase,
    Progress,
    TrainState,
    Weights,
    copy_weights,
    optimizer_state,
    restore_optimizer,
)
from limaml.training.optimizer import averaged_copy, make_optimizer, update_average
from limaml.training.step import Workers, outer_step
from limaml.training.validation import OBJECTIVE, Validator

Save = Callable[[TrainState], None]
Say = Callable[[dict[str, Any]], None]
_log = telemetry.get_logger(__name__)


def log_how_far(how_far: dict[str, Any]) -> None:
    _log.info("training", **how_far)


@dataclass(frozen=True)
class TrainingData:
    """Rows of both fits, each with the widths of its own encoder."""

    twin_rows: TaskRows
    twin_dims: EncoderDims
    validator: Validator
    refit_rows: TaskRows
    refit_dims: EncoderDims


def train_twin_and_refit(
    cfg: Config,
    data: TrainingData,
    workers: Workers,
    device: torch.device,
    *,
    resume: TrainState | None,
    save: Save,
    say: Say = log_how_far,
) -> TrainState:
    """Run both fits, or what is left of them after `resume`; `save` is called on every worker at every checkpoint.

    `say` is told on every worker how far a fit is: phase, step, validation, rate, seconds left unless it stops early.

    Returns the state of phase "done": `twin` and `network` (the refit) are the two networks' weights.
    """
    state = resume
    if state is None or state.phase == "twin":
        twin = _Fit(cfg, "twin", data.twin_rows, data.twin_dims, workers, device, state, say)
        twin.run(cfg.training.max_steps, data.validator, save)
        state = TrainState("refit", Progress(), {}, twin=twin.best, twin_progress=twin.progress)
    if state.phase == "refit":
        assert state.twin_progress is not None
        refit = _Fit(cfg, "refit", data.refit_rows, data.refit_dims, workers, device, state, say)
        refit.run(state.twin_progress.best_step, None, save)
        state = TrainState(
            "done", refit.progress, copy_weights(refit.average), twin=state.twin, twin_progress=state.twin_progress
        )
        save(state)
    return state


def fit_twin(cfg: Config, rows: TaskRows, dims: EncoderDims, validator: Validator) -> tuple[LiMAML, Progress]:
    """The twin alone, by this process, with no checkpoints: the network that validates best, and how its training went."""
    fit = _Fit(cfg, "twin", rows, dims, Workers(), torch.device("cpu"), None)
    fit.run(cfg.training.max_steps, validator, lambda _: None)
    fit.network.load_state_dict(fit.best)
    return fit.network.requires_grad_(False), fit.progress


class _Fit:
    """One network being fitted."""

    def __init__(
        self,
        cfg: Config,
        phase: Phase,
        rows: TaskRows,
        dims: EncoderDims,
        workers: Workers,
        device: torch.device,
        state: TrainState | None,
        say: Say = log_how_far,
    ) -> None:
        self.say = say
        self.cfg, self.phase, self.rows, self.workers = cfg, phase, rows, workers
        self.network: LiMAML = build_network(cfg, dims, cfg.training.seed)
        self.best: Weights = {}
        self.progress = Progress()
        self.twin, self.twin_progress = (state.twin, state.twin_progress) if state else ({}, None)
        if state is not None and state.network:
            self.network.load_state_dict(state.network)
            self.progress, self.best = state.progress, state.best
        else:
            warm_start(self.network, rows, cfg)
        self.network.to(device)
        self.average: LiMAML = averaged_copy(self.network)
        self.optimizer = make_optimizer(self.network, cfg.training)
        if state is not None and state.network:
            self.average.load_state_dict(state.average)
            restore_optimizer(self.optimizer, state.optimizer)

    def run(self, num_steps: int, validator: Validator | None, save: Save) -> None:
        """Step until `num_steps` are done or validation has been stale for too long."""
        training, progress = self.cfg.training, self.progress
        started, started_at = progress.step, time.perf_counter()
        while progress.step < num_steps and progress.stale < training.patience:
            loss = outer_step(self.network, self.optimizer, self.rows, self.cfg, progress.step, self.workers)
            update_average(self.average, self.network, self.cfg.training, progress.step)
            progress.window.append(loss)
            progress.step += 1
            if progress.step % training.validate_every == 0 or progress.step == num_steps:
                seconds = time.perf_counter() - started_at
                self._record((progress.step - started) / seconds, num_steps, validator)
                started, started_at = progress.step, time.perf_counter()
            if progress.step % training.checkpoint_every == 0 and progress.step < num_steps:
                save(self._state())

    def _record(self, steps_per_s: float, num_steps: int, validator: Validator | None) -> None:
        progress = self.progress
        entry = {"step": progress.step, "train_loss": math.fsum(progress.window) / len(progress.window)}
        progress.window.clear()
        if validator is not None:
            entry |= validator(self.average, self.workers)
            self._keep_best(entry[OBJECTIVE])
        progress.history.append(entry | {"tasks_per_s": steps_per_s * self.cfg.training.tasks_per_step})
        rounded = {key: round(value, 5) for key, value in progress.history[-1].items()}
        left_s = round((num_steps - progress.step) / steps_per_s)
        self.say({"phase": self.phase, **rounded, "of": num_steps, "left_s": left_s})

    def _keep_best(self, value: float) -> None:
        progress = self.progress
        # A validation without a value (one class only) is no improvement, except that the first one must keep something.
        value = -math.inf if math.isnan(value) else value
        if progress.best_value is None or value > progress.best_value:
            progress.best_step, progress.best_value, progress.stale = progress.step, value, 0
            self.best = copy_weights(self.average)
        else:
            progress.stale += 1

    def _state(self) -> TrainState:
        return TrainState(
            self.phase,
            self.progress,
            copy_weights(self.network),
            copy_weights(self.average),
            optimizer_state(self.optimizer),
            best=self.best,
            twin=self.twin,
            twin_progress=self.twin_progress,
        )
