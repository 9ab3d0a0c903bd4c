"""An encoder of the support, labels included, that gives the embedding without an inner step: what gradients are held against.

S support rows, F features, K factors, V numbers of a pool, D embedding width
"""

import torch
from torch import Tensor, nn

from limaml.models.blocks.block import MetaBlock, Params, Support
from limaml.models.blocks.mlp import mlp, mlp_parameters
from limaml.models.blocks.pool import Pool
from limaml.models.blocks.task_vector import FACTORS, LEVEL

_DAMPING = 10.0
"""Rows that a mean over the support is shrunk by."""


class SupportSet(MetaBlock):
    """e = prior + mean over rows of MLP(features, vector, label), shrunk by the number of rows; their order does not count.

    Every row is read beside the whole support's pool, if there is one.
    """

    reads_labels, has_steps = True, False

    def __init__(self, num_inputs: int, hidden: tuple[int, ...], embedding_dim: int, pool: Pool) -> None:
        """`num_inputs`: F + K."""
        super().__init__(embedding_dim)
        self.pool = pool
        self.mlp = mlp_parameters((num_inputs + 1 + pool.width, *hidden, embedding_dim))
        self.vector = nn.Parameter(torch.zeros(embedding_dim))

    def start(self, read: Support) -> Params:
        pool_SV = self.pool.whole(read).expand(len(read.mask_S), -1)
        x_SI = torch.cat([read.dense_SF, read.vector_SK, read.label_S.unsqueeze(1), pool_SV], dim=1)
        sum_D = (mlp(dict(self.mlp.items()), x_SI) * read.mask_S.unsqueeze(1)).sum(dim=0)
        e_D = self.vector + sum_D / (read.mask_S.sum() + _DAMPING)
        return {FACTORS: e_D[:-1], LEVEL: e_D[-1:]}

    def embed(self, theta: Params, read: Support) -> Tensor:  # noqa: ARG002
        return torch.cat([theta[FACTORS], theta[LEVEL]])

    def prior(self) -> Tensor:
        return self.vector


class Hybrid(SupportSet):
    """A task vector whose inner steps begin where the encoder puts it."""

    has_steps = True
