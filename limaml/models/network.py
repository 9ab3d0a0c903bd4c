"""Meta blocks and the global block joined, with what their inner loops learn.

T tasks, R rows, D embedding width
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from limaml.config import Config, MetaConfig
from limaml.features.encoder import EncoderDims
from limaml.models.blocks import MetaBlock, Support, build_block
from limaml.models.global_block import GlobalBlock
from limaml.models.inner_step import GradientStep, NewtonStep
from limaml.models.serving_plan import ServingPlan
from limaml.tasks.rows import Rows


class Network(nn.Module):
    """A block for every kind of task, and the global block that reads all their embeddings."""

    def __init__(self, cfg: Config, dims: EncoderDims) -> None:
        super().__init__()
        self.dims = dims
        self.meta_config: MetaConfig = cfg.meta
        self.kinds = {kind.name: kind.entity_column for kind in cfg.task_kinds}
        self.support_rows = {kind: cfg.support_rows_of(kind) for kind in self.kinds}
        self.kind = cfg.task_kind.name
        self.embedding_dim = cfg.model.embedding_dim
        sizes = {kind: replace(dims, num_entities=dims.num_entities_of(column)) for kind, column in self.kinds.items()}
        self.meta_blocks = nn.ModuleDict({kind: build_block(cfg.model_of(kind), sizes[kind]) for kind in self.kinds})
        of_candidates = {kind.name: cfg.is_of_candidates(kind) for kind in cfg.task_kinds}
        self.global_block = GlobalBlock(cfg.model, dims, of_candidates)
        num_factors = self.embedding_dim - 1 if self.global_block.product is not None else 0
        empty = _empty_support(dims.num_features, num_factors)
        self.inner_steps = nn.ModuleDict({kind: _inner_step(self.block(kind), empty, cfg.meta_of(kind)) for kind in self.kinds})
        for kind in self.kinds:
            self.register_buffer(f"prior_rows_{kind}", torch.zeros(self.embedding_dim))

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def block(self, kind: str) -> MetaBlock:
        """The meta block of a kind."""
        return cast(MetaBlock, self.meta_blocks[kind])

    def step(self, kind: str) -> GradientStep | NewtonStep:
        """What that kind's inner loop learns beside its block."""
        return cast(GradientStep | NewtonStep, self.inner_steps[kind])

    def priors(self) -> dict[str, Tensor]:
        """Kind -> (D,) embedding of an empty support."""
        return {kind: self.block(kind).prior() for kind in self.kinds}

    def prior_rows(self, kind: str) -> Tensor:
        """(D,) how many rows the prior counts as in each number of an embedding, chosen after training; 0: as none."""
        rows_D: Tensor = getattr(self, f"prior_rows_{kind}")
        return rows_D

    def held_back(self, kind: str, embedding_TD: Tensor, rows_T: Tensor) -> Tensor:
        """(T, D) n / (n + c) of the way from the prior to embeddings adapted on n rows, beside N / (N + c) of a full support;
        c = 0 leaves them as they are.
        """
        damping_D, prior_D, rows_T1 = self.prior_rows(kind), self.block(kind).prior(), rows_T.unsqueeze(1)
        full = float(self.support_rows[kind])
        share_TD = rows_T1 / (rows_T1 + damping_D).clamp(min=1.0) * ((full + damping_D) / full)
        return torch.where(damping_D > 0, prior_D + share_TD * (embedding_TD - prior_D), embedding_TD)

    def serving_plan(self) -> ServingPlan | None:
        """How a server may score without torch; None: only through `forward`."""
        return ServingPlan.of(self.global_block)

    def forward(self, rows: Rows, embeddings: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R) of rows scored with embeddings (T, D) of their tasks, or (T, R, D) of their own.

        A kind that is not given is scored with its prior. Dropout only where a generator is given.
        """
        return self.score(rows, embeddings, self.global_block.draw_dropout(rows, generator))

    def score(self, rows: Rows, embeddings: Mapping[str, Tensor], keep: Sequence[Tensor] = ()) -> Tensor:
        """`forward` with dropout as drawn."""
        given = {kind: e.unsqueeze(1) if e.ndim == 2 else e for kind, e in embeddings.items()}
        logits_TR: Tensor = self.global_block(rows, self.rows_of_priors(given) | given, keep)
        return logits_TR

    def rows_of_priors(self, given: Collection[str]) -> dict[str, Tensor]:
        """Kind -> (1, D) its prior, for all rows of a task, of the kinds that are not given."""
        return {kind: self.block(kind).prior().unsqueeze(0) for kind in self.kinds if kind not in given}


def build_network(cfg: Config, dims: EncoderDims, seed: int = 0) -> Network:
    """A network whose initial weights are a function of (cfg, dims, seed) alone; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(cfg, dims)


def _inner_step(block: MetaBlock, empty: Support, cfg: MetaConfig) -> GradientStep | NewtonStep:
    shapes = {name: p.shape for name, p in block.start(block.read(empty)).items()}
    return (NewtonStep if (block.inner_step or cfg.inner_step) == "newton" else GradientStep)(shapes, cfg)


def _empty_support(num_features: int, num_factors: int) -> Support:
    return Support(
        dense_SF=torch.zeros(1, num_features),
        vector_SK=torch.zeros(1, num_factors),
        mask_S=torch.zeros(1),
        gap_s_S=torch.zeros(1),
        label_S=torch.zeros(1),
        entity_index=torch.zeros((), dtype=torch.long),
    )
