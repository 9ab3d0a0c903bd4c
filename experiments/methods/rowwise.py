"""The full adapted network: each task's adapted meta block is run on every scored row itself, and nothing is stored.

    e(x) = block_phi(x)        x a support row in the inner loss, a query row in the outer loss and at request time

The inner loop is the project's. A row is a support of one row, so any block can be run on it; of a task-level block all rows'
embeddings are equal, and so are full and stored network.

    T tasks, R rows (S support, Q query), D embedding width
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limaml.meta import inner_loop
from limaml.meta.engine import supports
from limaml.meta.inner_loop import Labels
from limaml.models.blocks import MetaBlock, Params, Support, SupportMlp
from limaml.models.global_block import RowState
from limaml.models.network import Network
from limaml.tasks.rows import Rows, TaskBatch
from limaml.training.step import BatchLoss


def adapt_rowwise(network: Network, support: Rows, entity_index_T: Tensor, *, second_order: bool | None = None) -> Params:
    """Phi of T supports, tensors with a leading dimension T; what is unset comes from the configuration.

    Raises ValueError for a row-level block that reads the row's age, which a request has not.
    """
    block, meta = network.block(network.kind), network.meta_config
    if isinstance(block, SupportMlp) and block.row_age:
        raise ValueError("a full row_mlp scores rows that have no age yet, got model.row_age = true; set it to false")
    assert support.label_TR is not None
    second = meta.second_order if second_order is None else second_order
    state = network.global_block.encode(support)

    def adapt_one(task: Support, rows: RowState, label_S: Tensor) -> Params:
        def logits(phi: Params) -> Tensor:
            return network.global_block.score(rows, {network.kind: _embed_each(block, phi, task)})

        labels, step = Labels(label_S, task.mask_S), network.step(network.kind)
        return inner_loop.adapt(block.start(task), logits, labels, step, num_steps=meta.inner_steps, second_order=second)

    tasks = supports(network, network.kind, support, entity_index_T, state)
    found: Params = torch.func.vmap(adapt_one)(tasks, state, support.label_TR)
    return found


def row_embeddings(network: Network, phi: Params, rows: Rows) -> Tensor:
    """(T, R, D) what each task's adapted block makes of its rows."""
    state, block = network.global_block.encode(rows), network.block(network.kind)
    dense, zeros, ones = rows.dense, torch.zeros_like(rows.mask_TR), torch.ones_like(rows.mask_TR)
    entity = torch.zeros(len(dense), dtype=torch.long, device=dense.device)
    each = Support(dense, state.vectors.get(network.kind, dense[..., :1])[..., :-1], ones, zeros, zeros, entity)

    def embed(theta: Params, task: Support) -> Tensor:
        return _embed_each(block, theta, task)

    found_TRD: Tensor = torch.func.vmap(embed)(phi, each)
    return found_TRD


def logits(network: Network, phi: Params, rows: Rows, keep: Sequence[Tensor] = ()) -> Tensor:
    """(T, R) logits of the rows, each scored with what its task's adapted block makes of it."""
    return network.score(rows, {network.kind: row_embeddings(network, phi, rows)}, keep)


def full_loss(
    network: Network,
    batch: TaskBatch,
    *,
    generator: torch.Generator | None = None,
    num_tasks: int | None = None,
    second_order: bool | None = None,
) -> BatchLoss:
    """Sum over tasks of the mean of their query rows' cross-entropies, divided by `num_tasks`.

    By default the tasks that have query rows. Dropout on the query rows only where a generator is given.
    """
    label_TQ, mask_TQ = batch.query.label_TR, batch.query.mask_TR
    assert label_TQ is not None
    keep = network.global_block.draw_dropout(batch.query, generator)
    phi = adapt_rowwise(network, batch.support, batch.entity_index_T, second_order=second_order)
    logit_TQ = logits(network, phi, batch.query, keep)
    loss_TQ = F.binary_cross_entropy_with_logits(logit_TQ, label_TQ, reduction="none")
    count_T1 = mask_TQ.sum(dim=1, keepdim=True)
    count = num_tasks if num_tasks is not None else int((count_T1 > 0).sum())
    share_TQ = loss_TQ * (mask_TQ / count_T1.clamp(min=1.0))
    return BatchLoss(share_TQ.sum() / max(count, 1), share_TQ.detach().sum(dim=1))


def _embed_each(block: MetaBlock, theta: Params, rows: Support) -> Tensor:
    """(R, D) the block's embedding of every row by itself."""

    def one(dense_F: Tensor, vector_K: Tensor) -> Tensor:
        single = dense_F.new_ones(1)
        read = block.read(Support(dense_F[None], vector_K[None], single, single * 0, single * 0, rows.entity_index))
        return block.embed(theta, read)

    found_RD: Tensor = torch.func.vmap(one)(rows.dense_SF, rows.vector_SK)
    return found_RD
