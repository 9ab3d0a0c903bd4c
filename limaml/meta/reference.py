"""Meta-learning written plainly: a loop over tasks, one task's real rows at a time, double backward. The truth for the engine.

No padding, no task dimension, no vmap. Blocks and the global block are written for one task, so they are called as they are;
closed forms and finite differences hold them to account (tests/numerics). Too slow to train with.

    R rows (S support, Q query), D embedding width
"""

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from limaml.meta.inner_loop import MOST_LOGITS
from limaml.models.blocks import Params, Support
from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network
from limaml.tasks.rows import Rows, TaskBatch


def adapt(
    theta: Params, support_loss: Callable[[Params], Tensor], rates: Params, *, num_steps: int, second_order: bool = True
) -> Params:
    """Take `num_steps` gradient steps on one task; `theta` is left as it was.

    phi_{k+1} = phi_k - rates * grad L_support(phi_k)   (Finn et al. 2017, algorithm 1; a rate per parameter: Li et al. 2017)
    First order treats each gradient as a constant (Finn et al. 2017, section 5.2).
    """
    phi = theta
    for _ in range(num_steps):
        gradients = torch.autograd.grad(support_loss(phi), list(phi.values()), create_graph=True, materialize_grads=True)
        if not second_order:
            gradients = tuple(gradient.detach() for gradient in gradients)
        phi = {name: p - rates[name] * g for (name, p), g in zip(phi.items(), gradients, strict=True)}
    return phi


def newton(
    theta: Params, logits: Callable[[Params], Tensor], label_S: Tensor, scales: Params, rates: Params, *, num_steps: int
) -> Params:
    """Take `num_steps` Newton steps on L(phi) = sum of the rows' cross-entropies + sum of ((phi - theta) / scale)^2 / 2.

    phi_{k+1} = phi_k - rates * (J^T diag(p (1 - p)) J + diag(1 / scale^2))^-1 grad L(phi_k), J the logits' gradient by phi
    (Rasmussen and Williams 2006, section 3.4; Gauss-Newton where the logits are not linear in phi), shortened where it would
    move a row's logit by more than `MOST_LOGITS` to first order.
    """
    phi, names = theta, list(theta)
    precision_P = torch.cat([(1.0 / scales[name] ** 2).expand(theta[name].numel()) for name in names])
    for _ in range(num_steps):
        rows = [torch.autograd.grad(logit, [phi[n] for n in names], create_graph=True) for logit in logits(phi)]
        j_SP = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p_S = torch.sigmoid(logits(phi))
        moved_P = torch.cat([(phi[name] - theta[name]).flatten() for name in names])
        gradient_P = j_SP.T @ (p_S - label_S) + precision_P * moved_P
        hessian_PP = j_SP.T @ torch.diag(p_S * (1 - p_S)) @ j_SP + torch.diag(precision_P)
        step_P = torch.linalg.solve(hessian_PP, gradient_P)
        most = (j_SP @ step_P).abs().max()
        step_P = step_P * MOST_LOGITS / most if most > MOST_LOGITS else step_P
        parts = torch.split(step_P, [theta[name].numel() for name in names])
        phi = {n: phi[n] - rates[n] * part.view(phi[n].shape) for n, part in zip(names, parts, strict=True)}
    return phi


def real_rows(rows: Rows, task: int) -> Rows:
    """One task's rows without padding and without the task dimension: tensors (R, ...)."""
    real = rows.mask_TR[task] > 0
    return Rows(**{field.name: getattr(rows, field.name)[task][real] for field in fields(Rows)})


def score(network: Network, rows: Rows, kind: str, embedding: Tensor) -> Tensor:
    """(R,) logits of one task's rows; other kinds' embeddings are their priors. `embedding`: (1, D) or (R, D)."""
    embeddings = {name: prior.unsqueeze(0) for name, prior in network.priors().items()} | {kind: embedding}
    logits_R: Tensor = network.global_block(rows, embeddings)
    return logits_R


def task_embedding(
    network: Network, kind: str, support: Rows, entity_index: Tensor, *, num_steps: int, second_order: bool
) -> Tensor:
    """(D,) e = embed(phi, support), phi adapted on the sum of cross-entropies, with the step rate / (rows + c) or by Newton."""
    if len(support.mask_TR) < network.meta_config.min_support_rows:
        support = Rows(**{field.name: getattr(support, field.name)[:0] for field in fields(Rows)})
    label_S = support.label_TR
    assert label_S is not None
    block, state = network.block(kind), network.global_block.encode(support)
    one = Support(
        dense_SF=support.dense,
        vector_SK=state.vectors.get(kind, support.dense[:, :1])[:, :-1],
        mask_S=support.mask_TR,
        gap_s_S=support.gap_s_TR,
        label_S=label_S if block.reads_labels else torch.zeros_like(label_S),
        entity_index=entity_index,
    )

    def logits(phi: Params) -> Tensor:
        return score(network, support, kind, block.embed_rows(phi, read))

    def support_loss(phi: Params) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(phi), label_S, reduction="sum")

    read = block.read(one)
    theta, step, num_steps = block.start(read), network.step(kind), num_steps if block.has_steps else 0
    if isinstance(step, NewtonStep):
        steps = num_steps if len(label_S) else 0
        return block.embed(newton(theta, logits, label_S, step.scales(), step.rates(), num_steps=steps), read)
    sizes = step.sizes(one.mask_S.sum())
    return block.embed(adapt(theta, support_loss, sizes, num_steps=num_steps, second_order=second_order), read)


def outer_loss(network: Network, batch: TaskBatch, *, num_steps: int, second_order: bool) -> tuple[Tensor, Tensor]:
    """Mean over tasks with query rows of the mean over their rows, and each task's embedding (T, D)."""
    losses, embeddings, kind = [], [], network.kind
    for task in range(batch.num_tasks):
        support, query = real_rows(batch.support, task), real_rows(batch.query, task)
        entity = batch.entity_index_T[task]
        embedding_D = task_embedding(network, kind, support, entity, num_steps=num_steps, second_order=second_order)
        embeddings.append(embedding_D)
        if len(query.mask_TR):
            logits_Q = score(network, query, kind, embedding_D.unsqueeze(0))
            assert query.label_TR is not None
            losses.append(F.binary_cross_entropy_with_logits(logits_Q, query.label_TR))
    return torch.stack(losses).mean(), torch.stack(embeddings)
