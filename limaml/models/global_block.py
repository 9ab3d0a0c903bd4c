"""The global block (theta_global): scores rows from their features and the tasks' meta embeddings.

T tasks, R rows, F features, D embedding width, K = D - 1 factors, H hidden width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import ModelConfig
from limaml.features.columns import UNKNOWN
from limaml.features.encoder import EncoderDims
from limaml.models.adapted import AdaptedVector
from limaml.models.dense import is_plain, linear, linear_relu
from limaml.models.relu_pull import relu_pull
from limaml.models.rows_mlp import along_items, mlp_logits, mlp_loss, over_items, product_loss, product_pull
from limaml.models.vector_steps import MOST_ROWS, vector_steps
from limaml.tasks.rows import Rows, TaskBatch

if TYPE_CHECKING:
    from limaml.models.item_vectors import ItemVectors


@dataclass(frozen=True)
class RowState:
    """What the rows alone give, computed once however many embeddings they are scored with."""

    logit_TR1: Tensor
    """The MLP's logit; 0 if the embedding is one of its inputs."""
    first_TRH: Tensor | None
    """What the first layer makes of the features, if the embedding is an input beside them."""
    item_TRK: Tensor | None
    """Item vectors, if the embedding is multiplied with them."""

    def cut(self, rows: slice) -> "RowState":
        """Some of the rows."""
        parts = (self.logit_TR1, self.first_TRH, self.item_TRK)
        logit_TR1, first_TRH, item_TRK = (None if part is None else part[:, rows] for part in parts)
        assert logit_TR1 is not None
        return RowState(logit_TR1, first_TRH, item_TRK)


