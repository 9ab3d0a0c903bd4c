"""What a bundle of an earlier format becomes when it is read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from limaml.config import Config
from limaml.models.blocks import FACTORS, LEVEL

FIRST = 2
_TABLE = ("item", "content", "unknown_item")
_STEP = ("log_rates", "log_damping")


def config_of_format_2(values: Mapping[str, Any]) -> dict[str, Any]:
    """Its only inner step was the gradient's."""
    return {**values, "meta": {**values["meta"], "inner_step": "gradient"}}


def weights_of(written: int, weights: Mapping[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Up to format 3 the prior counted as no rows."""
    found = weights_of_format_2(weights, cfg) if written == FIRST else dict(weights)
    return found | {f"prior_rows_{kind.name}": torch.zeros(cfg.model.embedding_dim) for kind in cfg.task_kinds}


def weights_of_format_2(weights: Mapping[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """One kind, whose block was `meta`; a task vector's level was the last of its factors; a table that nothing read."""
    kind, found = cfg.task_kind.name, {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "meta":
            found[f"meta_blocks.{kind}.{rest}"] = tensor
        elif part in _STEP:
            split = {FACTORS: tensor[:-1], LEVEL: tensor[-1:]} if rest == "vector" else {rest: tensor}
            learned = cfg.meta.learn_inner_lr if part == _STEP[0] else cfg.meta.learn_damping
            # What is not learned is the same all over, and now one number.
            found |= {f"inner_steps.{kind}.{part}.{to}": t if learned else t.flatten()[0] for to, t in split.items()}
        elif rest in _TABLE and cfg.model.interaction != "concat":
            found[f"global_block.items.{rest}"] = tensor
        elif rest not in _TABLE:
            found[f"global_block.mlp.{rest}"] = tensor
    return found
