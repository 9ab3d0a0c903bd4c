"""Rivals that are networks: how they are trained, how a new user's vector is fitted, how they score.

T tasks, R rows, V width of a user's vector
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from limaml import telemetry
from limaml.config import Config
from limaml.evaluation.best_average import best_average, query_loss
from limaml.evaluation.judged import Floats, Judge, JudgedRows, Method
from limaml.models.baselines import GlobalMlp, WideDeep
from limaml.tasks.protocols import query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch, meta_batch
from limaml.training.scoring import flat_rows

RATES = (0.1, 0.3, 1.0, 3.0)
STEPS = (1, 3, 10, 30)
_TASKS_PER_BATCH = 256
_ROWS_PER_BATCH = 8192
_NO_QUERY = np.zeros(0, np.int64)

_Model = TypeVar("_Model", GlobalMlp, WideDeep)
_log = telemetry.get_logger(__name__)


def train(cfg: Config, model: _Model, rows: TaskRows, judge: Judge) -> _Model:
    """Train on the query rows of the network's own meta-batches, and return the average that validates best.

    Optimizer, averaging, dropout and patience are the network's own, so that the difference is the personalisation.
    """
    generator = torch.Generator().manual_seed(cfg.training.seed)

    def backward(step: int) -> None:
        batch = build_batch(rows, meta_batch(rows, cfg, seed=cfg.training.seed, step=step))
        logits_TQ = model(batch.query, model.vectors(batch.entity_index_T), generator)
        torch.autograd.backward(query_loss(logits_TQ, batch.query))

    def quality(average: _Model) -> float:
        return judge.quality_of(score_as_trained(average))

    best, value, step = best_average(cfg.training, model, cfg.evaluation.baseline_steps, backward, quality)
    _log.info("baseline_trained", baseline=type(model).__name__, best_step=step, validation=round(value, 5))
    return best


def score_as_trained(model: GlobalMlp | WideDeep) -> Method:
    """Score with the users' vectors as training left them; the unknown user's for a new one."""

    def scores(judged: JudgedRows, specs: Sequence[TaskSpec]) -> Floats:
        index = judged.rows.entity_index[[spec.entity for spec in specs]]
        with torch.no_grad():
            return score_with_vectors(model, judged, specs, model.vectors(torch.from_numpy(index)))

    return scores


def choose_fit(cfg: Config, model: WideDeep, judge: Judge) -> Method:
    """Fit each task's vector on its support with the rate and number of steps that validate best."""
    best, best_value = (RATES[0], STEPS[0]), -np.inf
    for rate in RATES:
        # One trajectory a rate: the vectors after 3 steps lie on the way to those after 30.
        fits = [fit_vectors(cfg, model, judge.judged.rows, specs, rate, STEPS) for specs in judge.tasks]
        for steps in STEPS:
            parts = zip(judge.tasks, fits, strict=True)
            value = judge.quality([score_with_vectors(model, judge.judged, specs, fit[steps]) for specs, fit in parts])
            if value > best_value:
                best, best_value = (rate, steps), value
    _log.info("baseline_chosen", baseline="wide_deep", rate=best[0], steps=best[1], validation=round(best_value, 5))
    rate, steps = best

    def scores(judged: JudgedRows, specs: Sequence[TaskSpec]) -> Floats:
        return score_with_vectors(model, judged, specs, fit_vectors(cfg, model, judged.rows, specs, rate, (steps,))[steps])

    return scores


def fit_vectors(
    cfg: Config, model: WideDeep, rows: TaskRows, specs: Sequence[TaskSpec], rate: float, steps: tuple[int, ...]
) -> dict[int, torch.Tensor]:
    """(T, V) vectors of the specs after each number of steps on their supports; a known user's fit starts at its own."""
    order = np.argsort([spec.support_size for spec in specs], kind="stable")
    found = {step: torch.empty(len(specs), model.users.embedding_dim) for step in steps}
    for start in range(0, len(order), _TASKS_PER_BATCH):
        chosen = order[start : start + _TASKS_PER_BATCH]
        batch = build_batch(rows, [replace(specs[task], query=_NO_QUERY) for task in chosen])
        fitted = model.fit_vectors(batch.support, batch.entity_index_T, rate=rate, steps=steps, damping=cfg.meta.damping)
        for step, vector_TV in fitted.items():
            found[step][torch.from_numpy(chosen)] = vector_TV
    return found


@torch.no_grad()
def score_with_vectors(
    model: GlobalMlp | WideDeep, judged: JudgedRows, specs: Sequence[TaskSpec], vector_TV: torch.Tensor
) -> Floats:
    """Probabilities of the specs' query rows, each task with its vector."""
    index = query_rows(judged.rows, specs).rows
    task = torch.from_numpy(np.repeat(np.arange(len(specs)), [len(spec.query) for spec in specs]))
    found: Floats = np.empty(len(index))
    for start in range(0, len(index), _ROWS_PER_BATCH):
        part = slice(start, start + _ROWS_PER_BATCH)
        logits_R1 = model(flat_rows(judged.rows, index[part]), vector_TV[task[part]])
        found[part] = torch.sigmoid(logits_R1.double()).numpy()[:, 0]
    return found
