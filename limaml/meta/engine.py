"""Inner and outer loop of T tasks at once, for any network. Equal to `limaml.meta.reference`, a plain loop over tasks.

A block and its inner loop are written for one task; `torch.func.vmap` batches them, and autograd goes back through the inner
gradients. What the rows alone give (`GlobalBlock.encode`) is computed once, outside of the loop. Where an accelerator
(`limaml.meta.accelerators`) knows the network, it does the same work.

    T tasks, S support rows, Q query rows, D embedding width
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.meta import accelerators, inner_loop
from limaml.meta.inner_loop import Labels, ThroughEmbedding
from limaml.meta.losses import OuterLoss, query_loss
from limaml.models.blocks import Params, Support
from limaml.models.global_block import RowState
from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network
from limaml.tasks.rows import Rows, TaskBatch


def adapt(
    network: Network,
    kind: str,
    support: Rows,
    entity_index_T: Tensor,
    *,
    num_steps: int | None = None,
    second_order: bool | None = None,
) -> Tensor:
    """(T, D) embeddings of T supports after `num_steps` inner steps; unset arguments come from the configuration.

    The embeddings are a function of theta through the steps; first order treats each gradient as a constant (Finn et al. 2017,
    section 5.2). Other kinds' embeddings stay at their priors. Raises ValueError if the rows have no labels.
    """
    label_TS, state = _require_labels(support), network.global_block.encode(support)
    tasks = supports(network, kind, support, entity_index_T, state)
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    second = network.meta_config.second_order if second_order is None else second_order
    one = partial(_adapt_one, network, kind, steps, second)
    adapted: Tensor = torch.func.vmap(one)(tasks, state, label_TS)
    return adapted


def _require_labels(support: Rows) -> Tensor:
    if support.label_TR is None:
        raise ValueError("support rows must carry labels to be adapted on, got none; build them with build_batch")
    return support.label_TR


def supports(network: Network, kind: str, rows: Rows, entity_index_T: Tensor, state: RowState) -> Support:
    """T supports as their kind's block reads them: tensors with a leading dimension T. A task of too few rows has none."""
    assert rows.label_TR is not None
    enough_T1 = rows.mask_TR.sum(dim=1, keepdim=True) >= network.meta_config.min_support_rows
    return Support(
        dense_SF=rows.dense,
        vector_SK=state.vectors.get(kind, rows.dense[..., :1])[..., :-1],
        mask_S=rows.mask_TR * enough_T1,
        gap_s_S=rows.gap_s_TR,
        label_S=rows.label_TR if network.block(kind).reads_labels else torch.zeros_like(rows.label_TR),
        entity_index=entity_index_T,
    )


def _adapt_one(
    network: Network, kind: str, num_steps: int, second_order: bool, support: Support, state: RowState, label_S: Tensor
) -> Tensor:
    """(D,) of one task."""
    phi, read, _ = _phi_of_one(network, kind, num_steps, second_order, support, state, label_S)
    return network.block(kind).embed(phi, read)


def _phi_of_one(
    network: Network, kind: str, num_steps: int, second_order: bool, support: Support, state: RowState, label_S: Tensor
) -> tuple[Params, Any, ThroughEmbedding]:
    """What is adapted of one task, what its block reads, and the logits of its rows."""
    block, labels = network.block(kind), Labels(label_S, support.mask_S)
    read, steps = block.read(support), num_steps if block.has_steps else 0
    logits = support_logits(network, kind, read, state)
    phi = inner_loop.adapt(block.start(read), logits, labels, network.step(kind), num_steps=steps, second_order=second_order)
    return phi, read, logits


def support_logits(network: Network, kind: str, read: Any, state: RowState) -> ThroughEmbedding:
    """Parameters -> (S,) logits of one task's rows, each scored with the embedding that it may see; `read`: `MetaBlock.read`.

    Other kinds' embeddings are their priors.
    """
    others, block = network.rows_of_priors({kind}), network.block(kind)
    return ThroughEmbedding(
        embed=lambda phi: block.embed_rows(phi, read),
        pull_rows=lambda phi, by_rows_SD: block.pull_rows(phi, read, by_rows_SD),
        score=lambda own: network.global_block.score(state, others | {kind: own}),
    )


@torch.no_grad()
def embed_tasks(network: Network, kind: str, support: Rows, entity_index_T: Tensor, *, num_steps: int | None = None) -> Tensor:
    """(T, D) embeddings of T supports, with no graph kept: adaptation as it runs offline.

    Same values as `outer_loss`'s, but that few rows count for less (`Network.held_back`) once training has chosen by how much.
    """
    _require_labels(support)
    if (accelerator := accelerators.choose(network, support, kind)) is not None:
        steps = network.meta_config.inner_steps if num_steps is None else num_steps
        embedding_TD = accelerator.embed(network, kind, support, entity_index_T, num_steps=steps)
    else:
        embedding_TD = adapt(network, kind, support, entity_index_T, num_steps=num_steps)
    return network.held_back(kind, embedding_TD, support.mask_TR.sum(dim=1))


