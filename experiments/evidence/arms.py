"""What is compared: ours, by what each changes in a world's configuration, and rivals, by what is fitted together."""

from collections.abc import Mapping
from typing import Any

from experiments.transfer_jobs import WORLDS
from limaml.config import Config

WITHOUT = ", without history"
"""Of a method whose configuration has no history features (affinities: what a user did with an item before)."""
FULL, HISTORY, VECTORS, SEQUENCE_MODEL = "full", "history", "vectors", "sequence_model"
_ROW_MLP = {"meta_block": "row_mlp", "interaction": "concat", "embedding_dim": 32, "meta_hidden": [64], "row_age": False}
_ONE_STEP = {"inner_step": "gradient", "inner_steps": 1, "inner_lr": 0.3, "learn_inner_lr": False, "learn_damping": False}
_PAPER = {"model": {**_ROW_MLP, "start": "prior"}, "meta": {**_ONE_STEP, "pairwise_share": 0.0}}
_NEWTON = {"inner_step": "newton", "pairwise_share": 0.0}
_GRADIENT = {"inner_step": "gradient", "pairwise_share": 0.0, "damping": 100.0, "factor_inner_lr": 60.0, "min_support_rows": 2}
_TASK_VECTOR = {"meta_block": "task_vector"}
_USER = {"name": "user", "entity_column": "user_id", "max_lag_s": 1_209_600}
_ITEM = {"name": "item", "entity_column": "item_id", "support_rows": 64, "prior_std": 0.3, "max_lag_s": 1_209_600}

ARMS: Mapping[str, Mapping[str, Any]] = {
    "shipped": {},
    "newton": {"meta": _NEWTON, "model": _TASK_VECTOR},
    "gradient": {"meta": _GRADIENT, "model": _TASK_VECTOR},
    "hybrid": {"meta": _NEWTON, "model": {"meta_block": "hybrid", "start": "prior"}},
    "set": {"meta": _NEWTON, "model": {"meta_block": "set", "start": "prior"}},
    "sequence": {"meta": _NEWTON, "model": {"meta_block": "sequence", "start": "prior"}},
    "pairwise": {"meta": {**_NEWTON, "pairwise_share": 0.5}, "model": _TASK_VECTOR},
    "item": {"meta": _NEWTON, "model": _TASK_VECTOR, "task_kinds": [_ITEM]},
    "both": {"meta": _NEWTON, "model": _TASK_VECTOR, "task_kinds": [_USER, _ITEM]},
    "paper": _PAPER,
    FULL: _PAPER,
    HISTORY: {},
    VECTORS: {},
}
"""Ours -> what it changes in the world's configuration, by section; a list takes a section's place.

newton is the task vector with Newton's step and its default rates, which for a task vector is the posterior; gradient has the
rates that a search on MovieLens found. set is amortised: an encoder of the support, no gradient at all; hybrid takes one step
from where that encoder starts. paper is the paper's form, of which an output is stored, and full is the same network, adapted
and kept whole. history is what ships with sums over the support stored beside it (`methods/history_mlp.py`); vectors is what
ships with pretrained vectors of items' texts, where a world has texts.
"""
FITTED_OTHERWISE = (FULL, HISTORY)
"""Of ours, what another fit makes of a configuration."""
SHIPPABLE = ("shipped", "newton", "gradient", "set", "hybrid", "paper", "both", VECTORS, "sequence")
"""Of ours, what may be chosen, since a user's embedding is served: the simplest first. Not another loss than the world's, which
its rivals are trained on as well.
"""
NEARLY = 0.001
"""The simplest is chosen that validates within this AUC of the best."""
RETRAINED = {", retrained daily": 1, ", retrained weekly": 7}
"""End of a job's name -> after how many judged days it is fitted anew, on all rows before."""
REFRESHED = ("shipped", "set")
"""Of ours, what is scored with older embeddings as well."""
RIVALS = {
    "rules": ("item_mean", "own_rate", "user_residual", "popular_lately", "bought_before"),
    "networks": ("global_mlp", "wide_deep", "dlrm"),
    "tables": ("logistic", "lightgbm"),
    "history_mlp": ("history_mlp",),
    SEQUENCE_MODEL: ("sasrec_daily", "sasrec_request"),
}
"""Job -> the rivals that it fits."""
ONCE = ("rules", SEQUENCE_MODEL)
"""Jobs that read no feature: with history and without they are the same."""


def retraining(name: str) -> tuple[str, int]:
    """What is fitted, and after how many judged days again; 0 where it is fitted once."""
    return next(((name.removesuffix(end), days) for end, days in RETRAINED.items() if name.endswith(end)), (name, 0))


def configured(world: Config, arm: str, *, history: bool, seed: int) -> Config:
    """A world's configuration for an arm; without history its features by a key of the user's are not declared."""
    values = world.model_dump(mode="json")
    if not history:
        values["features"] = [feature for feature in values["features"] if not feature["by"]]
    for section, changes in ARMS.get(arm, {}).items():
        values[section] = changes if isinstance(changes, list) else values[section] | changes
    values["training"] |= {"seed": seed, "num_workers": 1}
    cfg = Config.model_validate(values)
    texts = [each for each in WORLDS.values() if each.kind == world.source.kind] if arm == VECTORS else []
    return texts[0].with_text(cfg) if texts else cfg
