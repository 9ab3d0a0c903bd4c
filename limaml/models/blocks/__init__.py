"""Meta blocks, by the name that `model.meta_block` gives them."""

from collections.abc import Callable

from limaml.config import ModelConfig
from limaml.config.names import META_BLOCKS
from limaml.features.encoder import EncoderDims
from limaml.models.blocks.block import MetaBlock, Params, Support
from limaml.models.blocks.mlp import IdMlp, SupportMlp
from limaml.models.blocks.pool import Pool
from limaml.models.blocks.sequence import Sequence
from limaml.models.blocks.support_set import Hybrid, SupportSet
from limaml.models.blocks.task_vector import FACTORS, LEVEL, Posterior, TaskVector

__all__ = ["FACTORS", "LEVEL", "MetaBlock", "Params", "Support", "SupportMlp", "TaskVector"]

Build = Callable[[ModelConfig, EncoderDims], MetaBlock]

BLOCKS: dict[str, Build] = {
    "task_vector": lambda cfg, dims: TaskVector(cfg.embedding_dim, reads_items=cfg.start == "items", pool=Pool.of(cfg, dims)),
    "posterior": lambda cfg, dims: Posterior(cfg.embedding_dim, reads_items=cfg.start == "items", pool=Pool.of(cfg, dims)),
    "id_mlp": lambda cfg, dims: IdMlp(dims.num_entities, cfg.id_dim, cfg.meta_hidden, cfg.embedding_dim),
    "row_mlp": lambda cfg, dims: SupportMlp(dims.num_features, cfg.meta_hidden, cfg.embedding_dim, row_age=cfg.row_age),
    "set": lambda cfg, dims: SupportSet(_inputs(cfg, dims), cfg.meta_hidden, cfg.embedding_dim, Pool.of(cfg, dims)),
    "hybrid": lambda cfg, dims: Hybrid(_inputs(cfg, dims), cfg.meta_hidden, cfg.embedding_dim, Pool.of(cfg, dims)),
    "sequence": lambda cfg, dims: Sequence(
        _inputs(cfg, dims),
        cfg.sequence_width,
        cfg.sequence_layers,
        cfg.sequence_heads,
        cfg.embedding_dim,
        Pool.of(cfg, dims),
        adapts=cfg.sequence_adapts,
    ),
}
"""Another block is one more line here, and its name in `limaml.config.names.META_BLOCKS` (docs/extend.md)."""


def build_block(cfg: ModelConfig, dims: EncoderDims) -> MetaBlock:
    """The configured block."""
    return BLOCKS[cfg.meta_block](cfg, dims)


def register(name: str, build: Build) -> None:
    """Let `model.meta_block` name another block, in this process. Raises ConfigError if there is one of that name."""
    META_BLOCKS.add(name)
    BLOCKS[name] = build


def _inputs(cfg: ModelConfig, dims: EncoderDims) -> int:
    """Features of a row and, where there is a product, the vector that its embedding is multiplied with."""
    return dims.num_features + (0 if cfg.interaction == "concat" else cfg.embedding_dim - 1)
