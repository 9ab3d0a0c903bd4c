"""All rows on one device, and batches gathered there by index: an outer step then waits for no copy.

N rows in all, T tasks, R rows of each
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from limaml.features.columns import UNKNOWN
from limaml.tasks.rows import Rows, SourceRows


@dataclass(frozen=True)
class CardRows:
    """What `limaml.tasks.rows.Rows.gather` reads, as tensors of a device."""

    item_index_N: Tensor
    item_dense_NF: Tensor
    user_dense_NF: Tensor
    context_NF: Tensor
    label_N: Tensor
    time_us_N: Tensor

    @classmethod
    def of(cls, source: SourceRows, device: torch.device | str) -> Self:
        encoded = source.encoded
        arrays = (
            encoded.item_index,
            encoded.item_features(),
            encoded.user_dense[:],
            encoded.context,
            source.label,
            source.timestamp_us,
        )
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def gather(self, at_TR: Tensor, mask_TR: Tensor, as_of_us_T: Tensor) -> Rows:
        """The same rows as `Rows.gather`, whose arguments these are, on the device."""
        real_TR1, gap_us_TR = mask_TR.unsqueeze(-1), as_of_us_T.unsqueeze(1) - self.time_us_N[at_TR]
        return Rows(
            item_index_TR=torch.where(mask_TR > 0, self.item_index_N[at_TR], UNKNOWN),
            item_dense_TRF=self.item_dense_NF[at_TR] * real_TR1,
            user_dense_TRF=self.user_dense_NF[at_TR] * real_TR1,
            context_TRF=self.context_NF[at_TR] * real_TR1,
            mask_TR=mask_TR,
            gap_s_TR=((gap_us_TR.double() / 1e6) * mask_TR).float(),
            label_TR=self.label_N[at_TR] * mask_TR,
        )
