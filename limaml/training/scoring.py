"""Score tasks as they are served: embed each support once, then score its query rows with that embedding.

With several kinds a row is scored with the embeddings of all of them, as of its task's instant.

T tasks, U tasks of another kind, R rows, F features, D embedding width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from limaml.meta.engine import embed_tasks
from limaml.models.network import Network
from limaml.tasks.other_entities import OtherEntities, distinct_tasks
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TASKS_PER_BATCH = 512
_ROWS_PER_BATCH = 8192
_NO_QUERY = np.zeros(0, np.int64)


def embed_specs(network: Network, rows: TaskRows, specs: Sequence[TaskSpec]) -> torch.Tensor:
    """(T, D) embeddings of the specs' supports, in their order, on the CPU."""
    # Tasks of like support size share a batch: padding costs as much as rows do.
    order = np.argsort([spec.support_size for spec in specs], kind="stable")
    embedding_TD = torch.empty(len(specs), network.embedding_dim)
    device = next(network.parameters()).device
    for start in range(0, len(order), _TASKS_PER_BATCH):
        chosen = order[start : start + _TASKS_PER_BATCH]
        batch = build_batch(rows, [replace(specs[task], query=_NO_QUERY) for task in chosen]).to(device)
        embedding_TD[torch.from_numpy(chosen)] = embed_tasks(network, network.kind, batch.support, batch.entity_index_T).cpu()
    return embedding_TD


@dataclass(frozen=True)
class OtherEmbeddings:
    """A kind's entities as of the instants of some specs, behind the first kind."""

    entities: OtherEntities
    entity_U: Ints
    as_of_us_U: Ints
    """In order of entity, then instant."""
    embedding_UD: torch.Tensor
    """The kind's prior where there is no row before the instant."""

    def of(self, query_R: Ints, as_of_us_R: Ints) -> torch.Tensor:
        """(R, D) of the entities of these rows as of these instants; only of those that were embedded."""
        wanted = self._keys(self.entities.entity[query_R], as_of_us_R)
        return self.embedding_UD[torch.from_numpy(np.searchsorted(self._known, wanted))]

    @cached_property
    def _instants(self) -> Ints:
        found: Ints = np.unique(self.as_of_us_U)
        return found

    @cached_property
    def _known(self) -> Ints:
        return self._keys(self.entity_U, self.as_of_us_U)

    def _keys(self, entity: Ints, as_of_us: Ints) -> Ints:
        keys: Ints = entity * len(self._instants) + np.searchsorted(self._instants, as_of_us)
        return keys


def embed_others(network: Network, rows: TaskRows, specs: Sequence[TaskSpec]) -> dict[str, OtherEmbeddings]:
    """Embeddings that the specs' query rows are scored with beside their own tasks', by kind; none with one kind."""
    return {kind: _embed_others(network, rows, kind, specs) for kind in rows.others}


@torch.no_grad()
def _embed_others(network: Network, rows: TaskRows, kind: str, specs: Sequence[TaskSpec]) -> OtherEmbeddings:
    entities, (query_R, as_of_us_R) = rows.others[kind], _queries(specs)
    entity_U, as_of_us_U, _ = distinct_tasks(entities.entity[query_R], as_of_us_R)
    device = next(network.parameters()).device
    embedding_UD = network.block(kind).prior().detach().cpu().repeat(len(entity_U), 1)
    first_U, stop_U = entities.supports(entity_U, as_of_us_U)
    order = np.argsort(stop_U - first_U, kind="stable")
    order = order[(stop_U > first_U)[order]]
    for start in range(0, len(order), _TASKS_PER_BATCH):
        chosen = order[start : start + _TASKS_PER_BATCH]
        support = entities.gather(rows, entity_U[chosen], as_of_us_U[chosen]).to(device)
        index_U = torch.from_numpy(entities.entity_index[entity_U[chosen]]).to(device)
        embedding_UD[torch.from_numpy(chosen)] = embed_tasks(network, kind, support, index_U).cpu()
    return OtherEmbeddings(entities, entity_U, as_of_us_U, embedding_UD)


def score_specs(
    network: Network, rows: TaskRows, specs: Sequence[TaskSpec], others: Mapping[str, OtherEmbeddings] | None = None
) -> Floats:
    """(sum of queries,) probabilities of the specs' query rows, one spec after another.

    `others`: `embed_others` of these specs, or of more, so that lists of specs with the same rows need it once.
    """
    if not specs:
        return np.zeros(0)
    return score_with_embeddings(network, rows, specs, embed_specs(network, rows, specs), others)


@torch.no_grad()
def score_with_embeddings(
    network: Network,
    rows: TaskRows,
    specs: Sequence[TaskSpec],
    embedding_TD: torch.Tensor,
    others: Mapping[str, OtherEmbeddings] | None = None,
) -> Floats:
    """As `score_specs`, with the specs' embeddings given."""
    others = embed_others(network, rows, specs) if others is None else others
    index, as_of_us = _queries(specs)
    task = torch.from_numpy(np.repeat(np.arange(len(specs)), [len(spec.query) for spec in specs]))
    device = next(network.parameters()).device
    scores: Floats = np.empty(len(index))
    for start in range(0, len(index), _ROWS_PER_BATCH):
        stop = min(start + _ROWS_PER_BATCH, len(index))
        part = flat_rows(rows, index[start:stop]).to(device)
        embeddings = {network.kind: embedding_TD[task[start:stop]].to(device)}
        for kind, found in others.items():
            embeddings[kind] = found.of(index[start:stop], as_of_us[start:stop]).to(device)
        logits = network(part, embeddings)
        scores[start:stop] = torch.sigmoid(logits.double()).cpu().numpy()[:, 0]
    return scores


def _queries(specs: Sequence[TaskSpec]) -> tuple[Ints, Ints]:
    """(R,) row numbers of all query rows, and the instants of their tasks."""
    rows = [spec.query for spec in specs]
    instants = np.array([spec.as_of_us for spec in specs], np.int64)
    return np.concatenate([_NO_QUERY, *rows]), np.repeat(instants, [len(each) for each in rows])


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
