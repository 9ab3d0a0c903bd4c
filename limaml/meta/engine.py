"""Inner and outer loop of T tasks at once. Equal to `limaml.meta.reference` (a plain loop over tasks), which is the truth.

Tasks do not touch each other inside the loop. The inner gradient is written out, by the global block down to the embedding
and by the meta block from there (`GlobalBlock.pull`, `Adapted.pull`), so the outer gradient takes one backward pass and no
graph of a graph. Where the compiled kernel (`limaml.meta.fused`) was built and knows the network, it does the same work.

    T tasks, S support rows, Q query rows, D embedding width
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from limaml.meta import fused
from limaml.models.adapted import AdaptedVector
from limaml.models.dense import plain_layers
from limaml.models.global_block import RowState
from limaml.models.network import LiMAML
from limaml.tasks.rows import Rows, TaskBatch
from limaml.telemetry import get_logger

_log = get_logger("meta.engine")
_portable: ContextVar[bool] = ContextVar("portable", default=False)
_told: set[str] = set()
"""Forms that this process has logged."""


@dataclass(frozen=True)
class OuterLoss:
    """Loss of one meta-batch."""

    loss: Tensor
    """Scalar: mean over tasks of the mean over their query rows."""
    per_task_T: Tensor
    """(T,) detached; 0 for a task without query rows, which takes no part."""
    embedding_TD: Tensor
    """(T, D) the embeddings that the query rows were scored with; without a graph if the compiled kernel made them."""


@contextmanager
def portable() -> Iterator[None]:
    """Do without the compiled kernel, to compare the two."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def adapt(
    network: LiMAML,
    support: Rows,
    entity_index_T: Tensor,
    *,
    num_steps: int | None = None,
    second_order: bool | None = None,
    state: RowState | None = None,
) -> Tensor:
    """(T, D) embeddings of T supports after `num_steps` inner steps; unset arguments come from the configuration.

    phi_{k+1} = phi_k - rate / (rows + c) * grad (sum of the support rows' losses at phi_k)
    (Finn et al. 2017, algorithm 1; rate per parameter: Li et al. 2017; so is c)
    The embeddings are a function of theta through the steps; first order treats each gradient as a constant. `state` where the
    rows are encoded already. Raises ValueError if they have no labels.
    """
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    second = network.meta_config.second_order if second_order is None else second_order
    if support.label_TR is None:
        raise ValueError("support rows must carry labels to be adapted on, got none; build them with build_batch")
    gradients: AbstractContextManager[object] = nullcontext() if second else torch.no_grad()
    count_T, items_TSK = support.mask_TR.sum(dim=1), None
    with gradients:
        state = state or network.global_block.encode(support)
    if network.meta.reads_items:
        # The start is not a gradient: in first order, too, it is a function of the item vectors.
        found_TSK = state.item_TRK if second and state.item_TRK is not None else network.global_block.items(support)
        items_TSK = found_TSK * network.is_adapted(count_T).view(-1, 1, 1)
    block = network.meta.start(entity_index_T, support.unlabelled(), network.step_sizes(count_T), items_TSK)
    if isinstance(block, AdaptedVector) and second and torch.is_grad_enabled():
        vector_TD = network.global_block.vector_steps(state, block, support.label_TR, support.mask_TR, steps)
        if vector_TD is not None:
            return vector_TD
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
    if support.label_TR is not None and _use_kernel(network, (support,), dropout=False):
        return fused.embed(network, support, network.meta_config.inner_steps if num_steps is None else num_steps)
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
    block = network.global_block
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    second = network.meta_config.second_order if second_order is None else second_order
    count = num_tasks if num_tasks is not None else int((batch.query.mask_TR.sum(dim=1) > 0).sum())
    keep = block.draw_dropout(batch.query, generator)
    labelled = batch.support.label_TR is not None and batch.query.label_TR is not None
    if labelled and _use_kernel(network, (batch.support, batch.query), dropout=bool(keep)):
        total, per_task_T, embedding_TD = fused.loss_sum(network, batch.support, batch.query, steps, second_order=second)
        return OuterLoss(total / max(count, 1), per_task_T, embedding_TD)
    # One pass over support and query where the embeddings do not enter it and both get gradients.
    support, query = block.encode_both(batch, keep) if second and not block.has_concat else (None, None)
    embedding_TD = adapt(network, batch.support, batch.entity_index_T, num_steps=steps, second_order=second, state=support)
    loss, per_task_T = block.loss(batch.query, {network.kind: embedding_TD}, max(count, 1), keep, query)
    return OuterLoss(loss, per_task_T, embedding_TD)


