"""Where a random search draws each method's designs from: all rivals get as many draws as ours.

A rival's ranges lie around what did best on validation users. A design of ours starts from a block's known good settings, of
which it changes each with probability 0.3: draws over the whole product of choices were seldom as good. Ours gives rates as
totals over the inner steps, so that more steps are not more movement; damping, the fewest rows that are adapted on and the
start are fixed: they were chosen by what is left of the prior's quality at k = 1 to 5 (LOG.md). `item_mean` has no settings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.methods.fitted import Design
from experiments.methods.full_network import ROW_LEVEL

Space = Callable[[np.random.Generator], Design]
HIDDEN = ("[16]", "[32]", "[64]", "[64, 32]", "[128, 64]")
"""Widths of an MLP's hidden layers, as the configuration spells them."""
_CHANGED = 0.3
_BLOCK_CHOICES: dict[str, tuple[Any, ...]] = {
    "model.interaction": ("product", "concat", "both"),
    "model.meta_hidden": ("[32]", "[]", "[16]", "[64]"),
    "model.embedding_dim": (17, 9, 33),
    "meta.inner_steps": (3, 1, 5),
    "meta.damping": (5.0, 1.0, 20.0, 50.0),
    "training.outer_lr": (3e-3, 1e-3, 6e-3),
    "training.max_steps": (200, 100, 300),
}
"""The known good value first."""
_FIXED = ("meta.damping=100", "meta.min_support_rows=2", 'model.start="items"')
_STORED_CHOICES: dict[str, tuple[Any, ...]] = {
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


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.3g}")


def _one_of(rng: np.random.Generator, values: tuple[Any, ...]) -> Any:
    return values[int(rng.integers(len(values)))]


def _network(rng: np.random.Generator) -> list[str]:
    """Overrides that every network is tuned by."""
    return [
        f"training.outer_lr={_log_uniform(rng, 2e-3, 2.4e-2)}",
        f"evaluation.baseline_steps={_one_of(rng, (100, 200, 400))}",
        f"model.global_hidden={_one_of(rng, HIDDEN)}",
        f"model.dropout={_one_of(rng, (0.0, 0.1, 0.2, 0.3))}",
        f"model.profile_dropout={_one_of(rng, (0.2, 0.5, 0.8, 0.95))}",
        f"training.weight_decay={_log_uniform(rng, 1e-4, 3.0)}",
    ]


def _history(rng: np.random.Generator) -> dict[str, Any]:
    """Settings of the aggregates (`HistorySettings`)."""
    return {
        "shrinkage": _one_of(rng, (2.0, 5.0, 10.0, 20.0)),
        "slow_shrinkage": _one_of(rng, (30.0, 50.0, 100.0)),
        "genre_shrinkage": _one_of(rng, (5.0, 10.0, 30.0)),
        "recent_rows": _one_of(rng, (3, 5, 10)),
        "genre_vectors": bool(rng.random() < 0.15),
    }


def user_level(rng: np.random.Generator) -> Design:
    return {"space": _one_of(rng, ("rate", "logit"))}


def logistic(rng: np.random.Generator) -> Design:
    return {
        "steps": _one_of(rng, (20, 40, 80)),
        "C": _log_uniform(rng, 1e-4, 0.1),
        "history": _history(rng),
        "overrides": [f"model.profile_dropout={_one_of(rng, (0.2, 0.5, 0.8, 0.95))}"],
    }


def lightgbm(rng: np.random.Generator) -> Design:
    return {
        "steps": 40,
        "rounds": 400,
        "params": {
            "learning_rate": _log_uniform(rng, 0.01, 0.1),
            "num_leaves": _one_of(rng, (3, 4, 6, 8, 15)),
            "min_data_in_leaf": _one_of(rng, (100, 300, 1000, 3000)),
            "feature_fraction": _one_of(rng, (0.2, 0.4, 0.7, 1.0)),
            "bagging_fraction": _one_of(rng, (0.5, 0.8, 1.0)),
            "lambda_l2": _log_uniform(rng, 0.1, 1000.0),
        },
        "history": _history(rng),
        "overrides": [f"model.profile_dropout={_one_of(rng, (0.2, 0.5, 0.8, 0.95))}"],
    }


