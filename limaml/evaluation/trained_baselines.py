"""Rivals that are networks: how they are trained, how a new user's vector is fitted, how they score.

T tasks, R rows, V width of a user's vector
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limaml import telemetry
from limaml.config import Config
from limaml.evaluation.rival_networks import GlobalMlp, WideDeep
from limaml.evaluation.scoring_method import Floats, MethodInput, MethodValidator, ScoringMethod
from limaml.meta.losses import pairwise
from limaml.tasks.protocols import query_rows
from limaml.tasks.rows import Rows, TaskBatch
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch, meta_batch
from limaml.training.checkpoint import Progress
from limaml.training.fit import fit
from limaml.training.scoring import flat_rows
from limaml.training.step import BatchLoss, Model, Named, OuterObjective
from limaml.training.validation import OBJECTIVE

RATES = (0.1, 0.3, 1.0, 3.0)
STEPS = (1, 3, 10, 30)
_TASKS_PER_BATCH = 256
_ROWS_PER_BATCH = 8192
_NO_QUERY = np.zeros(0, np.int64)

_Rival = TypeVar("_Rival", GlobalMlp, WideDeep)
_log = telemetry.get_logger(__name__)


def fit_on_queries(
    cfg: Config, model: Model, draw: Callable[[int], tuple[TaskBatch, tuple[Any, ...]]], auc: Callable[[Model], float]
) -> tuple[Model, Progress]:
    """`fit` where `model(*inputs, generator)` gives the logits (T, Q) of a batch's query rows, with the network's own loss.

    Each step's tasks are one batch, drawn with its inputs; one generator draws the dropout of the whole run.
    """
    pairwise_share = cfg.meta.pairwise_share

    def batches(step: int) -> list[Named]:
        batch, inputs = draw(step)
        return [(batch.entities, (batch.query, inputs))]

    def loss(model: Model, asked: tuple[Rows, Any], *, generator: torch.Generator, num_tasks: int) -> BatchLoss:
        query, inputs = asked
        assert query.label_TR is not None
        logit_TQ = model(*inputs, generator)
        loss_TQ = F.binary_cross_entropy_with_logits(logit_TQ, query.label_TR, reduction="none")
        per_task_T = (loss_TQ * query.mask_TR).sum(dim=1) / query.mask_TR.sum(dim=1)
        if pairwise_share:
            pairs_T = pairwise(logit_TQ, query.label_TR, query.mask_TR)
            per_task_T = (1.0 - pairwise_share) * per_task_T + pairwise_share * pairs_T
        return BatchLoss(per_task_T.sum() / num_tasks, per_task_T.detach())

    schedule = cfg.training.model_copy(update={"max_steps": cfg.evaluation.baseline_steps})
    objective = OuterObjective(batches, loss, torch.Generator().manual_seed(cfg.training.seed))
    return fit(model, schedule, objective, validate=lambda average: {OBJECTIVE: auc(average)})


def train(cfg: Config, model: _Rival, rows: TaskRows, validator: MethodValidator) -> _Rival:
    """Train on the query rows of the network's own meta-batches, and return the average that validates best.

    Loss, optimizer, averaging, dropout and patience are the network's own, so that the difference is the personalisation.
    """

    def draw(step: int) -> tuple[TaskBatch, tuple[Rows, Tensor]]:
        specs = meta_batch(rows, cfg, seed=cfg.training.seed, step=step)
        batch = build_batch(rows, [replace(spec, support_stop=spec.support_start) for spec in specs])
        return batch, (batch.query, model.vectors(batch.entity_index_T))

    best, progress = fit_on_queries(cfg, model, draw, lambda average: validator.auc_of(score_as_trained(average)))
    value = round(progress.best_value or 0.0, 5)
    _log.info("baseline_trained", baseline=type(model).__name__, best_step=progress.best_step, validation=value)
    return best


def score_as_trained(model: GlobalMlp | WideDeep) -> ScoringMethod:
    """Score with the users' vectors as training left them; the unknown user's for a new one."""

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        index = inputs.rows.entity_index[[spec.entity for spec in specs]]
        with torch.no_grad():
            return score_with_vectors(model, inputs, specs, model.vectors(torch.from_numpy(index)))

    return scores


def choose_fit(cfg: Config, model: WideDeep, validator: MethodValidator) -> ScoringMethod:
    """Fit each task's vector on its support with the rate and number of steps that validate best."""
    best, best_value = (RATES[0], STEPS[0]), -np.inf
    for rate in RATES:
        # One trajectory a rate: the vectors after 3 steps lie on the way to those after 30.
        fits = [fit_vectors(cfg, model, validator.inputs.rows, specs, rate, STEPS) for specs in validator.tasks]
        for steps in STEPS:
            parts = zip(validator.tasks, fits, strict=True)
            value = validator.auc([score_with_vectors(model, validator.inputs, specs, fit[steps]) for specs, fit in parts])
            if value > best_value:
                best, best_value = (rate, steps), value
    _log.info("baseline_chosen", baseline="wide_deep", rate=best[0], steps=best[1], validation=round(best_value, 5))
    rate, steps = best

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_with_vectors(model, inputs, specs, fit_vectors(cfg, model, inputs.rows, specs, rate, (steps,))[steps])

    return scores


def fit_vectors(
    cfg: Config, model: WideDeep, rows: TaskRows, specs: Sequence[TaskSpec], rate: float, steps: tuple[int, ...]
) -> dict[int, Tensor]:
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
    model: GlobalMlp | WideDeep, inputs: MethodInput, specs: Sequence[TaskSpec], vector_TV: Tensor
) -> Floats:
    """Probabilities of the specs' query rows, each task with its vector."""
    index = query_rows(inputs.rows, specs).rows
    task = torch.from_numpy(np.repeat(np.arange(len(specs)), [len(spec.query) for spec in specs]))
    found: Floats = np.empty(len(index))
    for start in range(0, len(index), _ROWS_PER_BATCH):
        part = slice(start, start + _ROWS_PER_BATCH)
        logits_R1 = model(flat_rows(inputs.rows, index[part]), vector_TV[task[part]])
        found[part] = torch.sigmoid(logits_R1.double()).numpy()[:, 0]
    return found