@torch.no_grad()
def posterior_covariance(network: Network, kind: str, support: Rows, entity_index_T: Tensor) -> Tensor:
    """(T, P, P) covariance of what is adapted of each task, by Laplace's approximation at phi; P numbers in their order.

    Raises ValueError for a kind whose step has no prior (`meta.inner_step = "gradient"`), and for rows without labels.
    """
    step, steps = network.step(kind), network.meta_config.inner_steps
    if not isinstance(step, NewtonStep) or support.label_TR is None:
        raise ValueError(f"a posterior needs labelled rows and Newton's step for kind {kind}; set meta.inner_step to newton")

    def one(task: Support, state: RowState, label_S: Tensor) -> Tensor:
        phi, _, logits = _phi_of_one(network, kind, steps, False, task, state, label_S)
        return inner_loop.laplace(phi, logits, Labels(label_S, task.mask_S), step)

    state = network.global_block.encode(support)
    tasks = supports(network, kind, support, entity_index_T, state)
    found: Tensor = torch.func.vmap(one)(tasks, state, support.label_TR)
    return found


def outer_loss(
    network: Network,
    batch: TaskBatch,
    *,
    generator: torch.Generator | None = None,
    num_steps: int | None = None,
    second_order: bool | None = None,
    num_tasks: int | None = None,
) -> OuterLoss:
    """Adapt on the supports, embed, and score the queries; `loss` carries the graph back to theta_meta and theta_global.

    Dropout on the query rows only where a generator is given. `num_tasks` divides the sum over tasks; by default the tasks
    that have query rows. Raises ValueError if rows have no labels.
    """
    _require_labels(batch.support)
    if (accelerator := accelerators.choose(network, batch, network.kind)) is not None:
        steps = network.meta_config.inner_steps if num_steps is None else num_steps
        second = network.meta_config.second_order if second_order is None else second_order
        return accelerator.outer_loss(
            network, batch, generator=generator, num_steps=steps, second_order=second, num_tasks=num_tasks
        )
    keep = network.global_block.draw_dropout(batch.query, generator)
    count = num_tasks if num_tasks is not None else int((batch.query.mask_TR.sum(dim=1) > 0).sum())
    order = {"num_steps": num_steps, "second_order": second_order}
    embedding_TD = adapt(network, network.kind, batch.support, batch.entity_index_T, **order)  # type: ignore[arg-type]
    embeddings = {network.kind: embedding_TD}
    for kind, tasks in batch.others.items():
        found_UD = adapt(network, kind, tasks.support, tasks.entity_index_U, **order)  # type: ignore[arg-type]
        rows_of_kind = torch.cat([network.block(kind).prior().unsqueeze(0), found_UD])
        embeddings[kind] = F.embedding(tasks.task_TQ, rows_of_kind)
    per_task_T = query_loss(network, batch.query, embeddings, keep)
    return OuterLoss(per_task_T.sum() / max(count, 1), per_task_T.detach(), embedding_TD)


def task_gradients(
    network: Network,
    batch: TaskBatch,
    *,
    max_norm: float | None = None,
    num_steps: int | None = None,
    second_order: bool | None = None,
    keep: Sequence[Tensor] = (),
    chunk_tasks: int | None = None,
) -> dict[str, Tensor]:
    """(T, ...) gradient of each task's own outer loss by every trained parameter, before any sum over tasks.

    With `max_norm`, each task's gradient over all parameters is scaled down to that norm if it is longer. Their sum divided by
    the number of tasks with query rows is the gradient of `outer_loss`. `keep` as drawn by `GlobalBlock.draw_dropout` for the
    query. Memory grows with tasks times parameters; `chunk_tasks` at a time are computed. Raises ValueError for a batch of
    several kinds, whose other tasks belong to no single one of these.
    """
    if batch.others:
        raise ValueError(f"task gradients must be of a batch of one kind, got one with {', '.join(batch.others)}; leave it out")
    task = _TaskLoss(network, num_steps, second_order)
    trained = {name: p.detach() for name, p in task.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], *one: Any) -> Tensor:
        found: Tensor = torch.func.functional_call(task, values, one)
        return found

    per_task = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk_tasks)
    found = per_task(trained, _tensors(batch.support), _tensors(batch.query), batch.entity_index_T, tuple(keep))
    gradients = {name.removeprefix("network."): gradient for name, gradient in found.items()}
    return gradients if max_norm is None else _clipped(gradients, max_norm)


class _TaskLoss(nn.Module):
    """The outer loss of one task, as a function of its tensors without their leading dimension."""

    def __init__(self, network: Network, num_steps: int | None, second_order: bool | None) -> None:
        super().__init__()
        self.network, self.order = network, {"num_steps": num_steps, "second_order": second_order}

    def forward(
        self, support: dict[str, Tensor], query: dict[str, Tensor], entity_index: Tensor, keep: tuple[Tensor, ...]
    ) -> Tensor:
        rows, asked = (Rows(**{name: value.unsqueeze(0) for name, value in each.items()}) for each in (support, query))
        kind, index_T = self.network.kind, entity_index.unsqueeze(0)
        embedding_TD = adapt(self.network, kind, rows, index_T, **self.order)  # type: ignore[arg-type]
        return query_loss(self.network, asked, {kind: embedding_TD}, [mask.unsqueeze(0) for mask in keep])[0]


def _tensors(rows: Rows) -> dict[str, Tensor]:
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return {name: value for name, value in values.items() if value is not None}


def _clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    norm_T = torch.stack([gradient.reshape(len(gradient), -1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    scale_T = max_norm / norm_T.clamp(min=max_norm)
    return {name: g * scale_T.view(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}
