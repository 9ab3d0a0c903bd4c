"""Losses of a task's scored rows.

T tasks, R rows (Q query), D embedding width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from limaml.models.network import Network
from limaml.tasks.rows import Rows


@dataclass(frozen=True)
class OuterLoss:
    """Loss of one meta-batch."""

    loss: Tensor
    """Scalar: mean over tasks of the mean over their query rows."""
    per_task_T: Tensor
    """(T,) detached; 0 for a task without query rows, which takes no part."""
    embedding_TD: Tensor
    """(T, D) the embeddings that the query rows were scored with."""


def pointwise(logit_TR: Tensor, label_TR: Tensor, mask_TR: Tensor) -> Tensor:
    """(T,) mean over each task's rows of their cross-entropy; 0 without rows."""
    loss_TR = F.binary_cross_entropy_with_logits(logit_TR, label_TR, reduction="none")
    return (loss_TR * (mask_TR / mask_TR.sum(dim=1, keepdim=True).clamp(min=1.0))).sum(dim=1)


def pairwise(logit_TR: Tensor, label_TR: Tensor, mask_TR: Tensor) -> Tensor:
    """(T,) mean over each task's pairs of a positive row i and a negative row j of softplus(z_j - z_i); 0 without pairs.

    RankNet (Burges et al. 2005): what can change the order of a task's rows, and nothing else.
    """
    positive_TR, negative_TR = label_TR * mask_TR, (1.0 - label_TR) * mask_TR
    pair_TRR = positive_TR.unsqueeze(2) * negative_TR.unsqueeze(1)
    loss_TRR = F.softplus(logit_TR.unsqueeze(1) - logit_TR.unsqueeze(2))
    return (loss_TRR * pair_TRR).sum(dim=(1, 2)) / pair_TRR.sum(dim=(1, 2)).clamp(min=1.0)


def mixed(logit_TR: Tensor, label_TR: Tensor, mask_TR: Tensor, pairwise_share: float) -> Tensor:
    """(T,) both, the second with this share."""
    if pairwise_share == 0.0:
        return pointwise(logit_TR, label_TR, mask_TR)
    pairs_T = pairwise(logit_TR, label_TR, mask_TR) * pairwise_share
    return pairs_T if pairwise_share == 1.0 else pairs_T + (1.0 - pairwise_share) * pointwise(logit_TR, label_TR, mask_TR)


def query_loss(network: Network, query: Rows, embeddings: Mapping[str, Tensor], keep: Sequence[Tensor] = ()) -> Tensor:
    """(T,) the configured loss of each task's query rows; 0 without rows. Raises ValueError if they have no labels.

    Embeddings are (T, D) of tasks or (T, Q, D) of rows.
    """
    if query.label_TR is None:
        raise ValueError("query rows must carry labels to have a loss, got none; build them with build_batch")
    logit_TQ = network.score(query, embeddings, keep)
    return mixed(logit_TQ, query.label_TR, query.mask_TR, network.meta_config.pairwise_share)
