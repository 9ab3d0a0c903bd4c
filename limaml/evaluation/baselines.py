"""The rivals, fitted on the twin's training rows; whatever they choose, they choose on the rows that validate.

item_mean       the item's smoothed positive rate as it was logged
own_rate        the user's own smoothed positive rate of the item, where one is declared
user_residual   plus one shrunk number per user: how far the user's support lies above its items' rates
global_mlp      the global block without personalisation, trained on the same tasks' query rows
wide_deep       user-ID embeddings; a new user's is fitted on the same support rows with the network frozen
"""

from collections.abc import Sequence

import numpy as np

from limaml import telemetry
from limaml.config import Config
from limaml.evaluation.rival_networks import GlobalMlp, WideDeep
from limaml.evaluation.scoring_method import Floats, MethodInput, MethodValidator, ScoringMethod
from limaml.evaluation.trained_baselines import choose_fit, score_as_trained, train
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import query_rows
from limaml.tasks.sampling import TaskSpec

SHRINKAGES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
# Probabilities of the rate rules stay inside: a sum of rates is no probability, and one wrong 0 would cost 16 nats.
_CLIP = 0.02

_log = telemetry.get_logger(__name__)


def fit_baselines(cfg: Config, training: MethodInput, validator: MethodValidator, encoder: Encoder) -> dict[str, ScoringMethod]:
    """All rivals by name, fitted and chosen."""
    counted = {"item_mean": item_mean} | ({"own_rate": own_rate} if training.own_rate is not None else {})
    return {
        **counted,
        "user_residual": choose_shrinkage(validator),
        "global_mlp": score_as_trained(train(cfg, GlobalMlp(cfg, encoder.dims), training.rows, validator)),
        "wide_deep": choose_fit(cfg, train(cfg, WideDeep(cfg, encoder.dims), training.rows, validator), validator),
    }


def item_mean(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
    """The logged rate of each query row's item."""
    return _inside(inputs.item_rate[query_rows(inputs.rows, specs).rows])


def own_rate(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
    """The user's own rate of each query row's item."""
    assert inputs.own_rate is not None
    return _inside(inputs.own_rate[query_rows(inputs.rows, specs).rows])


def user_residual(shrinkage: float) -> ScoringMethod:
    """Item mean plus the user's residual = sum over support of (label - item's rate) / (rows + shrinkage)."""

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        surprise = np.r_[0.0, np.cumsum(inputs.rows.label - inputs.item_rate)]
        residuals = [(surprise[s.support_stop] - surprise[s.support_start]) / (s.support_size + shrinkage) for s in specs]
        shift = np.repeat(np.array(residuals), [len(spec.query) for spec in specs])
        return _inside(inputs.item_rate[query_rows(inputs.rows, specs).rows] + shift)

    return scores


def choose_shrinkage(validator: MethodValidator) -> ScoringMethod:
    """The user residual whose shrinkage validates best."""
    found = {shrinkage: validator.auc_of(user_residual(shrinkage)) for shrinkage in SHRINKAGES}
    best = max(found, key=lambda shrinkage: found[shrinkage])
    _log.info("baseline_chosen", baseline="user_residual", shrinkage=best, validation=round(found[best], 5))
    return user_residual(best)


def _inside(rates: Floats) -> Floats:
    clipped: Floats = np.clip(rates, _CLIP, 1 - _CLIP)
    return clipped
