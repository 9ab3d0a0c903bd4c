"""The practical rival: an MLP on strong features of the user's support, trained on the same meta-batches as LiMAML.

The same MLP beside LiMAML is LiMAML with history features in the stored vector: sums over the same support, of a fixed size,
stored with what is adapted. The inner loop does not see them: they hold labels of the very rows whose loss it takes.

T tasks, Q query rows, H features of the history
"""

from collections.abc import Sequence
from dataclasses import replace
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
from limaml.meta.engine import adapt, embed_tasks
from limaml.models.network import Network, build_network
from limaml.tasks.rows import TaskBatch
from limaml.tasks.sampling import TaskSpec, meta_batch
from limaml.training import shrinkage
from limaml.training.checkpoint import Progress
from limaml.training.warm_start import warm_start

SLOPE = 0.22
"""Mean of rate * (1 - rate): what a logit moves a rate by."""
_SCALE_STEPS, _FOLDS = 4, 4
STORABLE = ("pooled", "folded", "folded_level")
"""Of `VECTOR_FEATURES` what follows from a vector of fixed size: similar rows would need the rows."""
SETTINGS = HistorySettings(shrinkage=20.0, slow_shrinkage=50.0, recent_rows=10, sharpness=10.0)
"""Won among 20 on MovieLens' validation users."""


class HistoryMlp(nn.Module):
    """logit = MLP(row's features, history); beside a network its logit + MLP, which starts at zero."""

    def __init__(self, cfg: Config, dims: EncoderDims, items: FittedItems, network: Network | None = None) -> None:
        super().__init__()
        self.items, self.dropout, self.network = items, cfg.model.dropout, network
        self.read = [at for at, name in enumerate(VECTOR_FEATURES) if network is None or name in STORABLE]
        num_history = NUM_AGGREGATES + len(self.read)
        widths = (dims.item_dense + dims.user_dense + dims.context + num_history, *cfg.model.global_hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.standardised = Standardised(num_history)
        for parameter in self.layers[-1].parameters() if network is not None else ():
            nn.init.zeros_(parameter)

    def history(self, tasks: HistoryTasks, table_T: Tensor) -> Tensor:
        """(T, Q, H), not standardised."""
        support, query = tasks.batch.support, tasks.batch.query
        known_TQH = vector_features(tasks, self.items(support, table_T), self.items(query, table_T), SLOPE, SETTINGS)
        return torch.cat([aggregates(tasks, SETTINGS), known_TQH[..., self.read]], dim=2)

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
        if self.network is None:
            return logit_TQ
        batch, network = tasks.batch, self.network
        embed = adapt if torch.is_grad_enabled() else embed_tasks
        embeddings = {network.kind: embed(network, network.kind, batch.support, batch.entity_index_T)}
        both_TQ: Tensor = logit_TQ + network(batch.query, embeddings, generator)
        return both_TQ


def history_mlp(data: FitData) -> ScoringMethod:
    """Fitted with the world's own schedule and widths."""
    return _fitted(data)[0]


def with_history(data: FitData) -> tuple[ScoringMethod, Progress]:
    """LiMAML with history features in the stored vector, in as many steps as LiMAML; and how far it came."""
    evaluation = data.cfg.evaluation.model_copy(update={"baseline_steps": data.cfg.training.max_steps})
    cfg = data.cfg.model_copy(update={"evaluation": evaluation})
    network = build_network(cfg, data.encoder.dims, cfg.training.seed)
    warm_start(network, data.training.rows, cfg)
    return _fitted(replace(data, cfg=cfg), network)


def _fitted(data: FitData, network: Network | None = None) -> tuple[ScoringMethod, Progress]:
    cfg, dims, seed = data.cfg, data.encoder.dims, data.cfg.training.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HistoryMlp(cfg, dims, fitted_items(data.training.rows, cfg, dims, _FOLDS), network)

    def draw(step: int) -> tuple[TaskBatch, tuple[HistoryTasks, Tensor]]:
        specs = meta_batch(data.training.rows, cfg, seed=seed, step=step)
        tasks = history_tasks(data.training, specs, dims.item_sets)
        return tasks.batch, (tasks, table_of([spec.entity for spec in specs], _FOLDS))

    model.standardise([draw(step)[1] for step in range(_SCALE_STEPS)])

    def value(average: HistoryMlp) -> float:
        return data.validator.auc_of(score_history(average, dims.item_sets))

    best, progress = fit_on_queries(cfg, model, draw, value)
    if best.network is not None:
        shrinkage.choose(best.network, lambda: value(best))
    return score_history(best, dims.item_sets), progress


def score_history(model: HistoryMlp, num_sets: int) -> ScoringMethod:
    """Score tasks with vectors of all training users."""

    def logits(tasks: HistoryTasks) -> Tensor:
        found_TQ: Tensor = model(tasks, torch.full((tasks.batch.num_tasks,), ALL_USERS))
        return found_TQ

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_tasks(inputs, specs, num_sets, logits)

    return scores
