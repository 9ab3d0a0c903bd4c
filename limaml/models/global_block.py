"""The global block (theta_global): scores rows from their features and the tasks' meta embeddings.

T tasks, R rows, F features, D embedding width, H hidden width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import ModelConfig
from limaml.data.encoding import EncoderDims
from limaml.data.rows import Rows


@dataclass(frozen=True)
class RowState:
    """What the rows alone give, computed once however many embeddings they are scored with."""

    hidden_TRH: Tensor
    item_TRD: Tensor

    def detach(self) -> "RowState":
        return RowState(self.hidden_TRH.detach(), self.item_TRD.detach())


class GlobalBlock(nn.Module):
    """An MLP over [item embedding, features, meta embeddings, meta embedding * item embedding] of each row.

    Its first layer is linear, so it is split in two: `encode` takes the rows' part, which no inner step changes, and
    `score` adds the part of the meta embeddings. Row 0 of the item embedding is the unknown item.
    """

    def __init__(self, cfg: ModelConfig, dims: EncoderDims, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.item_product = cfg.item_product
        self.dropout = cfg.dropout
        width = cfg.embedding_dim
        self.item = nn.Embedding(dims.num_items + 1, width)
        nn.init.normal_(self.item.weight, std=width**-0.5)
        self.rows = nn.Linear(width + dims.item_dense + dims.user_dense + dims.context, cfg.global_hidden[0])
        per_kind = 2 * width if cfg.item_product else width
        self.embeddings = nn.ModuleDict({kind: nn.Linear(per_kind, cfg.global_hidden[0], bias=False) for kind in kinds})
        widths = (*cfg.global_hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    def encode(self, rows: Rows) -> RowState:
        """The rows' part of the first layer, and their item embeddings."""
        item_TRD = self.item(rows.item_index_TR)
        features_TRF = torch.cat([item_TRD, rows.item_dense_TRF, rows.user_dense_TRF, rows.context_TRF], dim=-1)
        return RowState(self.rows(features_TRF), item_TRD)

    def score(self, state: RowState, embeddings: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R); `embeddings` maps each kind to (T, D). Dropout only where a generator is given."""
        x_TRH = state.hidden_TRH
        for kind in self.kinds:
            x_TRH = x_TRH + self._embedding_part(kind, embeddings[kind], state.item_TRD)
        x_TRH = F.relu(x_TRH)
        *hidden, last = self.layers
        for layer in hidden:
            x_TRH = F.relu(layer(self._drop(x_TRH, generator)))
        logits_TR1: Tensor = last(self._drop(x_TRH, generator))
        return logits_TR1.squeeze(-1)

    def forward(self, rows: Rows, embeddings: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R) of `rows`; padded rows get one too, which the caller masks."""
        return self.score(self.encode(rows), embeddings, generator)

    def _embedding_part(self, kind: str, embedding_TD: Tensor, item_TRD: Tensor) -> Tensor:
        weight_HK = self.get_parameter(f"embeddings.{kind}.weight")
        width = embedding_TD.shape[-1]
        part_TRH = F.linear(embedding_TD, weight_HK[:, :width]).unsqueeze(1)
        if self.item_product:
            part_TRH = part_TRH + F.linear(embedding_TD.unsqueeze(1) * item_TRD, weight_HK[:, width:])
        return part_TRH

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or self.dropout == 0.0:
            return x
        keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= self.dropout
        return x * keep / (1.0 - self.dropout)
