"""The practical rival: an MLP on strong features of the user's support, trained on the same meta-batches as LiMAML.

T tasks, Q query rows, H features of the history
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.evidence.fit_data import FitData
from experiments.methods.history import (
    NUM_AGGREGATES,
    VECTOR_FEATURES,
    HistorySettings,
    HistoryTasks,
    Standardised,
    aggregates,
    dropped,
    history_tasks,
    score_tasks,
    vector_features,
)
from experiments.methods.item_tables import ALL_USERS, FittedItems, fitted_items, table_of
from limaml.config import Config
from limaml.evaluation.scoring_method import Floats, MethodInput, ScoringMethod
from limaml.evaluation.trained_baselines import fit_on_queries
from limaml.features.encoder import EncoderDims
from limaml.tasks.rows import TaskBatch
from limaml.tasks.sampling import TaskSpec, meta_batch

SLOPE = 0.22
"""Mean of rate * (1 - rate): what a logit moves a rate by."""
_SCALE_STEPS, _FOLDS = 4, 4
SETTINGS = HistorySettings(shrinkage=20.0, slow_shrinkage=50.0, recent_rows=10, sharpness=10.0)
"""Won among 20 on MovieLens' validation users."""


class HistoryMlp(nn.Module):
    """logit = MLP(row's features, history)."""

    def __init__(self, cfg: Config, dims: EncoderDims, items: FittedItems) -> None:
        super().__init__()
        self.items, self.dropout = items, cfg.model.dropout
        num_history = NUM_AGGREGATES + len(VECTOR_FEATURES)
        widths = (dims.item_dense + dims.user_dense + dims.context + num_history, *cfg.model.global_hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.standardised = Standardised(num_history)

    def history(self, tasks: HistoryTasks, table_T: Tensor) -> Tensor:
        """(T, Q, H), not standardised."""
        support, query = tasks.batch.support, tasks.batch.query
        known_TQH = vector_features(tasks, self.items(support, table_T), self.items(query, table_T), SLOPE, SETTINGS)
        return torch.cat([aggregates(tasks, SETTINGS), known_TQH], dim=2)

    @torch.no_grad()
    def standardise(self, parts: Sequence[tuple[HistoryTasks, Tensor]]) -> None:
        """Take the features' moments from some tasks."""
        found_NH = torch.cat([self.history(tasks, table_T)[tasks.batch.query.mask_TR > 0] for tasks, table_T in parts])
        self.standardised.take_moments(found_NH)

    def forward(self, tasks: HistoryTasks, table_T: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, Q); units are dropped if there is a generator to draw them."""
        history_TQH = self.standardised(self.history(tasks, table_T))
        x = torch.cat([tasks.batch.query.dense, history_TQH], dim=2)
        for layer in self.layers[:-1]:
            x = dropped(F.silu(layer(x)), self.dropout, generator)
        logit_TQ: Tensor = self.layers[-1](x).squeeze(2)
        return logit_TQ


def history_mlp(data: FitData) -> ScoringMethod:
    """Fitted with the world's own schedule and widths."""
    cfg, dims, seed = data.cfg, data.encoder.dims, data.cfg.training.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HistoryMlp(cfg, dims, fitted_items(data.training.rows, cfg, dims, _FOLDS))

    def draw(step: int) -> tuple[TaskBatch, tuple[HistoryTasks, Tensor]]:
        specs = meta_batch(data.training.rows, cfg, seed=seed, step=step)
        tasks = history_tasks(data.training, specs, dims.item_sets)
        return tasks.batch, (tasks, table_of([spec.entity for spec in specs], _FOLDS))

    model.standardise([draw(step)[1] for step in range(_SCALE_STEPS)])
    best, _ = fit_on_queries(cfg, model, draw, lambda average: data.validator.auc_of(score_history(average, dims.item_sets)))
    return score_history(best, dims.item_sets)


def score_history(model: HistoryMlp, num_sets: int) -> ScoringMethod:
    """Score tasks with vectors of all training users."""

    def logits(tasks: HistoryTasks) -> Tensor:
        found_TQ: Tensor = model(tasks, torch.full((tasks.batch.num_tasks,), ALL_USERS))
        return found_TQ

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_tasks(inputs, specs, num_sets, logits)

    return scores
