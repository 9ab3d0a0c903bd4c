"""Inner and outer loop of T tasks at once. Equal to `limaml.meta.reference` (a plain loop over tasks), which is the truth.

Tasks do not touch each other inside the loop. The inner gradient is written out, by the global block down to the embedding
and by the meta block from there (`GlobalBlock.pull`, `Adapted.pull`), so the outer gradient takes one backward pass and no
graph of a graph.

    T tasks, S support rows, Q query rows, D embedding width
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limaml.data.rows import Rows, TaskBatch
from limaml.models.network import LiMAML


@dataclass(frozen=True)
class OuterLoss:
    """Loss of one meta-batch."""

    loss: Tensor
    """Scalar: mean over tasks of the mean over their query rows."""
    per_task_T: Tensor
    """(T,) detached; 0 for a task without query rows, which takes no part."""
    embedding_TD: Tensor
    """(T, D) the embeddings that the query rows were scored with."""


def adapt(
    network: LiMAML, support: Rows, entity_index_T: Tensor, *, num_steps: int | None = None, second_order: bool | None = None
) -> Tensor:
    """(T, D) embeddings of T supports after `num_steps` inner steps; unset arguments come from the configuration.

    phi_{k+1} = phi_k - rate / (rows + c) * grad (sum of the support rows' losses at phi_k)
    (Finn et al. 2017, algorithm 1; rate per parameter: Li et al. 2017; so is c)
    The embeddings are a function of theta through the steps; first order treats each gradient as a constant. Raises ValueError
    if the rows have no labels.
    """
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    second = network.meta_config.second_order if second_order is None else second_order
    if support.label_TR is None:
        raise ValueError("support rows must carry labels to be adapted on, got none; build them with build_batch")
    gradients: AbstractContextManager[object] = nullcontext() if second else torch.no_grad()
    sizes = network.step_sizes(support.mask_TR.sum(dim=1))
    block = network.meta.start(entity_index_T, support.unlabelled(), sizes)
    with gradients:
        state = network.global_block.encode(support)
    for _ in range(steps):
        with gradients:
            embeddings = {network.kind: block.embed()}
            grad_TD = network.global_block.pull(state, embeddings, network.kind, support.label_TR, support.mask_TR)
            moves = block.pull(grad_TD)
        block.move(moves)
    return block.embed()


@torch.no_grad()
def embed_tasks(network: LiMAML, support: Rows, entity_index_T: Tensor, *, num_steps: int | None = None) -> Tensor:
    """(T, D) embeddings of T supports, with no graph kept: adaptation as it runs offline. Same values as `outer_loss`'s."""
    return adapt(network, support, entity_index_T, num_steps=num_steps)


def outer_loss(
    network: LiMAML,
    batch: TaskBatch,
    *,
    generator: torch.Generator | None = None,
    num_steps: int | None = None,
    second_order: bool | None = None,
    num_tasks: int | None = None,
) -> OuterLoss:
    """Adapt on the supports, embed, and score the queries; `loss` carries the graph back to theta_meta and theta_global.

    Dropout on the query rows only where a generator is given. `num_tasks` divides the sum over tasks; by default the tasks
    that have query rows.
    """
    embedding_TD = adapt(network, batch.support, batch.entity_index_T, num_steps=num_steps, second_order=second_order)
    per_task_T = query_loss(network, batch.query, embedding_TD, network.global_block.draw_dropout(batch.query, generator))
    count = num_tasks if num_tasks is not None else int((batch.query.mask_TR.sum(dim=1) > 0).sum())
    return OuterLoss(per_task_T.sum() / max(count, 1), per_task_T.detach(), embedding_TD)


def query_loss(network: LiMAML, query: Rows, embedding_TD: Tensor, keep: Sequence[Tensor] = ()) -> Tensor:
    """(T,) mean cross-entropy of each task's query rows; 0 for a task without any. Raises ValueError without labels."""
    if query.label_TR is None:
        raise ValueError("query rows must carry labels to have a loss, got none; build them with build_batch")
    logits_TQ = network.global_block(query, {network.kind: embedding_TD}, keep)
    loss_TQ = F.binary_cross_entropy_with_logits(logits_TQ, query.label_TR, reduction="none") * query.mask_TR
    return loss_TQ.sum(dim=1) / query.mask_TR.sum(dim=1).clamp(min=1.0)
