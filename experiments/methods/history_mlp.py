"""The practical rival: an MLP on strong features of the user's support, trained on the same meta-batches as LiMAML.

T tasks, Q query rows, H features of the history
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.methods.fitted import Data, Design, Fitted
from experiments.methods.history import (
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
from experiments.methods.item_tables import ALL_USERS, FittedItems, LearnedItems, fitted_items, table_of
from limaml.config import Config
from limaml.evaluation.scoring_method import Floats, MethodInput, ScoringMethod
from limaml.evaluation.trained_baselines import fit_on_queries
from limaml.features.encoder import EncoderDims
from limaml.tasks.rows import TaskBatch
from limaml.tasks.sampling import TaskSpec, meta_batch

SLOPE = 0.22
"""Mean of rate * (1 - rate): what a logit moves a rate by."""
_SCALE_STEPS = 4


class HistoryMlp(nn.Module):
    """logit = MLP(row's features, history) + <weight, history>: the linear part lets a good feature act at once."""

    def __init__(self, cfg: Config, dims: EncoderDims, items: LearnedItems | FittedItems, design: Design) -> None:
        super().__init__()
        self.items, self.dropout = items, cfg.model.dropout
        self.settings = HistorySettings(**design.get("history", {}))
        self.features = list(design.get("vector_features", VECTOR_FEATURES))
        num_history = self.settings.num_aggregates(dims.item_sets) + len(self.features)
        widths = (dims.item_dense + dims.user_dense + dims.context + num_history, *cfg.model.global_hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.direct_H = nn.Parameter(torch.zeros(num_history), requires_grad=bool(design.get("direct", True)))
        self.standardised = Standardised(num_history)

    def history(self, tasks: HistoryTasks, table_T: Tensor) -> Tensor:
        """(T, Q, H), not standardised."""
        support, query = tasks.batch.support, tasks.batch.query
        known_TQH = vector_features(tasks, self.items(support, table_T), self.items(query, table_T), SLOPE, self.settings)
        wanted = [VECTOR_FEATURES.index(name) for name in self.features]
        return torch.cat([aggregates(tasks, self.settings), known_TQH[..., wanted]], dim=2)

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
        logit_TQ: Tensor = self.layers[-1](x).squeeze(2) + history_TQH @ self.direct_H
        return logit_TQ


def history_mlp(data: Data, design: Design, seed: int) -> Fitted:
    """Design: `overrides`, `vectors` ("fitted" or "learned"), `folds`, `vector_features`, `direct`, `history` (settings)."""
    cfg, dims, folds = data.configured(design, seed), data.encoder.dims, int(design.get("folds", 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if design.get("vectors", "fitted") == "fitted":
            items: LearnedItems | FittedItems = fitted_items(data.training.rows, cfg, dims, folds)
        else:
            items, folds = LearnedItems(dims.num_items, cfg.model.embedding_dim - 1), 0
        model = HistoryMlp(cfg, dims, items, design)
    validator, num_sets = data.validator, dims.item_sets

    def draw(step: int) -> tuple[TaskBatch, tuple[HistoryTasks, Tensor]]:
        specs = meta_batch(data.training.rows, cfg, seed=seed, step=step)
        tasks = history_tasks(data.training, specs, num_sets)
        return tasks.batch, (tasks, table_of([spec.entity for spec in specs], folds))

    model.standardise([draw(step)[1] for step in range(_SCALE_STEPS)])
    best, progress = fit_on_queries(
        cfg.training,
        cfg.evaluation.baseline_steps,
        model,
        draw,
        lambda average: validator.auc_of(score_history(average, num_sets)),
    )
    return Fitted(score_history(best, num_sets), progress.best_value or 0.0, notes={"best_step": progress.best_step})


def score_history(model: HistoryMlp, num_sets: int) -> ScoringMethod:
    """Score tasks with vectors of all training users."""

    def logits(tasks: HistoryTasks) -> Tensor:
        found_TQ: Tensor = model(tasks, torch.full((tasks.batch.num_tasks,), ALL_USERS))
        return found_TQ

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_tasks(inputs, specs, num_sets, logits)

    return scores
