"""Where the settings of the other meta blocks, and of the full adapted network, are looked for.

A design starts from a block's known good settings, of which it changes each with probability 0.3: draws over the whole product
of choices were seldom as good.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.methods.fitted import Design
from experiments.methods.full import ROW_LEVEL

CHANGED = 0.3
_COMMON: dict[str, tuple[Any, ...]] = {
    "model.interaction": ("product", "concat", "both"),
    "model.meta_hidden": ("[32]", "[]", "[16]", "[64]"),
    "model.embedding_dim": (17, 9, 33),
    "meta.inner_steps": (3, 1, 5),
    "meta.damping": (5.0, 1.0, 20.0, 50.0),
    "training.outer_lr": (3e-3, 1e-3, 6e-3),
    "training.max_steps": (200, 100, 300),
}
"""The known good value first."""


def row_level(rng: np.random.Generator) -> Design:
    """Settings of a row-level block, stored or full: the same generator gives both the same design."""
    return {"overrides": [*ROW_LEVEL, *_changes(rng, {**_COMMON, "meta.inner_lr": (0.3, 0.1, 0.6, 1.0)})]}


def id_level(rng: np.random.Generator) -> Design:
    choices = {**_COMMON, "meta.inner_lr": (1.0, 0.3, 3.0), "model.id_dim": (16, 8, 32)}
    return {"overrides": ["model.meta_block=id_mlp", *_changes(rng, choices)]}


SPACES: dict[str, Callable[[np.random.Generator], Design]] = {"full": row_level, "row_mlp": row_level, "id_mlp": id_level}


def _changes(rng: np.random.Generator, choices: Mapping[str, Sequence[Any]]) -> list[str]:
    drawn = []
    for name, values in choices.items():
        drawn.append(f"{name}={near(rng, values)}")
    return drawn


def near(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    """The first value, or, with probability `CHANGED`, one of the others."""
    return values[int(rng.integers(1, len(values)))] if rng.random() < CHANGED else values[0]
