"""What a new network takes from its training rows before it is trained: item vectors, and how much its parameters move logits.

T tasks, S support rows, P numbers of all adapted parameters
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from limaml.config import Config
from limaml.features.columns import UNKNOWN
from limaml.features.encoder import EncoderDims
from limaml.meta.engine import support_logits, supports
from limaml.meta.inner_loop import Labels, jacobian
from limaml.models.blocks import Support
from limaml.models.global_block import RowState
from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network
from limaml.schema import rate_feature
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, build_batch, sample_tasks
from limaml.training.item_vectors import RATE_PRIOR, ROUNDS, ItemVectors, fit_item_vectors

_NUM_TASKS = 256
"""Tasks that gains are measured on."""
_CHAMPION_ROUNDS = 1
"""Of the factor model, from the champion's vectors on (experiments/LOG.md)."""


def warm_start(network: Network, rows: TaskRows, cfg: Config) -> None:
    """Put fitted item vectors into a new network if it is configured to have them, and its steps' gains; with several kinds the
    level of all scores, too.
    """
    items = network.global_block.items
    if items is not None and cfg.model.item_vectors == "fitted":
        items.put(fit_items(rows, cfg, network.dims))
    if rows.others:
        # Each kind would explain the share of positive rows by itself, and all of them together would overshoot.
        network.global_block.shift(_base_logit(rows))
    if rows.num_entities:
        specs = sample_tasks(rows, cfg, np.random.default_rng(0), _NUM_TASKS)
        batch = build_batch(rows, specs)
        measure_gains(network, network.kind, batch.support, batch.entity_index_T)
        for kind, tasks in batch.others.items():
            measure_gains(network, kind, tasks.support, tasks.entity_index_U)


def start_from_champion(
    network: Network, champion: Network, rows: TaskRows, cfg: Config, rounds: int = _CHAMPION_ROUNDS
) -> None:
    """Let a new network, whose vocabularies are the champion's with more behind them, begin where the champion is.

    Fitted item vectors go on from the champion's for so many rounds, and so stay in its space.
    """
    take_weights(network, champion, rows)
    items = network.global_block.items
    if items is not None and cfg.model.item_vectors == "fitted":
        begin = ItemVectors(*(part.detach().clone() for part in (items.item[1:], items.content, items.unknown_item)))
        found = fit_items(rows, cfg, network.dims, begin, rounds)
        # An item whose rows are gone keeps its vector.
        has_rows_I = torch.from_numpy(np.isin(np.arange(network.dims.num_items) + 1, rows.encoded.item_index)).unsqueeze(1)
        items.put(replace(found, vectors_IK=torch.where(has_rows_I, found.vectors_IK, begin.vectors_IK)))


@torch.no_grad()
def take_weights(network: Network, champion: Network, rows: TaskRows) -> None:
    """Copy the champion's weights. An entity new to it gets its unknown one's, an item new to it what its content says: every
    row is scored as the champion scores it.
    """
    theirs = champion.state_dict()
    for name, mine in network.state_dict().items():
        if mine.shape == theirs[name].shape:
            mine.copy_(theirs[name])
        else:
            mine[: len(theirs[name])] = theirs[name]
            mine[len(theirs[name]) :] = theirs[name][UNKNOWN]
    items, known = network.global_block.items, champion.dims.num_items
    item_R, at_R = np.unique(rows.encoded.item_index, return_index=True)
    new_R = at_R[item_R > known]
    if items is not None and len(new_R):
        features = torch.from_numpy(rows.encoded.item_features(new_R))
        items.item[item_R[item_R > known]] = items(torch.full((len(new_R),), UNKNOWN), features)


def _base_logit(rows: TaskRows) -> float:
    """Of the share of positive rows, which one row of each label keeps inside."""
    positive = float(rows.label.sum())
    return math.log((positive + 1.0) / (len(rows.label) - positive + 1.0))


def fit_items(
    rows: TaskRows, cfg: Config, dims: EncoderDims, start: ItemVectors | None = None, rounds: int = ROUNDS
) -> ItemVectors:
    """Item vectors fitted to the rows, as wide as the configured embedding's factors; `start` and `rounds` as of
    `fit_item_vectors`."""
    rate = rate_feature(cfg.features, "item")
    prior = (rate.prior, rate.prior_rows) if rate else RATE_PRIOR
    num_factors = cfg.model.embedding_dim - 1
    return fit_item_vectors(
        rows,
        num_factors,
        num_items=dims.num_items,
        num_content=dims.item_static,
        rate_prior=prior,
        content_factors=cfg.model.content_factors,
        content_ridge=cfg.model.content_ridge,
        start=start,
        rounds=rounds,
    )


@torch.no_grad()
def measure_gains(network: Network, kind: str, rows: Rows, entity_index_T: Tensor) -> None:
    """Tell a kind's Newton step how much a row's logit changes with each adapted tensor; other steps do not ask."""
    step = network.step(kind)
    if not isinstance(step, NewtonStep):
        return
    state = network.global_block.encode(rows)
    tasks = supports(network, kind, rows, entity_index_T, state)
    squares_TP = torch.func.vmap(partial(_squares, network, kind))(tasks, state)
    mean_P = squares_TP.sum(dim=0) / rows.mask_TR.sum().clamp(min=1.0)
    sizes = [step.log_rates[name].numel() for name in step.names]
    step.put_gains({name: part.sum() for name, part in zip(step.names, torch.split(mean_P, sizes), strict=True)})


def _squares(network: Network, kind: str, support: Support, state: RowState) -> Tensor:
    """(P,) sum over one task's rows of the squared gradients of their logits at theta."""
    read = network.block(kind).read(support)
    theta, ones = network.block(kind).start(read), {name: torch.ones(()) for name in network.step(kind).log_rates}
    labels = Labels(support.label_S, support.mask_S)
    return jacobian(theta, support_logits(network, kind, read, state), labels, ones).square().sum(dim=0)