class GlobalBlock(nn.Module):
    """logit = MLP(features) + sum over kinds of <meta embedding, [item vector, 1]>, or MLP(features, embeddings), or both.

    The last entry of a meta embedding is then the task's level. Within the product the item id reaches the score through its
    vector alone: with an id embedding inside the MLP, and with the product there, training rows were learnt by heart (per-user
    AUC of MovieLens' validation users 66 instead of 74). An item outside the vocabulary gets a vector from its static features
    plus a trained one.
    """

    def __init__(self, cfg: ModelConfig, dims: EncoderDims, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.dropout = cfg.dropout
        self.has_product = cfg.interaction in ("product", "both")
        self.has_concat = cfg.interaction in ("concat", "both") and len(kinds) > 0
        self.item_static = dims.item_static
        num_factors, learned = cfg.embedding_dim - 1, cfg.item_vectors == "learned"
        # Row 0 is never read: the unknown item has its own parameters.
        self.item = nn.Parameter(torch.randn(dims.num_items + 1, num_factors) * 0.1, requires_grad=learned)
        self.content = nn.Parameter(torch.zeros(dims.item_static, num_factors), requires_grad=learned)
        self.unknown_item = nn.Parameter(torch.zeros(num_factors))
        self.num_features = dims.item_dense + dims.user_dense + dims.context
        beside = len(kinds) * cfg.embedding_dim if self.has_concat else 0
        widths = (self.num_features + beside, *cfg.global_hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    @property
    def _layers(self) -> Sequence[nn.Linear]:
        return cast(Sequence[nn.Linear], self.layers)

    def set_item_vectors(self, found: "ItemVectors") -> None:
        """Put fitted vectors in place of the initial ones."""
        with torch.no_grad():
            self.item[1:] = found.vectors_IK
            self.content.copy_(found.content_weights_CK)
            self.unknown_item.copy_(found.bias_K)

    def forward(self, rows: Rows, embeddings: Mapping[str, Tensor], keep: Sequence[Tensor] = ()) -> Tensor:
        """Logits (T, R) of `rows`; `embeddings` maps each kind to (T, D). Padded rows get one too, which the caller masks."""
        return self.score(self.encode(rows, keep), embeddings, keep)

    def draw_dropout(self, rows: Rows, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """`keep` of a pass over `rows`: for every hidden layer (T, R, H), 0 where dropped, else 1 / (1 - dropout).

        Nothing is dropped without a generator.
        """
        if generator is None or self.dropout == 0.0:
            return ()
        like = rows.item_dense_TRF
        shapes = [(*like.shape[:2], layer.out_features) for layer in list(self._layers)[:-1]]
        drawn = [torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype) for shape in shapes]
        return tuple((draw >= self.dropout).to(like.dtype) / (1.0 - self.dropout) for draw in drawn)

    def encode(self, rows: Rows, keep: Sequence[Tensor] = ()) -> RowState:
        """What does not depend on the embeddings."""
        x = rows.dense
        item_TRK = self.items(rows) if self.has_product else None
        if self.has_concat:
            weight_HF = self._layers[0].weight[:, : self.num_features]
            return RowState(torch.zeros_like(x[..., :1]), linear(x, weight_HF, self._layers[0].bias), item_TRK)
        if not is_plain():
            return RowState(mlp_logits(x, self._weights(self._layers), keep), None, item_TRK)
        *hidden, last = self._layers
        for number, layer in enumerate(hidden):
            x = F.silu(linear(x, layer.weight, layer.bias))
            x = x * keep[number] if keep else x
        return RowState(linear(x, last.weight, last.bias), None, item_TRK)

    def encode_both(self, batch: TaskBatch, keep: Sequence[Tensor] = ()) -> tuple[RowState, RowState]:
        """States of support and query in one pass over both, `keep` being the query's."""
        num_support = batch.support.mask_TR.shape[1]
        state = self.encode(batch.beside, keep)
        return state.cut(slice(0, num_support)), state.cut(slice(num_support, None))

    def loss(
        self,
        rows: Rows,
        embeddings: Mapping[str, Tensor],
        num_tasks: int,
        keep: Sequence[Tensor] = (),
        state: RowState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum over tasks of the mean of their rows' cross-entropies, divided by `num_tasks`, and (T,) those means, detached.

        `state` where the rows are encoded already. Raises ValueError if they have no labels.
        """
        label_TR, mask_TR = rows.label_TR, rows.mask_TR
        if label_TR is None:
            raise ValueError("query rows must carry labels to have a loss, got none; build them with build_batch")
        if is_plain() or len(self.kinds) != 1:
            loss_TR = F.binary_cross_entropy_with_logits(self(rows, embeddings, keep), label_TR, reduction="none")
            per_task_T = (loss_TR * (mask_TR / mask_TR.sum(dim=1, keepdim=True).clamp(min=1.0))).sum(dim=1)
            return per_task_T.sum() / num_tasks, per_task_T.detach()
        (embedding_TD,) = embeddings.values()
        if not self.has_concat:
            state = state or self.encode(rows, keep)
            assert state.item_TRK is not None
            return product_loss(state.logit_TR1, state.item_TRK, embedding_TD, label_TR, mask_TR, num_tasks)
        layers = self._weights(self._layers)
        layers[0] = layers[0][0][:, : self.num_features], layers[0][1]
        item_TRK = self.items(rows) if self.has_product else None
        shift_TH = self._shift(embeddings)
        return mlp_loss(rows.dense, layers, embedding_TD, shift_TH, item_TRK, label_TR, mask_TR, keep, num_tasks)

    def score(self, state: RowState, embeddings: Mapping[str, Tensor], keep: Sequence[Tensor] = ()) -> Tensor:
        """Logits (T, R) of rows encoded with the same `keep`."""
        product_TR1 = self._product(state, embeddings)
        if state.first_TRH is None:
            return product_TR1.squeeze(-1)
        x = (state.first_TRH + self._shift(embeddings).unsqueeze(1)).relu_()
        *hidden, last = self._layers[1:]
        for number, layer in enumerate(hidden):
            x = linear_relu(x * keep[number] if keep else x, layer.weight, layer.bias)
        logit_TR1 = linear(x * keep[-1] if keep else x, last.weight, last.bias)
        return (logit_TR1 + product_TR1).squeeze(-1)

    def pull(self, state: RowState, embeddings: Mapping[str, Tensor], kind: str, label_TR: Tensor, mask_TR: Tensor) -> Tensor:
        """(T, D) gradient of each task's summed cross-entropy by its embedding of `kind`, written out.

        The residual sigmoid(logit) - label of every row goes back through the product and through the MLP.
        """
        if state.first_TRH is None and state.item_TRK is not None and len(self.kinds) == 1 and not is_plain():
            return product_pull(state.logit_TR1, state.item_TRK, embeddings[kind], label_TR, mask_TR)
        product_TR1 = self._product(state, embeddings)
        gradients = []
        if state.first_TRH is None:
            residual_TR1 = ((torch.sigmoid(product_TR1.squeeze(-1)) - label_TR) * mask_TR).unsqueeze(-1)
        else:
            layers, shift_TH = self._weights(self._layers[1:]), self._shift(embeddings)
            by_shift_TH, residual_TR1 = relu_pull(state.first_TRH, shift_TH, layers, product_TR1, label_TR, mask_TR)
            width, number = embeddings[kind].shape[1], self.kinds.index(kind)
            start = self.num_features + number * width
            gradients.append(by_shift_TH @ self._layers[0].weight[:, start : start + width])
        if state.item_TRK is not None:
            gradients.append(over_items(residual_TR1, state.item_TRK))
        return sum(gradients[1:], gradients[0])

    @staticmethod
    def _weights(layers: Sequence[nn.Linear]) -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight, layer.bias) for layer in layers]

    def vector_steps(
        self, state: RowState, vector: AdaptedVector, label_TR: Tensor, mask_TR: Tensor, num_steps: int
    ) -> Tensor | None:
        """(T, D) a task vector after all its steps, None where it has to take them one by one."""
        few = num_steps > 0 and mask_TR.shape[1] <= MOST_ROWS
        if state.first_TRH is not None or state.item_TRK is None or len(self.kinds) != 1 or not few or is_plain():
            return None
        return vector_steps(vector.embed(), vector.size, state.logit_TR1, state.item_TRK, label_TR, mask_TR, num_steps)

    def _shift(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """(T, H) what the embeddings add to the first layer."""
        beside_TE = torch.cat([embeddings[kind] for kind in self.kinds], dim=-1)
        return beside_TE @ self._layers[0].weight[:, self.num_features :].t()

    def _product(self, state: RowState, embeddings: Mapping[str, Tensor]) -> Tensor:
        """(T, R, 1) logits but for what goes through the MLP together with the embeddings."""
        logit_TR1 = state.logit_TR1
        if state.item_TRK is not None:
            for kind in self.kinds:
                logit_TR1 = logit_TR1 + along_items(state.item_TRK, embeddings[kind])
        return logit_TR1

    def items(self, rows: Rows) -> Tensor:
        """(T, R, K) vectors of the rows' items."""
        vector_TRK = F.embedding(rows.item_index_TR, self.item)
        unknown_TR = rows.item_index_TR == UNKNOWN
        if is_plain():
            return torch.where(unknown_TR.unsqueeze(-1), self._unknown(rows.item_dense_TRF), vector_TRK)
        # Few rows hold an unknown item: a vector for each of the others would cost more than everything else here.
        at = unknown_TR.nonzero(as_tuple=True)
        return vector_TRK.index_put(at, self._unknown(rows.item_dense_TRF[at])) if len(at[0]) else vector_TRK

    def _unknown(self, item_dense: Tensor) -> Tensor:
        return item_dense[..., : self.item_static] @ self.content + self.unknown_item
