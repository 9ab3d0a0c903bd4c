"""The global block (theta_global): scores rows from their features and the tasks' meta embeddings.

R rows, F features, D embedding width, H hidden width; … any leading dimensions (tasks)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from limaml.config import ModelConfig
from limaml.features.encoder import EncoderDims
from limaml.models.interaction import Embeddings, Product, side_by_side
from limaml.models.item_table import ItemTable
from limaml.models.row_mlp import RowMlp
from limaml.tasks.rows import Rows


class RowState(NamedTuple):
    """What the rows alone give, computed once however many embeddings they are scored with."""

    encoded: Tensor
    """(…, R) the MLP's logit, or (…, R, H) its first layer where embeddings are inputs of it."""
    vectors: dict[str, Tensor]
    """Kind -> (…, R, D) what its embedding is multiplied with, [vector, 1]; empty without a product."""


class GlobalBlock(nn.Module):
    """logit = MLP(features) + <meta embedding, [vector, 1]>, or MLP(features, meta embedding), or both.

    Within the product the item id reaches the score through its vector alone: with an id embedding inside the MLP, and with
    the product there, training rows were learnt by heart (per-user AUC of MovieLens' validation users 66 instead of 74).
    """

    def __init__(self, cfg: ModelConfig, dims: EncoderDims, kinds: Mapping[str, bool]) -> None:
        """`kinds`: kind -> whether candidates of one request differ in its entity."""
        super().__init__()
        self.kinds = tuple(kinds)
        self.dropout = cfg.dropout
        num_beside, num_factors = dims.user_dense + dims.context, cfg.embedding_dim - 1
        # Made in every case, so that the first weights of the MLP do not depend on the interaction.
        items = ItemTable(dims.num_items, dims.item_static, num_factors, learned=cfg.item_vectors == "learned")
        with_product = cfg.interaction in ("product", "both")
        self.items = items if with_product else None
        self.product = Product(kinds, num_beside, num_factors) if with_product and kinds else None
        concat = len(kinds) * cfg.embedding_dim if cfg.interaction in ("concat", "both") else 0
        unread = 0 if cfg.mlp_reads_vectors else dims.vectors
        self.unread = slice(dims.item_static - unread, dims.item_static)
        self.mlp = RowMlp(dims.item_dense - unread + num_beside, cfg.global_hidden, concat)

    def forward(self, rows: Rows, embeddings: Embeddings, keep: Sequence[Tensor] = ()) -> Tensor:
        """Logits (…, R) of `rows`. Padded rows get one too, which the caller masks."""
        return self.score(self.encode(rows, keep), embeddings, keep)

    def shift(self, by: float) -> None:
        """Add to every logit: a loss of pairs alone leaves the level open."""
        with torch.no_grad():
            self.mlp.linears[-1].bias.add_(by)

    def draw_dropout(self, rows: Rows, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """`keep` of a pass over `rows`: for every hidden layer (…, R, H), 0 where dropped, else 1 / (1 - dropout).

        Nothing is dropped without a generator.
        """
        if generator is None or self.dropout == 0.0:
            return ()
        like = rows.item_dense_TRF
        shapes = [(*like.shape[:-1], layer.out_features) for layer in self.mlp.linears[:-1]]
        drawn = [torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype) for shape in shapes]
        return tuple(draw.ge_(self.dropout).div_(1.0 - self.dropout) for draw in drawn)

    def encode(self, rows: Rows, keep: Sequence[Tensor] = ()) -> RowState:
        """What does not depend on the embeddings."""
        vectors: dict[str, Tensor] = {}
        if self.items is not None and self.product is not None:
            item = self.items(rows.item_index_TR, rows.item_dense_TRF)
            vectors = self.product.vectors(item, rows)
        return RowState(self.mlp.encode(rows.dense_without(self.unread), keep), vectors)

    def score(self, state: RowState, embeddings: Embeddings, keep: Sequence[Tensor] = ()) -> Tensor:
        """Logits (…, R) of rows encoded with the same `keep`."""
        beside = side_by_side(self.kinds, embeddings) if self.mlp.num_beside else None
        logits = self.mlp.score(state.encoded, beside, keep)
        return logits if self.product is None else logits + self.product(state.vectors, embeddings)
