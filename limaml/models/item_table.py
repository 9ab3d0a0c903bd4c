"""Item vectors by index, and by content for an item that training never saw.

I items, C static features, K factors
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.features.columns import UNKNOWN


class ItemVectors(Protocol):
    """What a provider gives (`limaml.training.item_vectors`): each known item's vector, and a map from content for others."""

    @property
    def vectors_IK(self) -> Tensor: ...  # noqa: N802
    @property
    def content_weights_CK(self) -> Tensor: ...  # noqa: N802
    @property
    def bias_K(self) -> Tensor: ...  # noqa: N802


class ItemTable(nn.Module):
    """(…, K) vectors of items: a row of the table, or content W + b of an item outside the vocabulary."""

    def __init__(self, num_items: int, num_static: int, num_factors: int, *, learned: bool) -> None:
        """`num_static`: C, the first of a row's item features. What is not learned stays as its provider gave it, but for b."""
        super().__init__()
        self.num_static = num_static
        # Row 0 is never read: the unknown item has its own parameters.
        self.item = nn.Parameter(torch.randn(num_items + 1, num_factors) * 0.1, requires_grad=learned)
        self.content = nn.Parameter(torch.zeros(num_static, num_factors), requires_grad=learned)
        self.unknown_item = nn.Parameter(torch.zeros(num_factors))

    def put(self, found: ItemVectors) -> None:
        """Take a provider's vectors in place of the initial ones."""
        with torch.no_grad():
            self.item[1:] = found.vectors_IK
            self.content.copy_(found.content_weights_CK)
            self.unknown_item.copy_(found.bias_K)

    def forward(self, index: Tensor, item_dense: Tensor) -> Tensor:
        """Vectors of rows whose item has this index (…) and these features (…, F)."""
        by_content = item_dense[..., : self.num_static] @ self.content + self.unknown_item
        return torch.where((index == UNKNOWN).unsqueeze(-1), by_content, F.embedding(index, self.item))
