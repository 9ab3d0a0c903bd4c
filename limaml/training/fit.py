"""The outer loop, the only one: the network, its rivals and the variants of the experiments are all trained by `fit`.

Outer steps, a moving average of the weights, and, where there are rows to validate on, the average that validates best.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from limaml.config import TrainingConfig
from limaml.training.checkpoint import FitState, Progress, copy_weights, optimizer_state, restore_optimizer
from limaml.training.optimizer import averaged_copy, make_optimizer, update_average
from limaml.training.step import Model, OuterObjective, Workers, outer_step
from limaml.training.validation import OBJECTIVE

Say = Callable[[dict[str, Any]], None]
_ALONE = Workers()


def fit(
    model: Model,
    cfg: TrainingConfig,
    objective: OuterObjective,
    *,
    num_steps: int | None = None,
    validate: Callable[[Model], dict[str, float]] | None = None,
    workers: Workers = _ALONE,
    state: FitState | None = None,
    save: Callable[[FitState], None] = lambda _: None,
    say: Say = lambda _: None,
) -> tuple[Model, Progress]:
    """Train `model`; returns the average of its weights, with `validate` the one that validates best, and how it went.

    `num_steps` of the schedule's `cfg.max_steps` are done (all by default), fewer once `cfg.patience` validations were no
    better. `validate` gives named values of an average, `OBJECTIVE` among them. `state` is where to go on, if it holds
    weights; `save` gets such a one at every checkpoint. `say` is told how far it is: step, loss, validation, rate, seconds
    left unless it stops early. Both are called on every worker. Raises TrainingError if a loss or its gradient is not finite.
    """
    state, num_steps = state or FitState(), cfg.max_steps if num_steps is None else num_steps
    progress, best = state.progress, state.best
    optimizer, average = make_optimizer(model, cfg), averaged_copy(model)
    if state.network:
        model.load_state_dict(state.network)
        average.load_state_dict(state.average)
        restore_optimizer(optimizer, state.optimizer)
    started, started_at = progress.step, time.perf_counter()
    while progress.step < num_steps and progress.stale < cfg.patience:
        progress.window.append(outer_step(model, optimizer, objective, cfg, progress.step, workers))
        update_average(average, model, cfg, progress.step)
        progress.step += 1
        if progress.step % cfg.validate_every == 0 or progress.step == num_steps:
            steps_per_s = (progress.step - started) / (time.perf_counter() - started_at)
            values = validate(average) if validate else {}
            if validate and progress.count_validation(values[OBJECTIVE]):
                best = copy_weights(average)
            say(_recorded(progress, values, steps_per_s, num_steps, cfg.tasks_per_step))
            started, started_at = progress.step, time.perf_counter()
        if progress.step % cfg.checkpoint_every == 0 and progress.step < num_steps:
            save(FitState(progress, copy_weights(model), copy_weights(average), optimizer_state(optimizer), best))
    if best:
        average.load_state_dict(best)
    return average, progress


def _recorded(
    progress: Progress, values: dict[str, float], steps_per_s: float, num_steps: int, tasks_per_step: int
) -> dict[str, Any]:
    """Put what happened since the last entry into the history; returns how far the fit is."""
    loss = math.fsum(progress.window) / len(progress.window)
    progress.window.clear()
    entry = {"step": progress.step, "train_loss": loss, **values, "tasks_per_s": steps_per_s * tasks_per_step}
    progress.history.append(entry)
    left_s = round((num_steps - progress.step) / steps_per_s)
    return {**{key: round(value, 5) for key, value in entry.items()}, "of": num_steps, "left_s": left_s}
