"""torch.func: vmap over tasks of grad of one task's loss, one backward pass for the outer gradient.

S support rows, Q query rows, F features, D embedding width, K factors
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.work import Gradients, Work

Weights = dict[str, Tensor]


def prepare(work: Work, steps: int) -> Callable[[], Gradients]:
    loss = _reference if work.model == "reference" else _task_vector
    weights = {name: weight.clone().requires_grad_() for name, weight in work.weights.items()}

    def run() -> Gradients:
        gradients = torch.autograd.grad(loss(work, weights, steps), list(weights.values()))
        return dict(zip(weights, gradients, strict=True))

    return run


def _reference(work: Work, weights: Weights, steps: int) -> Tensor:
    meta, glob = _block(weights, "meta."), _block(weights, "global.")

    def score(x_RF: Tensor, embedding_D: Tensor) -> Tensor:
        return _mlp(glob, torch.cat([x_RF, embedding_D.expand(x_RF.shape[0], -1)], dim=1), F.relu)[:, 0]

    def embed(phi: Weights, x_SF: Tensor) -> Tensor:
        return _mlp(phi, x_SF, F.relu).mean(dim=0)

    def inner(phi: Weights, x_SF: Tensor, label_S: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(score(x_SF, embed(phi, x_SF)), label_S)

    def task_loss(x_SF: Tensor, label_S: Tensor, x_QF: Tensor, label_Q: Tensor) -> Tensor:
        phi = meta
        for _ in range(steps):
            gradient = grad(inner)(phi, x_SF, label_S)
            phi = {name: p - work.inner_lr * gradient[name] for name, p in phi.items()}
        return F.binary_cross_entropy_with_logits(score(x_QF, embed(phi, x_SF)), label_Q)

    support, query = work.support, work.query
    return vmap(task_loss)(support.x_TRF, support.label_TR, query.x_TRF, query.label_TR).mean()


def _task_vector(work: Work, weights: Weights, steps: int) -> Tensor:
    """The MLP does not see the vector, so it runs once, outside the inner loop."""
    glob, vector_D = _block(weights, "global."), weights["meta.vector"]

    def loss(embedding_D: Tensor, base_R: Tensor, item_RK: Tensor, label_R: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(base_R + item_RK @ embedding_D[:-1] + embedding_D[-1], label_R)

    def task_loss(base_S: Tensor, item_SK: Tensor, label_S: Tensor, base_Q: Tensor, item_QK: Tensor, label_Q: Tensor) -> Tensor:
        phi_D = vector_D
        for _ in range(steps):
            phi_D = phi_D - work.inner_lr * grad(loss)(phi_D, base_S, item_SK, label_S)
        return loss(phi_D, base_Q, item_QK, label_Q)

    sides = []
    for side in (work.support, work.query):
        item_TRK = F.embedding(side.item_TR, work.items_IK)
        sides += [_mlp(glob, side.x_TRF, F.silu)[..., 0], item_TRK, side.label_TR]
    return vmap(task_loss)(*sides).mean()


def _block(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _mlp(weights: Weights, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    for layer in range(len(weights) // 2):
        x = x @ weights[f"weight{layer}"] + weights[f"bias{layer}"]
        x = activation(x) if layer < len(weights) // 2 - 1 else x
    return x
