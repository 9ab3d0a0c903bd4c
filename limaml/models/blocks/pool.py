"""What somebody took, as declared vectors of items say it: a mean over the support's positive rows, newer ones for more.

S support rows, V numbers of the items' declared vectors as they are encoded (whitened and projected, if so declared)
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from limaml.config import ModelConfig
from limaml.features.encoder import EncoderDims
from limaml.models.blocks.block import Support, age_days

_DAMPING = 10.0
"""Rows of the newest one's weight that a mean is shrunk by: nothing taken is nothing said."""


class Pool(NamedTuple):
    """sum of w x / (sum of w + c) over rows with a positive label, w = 2^(-days before the newest row / half life)."""

    width: int
    """V; 0 where no block reads a pool."""
    first: int = 0
    """Place of the vectors among a row's features."""
    half_life_days: float = 1.0

    @classmethod
    def of(cls, cfg: ModelConfig, dims: EncoderDims) -> Self:
        """As configured."""
        if cfg.pool_half_life_days is None:
            return cls(0)
        return cls(dims.vectors, dims.item_static - dims.vectors, cfg.pool_half_life_days)

    def whole(self, support: Support) -> Tensor:
        """(V,) after the last row."""
        weight_S1 = self._weights(support, age_days(support)).unsqueeze(1)
        return (weight_S1 * self._vectors(support)).sum(dim=0) / (weight_S1.sum() + _DAMPING)

    def running(self, support: Support) -> Tensor:
        """(S, V) after each row, of it and those before it."""
        age_S = age_days(support)
        weight_SS = self._weights(support, age_S - age_S.unsqueeze(1)).tril()
        return weight_SS @ self._vectors(support) / (weight_SS.sum(dim=1, keepdim=True) + _DAMPING)

    def _weights(self, support: Support, days: Tensor) -> Tensor:
        return support.label_S * support.mask_S * torch.exp2(-days.clamp(min=0.0) / self.half_life_days)

    def _vectors(self, support: Support) -> Tensor:
        return support.dense_SF[:, self.first : self.first + self.width]