def global_mlp(rng: np.random.Generator) -> Design:
    return {"overrides": _network(rng)}


def user_id(rng: np.random.Generator) -> Design:
    return {
        "overrides": [
            *_network(rng),
            f"model.embedding_dim={_one_of(rng, (3, 5, 9, 17))}",
            f"model.unknown_entity_share={_one_of(rng, (0.1, 0.3, 0.5))}",
            f"meta.damping={_one_of(rng, (1.0, 5.0, 20.0))}",
        ]
    }


def history_mlp(rng: np.random.Generator) -> Design:
    return {
        "vectors": "learned" if rng.random() < 0.1 else "fitted",
        "folds": _one_of(rng, (0, 4, 4, 8)),
        "vector_features": list(
            _one_of(
                rng,
                (
                    ("pooled", "liked", "similar", "folded", "folded_level"),
                    ("pooled", "similar", "folded", "folded_level"),
                    ("folded", "folded_level"),
                ),
            )
        ),
        "direct": bool(rng.random() < 0.5),
        "history": {
            **_history(rng),
            "vector_shrinkage": _one_of(rng, (10.0, 20.0, 50.0, 100.0)),
            "sharpness": _one_of(rng, (2.0, 5.0, 10.0)),
        },
        "overrides": _network(rng),
    }


def row_level(rng: np.random.Generator) -> Design:
    """Settings of a row-level block, stored or full: the same generator gives both the same design."""
    return {"overrides": [*ROW_LEVEL, *_changes(rng, {**_BLOCK_CHOICES, "meta.inner_lr": (0.3, 0.1, 0.6, 1.0)})]}


def id_level(rng: np.random.Generator) -> Design:
    choices = {**_BLOCK_CHOICES, "meta.inner_lr": (1.0, 0.3, 3.0), "model.id_dim": (16, 8, 32)}
    return {"overrides": ["model.meta_block=id_mlp", *_changes(rng, choices)]}


def stored(rng: np.random.Generator) -> Design:
    steps, factor, level = (_near(rng, values) for values in (_STEPS, _FACTOR_MOVE, _LEVEL_MOVE))
    rates = [f"meta.inner_steps={steps}", f"meta.factor_inner_lr={factor / steps:.4g}", f"meta.inner_lr={level / steps:.4g}"]
    return {"overrides": [*_FIXED, *rates, *(f"{name}={_near(rng, values)}" for name, values in _STORED_CHOICES.items())]}


def history(rng: np.random.Generator) -> Design:
    settings = {
        "shrinkage": _near(rng, (5.0, 2.0, 10.0, 20.0)),
        "genre_shrinkage": _near(rng, (10.0, 5.0, 30.0)),
        "vector_shrinkage": _near(rng, (20.0, 50.0, 100.0)),
        "genre_vectors": _near(rng, (False, True)),
    }
    return {**stored(rng), "history": settings, "hidden": _near(rng, (32, 16, 64))}


def _changes(rng: np.random.Generator, choices: Mapping[str, Sequence[Any]]) -> list[str]:
    drawn = []
    for name, values in choices.items():
        drawn.append(f"{name}={_near(rng, values)}")
    return drawn


def _near(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    """The first value, or, with probability `_CHANGED`, one of the others."""
    return values[int(rng.integers(1, len(values)))] if rng.random() < _CHANGED else values[0]


SPACES: Mapping[str, Space] = {
    "user_level": user_level,
    "logistic": logistic,
    "lightgbm": lightgbm,
    "global_mlp": global_mlp,
    "user_id": user_id,
    "history_mlp": history_mlp,
    "full": row_level,
    "row_mlp": row_level,
    "id_mlp": id_level,
    "stored": stored,
    "history": history,
}
