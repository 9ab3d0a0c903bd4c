"""The outer loss of one task of the networks that ship, as one writes it by hand: in torch's or in JAX's arrays.

Weights go by the network's names. What is adapted is a part of them, `phi`; a library's own `grad` steps, and its own `vmap`
batches what stands here.

    R rows (S support, Q query), F features, K factors, D embedding width, H hidden width
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.work import DIMS, Work

Array = Any
Weights = Mapping[str, Array]
Rows = Mapping[str, Array]
"""Of one task: dense (R, F), item, label, mask and gap (R,)."""

_MLP, _BLOCK, _STEP, _ITEMS = "global_block.mlp.layers", "meta_blocks.user", "inner_steps.user", "global_block.items"


@dataclass(frozen=True)
class Library:
    """The functions that torch and JAX name differently, or both have."""

    concatenate: Callable[..., Array]
    exp: Callable[[Array], Array]
    log1p: Callable[[Array], Array]
    relu: Callable[[Array], Array]
    silu: Callable[[Array], Array]
    softmax: Callable[..., Array]
    softplus: Callable[[Array], Array]
    take: Callable[[Array, Array], Array]
    """(table, index) -> rows of the table."""
    where: Callable[..., Array]
    arange: Callable[[int, Array], Array]
    """(count, an array of the device that it is to be on)."""
    grad: Callable[..., Any]


@dataclass(frozen=True)
class Formula:
    """One row of the tables in one library."""

    o: Library
    work: Work

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the weights that the inner loop adapts."""
        last = {
            "task_vector": ("vector",),
            "paper": ("mlp.weight0", "mlp.bias0", "mlp.weight1", "mlp.bias1"),
            "sequence": ("bias", "weight"),
        }
        return tuple(f"{_BLOCK}.{name}" for name in last[self.work.row])

    def task_loss(self, weights: Weights, steps: int, support: Rows, query: Rows, keep: Sequence[Array]) -> Array:
        """Mean loss of the query rows after `steps` steps on the support."""
        state, sizes = self.read(weights, support), self.sizes(weights, support)
        phi = {name: weights[name] for name in self.adapted}
        for _ in range(steps):
            gradients = self.o.grad(lambda phi: self.support_loss({**weights, **phi}, support, state))(phi)
            phi = {name: p - sizes[name] * gradients[name] for name, p in phi.items()}
        return self.query_loss(weights, query, self.embed({**weights, **phi}, support, state), keep)

    def sizes(self, w: Weights, support: Rows) -> dict[str, Array]:
        """rate / (rows + damping) of every adapted weight."""
        count, meta, sizes = support["mask"].sum(), self.work.cfg.meta, {}
        for name in self.adapted:
            if not meta.learn_inner_lr:
                sizes[name] = meta.inner_lr / (count + meta.damping)
                continue
            parts = ("factors", "level") if self.work.row == "task_vector" else (name.rsplit(".", 1)[1],)
            rate, damping = (
                self.o.concatenate([w[f"{_STEP}.{what}.{part}"] for part in parts]) for what in ("log_rates", "log_damping")
            )
            sizes[name] = self.o.exp(rate) / (count + self.o.exp(damping))
        return sizes

    def support_loss(self, w: Weights, support: Rows, state: Weights) -> Array:
        return self._cross_entropy(self._score(w, state, self._embed_rows(w, support, state)), support).sum()

    def query_loss(self, w: Weights, query: Rows, embedding: Array, keep: Sequence[Array]) -> Array:
        """Mean over rows; embedding (D,)."""
        losses = self._cross_entropy(self._score(w, self._encode(w, query, keep), embedding[..., None, :], keep), query)
        return losses.sum(-1) / query["mask"].sum(-1)

    def read(self, w: Weights, support: Rows) -> dict[str, Array]:
        """What does not depend on phi."""
        state = self._encode(w, support, ())
        if self.work.row == "sequence":
            state["states"] = self._states(w, support, state["vectors"])
        return state

    def embed(self, w: Weights, support: Rows, state: Weights) -> Array:
        """(D,) of the whole support."""
        if self.work.row != "sequence":
            return self._embed_rows(w, support, state)[0]
        last = self.o.where(self.o.arange(len(state["states"]), state["states"]) == support["mask"].sum(), 1.0, 0.0)
        return (last[:, None] * self._of_states(w, state)).sum(0)

    # The global block.

    def _encode(self, w: Weights, rows: Rows, keep: Sequence[Array]) -> dict[str, Array]:
        weight, bias, x = w[f"{_MLP}.0.weight"], w[f"{_MLP}.0.bias"], rows["dense"]
        if self.work.row == "paper":
            return {"encoded": x @ weight[:, : x.shape[-1]].T + bias}
        static = x[..., : DIMS.item_static]
        by_content = static @ w[f"{_ITEMS}.content"] + w[f"{_ITEMS}.unknown_item"]
        known = self.o.take(w[f"{_ITEMS}.item"], rows["item"])
        vectors = self.o.where((rows["item"] == 0)[..., None], by_content, known)
        return {"encoded": self._rest(w, x @ weight.T + bias, self.o.silu, keep), "vectors": vectors}

    def _rest(self, w: Weights, h: Array, activation: Callable[[Array], Array], keep: Sequence[Array]) -> Array:
        """(..., R) logits from the first layer's sums."""
        for number in (1, 2):
            h = activation(h)
            h = (h * keep[number - 1] if keep else h) @ w[f"{_MLP}.{number}.weight"].T + w[f"{_MLP}.{number}.bias"]
        return h[..., 0]

    def _score(self, w: Weights, state: Weights, e: Array, keep: Sequence[Array] = ()) -> Array:
        if self.work.row == "paper":
            beside = e @ w[f"{_MLP}.0.weight"][:, DIMS.num_features :].T
            return self._rest(w, state["encoded"] + beside, self.o.relu, keep)
        return state["encoded"] + (state["vectors"] * e[..., :-1]).sum(-1) + e[..., -1]

    def _cross_entropy(self, z: Array, rows: Rows) -> Array:
        return (self.o.softplus(z) - rows["label"] * z) * rows["mask"]

    # The meta blocks.

    def _embed_rows(self, w: Weights, support: Rows, state: Weights) -> Array:
        """(1, D), or (S, D) where every row has its own."""
        mask = support["mask"]
        if self.work.row == "sequence":
            return self._of_states(w, state)[:-1]
        if self.work.row == "task_vector":
            mean = (mask[:, None] * state["vectors"]).sum(0) / (mask.sum() + 10.0)
            start = 10.0 * w[f"{_BLOCK}.item_scale"] * mean
            return w[f"{_BLOCK}.vector"][None] + self.o.concatenate([start, 0.0 * start[:1]])[None]
        days = (support["gap"] - support["gap"].min()) / 86_400.0
        x = self.o.concatenate([support["dense"], self.o.log1p(days)[:, None]], -1)
        hidden = self.o.relu(x @ w[f"{_BLOCK}.mlp.weight0"] + w[f"{_BLOCK}.mlp.bias0"])
        mean = (hidden * mask[:, None]).sum(0) / mask.sum()
        return (mean @ w[f"{_BLOCK}.mlp.weight1"] + w[f"{_BLOCK}.mlp.bias1"])[None]

    def _of_states(self, w: Weights, state: Weights) -> Array:
        return state["states"] @ w[f"{_BLOCK}.weight"] + w[f"{_BLOCK}.bias"]

    def _states(self, w: Weights, support: Rows, vectors: Array) -> Array:
        """(S + 1, H) of a causal transformer, the first before any row."""
        o, model, gap, name = self.o, self.work.cfg.model, support["gap"], f"{_BLOCK}.transformer"
        days = o.log1p((o.concatenate([gap[:1], gap[:-1]]) - gap).clip(min=0.0) / 86_400.0)
        x = o.concatenate([support["dense"], vectors, days[:, None], support["label"][:, None]], -1)
        x = o.concatenate([w[f"{name}.first"][None], x @ w[f"{name}.rows.weight"].T + w[f"{name}.rows.bias"]])
        at, heads, width = o.arange(x.shape[0], x), model.sequence_heads, model.sequence_width // model.sequence_heads

        def linear(x: Array, layer: str) -> Array:
            return x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]

        for layer in (f"{name}.layers.{number}" for number in range(model.sequence_layers)):
            qkv = linear(_normed(x), f"{layer}.qkv").reshape(-1, 3, heads, width)
            q, k, v = (qkv[:, part].swapaxes(0, 1) for part in range(3))
            scores = o.where(at[None, :] > at[:, None], -math.inf, q @ k.swapaxes(1, 2) / math.sqrt(width))
            x = x + (o.softmax(scores, -1) @ v).swapaxes(0, 1).reshape(x.shape[0], -1)
            x = x + linear(o.silu(linear(_normed(x), f"{layer}.up")), f"{layer}.down")
        return _normed(x)


def _normed(x: Array) -> Array:
    return x * ((x * x).mean(-1)[..., None] + 1e-6) ** -0.5


def rows_of(work: Work) -> tuple[dict[str, Array], dict[str, Array]]:
    """Support and query of all tasks, in torch's arrays."""
    batch = work.batch
    support, query = (
        {"dense": r.dense, "item": r.item_index_TR, "label": r.label_TR, "mask": r.mask_TR, "gap": r.gap_s_TR}
        for r in (batch.support, batch.query)
    )
    return support, query
