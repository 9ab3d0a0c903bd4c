"""The global block (theta_global): scores rows from their features and the tasks' meta embeddings.

T tasks, R rows, F features, D embedding width, K = D - 1 factors, H hidden width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import ModelConfig
from limaml.data.encoding import UNKNOWN, EncoderDims
from limaml.data.rows import Rows

if TYPE_CHECKING:
    from limaml.models.item_vectors import ItemVectors


@dataclass(frozen=True)
class RowState:
    """What the rows alone give, computed once however many embeddings they are scored with."""

    logit_TR: Tensor
    item_TRD: Tensor

    def detach(self) -> "RowState":
        return RowState(self.logit_TR.detach(), self.item_TRD.detach())


class GlobalBlock(nn.Module):
    """logit = MLP(features) + sum over kinds of <meta embedding, item embedding>.

    The last entry of every item embedding is 1, so that the last entry of a meta embedding is the task's level; the other K
    are the item's vector. The item id reaches the score through that product alone: with an id embedding inside the MLP, and
    with the product there, training rows were learnt by heart (per-user AUC of MovieLens' validation users 66 instead of 74).
    An item outside the vocabulary gets a vector from its genres plus a trained one.
    """

    def __init__(self, cfg: ModelConfig, dims: EncoderDims, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.dropout = cfg.dropout
        self.num_genres = dims.num_genres
        num_factors, learned = cfg.embedding_dim - 1, cfg.item_vectors == "learned"
        # Row 0 is never read: the unknown item has its own parameters.
        self.item = nn.Parameter(torch.randn(dims.num_items + 1, num_factors) * 0.1, requires_grad=learned)
        self.genre = nn.Parameter(torch.zeros(dims.num_genres, num_factors), requires_grad=learned)
        self.unknown_item = nn.Parameter(torch.zeros(num_factors))
        widths = (dims.item_dense + dims.user_dense + dims.context, *cfg.global_hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    def set_item_vectors(self, found: "ItemVectors") -> None:
        """Put fitted vectors in place of the initial ones."""
        with torch.no_grad():
            self.item[1:] = found.vectors_IK
            self.genre.copy_(found.genre_weights_GK)
            self.unknown_item.copy_(found.bias_K)

    def encode(self, rows: Rows, generator: torch.Generator | None = None) -> RowState:
        """The rows' own logits and their item embeddings. Dropout only where a generator is given."""
        x = torch.cat([rows.item_dense_TRF, rows.user_dense_TRF, rows.context_TRF], dim=-1)
        *hidden, last = self.layers
        for layer in hidden:
            x = self._drop(F.silu(layer(x)), generator)
        return RowState(last(x).squeeze(-1), self._items(rows))

    def score(self, state: RowState, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Logits (T, R); `embeddings` maps each kind to (T, D)."""
        logit_TR = state.logit_TR
        for kind in self.kinds:
            logit_TR = logit_TR + torch.bmm(state.item_TRD, embeddings[kind].unsqueeze(-1)).squeeze(-1)
        return logit_TR

    def forward(self, rows: Rows, embeddings: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R) of `rows`; padded rows get one too, which the caller masks."""
        return self.score(self.encode(rows, generator), embeddings)

    def _items(self, rows: Rows) -> Tensor:
        unknown_TR1 = (rows.item_index_TR == UNKNOWN).unsqueeze(-1)
        new_TRK = rows.item_dense_TRF[..., : self.num_genres] @ self.genre + self.unknown_item
        vector_TRK = torch.where(unknown_TR1, new_TRK, F.embedding(rows.item_index_TR, self.item))
        return torch.cat([vector_TRK, torch.ones_like(vector_TRK[..., :1])], dim=-1)

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or self.dropout == 0.0:
            return x
        keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= self.dropout
        return x * keep / (1.0 - self.dropout)
