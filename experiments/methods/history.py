"""What a user's support says about a candidate, as numbers: the aggregates that every feature-based rival is given.

They are computed from the task's support when it is scored, so that they are as fresh as a meta embedding would be. The
residual r of a row is its label less its item's logged rate. A sum shrunk by c is sum / (rows + c).

    T tasks, S support rows, Q query rows, G categories, K width of an item's vector, H features
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from limaml.evaluation.scoring_method import Floats, MethodInput
from limaml.features.columns import Indices
from limaml.tasks.rows import TaskBatch
from limaml.tasks.sampling import TaskSpec, build_batch

VECTOR_FEATURES = ("pooled", "similar", "folded", "folded_level")
NUM_AGGREGATES = 9
_QUERY_ROWS = 64
_PADDED_ROWS = 16_384


@dataclass(frozen=True)
class HistorySettings:
    """Shrinkages are in rows of support."""

    shrinkage: float = 5.0
    slow_shrinkage: float = 50.0
    """A second one: which of the two is right depends on the number of rows, which the model knows."""
    genre_shrinkage: float = 10.0
    recent_rows: int = 5
    vector_shrinkage: float = 20.0
    sharpness: float = 5.0
    """Weight of a support row beside a candidate: exp(sharpness * (cosine of their vectors - 1))."""


@dataclass(frozen=True)
class HistoryTasks:
    """A padded batch of tasks with the residuals of their supports."""

    batch: TaskBatch
    residual_TS: Tensor
    """0 where padded."""
    num_sets: int

    @property
    def sizes(self) -> Tensor:
        """(T, 1) rows of support."""
        return self.batch.support.mask_TR.sum(dim=1, keepdim=True)


def history_tasks(inputs: MethodInput, specs: Sequence[TaskSpec], num_sets: int) -> HistoryTasks:
    """Gather the specs' rows."""
    batch = build_batch(inputs.rows, specs)
    residual_TS = np.zeros(tuple(batch.support.mask_TR.shape), np.float32)
    for task, spec in enumerate(specs):
        rows = slice(spec.support_start, spec.support_stop)
        residual_TS[task, : spec.support_size] = inputs.rows.label[rows] - inputs.item_rate[rows]
    return HistoryTasks(batch, torch.from_numpy(residual_TS), num_sets)


def aggregates(tasks: HistoryTasks, settings: HistorySettings) -> Tensor:
    """(T, Q, NUM_AGGREGATES) numbers of the user, and of the candidate's categories among its own."""
    support, query, size_T1 = tasks.batch.support, tasks.batch.query, tasks.sizes
    assert support.label_TR is not None
    residual_TS, total_T1 = tasks.residual_TS, tasks.residual_TS.sum(dim=1, keepdim=True)
    recent_TS = residual_TS * _among_last(support.mask_TR, settings.recent_rows)
    half_TS = (support.label_TR - 0.5) * support.mask_TR
    user_TH = torch.cat(
        [
            size_T1.log1p(),
            total_T1 / (size_T1 + settings.shrinkage),
            total_T1 / (size_T1 + settings.slow_shrinkage),
            half_TS.sum(dim=1, keepdim=True) / (size_T1 + settings.shrinkage),
            recent_TS.sum(dim=1, keepdim=True) / (size_T1.clamp(max=settings.recent_rows) + settings.shrinkage),
            (residual_TS * _among_last(support.mask_TR, 1)).sum(dim=1, keepdim=True),
        ],
        dim=1,
    )
    genre_TSG = support.item_dense_TRF[..., : tasks.num_sets]
    genre_TQG = query.item_dense_TRF[..., : tasks.num_sets]
    count_TG = genre_TSG.sum(dim=1)
    rate_TG = (residual_TS.unsqueeze(2) * genre_TSG).sum(dim=1) / (count_TG + settings.genre_shrinkage)
    num_query = query.mask_TR.shape[1]
    return torch.cat([user_TH.unsqueeze(1).expand(-1, num_query, -1), _of_genres(genre_TQG, rate_TG, count_TG)], dim=2)


def _of_genres(genre_TQG: Tensor, rate_TG: Tensor, count_TG: Tensor) -> Tensor:
    """(T, Q, 3) affinity to the candidate's categories: plain mean, mean weighted by their rows, and the log of those rows."""
    rate_TG1, count_TG1 = rate_TG.unsqueeze(2), count_TG.unsqueeze(2)
    rows_TQ1 = genre_TQG @ count_TG1
    plain_TQ1 = (genre_TQG @ rate_TG1) / genre_TQG.sum(dim=2, keepdim=True).clamp(min=1.0)
    weighted_TQ1 = (genre_TQG @ (rate_TG1 * count_TG1)) / rows_TQ1.clamp(min=1.0)
    return torch.cat([plain_TQ1, weighted_TQ1, rows_TQ1.log1p()], dim=2)


def _among_last(mask_TS: Tensor, rows: int) -> Tensor:
    """1.0 for the last `rows` rows of each support."""
    left_TS = mask_TS.sum(dim=1, keepdim=True) - mask_TS.cumsum(dim=1)
    return mask_TS * (left_TS < rows)


