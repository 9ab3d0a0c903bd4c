"""Where a random search draws each method's designs from: all rivals get as many draws as ours.

Ranges lie around what did best on validation users; `item_mean` has no settings.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Space = Callable[[np.random.Generator], dict[str, Any]]
HIDDEN = ("[16]", "[32]", "[64]", "[64, 32]", "[128, 64]")
"""Widths of an MLP's hidden layers, as the configuration spells them."""


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


def user_level(rng: np.random.Generator) -> dict[str, Any]:
    return {"space": _one_of(rng, ("rate", "logit"))}


def logistic(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "steps": _one_of(rng, (20, 40, 80)),
        "C": _log_uniform(rng, 1e-4, 0.1),
        "history": _history(rng),
        "overrides": [f"model.profile_dropout={_one_of(rng, (0.2, 0.5, 0.8, 0.95))}"],
    }


def lightgbm(rng: np.random.Generator) -> dict[str, Any]:
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


def global_mlp(rng: np.random.Generator) -> dict[str, Any]:
    return {"overrides": _network(rng)}


def user_id(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "overrides": [
            *_network(rng),
            f"model.embedding_dim={_one_of(rng, (3, 5, 9, 17))}",
            f"model.unknown_entity_share={_one_of(rng, (0.1, 0.3, 0.5))}",
            f"meta.damping={_one_of(rng, (1.0, 5.0, 20.0))}",
        ]
    }


def history_mlp(rng: np.random.Generator) -> dict[str, Any]:
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


SPACES: dict[str, Space] = {
    "user_level": user_level,
    "logistic": logistic,
    "lightgbm": lightgbm,
    "global_mlp": global_mlp,
    "user_id": user_id,
    "history_mlp": history_mlp,
}
