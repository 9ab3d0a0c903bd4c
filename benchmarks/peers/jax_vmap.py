"""JAX: jit of value_and_grad of vmap over tasks of one task's loss, whose inner steps are its `grad`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.formula import Formula, Library, rows_of
from benchmarks.work import Gradients, Work

# Gradients are compared in float64; float32 stays float32.
jax.config.update("jax_enable_x64", True)

JAX = Library(
    concatenate=jnp.concatenate,
    exp=jnp.exp,
    log1p=jnp.log1p,
    relu=jax.nn.relu,
    silu=jax.nn.silu,
    softmax=jax.nn.softmax,
    softplus=jax.nn.softplus,
    take=lambda table, index: table[index],
    where=jnp.where,
    arange=lambda count, _: jnp.arange(count),
    grad=jax.grad,
)


def prepare(work: Work, steps: int) -> tuple[Callable[[], Gradients], Callable[[], Gradients]]:
    formula, share = Formula(JAX, work), work.cfg.model.dropout
    given = (*work.weights, rows_of(work), work.keep)
    trained, frozen, rows, keep = jax.tree.map(lambda tensor: jnp.asarray(tensor.cpu().numpy()), given)

    def loss(trained: dict[str, jax.Array], frozen: dict[str, jax.Array], rows: Any, keep: Sequence[jax.Array]) -> jax.Array:
        return jax.vmap(partial(formula.task_loss, trained | frozen, steps))(*rows, keep).mean()

    def drawn(trained: dict[str, jax.Array], frozen: dict[str, jax.Array], rows: Any, key: jax.Array) -> jax.Array:
        uniform = [jax.random.uniform(k, m.shape, m.dtype) for k, m in zip(jax.random.split(key, len(keep)), keep, strict=True)]
        masks = [(u >= share) / jnp.asarray(1 - share, u.dtype) for u in uniform]
        return loss(trained, frozen, rows, masks)

    compared, timed = jax.jit(jax.value_and_grad(loss)), jax.jit(jax.value_and_grad(drawn))
    key = jax.random.key(0)
    return (
        lambda: jax.block_until_ready(compared(trained, frozen, rows, keep))[1],
        lambda: jax.block_until_ready(timed(trained, frozen, rows, key))[1],
    )
