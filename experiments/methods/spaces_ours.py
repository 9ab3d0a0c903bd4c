"""Where ours is looked for: the shipped settings, of which a design changes each with probability 0.3.

Rates are given as totals over the inner steps, so that more steps are not more movement. Damping and the fewest rows that are
adapted on are fixed: they were chosen by what is left of the prior's quality at k = 1 to 5 (LOG.md); so is the start.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.methods.spaces_blocks import near

FIXED = ("meta.damping=100", "meta.min_support_rows=2", 'model.start="items"')
_CHOICES: dict[str, tuple[Any, ...]] = {
    "training.outer_lr": (6e-3, 3e-3, 1.2e-2),
    "training.max_steps": (200, 400),
    "model.embedding_dim": (17, 9, 33),
    "model.global_hidden": ("[64, 32]", "[32]", "[128, 64]"),
    "model.dropout": (0.1, 0.0, 0.3),
    "model.profile_dropout": (0.5, 0.2, 0.8),
    "meta.factor_damping": (100.0, 50.0, 200.0),
    "meta.early_probability": (0.6, 0.4, 0.8),
}
"""The known good value first."""
_STEPS, _FACTOR_MOVE, _LEVEL_MOVE = (3, 1, 5), (120.0, 80.0, 180.0), (4.5, 7.5)


def stored(rng: np.random.Generator) -> dict[str, Any]:
    steps, factor, level = (near(rng, values) for values in (_STEPS, _FACTOR_MOVE, _LEVEL_MOVE))
    rates = [f"meta.inner_steps={steps}", f"meta.factor_inner_lr={factor / steps:.4g}", f"meta.inner_lr={level / steps:.4g}"]
    return {"overrides": [*FIXED, *rates, *(f"{name}={near(rng, values)}" for name, values in _CHOICES.items())]}


def history(rng: np.random.Generator) -> dict[str, Any]:
    settings = {
        "shrinkage": near(rng, (5.0, 2.0, 10.0, 20.0)),
        "genre_shrinkage": near(rng, (10.0, 5.0, 30.0)),
        "vector_shrinkage": near(rng, (20.0, 50.0, 100.0)),
        "genre_vectors": near(rng, (False, True)),
    }
    return {**stored(rng), "history": settings, "hidden": near(rng, (32, 16, 64))}


SPACES: Mapping[str, Callable[[np.random.Generator], dict[str, Any]]] = {"stored": stored, "history": history}
