"""The global block over the whole catalogue in memory: what depends on items alone is computed once, when it is loaded.

In numpy: a request is so little arithmetic that calls are what it costs (100 rows, two hidden layers: 50 us, 77 us as the same
operations in torch, 200 us through `GlobalBlock.forward`). Equal to `GlobalBlock.forward` to rounding, by test.

I items, R candidates, F features, H hidden width, K = D - 1 factors of an embedding
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from scipy.special import expit
from torch import nn

from limaml.features.columns import Floats
from limaml.features.encoder import EncodedRows
from limaml.models.global_block import GlobalBlock
from limaml.tasks.rows import Rows

_PART_ITEMS = 8192


class CatalogueScorer:
    """Scores items by their number, their row in `items`."""

    def __init__(self, block: GlobalBlock, items: EncodedRows, num_candidate: int = 0) -> None:
        """`num_candidate`: of a row's context, last, what a request has for every candidate (`EncoderDims.candidate`)."""
        first, *rest = [_parameters(layer) for layer in cast(Sequence[nn.Linear], block.layers)]
        context = items.context.shape[1] - num_candidate
        widths = items.item_width, items.user_dense.shape[1], context, num_candidate
        by_item, by_user, by_context, by_candidate, by_embedding = np.split(first[0], np.cumsum(widths))
        self._kinds = block.kinds
        self._activate = _relu if block.has_concat else _silu
        self._rest = rest
        parts = _parts(items)
        self._item_IH = _joined([part.item_features() @ by_item + first[1] for part in parts])
        self._by_user_FH = by_user
        self._by_context_FH = by_context
        self._by_candidate_FH = by_candidate
        self._by_embedding = by_embedding if block.has_concat else None
        with torch.inference_mode():
            vectors = [block.items(Rows.from_encoded(part))[0].numpy() for part in parts if block.has_product]
            self._vectors_IK = _joined(vectors) if vectors else None

    def score(
        self,
        numbers: Sequence[int],
        user_F: Floats,
        context_F: Floats,
        embeddings: Mapping[str, Floats],
        candidate_RF: Floats | None = None,
    ) -> Floats:
        """(R,) estimated probabilities of a positive label; `embeddings` maps each kind to (D,)."""
        at_R = np.array(numbers)
        beside_H = user_F @ self._by_user_FH + context_F @ self._by_context_FH
        if self._by_embedding is not None:
            beside_H += np.concatenate([embeddings[kind] for kind in self._kinds]) @ self._by_embedding
        x = self._item_IH.take(at_R, axis=0)
        x += beside_H
        if candidate_RF is not None:
            x += candidate_RF @ self._by_candidate_FH
        for weight, bias in self._rest:
            x = self._activate(x) @ weight
            x += bias
        logits_R = x[:, 0]
        if self._vectors_IK is not None:
            vectors_RK = self._vectors_IK.take(at_R, axis=0)
            for kind in self._kinds:
                logits_R += vectors_RK @ embeddings[kind][:-1] + embeddings[kind][-1]
        scores: Floats = expit(logits_R)
        return scores


def _parts(items: EncodedRows) -> Sequence[EncodedRows]:
    """All items at once or, where they have vectors, some at a time: with those beside them, items take up gigabytes."""
    if items.item_table is None or len(items) <= _PART_ITEMS:
        return [items]
    starts = range(0, len(items), _PART_ITEMS)
    return [items.take(np.arange(start, min(start + _PART_ITEMS, len(items)))) for start in starts]


def _joined(parts: Sequence[Floats]) -> Floats:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _parameters(layer: nn.Linear) -> tuple[Floats, Floats]:
    """Weight (inputs, outputs) and bias (outputs,) of a layer."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.ascontiguousarray(weight.T), bias


def _silu(x: Floats) -> Floats:
    """x * sigmoid(x), in place; numpy's tanh is vectorised and, unlike exp, does not overflow."""
    x *= 0.5
    gate = np.tanh(x)
    gate += 1.0
    x *= gate
    return x


def _relu(x: Floats) -> Floats:
    return np.maximum(x, 0.0, out=x)
