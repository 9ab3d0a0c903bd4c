"""Rivals that are rules on logged item rates: the rate itself, and with one number per user."""

from collections.abc import Sequence

import numpy as np

from experiments.methods.fitted import Design, Fitted
from experiments.methods.support_size_bands import BANDS, Choice, band_of, band_tasks, choose_by_band
from experiments.origin_data import OriginData
from limaml.evaluation import baselines
from limaml.evaluation.scoring_method import Floats, MethodInput
from limaml.tasks.protocols import query_rows
from limaml.tasks.sampling import TaskSpec

SHRINKAGES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""In rows."""
_NEWTON_STEPS = 8
_ROW_INFORMATION = 0.25
"""What a row of rate 1/2 says about a logit: with it, a shrinkage counts rows in both spaces."""
_INSIDE = 0.02


def item_mean(data: OriginData, _design: Design, _seed: int) -> Fitted:
    """The logged rate of each query row's item."""
    return Fitted(baselines.item_mean, data.validator.auc_of(baselines.item_mean))


def user_level(data: OriginData, design: Design, _seed: int) -> Fitted:
    """Item rate plus the user's level, in the design's `space`, shrunk by what validates best for its band of support size."""
    space = design.get("space", "logit")
    tasks, choices = band_tasks(data.validation.rows, data.cfg), [{"shrinkage": value} for value in SHRINKAGES]
    chosen = choose_by_band(
        data.validation.rows,
        tasks,
        choices,
        lambda specs, choice: level_scores(data.validation, specs, [choice] * len(BANDS), space),
    )

    def score(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return level_scores(inputs, specs, chosen, space)

    return Fitted(score, data.validator.auc_of(score), notes={"shrinkages": [choice["shrinkage"] for choice in chosen]})


def level_scores(inputs: MethodInput, specs: Sequence[TaskSpec], chosen: Sequence[Choice], space: str) -> Floats:
    """(sum of queries,) probabilities; `chosen` holds a shrinkage for every band."""
    level_of = _level_of_rates if space == "rate" else _level_of_logits
    levels = [
        level_of(inputs, spec, chosen[band_of(spec.support_size)]["shrinkage"]) if spec.support_size else 0.0 for spec in specs
    ]
    shift = np.repeat(np.array(levels), [len(spec.query) for spec in specs])
    rate = inputs.item_rate[query_rows(inputs.rows, specs).rows]
    return _clip(rate + shift) if space == "rate" else _clip(_sigmoid(_logit(rate) + shift))


def _level_of_rates(inputs: MethodInput, spec: TaskSpec, shrinkage: float) -> float:
    rows = slice(spec.support_start, spec.support_stop)
    return float((inputs.rows.label[rows] - inputs.item_rate[rows]).sum()) / (spec.support_size + shrinkage)


def _level_of_logits(inputs: MethodInput, spec: TaskSpec, shrinkage: float) -> float:
    """The most probable shift of the support's logits under a normal prior, by Newton's method."""
    rows = slice(spec.support_start, spec.support_stop)
    label, logit, precision = inputs.rows.label[rows], _logit(inputs.item_rate[rows]), _ROW_INFORMATION * shrinkage
    level = 0.0
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(logit + level)
        level += float((label - p).sum() - precision * level) / float((p * (1 - p)).sum() + precision)
    return level


def _logit(rate: Floats) -> Floats:
    inside = _clip(rate)
    found: Floats = np.log(inside / (1 - inside))
    return found


def _sigmoid(logit: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-logit))
    return found


def _clip(rate: Floats) -> Floats:
    clipped: Floats = np.clip(rate, _INSIDE, 1 - _INSIDE)
    return clipped
