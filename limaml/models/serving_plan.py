"""What a server needs of a network to score a catalogue without torch: plain arrays.

F features, H hidden width, E numbers of all embeddings, K = D - 1 factors
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import nn

from limaml.features.columns import Floats
from limaml.features.encoder import EncodedRows
from limaml.models.global_block import GlobalBlock
from limaml.tasks.rows import Rows

Layer = tuple[Floats, Floats]
"""Weight (inputs, outputs) and bias (outputs,)."""


@dataclass(frozen=True)
class ServingPlan:
    """logit = layers([features, embeddings if `num_beside`]) + sum over kinds of <e, [vector, 1]> if there are vectors."""

    kinds: tuple[str, ...]
    layers: Sequence[Layer]
    activation: Literal["relu", "silu"]
    num_beside: int
    """E: embeddings of all kinds are the last inputs of the first layer; 0: they are none."""
    item_vectors: Callable[[EncodedRows], Floats] | None
    """Items -> (I, K) what embeddings are multiplied with; None without a product."""
    others: Mapping[str, Layer]
    """Kinds whose embedding is multiplied with a map of the features of user and context instead."""

    @classmethod
    def of(cls, block: GlobalBlock) -> Self:
        product, items = block.product, block.items

        @torch.inference_mode()
        def item_vectors(encoded: EncodedRows) -> Floats:
            assert items is not None
            rows = Rows.from_encoded(encoded)
            found: Floats = items(rows.item_index_TR, rows.item_dense_TRF)[0].numpy()
            return found

        (first, bias), *rest = [_layer(layer) for layer in block.mlp.linears]
        num_unread = block.unread.stop - block.unread.start
        others = {} if product is None else {kind: _layer(product.others[kind]) for kind in product.others}
        return cls(
            kinds=block.kinds,
            layers=[(np.insert(first, [block.unread.start] * num_unread, 0.0, axis=0), bias), *rest],
            activation="relu" if block.mlp.num_beside else "silu",
            num_beside=block.mlp.num_beside,
            item_vectors=None if product is None else item_vectors,
            others=others,
        )


def _layer(layer: nn.Module) -> Layer:
    assert isinstance(layer, nn.Linear)
    weight: Floats = layer.weight.detach().numpy().T.copy()
    bias: Floats = layer.bias.detach().numpy()
    return weight, bias
