"""LiMAML without storing anything: trained with the full graph, and scored with each task's adapted network itself.

The outer loop, its meta-batches and its dropout are the project's, around another loss.
"""

from collections.abc import Sequence

import numpy as np
import torch

from experiments.evidence.fit_data import FitData
from experiments.methods.rowwise import adapt_rowwise, full_loss, logits
from limaml.evaluation.scoring_method import Floats, MethodInput, ScoringMethod
from limaml.models.network import Network, build_network
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch
from limaml.training.checkpoint import Progress
from limaml.training.fit import fit
from limaml.training.step import OuterObjective, Workers, meta_batches
from limaml.training.validation import OBJECTIVE
from limaml.training.warm_start import warm_start

_ROWS_PER_BATCH = 32768
"""Padded query rows that are scored at a time."""
_TASKS_PER_BATCH = 256


def full(data: FitData) -> tuple[ScoringMethod, Progress]:
    """The averaged network that validates best by its own scores, and how far it came."""
    cfg, rows, validator = data.cfg, data.training.rows, data.validator
    start = build_network(cfg, data.encoder.dims, cfg.training.seed)
    warm_start(start, rows, cfg)

    network, progress = fit(
        start,
        cfg.training,
        OuterObjective(meta_batches(rows, cfg, Workers(), next(start.parameters())), full_loss),
        validate=lambda average: {
            OBJECTIVE: validator.auc([full_scores(average, data.validation.rows, specs) for specs in validator.tasks])
        },
    )

    def score(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return full_scores(network, inputs.rows, specs)

    return score, progress


@torch.no_grad()
def full_scores(network: Network, rows: TaskRows, specs: Sequence[TaskSpec]) -> Floats:
    """(sum of queries,) probabilities of the specs' query rows by their tasks' adapted networks, one spec after another."""
    starts = np.cumsum([0] + [len(spec.query) for spec in specs])
    scores: Floats = np.zeros(starts[-1])
    for chosen in _batches(specs):
        batch = build_batch(rows, [specs[task] for task in chosen])
        block = adapt_rowwise(network, batch.support, batch.entity_index_T)
        found_TQ = torch.sigmoid(logits(network, block, batch.query).double()).numpy()
        for task, found_Q in zip(chosen, found_TQ, strict=True):
            scores[starts[task] : starts[task + 1]] = found_Q[: len(specs[task].query)]
    return scores


def _batches(specs: Sequence[TaskSpec]) -> list[list[int]]:
    """Positions of the specs, those of like length together, bounded in tasks and in padded query rows."""
    order = sorted(range(len(specs)), key=lambda task: (len(specs[task].query).bit_length(), specs[task].support_size))
    batches: list[list[int]] = []
    widest = 0
    for task in order:
        widest = max(widest, len(specs[task].query))
        if batches and len(batches[-1]) < _TASKS_PER_BATCH and (len(batches[-1]) + 1) * widest <= _ROWS_PER_BATCH:
            batches[-1].append(task)
        else:
            batches.append([task])
            widest = len(specs[task].query)
    return batches
