"""LiMAML without storing anything: trained with the full graph, and scored with each task's adapted network itself.

The outer loop is the project's (meta-batches, optimizer, averaging, dropout, patience), around another loss.
"""

from collections.abc import Sequence

import numpy as np
import torch

from experiments.cases import OriginData
from experiments.methods.fitted import Design, Fitted, configured
from experiments.methods.rowwise import adapt_rowwise, full_loss, logits
from limaml.config import Config
from limaml.evaluation.best_average import best_average
from limaml.evaluation.judged import Floats, Judge, JudgedRows
from limaml.models.item_vectors import warm_start
from limaml.models.network import LiMAML, build_network
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch, length_groups, meta_batch
from limaml.training.step import Workers, dropout_generator, reduce_gradients

ROW_LEVEL = ("model.meta_block=row_mlp", "model.row_age=false", "meta.inner_lr=0.3")
"""The one block of which full and stored network differ: where a design names no block, before its overrides."""
_ROWS_PER_BATCH = 32768
"""Padded query rows that are scored at a time."""
_TASKS_PER_BATCH = 256


def full(data: OriginData, design: Design, seed: int) -> Fitted:
    """Design: `overrides`. The averaged network that validates best by its own scores."""
    overrides = design.get("overrides", ())
    named = any(override.startswith("model.meta_block=") for override in overrides)
    cfg = configured(data, {"overrides": overrides if named else [*ROW_LEVEL, *overrides]}, seed)
    rows, judge = data.training.rows, Judge(data.validation, cfg)
    start = build_network(cfg, data.encoder.dims, seed)
    warm_start(start, rows, cfg)

    def backward(step: int) -> None:
        full_backward(start, rows, cfg, step)

    def quality(average: LiMAML) -> float:
        return judge.quality([full_scores(average, judge.judged.rows, specs) for specs in judge.tasks])

    network, value, best_step = best_average(cfg.training, start, cfg.training.max_steps, backward, quality)

    def score(judged: JudgedRows, specs: Sequence[TaskSpec]) -> Floats:
        return full_scores(network, judged.rows, specs)

    return Fitted(score, value, notes={"best_step": best_step})


def full_backward(network: LiMAML, rows: TaskRows, cfg: Config, step: int) -> None:
    """Leave the gradient of meta-batch number `step`, as `limaml.training.step.backward` does of the stored network's loss."""
    training, alone = cfg.training, Workers()
    generator = dropout_generator(training.seed, step, alone.rank, torch.device("cpu"))
    total = torch.zeros(())
    for group in length_groups(meta_batch(rows, cfg, seed=training.seed, step=step)):
        loss = full_loss(network, build_batch(rows, group), generator=generator, num_tasks=training.tasks_per_step)
        torch.autograd.backward(loss)
        total += loss.detach()
    # Zeros for the learned vector of an empty support, which takes no part here.
    reduce_gradients(network, total, alone)


@torch.no_grad()
def full_scores(network: LiMAML, rows: TaskRows, specs: Sequence[TaskSpec]) -> Floats:
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
