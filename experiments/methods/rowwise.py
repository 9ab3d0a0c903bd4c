"""The full adapted network: each task's adapted meta block is run on every scored row itself, and nothing is stored.

    e(x) = block_phi(x)        x a support row in the inner loss, a query row in the outer loss and at request time

phi_{k+1} = phi_k - rate / (rows + c) * grad (sum of the support rows' losses at phi_k), with the network's own rates and
damping, as in `limaml.meta.engine`; without a step, and so for an empty support, phi is theta. Every row is scored as a task
of one row with an embedding of its own, so the global block is the project's as it stands. The gradient is written out, as in
the engine, and differentiated once. Of a task-level block all rows' embeddings are equal, and so are full and stored network.

    T tasks, R rows (S support, Q query), N = T * R rows end to end, F features, I inputs, D embedding width
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from limaml.models.adapted import BuiltLayer, Params
from limaml.models.dense import gate
from limaml.models.meta_blocks import FACTORS, IdMlp, RowMlp, TaskVector
from limaml.models.network import LiMAML
from limaml.tasks.rows import Rows, TaskBatch


class Rowwise(Protocol):
    """T tasks' parameters on their way from theta to phi, with an embedding for every row."""

    def embed(self, rows: Rows) -> Tensor: ...
    def pull(self, grad_TRD: Tensor) -> list[Tensor]: ...
    def move(self, gradients: list[Tensor]) -> None: ...


def start_rowwise(network: LiMAML, support: Rows, entity_index_T: Tensor) -> Rowwise:
    """Theta for each of T tasks. Raises ValueError for a row-level block that reads the row's age, which a request has not."""
    block, sizes = network.meta, network.step_sizes(support.mask_TR.sum(dim=1))
    if isinstance(block, TaskVector):
        return RowwiseVector(block.vector.expand(len(entity_index_T), -1), sizes[FACTORS])
    if isinstance(block, IdMlp):
        return RowwiseMlp(dict(block.mlp.items()), sizes, id_TI=block.table[entity_index_T])
    assert isinstance(block, RowMlp)
    if block.row_age:
        raise ValueError("a full row_mlp scores rows that have no age yet, got model.row_age = true; set it to false")
    return RowwiseMlp(dict(block.mlp.items()), sizes)


class RowwiseVector:
    """The vector itself, the same for every row."""

    def __init__(self, vector_TD: Tensor, size_TD: Tensor) -> None:
        self._vector_TD, self._size_TD = vector_TD, size_TD

    def embed(self, rows: Rows) -> Tensor:
        return self._vector_TD.unsqueeze(1).expand(-1, rows.mask_TR.shape[1], -1)

    def pull(self, grad_TRD: Tensor) -> list[Tensor]:
        return [grad_TRD.sum(dim=1)]

    def move(self, gradients: list[Tensor]) -> None:
        self._vector_TD = self._vector_TD - self._size_TD * gradients[0]


