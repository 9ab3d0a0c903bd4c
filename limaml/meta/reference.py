"""Meta-learning written plainly: a loop over tasks, one task's rows at a time, double backward. The truth for the engine.

No padding, no task dimension, no split layer: each function is the formula of the docstring. Too slow to train with.

    R rows (S support, Q query), F features, D embedding width
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limaml.models.meta_blocks import IdMlp, RowMlp, TaskVector
from limaml.models.network import LiMAML
from limaml.tasks.rows import Rows, TaskBatch

Params = dict[str, Tensor]
"""One task's parameters."""


def adapt(
    theta: Params, support_loss: Callable[[Params], Tensor], rates: Params, *, num_steps: int, second_order: bool = True
) -> Params:
    """Take `num_steps` gradient steps on one task; `theta` is left as it was.

    phi_{k+1} = phi_k - rates * grad L_support(phi_k)   (Finn et al. 2017, algorithm 1; a rate per parameter: Li et al. 2017)
    First order treats each gradient as a constant (Finn et al. 2017, section 5.2).
    """
    phi = theta
    for _ in range(num_steps):
        gradients = torch.autograd.grad(support_loss(phi), list(phi.values()), create_graph=True)
        if not second_order:
            gradients = tuple(gradient.detach() for gradient in gradients)
        phi = {name: p - rates[name] * g for (name, p), g in zip(phi.items(), gradients, strict=True)}
    return phi


@dataclass(frozen=True)
class UnpaddedRows:
    """One task's real rows (no padding), as (R, F) features and (R,) labels."""

    item_R: Tensor
    item_dense_RF: Tensor
    user_dense_RF: Tensor
    context_RF: Tensor
    gap_s_R: Tensor
    label_R: Tensor

    @classmethod
    def of(cls, rows: Rows, task: int) -> "UnpaddedRows":
        real = rows.mask_TR[task] > 0
        assert rows.label_TR is not None
        dense = (rows.item_dense_TRF, rows.user_dense_TRF, rows.context_TRF, rows.gap_s_TR, rows.label_TR)
        return cls(rows.item_index_TR[task][real], *(tensor[task][real] for tensor in dense))


def embed(network: LiMAML, phi: Params, support: UnpaddedRows) -> Tensor:
    """(D,) the meta block's output; support labels are not read."""
    block = network.meta
    if isinstance(block, TaskVector):
        return phi["vector"]
    if isinstance(block, IdMlp):
        return _mlp(phi, phi["id"])
    assert isinstance(block, RowMlp)
    if len(support.item_R) == 0:
        return block.empty
    features = [support.item_dense_RF, support.user_dense_RF, support.context_RF]
    if block.row_age:
        features.append(torch.log1p(support.gap_s_R / 86_400.0)[:, None])
    return _mlp(phi, torch.cat(features, dim=1)).mean(dim=0)


def score(network: LiMAML, rows: UnpaddedRows, embedding_D: Tensor) -> Tensor:
    """(R,) logits: MLP(features) + <embedding, [item vector, 1]>, or MLP(features, embedding), or both."""
    block = network.global_block
    x = torch.cat([rows.item_dense_RF, rows.user_dense_RF, rows.context_RF], dim=1)
    if block.has_concat:
        x = torch.cat([x, embedding_D.expand(len(x), -1)], dim=1)
    *hidden, last = block.layers
    for layer in hidden:
        x = F.relu(layer(x)) if block.has_concat else F.silu(layer(x))
    logits_R: Tensor = last(x)[:, 0]
    if not block.has_product:
        return logits_R
    products = [embedding_D[:-1] @ item_vector(network, rows, row) + embedding_D[-1] for row in range(len(x))]
    return logits_R + torch.stack(products) if products else logits_R


def item_vector(network: LiMAML, rows: UnpaddedRows, row: int) -> Tensor:
    """(K,) the row's item; an unknown one's comes from its static features."""
    block = network.global_block
    content = rows.item_dense_RF[row, : block.item_static]
    return block.item[rows.item_R[row]] if rows.item_R[row] > 0 else content @ block.content + block.unknown_item


def initial(network: LiMAML, support: UnpaddedRows, entity_index: int) -> Params:
    """theta_meta as one task starts from it; a task vector may start where the support's items lie."""
    block = network.meta
    if isinstance(block, TaskVector):
        size = len(support.item_R)
        vector: Tensor = block.vector
        if block.item_scale is not None and size >= network.meta_config.min_support_rows:
            items = [item_vector(network, support, row) for row in range(size)]
            vector = vector + F.pad(10.0 * block.item_scale * torch.stack(items).sum(dim=0) / (size + 10.0), (0, 1))
        return {"vector": vector}
    if isinstance(block, IdMlp):
        return {"id": block.table[entity_index], **block.mlp}
    assert isinstance(block, RowMlp)
    return dict(block.mlp)


def task_embedding(network: LiMAML, support: UnpaddedRows, entity_index: int, *, num_steps: int, second_order: bool) -> Tensor:
    """(D,) e = embed(phi, support), phi adapted on the sum of cross-entropies with the step rate / (rows + c)."""

    def support_loss(phi: Params) -> Tensor:
        logits_S = score(network, support, embed(network, phi, support))
        return F.binary_cross_entropy_with_logits(logits_S, support.label_R, reduction="sum")

    theta = initial(network, support, entity_index)
    if len(support.item_R) >= network.meta_config.min_support_rows:
        damping = network.damping()
        steps = {name: rate / (len(support.item_R) + damping[name]) for name, rate in network.rates().items()}
        theta = adapt(theta, support_loss, steps, num_steps=num_steps, second_order=second_order)
    return embed(network, theta, support)


def outer_loss(network: LiMAML, batch: TaskBatch, *, num_steps: int, second_order: bool) -> tuple[Tensor, Tensor]:
    """Mean over tasks with query rows of the mean over their rows, and each task's embedding (T, D)."""
    losses, embeddings = [], []
    for task in range(batch.num_tasks):
        support, query = UnpaddedRows.of(batch.support, task), UnpaddedRows.of(batch.query, task)
        entity = int(batch.entity_index_T[task])
        embedding_D = task_embedding(network, support, entity, num_steps=num_steps, second_order=second_order)
        embeddings.append(embedding_D)
        if len(query.item_R):
            losses.append(F.binary_cross_entropy_with_logits(score(network, query, embedding_D), query.label_R))
    return torch.stack(losses).mean(), torch.stack(embeddings)


def _mlp(phi: Params, x: Tensor) -> Tensor:
    num_layers = sum(name.startswith("weight") for name in phi)
    for layer in range(num_layers):
        x = x @ phi[f"weight{layer}"] + phi[f"bias{layer}"]
        if layer < num_layers - 1:
            x = F.relu(x)
    return x
