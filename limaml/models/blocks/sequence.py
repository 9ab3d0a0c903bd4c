"""A small causal transformer over the support rows.

S support rows, F features, K factors, V numbers of a pool, H width of a state, D embedding width
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.models.blocks.block import MetaBlock, Params, Support
from limaml.models.blocks.pool import Pool

_SECONDS_PER_DAY = 86_400.0
_BESIDE = 2
"""Inputs of a row beside features and vector: days since the row before, and its label."""


class States(NamedTuple):
    """What the transformer made of one support, or what it will read."""

    x_SI: Tensor
    state_SH: Tensor | tuple[()]
    """State i has read the rows before i: (S + 1, H); nothing yet where the transformer itself is adapted."""
    mask_S: Tensor


class Sequence(MetaBlock):
    """e_i = W state_i + b, where state i has read the rows before i with their labels; the last state gives the embedding.

    Row i's inner loss uses e_i, so no row sees its own label. Time is told by the days between rows, so that an embedding does
    not change while no new row comes. A row is read beside the pool of the rows up to it, if there is one. `adapts`: every
    weight, W and b, or b.
    """

    reads_labels, multiplies_rows = True, True

    def __init__(
        self, num_inputs: int, width: int, layers: int, heads: int, embedding_dim: int, pool: Pool, *, adapts: str
    ) -> None:
        """`num_inputs`: F + K."""
        super().__init__(embedding_dim)
        self.adapts, self.pool = adapts, pool
        self.transformer = Transformer(num_inputs + _BESIDE + pool.width, width, layers, heads)
        self.weight = nn.Parameter(torch.randn(width, embedding_dim) * width**-0.5 * 0.1)
        self.bias = nn.Parameter(torch.zeros(embedding_dim))

    def read(self, support: Support) -> States:
        before_S = torch.cat([support.gap_s_S[:1], support.gap_s_S[:-1]])
        days_S = torch.log1p((before_S - support.gap_s_S).clamp(min=0.0) / _SECONDS_PER_DAY)
        beside_S2, pool_SV = torch.stack([days_S, support.label_S], dim=1), self.pool.running(support)
        x_SI = torch.cat([support.dense_SF, support.vector_SK, beside_S2, pool_SV], dim=1)
        return States(x_SI, () if self.adapts == "all" else self.transformer(x_SI), support.mask_S)

    def start(self, read: States) -> Params:  # noqa: ARG002
        theta: Params = {"bias": self.bias}
        if self.adapts != "bias":
            theta["weight"] = self.weight
        if self.adapts == "all":
            theta |= self.transformer.weights()
        return theta

    def embed(self, theta: Params, read: States) -> Tensor:
        at_S = torch.arange(len(read.mask_S) + 1, device=read.mask_S.device) == read.mask_S.sum()
        return at_S.to(read.mask_S.dtype) @ self._embeddings(theta, read)

    def embed_rows(self, theta: Params, read: States) -> Tensor:
        return self._embeddings(theta, read)[:-1]

    def pull_rows(self, theta: Params, read: States, by_rows_SD: Tensor) -> Params:
        state_SH = read.state_SH
        if isinstance(state_SH, tuple):
            return super().pull_rows(theta, read, by_rows_SD)
        # Linear in theta, and row i reads state i alone.
        found: Params = {"bias": by_rows_SD}
        if "weight" in theta:
            found["weight"] = state_SH[:-1].unsqueeze(2) * by_rows_SD.unsqueeze(1)
        return found

    def prior(self) -> Tensor:
        nothing_0I = self.transformer.first.new_zeros(0, self.transformer.num_inputs)
        prior_D: Tensor = (self.transformer(nothing_0I) @ self.weight + self.bias)[0]
        return prior_D

    def _embeddings(self, theta: Params, read: States) -> Tensor:
        """(S + 1, D) after no row, after the first, and so on."""
        state_SH = read.state_SH
        if isinstance(state_SH, tuple):
            state_SH = self.transformer(read.x_SI, theta)
        return state_SH @ theta.get("weight", self.weight) + theta["bias"]


class Transformer(nn.Module):
    """(S, I) rows -> (S + 1, H) states, each of the rows before it: attention and an MLP a layer (Vaswani et al. 2017)."""

    def __init__(self, num_inputs: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.num_inputs, self.heads = num_inputs, heads
        self.rows = nn.Linear(num_inputs, width)
        self.first = nn.Parameter(torch.randn(width) * 0.1)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"qkv": nn.Linear(width, 3 * width), "up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)}
            )
            for _ in range(layers)
        )

    def weights(self) -> Params:
        """By name, without the dots that parameters' names must not have."""
        return {name.replace(".", "_"): p for name, p in self.named_parameters()}

    def forward(self, x_SI: Tensor, weights: Params | None = None) -> Tensor:
        """With its own weights or, of one task, adapted ones: threads share the module, so no weight is put into it."""
        w = self.weights() if weights is None else weights
        x = torch.cat([w["first"].unsqueeze(0), _linear(w, "rows", x_SI)])
        hidden = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        for number in range(len(self.layers)):
            layer = f"layers_{number}"
            x = x + self._attend(_linear(w, f"{layer}_qkv", _normed(x)), hidden)
            x = x + _linear(w, f"{layer}_down", F.silu(_linear(w, f"{layer}_up", _normed(x))))
        return _normed(x)

    def _attend(self, qkv: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, self.heads, -1).permute(1, 2, 0, 3)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        read: Tensor = (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)
        return read


def _normed(x: Tensor) -> Tensor:
    """Rows of mean square 1."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def _linear(weights: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}_weight"], weights[f"{name}_bias"])
