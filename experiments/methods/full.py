"""LiMAML without storing anything: trained with the full graph, and scored with each task's adapted network itself.

The outer loop is the project's (meta-batches, optimizer, averaging, dropout, patience), around another loss. A network trained
so can also be served with stored embeddings (`served = "stored"` in the design).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from experiments.cases import OriginData
from experiments.methods.fitted import Design, Fitted, configured
from experiments.methods.rowwise import adapt_rowwise, full_loss, logits, start_rowwise
from limaml.config import Config
from limaml.data.rows import Rows
from limaml.data.tasks import TaskRows, TaskSpec, build_batch, length_groups, meta_batch
from limaml.evaluation.best_average import best_average
from limaml.evaluation.judged import Floats, Judge, JudgedRows
from limaml.models.item_vectors import warm_start
from limaml.models.meta_blocks import RowMlp
from limaml.models.network import LiMAML, build_network
from limaml.training.scoring import score_specs

ROW_LEVEL = ("model.meta_block=row_mlp", "model.row_age=false", "meta.inner_lr=0.3")
"""The one block of which full and stored network differ: where a design names no block, before its overrides."""
_ROWS_PER_BATCH = 32768
"""Padded query rows that are scored at a time."""
_TASKS_PER_BATCH = 256

Score = Callable[[LiMAML, TaskRows, Sequence[TaskSpec]], Floats]


def full(data: OriginData, design: Design, seed: int) -> Fitted:
    """`served` of the design: `full` (the default) or `stored`; overrides as everywhere."""
    overrides = design.get("overrides", ())
    named = any(override.startswith("model.meta_block=") for override in overrides)
    cfg = configured(data, {"overrides": overrides if named else [*ROW_LEVEL, *overrides]}, seed)
    serve: Score = served_stored if design.get("served", "full") == "stored" else full_scores
    network, value, best_step = fit_full(cfg, data, serve)

    def score(judged: JudgedRows, specs: Sequence[TaskSpec]) -> Floats:
        return serve(network, judged.rows, specs)

    return Fitted(score, value, notes={"best_step": best_step})


def fit_full(cfg: Config, data: OriginData, serve: Score) -> tuple[LiMAML, float, int]:
    """The averaged network that validates best as `serve` scores it, with that value and its step."""
    rows, judge = data.training.rows, Judge(data.validation, cfg)
    network = build_network(cfg, data.encoder.dims, cfg.training.seed)
    warm_start(network, rows, cfg)

    def backward(step: int) -> None:
        full_backward(network, rows, cfg, step)

    def quality_of(average: LiMAML) -> float:
        give_prior(average, rows)
        return quality(average, judge, serve)

    return best_average(cfg.training, network, cfg.training.max_steps, backward, quality_of)


def quality(network: LiMAML, judge: Judge, serve: Score) -> float:
    """The number that choices are made by."""
    return judge.quality([serve(network, judge.judged.rows, specs) for specs in judge.tasks])


def full_backward(network: LiMAML, rows: TaskRows, cfg: Config, step: int) -> None:
    """Leave the gradient of meta-batch number `step`, as `limaml.training.step` does of the stored network's loss."""
    training = cfg.training
    state = np.random.SeedSequence((training.seed, step, 0)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    for group in length_groups(meta_batch(rows, cfg, seed=training.seed, step=step)):
        loss = full_loss(network, build_batch(rows, group), generator=generator, num_tasks=training.tasks_per_step)
        torch.autograd.backward(loss)
    # The learned vector of an empty support takes no part here.
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


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


def served_stored(network: LiMAML, rows: TaskRows, specs: Sequence[TaskSpec]) -> Floats:
    """The same network with one stored embedding a task: the mean over its support rows."""
    return score_specs(network, rows, specs)


@torch.no_grad()
def give_prior(network: LiMAML, rows: TaskRows) -> None:
    """A stored embedding for an empty support, which full training has no use for: theta's mean over all training rows."""
    if isinstance(network.meta, RowMlp):
        every = Rows.from_encoded(rows.encoded)
        embedding_1RD = start_rowwise(network, every, torch.zeros(1, dtype=torch.int64)).embed(every)
        network.meta.empty.copy_(embedding_1RD.mean(dim=(0, 1)))
