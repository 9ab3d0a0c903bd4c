"""LiMAML with history features in the stored vector: what is adapted, and beside it fixed sums over the same support.

The stored vector is [meta embedding, the user's aggregates, two pooled item vectors]; a second small network reads the sums
with the candidate's features and adds to LiMAML's logit. The inner loop does not see them: they hold labels of the very rows
whose loss it takes.

T tasks, Q query rows, H features of the history
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.methods.cross_fit import cross_fitted
from experiments.methods.fitted import Design, Fitted
from experiments.methods.history import (
    HistorySettings,
    HistoryTasks,
    Standardised,
    aggregates,
    dropped,
    history_tasks,
    pooled_features,
    score_tasks,
)
from experiments.origin_data import OriginData
from limaml.config import Config
from limaml.evaluation.scoring_method import Floats, MethodInput, MethodValidator, ScoringMethod
from limaml.evaluation.trained_baselines import fit_on_queries
from limaml.features.encoder import EncoderDims
from limaml.meta.engine import adapt, embed_tasks
from limaml.models.network import build_network
from limaml.tasks.rows import TaskBatch
from limaml.tasks.sampling import TaskSpec, meta_batch
from limaml.training.warm_start import warm_start

_POOLED = 2
_SCALE_STEPS = 4


class HistoryLiMAML(nn.Module):
    """logit = LiMAML + MLP(row's features, history) + <weight, history>; the last two start at zero."""

    def __init__(self, cfg: Config, dims: EncoderDims, settings: HistorySettings, hidden: int) -> None:
        super().__init__()
        self.network = build_network(cfg, dims, cfg.training.seed)
        self.settings = settings
        num_history = settings.num_aggregates(dims.item_sets) + _POOLED
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.training.seed)
            self.first = nn.Linear(dims.item_dense + dims.user_dense + dims.context + num_history, hidden)
        self.last = nn.Parameter(torch.zeros(hidden))
        self.direct_H = nn.Parameter(torch.zeros(num_history))
        self.standardised = Standardised(num_history)

    def history(self, tasks: HistoryTasks) -> Tensor:
        """(T, Q, H), not standardised."""
        batch, items = tasks.batch, self.network.global_block.items
        assert items is not None
        item_TSK, item_TQK = (items(rows.item_index_TR, rows.item_dense_TRF).detach() for rows in (batch.support, batch.query))
        return torch.cat([aggregates(tasks, self.settings), pooled_features(tasks, item_TSK, item_TQK, self.settings)], dim=2)

    @torch.no_grad()
    def standardise(self, parts: Sequence[HistoryTasks]) -> None:
        """Take the features' moments from some tasks."""
        found_NH = torch.cat([self.history(tasks)[tasks.batch.query.mask_TR > 0] for tasks in parts])
        self.standardised.take_moments(found_NH)

    def forward(self, tasks: HistoryTasks, generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, Q); units are dropped if there is a generator to draw them."""
        batch, network = tasks.batch, self.network
        embed = adapt if torch.is_grad_enabled() else embed_tasks
        embeddings = {network.kind: embed(network, network.kind, batch.support, batch.entity_index_T)}
        logit_TQ: Tensor = network(batch.query, embeddings, generator)
        history_TQH: Tensor = self.standardised(self.history(tasks))
        x = F.silu(self.first(torch.cat([batch.query.dense, history_TQH], dim=2)))
        x = dropped(x, network.global_block.dropout, generator)
        return logit_TQ + x @ self.last + history_TQH @ self.direct_H


def history(data: OriginData, design: Design, seed: int) -> Fitted:
    """Design: `overrides`, `history` (settings), `hidden`, `folds` of the item vectors' cross-fitting."""
    cfg, dims = data.configured(design, seed), data.encoder.dims
    model = HistoryLiMAML(cfg, dims, HistorySettings(**design.get("history", {})), int(design.get("hidden", 32)))
    warm_start(model.network, data.training.rows, cfg)
    rows = cross_fitted(model.network, data.training.rows, cfg, int(design.get("folds", 4)))
    training = replace(data.training, rows=rows)
    validator, num_sets = MethodValidator(data.validation, cfg), dims.item_sets

    def draw(step: int) -> tuple[TaskBatch, tuple[HistoryTasks]]:
        tasks = history_tasks(training, meta_batch(rows, cfg, seed=seed, step=step), num_sets)
        return tasks.batch, (tasks,)

    model.standardise([draw(step)[1][0] for step in range(_SCALE_STEPS)])
    best, progress = fit_on_queries(
        cfg.training, cfg.training.max_steps, model, draw, lambda average: validator.auc_of(_scores(average, num_sets))
    )
    return Fitted(_scores(best, num_sets), progress.best_value or 0.0, notes={"best_step": progress.best_step})


def _scores(model: HistoryLiMAML, num_sets: int) -> ScoringMethod:
    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_tasks(inputs, specs, num_sets, model)

    return scores