def vector_features(tasks: HistoryTasks, item_TSK: Tensor, item_TQK: Tensor, slope: float, settings: HistorySettings) -> Tensor:
    """(T, Q, 4) VECTOR_FEATURES of candidates with vectors `item_TQK` beside supports with vectors `item_TSK`.

    pooled    <sum_j r_j v_j shrunk, v_i>
    similar   the residuals of support rows with similar vectors, weighted and shrunk
    folded    <e, v_i> of the factors e, and folded_level the level, that are most probable a posteriori (`_fold_in`)
    """
    mask_TS1, residual_TS1 = tasks.batch.support.mask_TR.unsqueeze(2), tasks.residual_TS.unsqueeze(2)
    item_TSK = item_TSK * mask_TS1
    cosine_TQS = _unit(item_TQK) @ _unit(item_TSK).transpose(1, 2)
    weight_TQS = torch.exp(settings.sharpness * (cosine_TQS - 1.0)) * mask_TS1.transpose(1, 2)
    similar_TQ1 = (weight_TQS @ residual_TS1) / (weight_TQS.sum(dim=2, keepdim=True) + 1.0)
    user_TL1 = _fold_in(item_TSK, mask_TS1, residual_TS1, slope)
    folded_TQ1 = item_TQK @ user_TL1[:, :-1]
    divisor_T11 = (tasks.sizes + settings.vector_shrinkage).unsqueeze(2)
    pooled_TQ1 = item_TQK @ ((item_TSK * residual_TS1).sum(dim=1).unsqueeze(2) / divisor_T11)
    return torch.cat([pooled_TQ1, similar_TQ1, folded_TQ1, user_TL1[:, -1:].expand_as(folded_TQ1)], dim=2)


LEVEL_PRECISION = 2.0


def _fold_in(item_TSK: Tensor, mask_TS1: Tensor, residual_TS1: Tensor, slope: float) -> Tensor:
    """(T, K + 1, 1) most probable factors and, last, level of each user, on the scale of logits.

    r = slope * (<e, v> + level) + noise of variance slope, e ~ N(0, I), level ~ N(0, 1 / LEVEL_PRECISION): a ridge regression.
    """
    with_level_TSL = torch.cat([item_TSK, mask_TS1], dim=2)
    prior_L = torch.ones(with_level_TSL.shape[2])
    prior_L[-1] = LEVEL_PRECISION
    precision_TLL = slope * with_level_TSL.transpose(1, 2) @ with_level_TSL + torch.diag(prior_L)
    found_TL1: Tensor = torch.linalg.solve(precision_TLL, with_level_TSL.transpose(1, 2) @ residual_TS1)
    return found_TL1


def _unit(item_TRK: Tensor) -> Tensor:
    unit_TRK: Tensor = item_TRK / item_TRK.norm(dim=2, keepdim=True).clamp(min=1e-6)
    return unit_TRK


class Standardised(nn.Module):
    """H features less their mean, in units of their standard deviation, as a few batches of tasks have them."""

    shift_H: Tensor
    scale_H: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("shift_H", torch.zeros(num_features))
        self.register_buffer("scale_H", torch.ones(num_features))

    def take_moments(self, features_NH: Tensor) -> None:
        self.shift_H.copy_(features_NH.mean(dim=0))
        self.scale_H.copy_(1.0 / features_NH.std(dim=0).clamp(min=1e-3))

    def forward(self, features_TQH: Tensor) -> Tensor:
        return (features_TQH - self.shift_H) * self.scale_H


def dropped(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """`x` with a share of its units dropped; none without a generator to draw them."""
    if generator is None or not share:
        return x
    return x * (torch.rand(x.shape, generator=generator) >= share) / (1.0 - share)


@torch.no_grad()
def score_tasks(
    inputs: MethodInput, specs: Sequence[TaskSpec], num_sets: int, logits: Callable[[HistoryTasks], Tensor]
) -> Floats:
    """Probability of every query row, one spec after another, from logits (T, Q) of a batch of tasks."""
    found: Floats = np.empty(sum(len(spec.query) for spec in specs))
    for part, places in in_batches(specs):
        tasks = history_tasks(inputs, part, num_sets)
        found[places] = torch.sigmoid(logits(tasks)[tasks.batch.query.mask_TR > 0].double()).numpy()
    return found


def in_batches(specs: Sequence[TaskSpec]) -> Iterator[tuple[list[TaskSpec], Indices]]:
    """The specs cut into batches of little padding, each with the places of its query rows among all query rows.

    A long query is cut into pieces; pieces of like length share a batch.
    """
    starts = np.cumsum([0] + [len(spec.query) for spec in specs])
    pieces = [
        (replace(spec, query=spec.query[at : at + _QUERY_ROWS]), start + at)
        for spec, start in zip(specs, starts, strict=False)
        for at in range(0, len(spec.query), _QUERY_ROWS)
    ]
    pieces.sort(key=lambda piece: (piece[0].support_size, len(piece[0].query)))
    while pieces:
        size = max(1, _PADDED_ROWS // (pieces[min(len(pieces), 256) - 1][0].support_size + _QUERY_ROWS))
        now, pieces = pieces[:size], pieces[size:]
        yield [spec for spec, _ in now], np.concatenate([np.arange(at, at + len(spec.query)) for spec, at in now])
