"""JAX: jit of the gradient of vmap over tasks of grad of one task's loss.

S support rows, Q query rows, F features, D embedding width, K factors
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.work import Gradients, Work

Array = jax.Array
Weights = dict[str, Array]


def prepare(work: Work, steps: int) -> Callable[[], Gradients]:
    task_losses = _reference if work.model == "reference" else _task_vector
    rows = [
        jnp.asarray(tensor.numpy())
        for side in (work.support, work.query)
        for tensor in (side.x_TRF, side.item_TR, side.label_TR)
    ]
    weights = {name: jnp.asarray(weight.numpy()) for name, weight in work.weights.items()}
    items_IK = jnp.asarray(work.items_IK.numpy())

    def loss(weights: Weights, items_IK: Array, rows: list[Array]) -> Array:
        return task_losses(weights, items_IK, rows, work.inner_lr, steps).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(weights, items_IK, rows).compile()

    def run() -> Gradients:
        _, gradients = jax.block_until_ready(compiled(weights, items_IK, rows))
        return gradients

    return run


def _reference(weights: Weights, _items_IK: Array, rows: list[Array], inner_lr: float, steps: int) -> Array:
    meta, glob = _block(weights, "meta."), _block(weights, "global.")
    x_TSF, _, label_TS, x_TQF, _, label_TQ = rows

    def score(x_RF: Array, embedding_D: Array) -> Array:
        tiled_RD = jnp.broadcast_to(embedding_D, (x_RF.shape[0], embedding_D.shape[0]))
        return _mlp(glob, jnp.concatenate([x_RF, tiled_RD], axis=1), jax.nn.relu)[:, 0]

    def embed(phi: Weights, x_SF: Array) -> Array:
        return _mlp(phi, x_SF, jax.nn.relu).mean(axis=0)

    def inner(phi: Weights, x_SF: Array, label_S: Array) -> Array:
        return _cross_entropy(score(x_SF, embed(phi, x_SF)), label_S)

    def task_loss(x_SF: Array, label_S: Array, x_QF: Array, label_Q: Array) -> Array:
        phi = meta
        for _ in range(steps):
            gradient = jax.grad(inner)(phi, x_SF, label_S)
            phi = jax.tree.map(lambda p, g: p - inner_lr * g, phi, gradient)
        return _cross_entropy(score(x_QF, embed(phi, x_SF)), label_Q)

    return jax.vmap(task_loss)(x_TSF, label_TS, x_TQF, label_TQ)


def _task_vector(weights: Weights, items_IK: Array, rows: list[Array], inner_lr: float, steps: int) -> Array:
    """The MLP does not see the vector, so it runs once, outside the inner loop."""
    glob = _block(weights, "global.")

    def loss(embedding_D: Array, base_R: Array, item_RK: Array, label_R: Array) -> Array:
        return _cross_entropy(base_R + item_RK @ embedding_D[:-1] + embedding_D[-1], label_R)

    def task_loss(support: list[Array], query: list[Array]) -> Array:
        phi_D = weights["meta.vector"]
        for _ in range(steps):
            phi_D = phi_D - inner_lr * jax.grad(loss)(phi_D, *support)
        return loss(phi_D, *query)

    def side(x_TRF: Array, item_TR: Array, label_TR: Array) -> list[Array]:
        return [_mlp(glob, x_TRF, jax.nn.silu)[..., 0], items_IK[item_TR], label_TR]

    return jax.vmap(task_loss)(side(*rows[:3]), side(*rows[3:]))


def _cross_entropy(logits_R: Array, label_R: Array) -> Array:
    return (jax.nn.softplus(logits_R) - label_R * logits_R).mean()


def _block(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _mlp(weights: Weights, x: Array, activation: Callable[[Array], Any]) -> Array:
    for layer in range(len(weights) // 2):
        x = x @ weights[f"weight{layer}"] + weights[f"bias{layer}"]
        x = activation(x) if layer < len(weights) // 2 - 1 else x
    return x
