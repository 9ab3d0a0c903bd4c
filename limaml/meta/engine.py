"""Inner and outer loop batched over tasks: per-task parameters are tensors whose leading dimension is the task.

Tasks do not touch each other inside the loop, so the gradient of the sum of their losses holds each task's own gradient.
Equal to `limaml.meta.reference` (a plain loop over tasks), which is the truth.

    T tasks, S support rows, Q query rows, D embedding width
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limaml.data.rows import Rows, TaskBatch
from limaml.models.meta_blocks import Params
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
) -> Params:
    """phi of every task after `num_steps` inner steps, still a function of theta; unset arguments come from the configuration.

    phi_{k+1} = phi_k - rate / (rows + c) * grad (sum of the support rows' losses at phi_k)
    (Finn et al. 2017, algorithm 1; rate per parameter: Li et al. 2017; so is c)
    First order treats the gradient as a constant.
    """
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    second = network.meta_config.second_order if second_order is None else second_order
    return _adapt(network, support, entity_index_T, steps, keep_graph=True, second_order=second)


def embed_tasks(network: LiMAML, support: Rows, entity_index_T: Tensor, *, num_steps: int | None = None) -> Tensor:
    """(T, D) embeddings of T supports, with no graph kept: adaptation as it runs offline. Same values as `outer_loss`'s."""
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    phi = _adapt(network, support, entity_index_T, steps, keep_graph=False, second_order=False)
    with torch.no_grad():
        return network.meta.embed(phi, support.unlabelled())


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
    phi = adapt(network, batch.support, batch.entity_index_T, num_steps=num_steps, second_order=second_order)
    embedding_TD = network.meta.embed(phi, batch.support.unlabelled())
    per_task_T = query_loss(network, batch.query, embedding_TD, generator)
    count = num_tasks if num_tasks is not None else int((batch.query.mask_TR.sum(dim=1) > 0).sum())
    return OuterLoss(per_task_T.sum() / max(count, 1), per_task_T.detach(), embedding_TD)


def query_loss(network: LiMAML, query: Rows, embedding_TD: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(T,) mean cross-entropy of each task's query rows; 0 for a task without any. Raises ValueError without labels."""
    if query.label_TR is None:
        raise ValueError("query rows must carry labels to have a loss, got none; build them with build_batch")
    logits_TQ = network(query, embedding_TD, generator)
    loss_TQ = F.binary_cross_entropy_with_logits(logits_TQ, query.label_TR, reduction="none") * query.mask_TR
    return loss_TQ.sum(dim=1) / query.mask_TR.sum(dim=1).clamp(min=1.0)


def _adapt(
    network: LiMAML, support: Rows, entity_index_T: Tensor, num_steps: int, *, keep_graph: bool, second_order: bool
) -> Params:
    features = support.unlabelled()
    with torch.set_grad_enabled(keep_graph):
        phi = network.meta.initial(entity_index_T)
        sizes = network.step_sizes(support.mask_TR.sum(dim=1))
        state = network.global_block.encode(features)
    with torch.enable_grad():
        for _ in range(num_steps):
            at = phi if second_order else {name: p.detach().requires_grad_() for name, p in phi.items()}
            loss_T = network.support_loss(network.meta.embed(at, features), state if second_order else state.detach(), support)
            gradient = torch.autograd.grad(loss_T.sum(), list(at.values()), create_graph=second_order)
            phi = {name: p - sizes[name] * g for (name, p), g in zip(phi.items(), gradient, strict=True)}
            if not keep_graph:
                phi = {name: p.detach() for name, p in phi.items()}
    return phi
