"""Where the settings of the other meta blocks, and of the full adapted network, are looked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.methods.fitted import Design
from experiments.methods.full import ROW_LEVEL


def row_level(rng: np.random.Generator) -> Design:
    """Settings of a row-level block, stored or full: the same generator gives both the same design."""
    return {"overrides": [*ROW_LEVEL, *_common(rng, rates=(0.1, 0.3, 1.0))]}


def id_level(rng: np.random.Generator) -> Design:
    rates, widths = (0.3, 1.0, 3.0), (8, 16, 32)
    common = _common(rng, rates)
    return {"overrides": ["model.meta_block=id_mlp", *common, f"model.id_dim={_one(rng, widths)}"]}


SPACES: dict[str, Callable[[np.random.Generator], Design]] = {"full": row_level, "row_mlp": row_level, "id_mlp": id_level}


def _common(rng: np.random.Generator, rates: Sequence[float]) -> list[str]:
    hidden = ("[]", "[16]", "[32]", "[64]")
    return [
        f"model.interaction={_one(rng, ('product', 'product', 'concat', 'both'))}",
        f"model.meta_hidden={_one(rng, hidden)}",
        f"model.embedding_dim={_one(rng, (9, 17, 33))}",
        f"meta.inner_lr={_one(rng, rates)}",
        f"meta.inner_steps={_one(rng, (1, 3, 5))}",
        f"meta.damping={_one(rng, (1.0, 5.0, 20.0, 50.0))}",
        f"training.outer_lr={_one(rng, (1e-3, 3e-3, 6e-3))}",
        f"training.max_steps={_one(rng, (100, 200, 300))}",
    ]


def _one(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]
