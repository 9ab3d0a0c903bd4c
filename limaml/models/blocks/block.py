"""What a meta block (theta_meta) is: written for one task, in ordinary differentiable torch; the engine batches it.

S support rows, F features, K = D - 1 factors, D embedding width
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SECONDS_PER_DAY = 86_400.0
_FOREVER_S = 1e12
"""Longer than any history: what an empty support's newest row is away."""

Params = dict[str, Tensor]
"""What is adapted of one task: theta before, phi after."""


class Support(NamedTuple):
    """One task's support rows, oldest first, padding last; a task of too few rows has a mask of zeros."""

    dense_SF: Tensor
    vector_SK: Tensor
    """What the embedding is multiplied with in each row (of a user: item vectors); K = 0 without a product."""
    mask_S: Tensor
    """1.0 for a row, 0.0 for padding."""
    gap_s_S: Tensor
    """Seconds from the row to the task's as-of instant."""
    label_S: Tensor
    """0.0 or 1.0; all zeros for a block that does not read labels."""
    entity_index: Tensor
    """() index into the entity vocabulary, 0 for one that training never saw."""


def age_days(support: Support) -> Tensor:
    """(S,) days from each row to the newest one, not to the as-of instant: they do not change while no new row comes."""
    gap_s_S = torch.where(support.mask_S > 0, support.gap_s_S, _FOREVER_S)
    newest_s = F.pad(gap_s_S, (0, 1), value=_FOREVER_S).amin()
    return (support.gap_s_S - newest_s).clamp(min=0.0) / _SECONDS_PER_DAY


class MetaBlock(nn.Module, ABC):
    """theta -> embedding of one task. The engine adapts theta on the support's loss, then embeds once."""

    reads_labels = False
    """Labels reach a block only where they cannot be copied: `embed_rows` may let row i see the labels of rows before i, and
    `start` may see all of them, since what it gives is judged on other rows."""
    inner_step: str | None = None
    """The step that this block takes whatever `meta.inner_step` says."""
    has_steps = True
    """Whether it takes any."""
    multiplies_rows = False
    """Whether it multiplies a task's rows with one another, as attention does: matrices of the task's own, whatever is adapted
    (`limaml.embeddings.stream.precision`)."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim

    def read(self, support: Support) -> Any:
        """What the other functions get of a support, computed once: what does not depend on theta."""
        return support

    @abstractmethod
    def start(self, read: Any) -> Params:
        """Theta as the task starts from it."""

    @abstractmethod
    def embed(self, theta: Params, read: Any) -> Tensor:
        """(D,) the meta embedding."""

    @abstractmethod
    def prior(self) -> Tensor:
        """(D,) `embed` of an empty support of an unknown entity."""

    def embed_rows(self, theta: Params, read: Any) -> Tensor:
        """(1, D), or (S, D) where every row's inner loss has an embedding of its own."""
        return self.embed(theta, read).unsqueeze(0)

    def pull_rows(self, theta: Params, read: Any, by_rows_SD: Tensor) -> Params:
        """(S, ...) gradient by each tensor of row i of `embed_rows` times row i of `by_rows_SD`.

        Only called where every row has an embedding of its own. This one is right for any block and goes through all rows once
        a row; a block that knows how a row depends on theta may say so.
        """
        found: Params = torch.func.jacrev(lambda at: (self.embed_rows(at, read) * by_rows_SD).sum(dim=1))(theta)
        return found
