"""The global block over the whole catalogue in memory: what depends on items alone is computed once, when it is loaded.

In numpy: a request is so little arithmetic that calls are what it costs (100 rows, two hidden layers: 50 us, 77 us as the same
operations in torch, 200 us through the network's own forward pass). Equal to that pass to rounding, by test.

    I items, R candidates, F features, H hidden width, D embedding width, K = D - 1 factors
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from scipy.special import expit

from limaml.features.columns import Floats
from limaml.features.encoder import EncodedRows
from limaml.models.network import Network
from limaml.models.serving_plan import ServingPlan
from limaml.tasks.rows import Rows

_PART_ITEMS = 8192


class Scorer(Protocol):
    """Scores items by their number, their row in the catalogue."""

    def score(
        self,
        numbers: Sequence[int],
        user_F: Floats,
        context_F: Floats,
        embeddings: Mapping[str, Floats],
        candidate_RF: Floats | None = None,
    ) -> Floats:
        """(R,) estimated probabilities of a positive label; `embeddings` maps each kind to (D,), or to (R, D) of candidates."""


def catalogue_scorer(network: Network, items: EncodedRows, num_candidate: int = 0) -> Scorer:
    """By the network's serving plan or, where it has none, through the network itself.

    `num_candidate`: of a row's context, last, what a request has for every candidate (`EncoderDims.candidate`).
    """
    plan = network.serving_plan()
    return NetworkScorer(network, items) if plan is None else PlannedScorer(plan, items, num_candidate)


class PlannedScorer:
    """A serving plan over a catalogue."""

    def __init__(self, plan: ServingPlan, items: EncodedRows, num_candidate: int) -> None:
        (weight, bias), *self._rest = plan.layers
        context = items.context.shape[1] - num_candidate
        widths = items.item_width, items.user_dense.shape[1], context, num_candidate
        by_item, self._by_user, self._by_context, self._by_candidate, self._by_embedding = np.split(weight, np.cumsum(widths))
        self._kinds, self._num_beside = plan.kinds, plan.num_beside
        self._activate = _relu if plan.activation == "relu" else _silu
        parts = _parts(items)
        self._item_IH = _joined([part.item_features() @ by_item + bias for part in parts])
        vectors = None if plan.item_vectors is None else _joined([plan.item_vectors(part) for part in parts])
        self._vectors_IK = vectors
        self._others = {kind: (*np.split(w, np.cumsum(widths[1:])[:-1]), b) for kind, (w, b) in plan.others.items()}

    def score(
        self,
        numbers: Sequence[int],
        user_F: Floats,
        context_F: Floats,
        embeddings: Mapping[str, Floats],
        candidate_RF: Floats | None = None,
    ) -> Floats:
        at_R = np.array(numbers)
        beside = user_F @ self._by_user + context_F @ self._by_context
        if self._num_beside:
            beside = beside + self._side_by_side(embeddings, len(at_R)) @ self._by_embedding
        x = self._item_IH.take(at_R, axis=0)
        x += beside
        if candidate_RF is not None:
            x += candidate_RF @ self._by_candidate
        for weight, bias in self._rest:
            x = self._activate(x) @ weight
            x += bias
        logits_R = x[:, 0]
        if self._vectors_IK is not None:
            vectors_RK = self._vectors_IK.take(at_R, axis=0)
            for kind in self._kinds:
                e = embeddings[kind]
                if kind in self._others:
                    logits_R += (self._other(kind, user_F, context_F, candidate_RF) * e[..., :-1]).sum(-1) + e[..., -1]
                else:
                    logits_R += vectors_RK @ e[:-1] + e[-1]
        scores: Floats = expit(logits_R)
        return scores

    def _side_by_side(self, embeddings: Mapping[str, Floats], num_rows: int) -> Floats:
        """(E,) or, where a kind's differ from row to row, (R, E)."""
        found = [embeddings[kind] for kind in self._kinds]
        if any(e.ndim == 2 for e in found):
            found = [np.broadcast_to(e, (num_rows, e.shape[-1])) for e in found]
        joined: Floats = np.concatenate(found, axis=-1)
        return joined

    def _other(self, kind: str, user_F: Floats, context_F: Floats, candidate_RF: Floats | None) -> Floats:
        """(K,) or (R, K) what an item's embedding is multiplied with."""
        by_user, by_context, by_candidate, bias = self._others[kind]
        found: Floats = user_F @ by_user + context_F @ by_context + bias
        return found if candidate_RF is None else found + candidate_RF @ by_candidate


class NetworkScorer:
    """Any network, through its own forward pass."""

    def __init__(self, network: Network, items: EncodedRows) -> None:
        self._network, self._items = network, items

    @torch.inference_mode()
    def score(
        self,
        numbers: Sequence[int],
        user_F: Floats,
        context_F: Floats,
        embeddings: Mapping[str, Floats],
        candidate_RF: Floats | None = None,
    ) -> Floats:
        at_R = np.array(numbers)
        rows, context = Rows.from_encoded(self._items.take(at_R)), [np.tile(context_F, (len(at_R), 1))]
        context += [] if candidate_RF is None else [candidate_RF]
        user = torch.from_numpy(np.tile(user_F, (len(at_R), 1)))
        asked = Rows(
            rows.item_index_TR,
            rows.item_dense_TRF,
            user[None],
            torch.from_numpy(np.concatenate(context, axis=1))[None],
            rows.mask_TR,
            rows.gap_s_TR,
        )
        found = {kind: torch.from_numpy(np.atleast_2d(e))[None] for kind, e in embeddings.items()}
        logits_1R = self._network(asked, found)
        scores: Floats = torch.sigmoid(logits_1R)[0].numpy()
        return scores


def _parts(items: EncodedRows) -> Sequence[EncodedRows]:
    """All items at once or, where they have vectors, some at a time: with those beside them, items take up gigabytes."""
    if items.item_table is None or len(items) <= _PART_ITEMS:
        return [items]
    starts = range(0, len(items), _PART_ITEMS)
    return [items.take(np.arange(start, min(start + _PART_ITEMS, len(items)))) for start in starts]


def _joined(parts: Sequence[Floats]) -> Floats:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _silu(x: Floats) -> Floats:
    """x * sigmoid(x), in place; numpy's tanh is vectorised and, unlike exp, does not overflow."""
    x *= 0.5
    gate = np.tanh(x)
    gate += 1.0
    x *= gate
    return x


def _relu(x: Floats) -> Floats:
    return np.maximum(x, 0.0, out=x)