class RowwiseMlp:
    """A ReLU network over each row's features, or over the task's own input, which then moves too."""

    def __init__(self, mlp: Params, sizes: Params, *, id_TI: Tensor | None = None) -> None:
        self._layers = [
            BuiltLayer(mlp[f"weight{n}"], mlp[f"bias{n}"], sizes[f"weight{n}"], sizes[f"bias{n}"]) for n in range(len(mlp) // 2)
        ]
        self._id_TI, self._sizes = id_TI, sizes
        self._inputs: list[Tensor] = []
        """Every layer's inputs at the last `embed`."""

    def embed(self, rows: Rows) -> Tensor:
        if self._id_TI is None:
            x_TRI = rows.dense
        else:
            # What is read without a graph (first order) must not bring the moving input's back.
            moving_TI = self._id_TI if torch.is_grad_enabled() else self._id_TI.detach()
            x_TRI = moving_TI.unsqueeze(1).repeat(1, rows.mask_TR.shape[1], 1)
        *hidden, last = self._layers
        self._inputs = [x_TRI]
        for layer in hidden:
            self._inputs.append(layer.forward(self._inputs[-1], relu=True))
        return last.forward(self._inputs[-1])

    def pull(self, grad_TRD: Tensor) -> list[Tensor]:
        """Gradients at every layer's output, first layer first, and before them at the task's own input if it moves."""
        found = [grad_TRD]
        for layer, x in zip(self._layers[:0:-1], self._inputs[:0:-1], strict=True):
            found.append(gate(layer.pull(found[-1]), x))
        if self._id_TI is not None:
            found.append(self._layers[0].pull(found[-1]).sum(dim=1))
        return found[::-1]

    def move(self, gradients: list[Tensor]) -> None:
        if self._id_TI is not None:
            by_id_TI, *gradients = gradients
            self._id_TI = self._id_TI - self._sizes["id"] * by_id_TI
        for layer, x, d in zip(self._layers, self._inputs, gradients, strict=True):
            layer.move(x, d)


def adapt_rowwise(
    network: LiMAML,
    support: Rows,
    entity_index_T: Tensor,
    *,
    num_steps: int | None = None,
    second_order: bool | None = None,
) -> Rowwise:
    """The blocks of T supports after `num_steps` inner steps; unset arguments come from the configuration."""
    steps = network.meta_config.inner_steps if num_steps is None else num_steps
    second = network.meta_config.second_order if second_order is None else second_order
    gradients: AbstractContextManager[object] = nullcontext() if second else torch.no_grad()
    block = start_rowwise(network, support, entity_index_T)
    flat, top = end_to_end(support), network.global_block
    assert flat.label_TR is not None
    with gradients:
        state = top.encode(flat)
    for _ in range(steps):
        with gradients:
            embedding_TSD = block.embed(support)
            embeddings = {network.kind: embedding_TSD.flatten(0, 1)}
            grad_ND = top.pull(state, embeddings, network.kind, flat.label_TR, flat.mask_TR)
            moves = block.pull(grad_ND.view_as(embedding_TSD))
        block.move(moves)
    return block


def logits(network: LiMAML, block: Rowwise, rows: Rows, keep: Sequence[Tensor] = ()) -> Tensor:
    """(T, R) logits of the rows, each scored with what its task's adapted block makes of it; `keep` of `end_to_end(rows)`."""
    flat = end_to_end(rows)
    logit_N1: Tensor = network.global_block(flat, {network.kind: block.embed(rows).flatten(0, 1)}, keep)
    return logit_N1.view_as(rows.mask_TR)


def full_loss(
    network: LiMAML,
    batch: TaskBatch,
    *,
    generator: torch.Generator | None = None,
    num_tasks: int | None = None,
    num_steps: int | None = None,
    second_order: bool | None = None,
) -> Tensor:
    """Scalar: sum over tasks of the mean of their query rows' cross-entropies, divided by `num_tasks`.

    By default the tasks that have query rows. Dropout on the query rows only where a generator is given.
    """
    label_TQ, mask_TQ = batch.query.label_TR, batch.query.mask_TR
    assert label_TQ is not None
    keep = network.global_block.draw_dropout(end_to_end(batch.query), generator)
    block = adapt_rowwise(network, batch.support, batch.entity_index_T, num_steps=num_steps, second_order=second_order)
    logit_TQ = logits(network, block, batch.query, keep)
    loss_TQ = F.binary_cross_entropy_with_logits(logit_TQ, label_TQ, reduction="none")
    count_T1 = mask_TQ.sum(dim=1, keepdim=True)
    count = num_tasks if num_tasks is not None else int((count_T1 > 0).sum())
    return (loss_TQ * (mask_TQ / count_T1.clamp(min=1.0))).sum() / max(count, 1)


def end_to_end(rows: Rows) -> Rows:
    """(N, 1, ...) the rows of T tasks as N tasks of one row."""
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return Rows(**{name: value.flatten(0, 1).unsqueeze(1) for name, value in values.items() if value is not None})
