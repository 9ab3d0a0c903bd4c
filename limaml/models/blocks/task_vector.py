"""The embedding itself is what is adapted.

S support rows, V numbers of a pool, K = D - 1 factors, D embedding width
"""

import torch
from torch import Tensor, nn

from limaml.models.blocks.block import MetaBlock, Params, Support
from limaml.models.blocks.pool import Pool

FACTORS, LEVEL = "factors", "level"
"""The adapted parameters: (K,) factors, which are multiplied with a row's vector, and (1,) the task's level."""

_ITEM_WEIGHT, _ITEM_DAMPING = 10.0, 10.0
"""The first multiple of the items' mean, and the rows it is shrunk by. On MovieLens' validation users weights of 5 to 20 and
shrinkages of 1 to 20 rows did alike (experiments/LOG.md)."""


class TaskVector(MetaBlock):
    """phi is a vector of D numbers; the prior is theta.

    A task starts at theta or, if the block reads items, at theta + [w * sum of the support's vectors / (rows + c), 0]: what
    somebody chose says what they like before any label does (SVD++, Koren 2008). If it reads a pool, [pool B, 0] is added, with
    B zero before training.
    """

    def __init__(self, embedding_dim: int, *, reads_items: bool, pool: Pool) -> None:
        super().__init__(embedding_dim)
        self.vector = nn.Parameter(torch.zeros(embedding_dim))
        self.item_scale = nn.Parameter(torch.ones(1)) if reads_items else None
        self.pool, self.reads_labels = pool, pool.width > 0
        self.pool_weights = nn.Parameter(torch.zeros(pool.width, embedding_dim - 1)) if pool.width else None

    def start(self, support: Support) -> Params:
        factors, level = self.vector[:-1], self.vector[-1:]
        if self.item_scale is not None:
            sum_K = (support.mask_S.unsqueeze(1) * support.vector_SK).sum(dim=0)
            factors = factors + _ITEM_WEIGHT * self.item_scale * sum_K / (support.mask_S.sum() + _ITEM_DAMPING)
        if self.pool_weights is not None:
            factors = factors + self.pool.whole(support) @ self.pool_weights
        return {FACTORS: factors, LEVEL: level}

    def embed(self, theta: Params, support: Support) -> Tensor:  # noqa: ARG002  rows speak through start and inner gradient
        return torch.cat([theta[FACTORS], theta[LEVEL]])

    def prior(self) -> Tensor:
        return self.vector


class Posterior(TaskVector):
    """The most likely task vector, given the rows and a Gaussian prior, by Newton's steps: ridge regression reweighted.

    Its variance is `limaml.meta.engine.posterior_covariance` (Laplace).
    """

    inner_step = "newton"