def _use_kernel(network: LiMAML, sides: tuple[Rows, ...], *, dropout: bool) -> bool:
    """Whether the compiled kernel does this call; each answer is logged once in a process."""
    if _portable.get():
        return False
    why_not = fused.reason(network, sides, dropout=dropout)
    form = "portable" if why_not else "compiled"
    if (told := why_not or form) not in _told:
        _told.add(told)
        _log.info("engine", form=form, **({"why_not_compiled": why_not} if why_not else {}))
    return why_not is None


def task_gradients(
    network: LiMAML,
    batch: TaskBatch,
    *,
    max_norm: float | None = None,
    num_steps: int | None = None,
    second_order: bool | None = None,
    keep: Sequence[Tensor] = (),
    chunk_tasks: int | None = None,
) -> dict[str, Tensor]:
    """(T, ...) gradient of each task's own outer loss by every trained parameter of both blocks, before any sum over tasks.

    With `max_norm`, each task's gradient over all parameters is scaled down to that norm if it is longer. Their sum divided by
    the number of tasks with query rows is the gradient of `outer_loss`. `keep` as drawn by `GlobalBlock.draw_dropout` for the
    query. Memory grows with tasks times parameters; `chunk_tasks` at a time are computed.
    """
    task = _TaskLoss(network, num_steps, second_order)
    trained = {name: p.detach() for name, p in task.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], *one: Any) -> Tensor:
        found: Tensor = torch.func.functional_call(task, values, one)
        return found

    # Batched by torch.func, which knows ordinary operations only.
    with plain_layers():
        per_task = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk_tasks)
        arguments = _tensors(batch.support), _tensors(batch.query), batch.entity_index_T, tuple(keep)
        found: dict[str, Tensor] = per_task(trained, *arguments)
    gradients = {name.removeprefix("network."): gradient for name, gradient in found.items()}
    return gradients if max_norm is None else _clipped(gradients, max_norm)


class _TaskLoss(nn.Module):
    """The outer loss of one task, as a function of its tensors without their leading dimension."""

    def __init__(self, network: LiMAML, num_steps: int | None, second_order: bool | None) -> None:
        super().__init__()
        self.network, self.num_steps, self.second_order = network, num_steps, second_order

    def forward(
        self, support: dict[str, Tensor], query: dict[str, Tensor], entity_index: Tensor, keep: tuple[Tensor, ...]
    ) -> Tensor:
        rows, asked = (Rows(**{name: value.unsqueeze(0) for name, value in each.items()}) for each in (support, query))
        order = {"num_steps": self.num_steps, "second_order": self.second_order}
        embedding_TD = adapt(self.network, rows, entity_index.unsqueeze(0), **order)  # type: ignore[arg-type]
        masks = [mask.unsqueeze(0) for mask in keep]
        return self.network.global_block.loss(asked, {self.network.kind: embedding_TD}, 1, masks)[0]


def _tensors(rows: Rows) -> dict[str, Tensor]:
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return {name: value for name, value in values.items() if value is not None}


def _clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    norm_T = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    scale_T = max_norm / norm_T.clamp(min=max_norm)
    return {name: g * scale_T.view(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}
