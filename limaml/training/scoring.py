"""Score tasks as they are served: embed each support once, then score its query rows with that embedding.

T tasks, R rows, F features, D embedding width
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from limaml.meta.engine import embed_tasks
from limaml.models.network import LiMAML
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TASKS_PER_BATCH = 512
_ROWS_PER_BATCH = 8192
_NO_QUERY = np.zeros(0, np.int64)


def embed_specs(network: LiMAML, rows: TaskRows, specs: Sequence[TaskSpec]) -> torch.Tensor:
    """(T, D) embeddings of the specs' supports, in their order, on the CPU."""
    # Tasks of like support size share a batch: padding costs as much as rows do.
    order = np.argsort([spec.support_size for spec in specs], kind="stable")
    embedding_TD = torch.empty(len(specs), network.embedding_dim)
    device = next(network.parameters()).device
    for start in range(0, len(order), _TASKS_PER_BATCH):
        chosen = order[start : start + _TASKS_PER_BATCH]
        batch = build_batch(rows, [replace(specs[task], query=_NO_QUERY) for task in chosen]).to(device)
        embedding_TD[torch.from_numpy(chosen)] = embed_tasks(network, batch.support, batch.entity_index_T).cpu()
    return embedding_TD


def score_specs(network: LiMAML, rows: TaskRows, specs: Sequence[TaskSpec]) -> Floats:
    """(sum of queries,) probabilities of the specs' query rows, one spec after another."""
    if not specs:
        return np.zeros(0)
    return score_with_embeddings(network, rows, specs, embed_specs(network, rows, specs))


@torch.no_grad()
def score_with_embeddings(network: LiMAML, rows: TaskRows, specs: Sequence[TaskSpec], embedding_TD: torch.Tensor) -> Floats:
    """As `score_specs`, with the specs' embeddings given."""
    index = np.concatenate([spec.query for spec in specs])
    task = torch.from_numpy(np.repeat(np.arange(len(specs)), [len(spec.query) for spec in specs]))
    device = next(network.parameters()).device
    scores: Floats = np.empty(len(index))
    for start in range(0, len(index), _ROWS_PER_BATCH):
        stop = min(start + _ROWS_PER_BATCH, len(index))
        part = flat_rows(rows, index[start:stop]).to(device)
        logits = network(part, embedding_TD[task[start:stop]].to(device))
        scores[start:stop] = torch.sigmoid(logits.double()).cpu().numpy()[:, 0]
    return scores


def flat_rows(rows: TaskRows, index: Ints) -> Rows:
    """Rows `index` as as many tasks of one row each: shapes (R, 1, ...); no padding, however unequal the queries are."""
    mask_TR = torch.ones(len(index), 1)
    return Rows(
        item_index_TR=torch.from_numpy(rows.encoded.item_index[index])[:, None],
        item_dense_TRF=torch.from_numpy(rows.encoded.item_features(index))[:, None],
        user_dense_TRF=torch.from_numpy(rows.encoded.user_dense[index])[:, None],
        context_TRF=torch.from_numpy(rows.encoded.context[index])[:, None],
        mask_TR=mask_TR,
        gap_s_TR=torch.zeros_like(mask_TR),
        label_TR=torch.from_numpy(rows.label[index])[:, None],
    )
