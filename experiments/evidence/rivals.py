"""The rivals, fitted on an origin's training rows; what they choose, they choose on the rows that validate.

rules          an item's rate, a user's own rate of it, one number a user (`limaml.evaluation.baselines`); what was popular in
               the last week; what this user took before, counted with decay
networks       the global MLP and wide & deep (`limaml.evaluation.baselines`); DLRM
tables         logistic regression and LightGBM on a row's features and sums over the user's support
history_mlp    an MLP on the same, and on products with fitted item vectors
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from experiments.evidence.fit_data import FitData
from experiments.methods.dlrm import Dlrm
from experiments.methods.history_mlp import history_mlp
from experiments.methods.tabular import boosted, logistic
from limaml.evaluation.baselines import choose_shrinkage, item_mean, own_rate
from limaml.evaluation.rival_networks import GlobalMlp, WideDeep
from limaml.evaluation.scoring_method import Floats, MethodInput, MethodValidator, ScoringMethod
from limaml.evaluation.trained_baselines import choose_fit, score_as_trained, train
from limaml.features.columns import UNKNOWN
from limaml.metrics import Ints
from limaml.tasks.protocols import query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskSpec

HALF_LIVES, SHRINKAGES = (7.0, 28.0, 112.0, 1e6), (1.0, 5.0, 20.0)
"""Of what a user took before: days, and rows of the item's own rate."""
POPULAR_DAYS, POPULAR_ROWS = 7, 20.0
WITH_OTHERS = ("popular_lately",)
"""What reads other users' rows beside a task's."""
_MANY_DAYS = 1_000_000


def fit_rivals(group: str, data: FitData) -> Iterator[tuple[str, ScoringMethod]]:
    """Each rival of a group of `experiments.evidence.arms.RIVALS`, fitted."""
    cfg, validator = data.cfg, data.validator
    if group == "rules":
        yield "item_mean", item_mean
        if validator.inputs.own_rate is not None:
            yield "own_rate", own_rate
        yield "user_residual", choose_shrinkage(validator)
        yield "popular_lately", popular_lately
        yield "bought_before", choose_bought_before(validator)
    elif group == "networks":
        dims, rows = data.encoder.dims, data.training.rows
        yield "global_mlp", score_as_trained(train(cfg, GlobalMlp(cfg, dims), rows, validator))
        yield "wide_deep", choose_fit(cfg, train(cfg, WideDeep(cfg, dims), rows, validator), validator)
        yield "dlrm", choose_fit(cfg, train(cfg, Dlrm(cfg, dims), rows, validator), validator)
    elif group == "tables":
        yield "logistic", logistic(data)
        yield "lightgbm", boosted(data)
    else:
        yield "history_mlp", history_mlp(data)


def popular_lately(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
    """The rate of each query row's item in the week before the task's day, shrunk to the item's logged rate."""
    rows, queries = inputs.rows, query_rows(inputs.rows, specs)
    keys = rows.encoded.item_index.astype(np.int64) * _MANY_DAYS + rows.timestamp_us // MICROSECONDS_PER_DAY
    order = np.argsort(keys, kind="stable")
    positives = np.r_[0.0, np.cumsum(rows.label[order])]
    day = np.repeat([spec.as_of_us // MICROSECONDS_PER_DAY for spec in specs], [len(spec.query) for spec in specs])
    asked = rows.encoded.item_index[queries.rows].astype(np.int64) * _MANY_DAYS + day
    first, last = (np.searchsorted(keys[order], asked - days) for days in (POPULAR_DAYS, 0))
    rate = inputs.item_rate[queries.rows]
    found: Floats = (positives[last] - positives[first] + POPULAR_ROWS * rate) / (last - first + POPULAR_ROWS)
    return found


def choose_bought_before(validator: MethodValidator) -> ScoringMethod:
    """The decayed count whose half-life and shrinkage validate best."""
    found = {choice: validator.auc_of(bought_before(*choice)) for choice in product(HALF_LIVES, SHRINKAGES)}
    return bought_before(*max(found, key=found.__getitem__))


def bought_before(half_life_days: float, shrinkage: float) -> ScoringMethod:
    """The user's own rate of each query row's item over all rows before the task, a row weighing 2^(-age / half-life), shrunk
    to the item's logged rate.
    """

    def scores(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        rows, parts = inputs.rows, [np.zeros((2, 0))]
        for spec in specs:
            before = slice(int(rows.offsets[spec.entity]), spec.support_stop)
            age_days = (spec.as_of_us - rows.timestamp_us[before]) / MICROSECONDS_PER_DAY
            weight = 0.5 ** (age_days / half_life_days)
            parts.append(
                _of_items(rows.encoded.item_index, before, spec.query, np.stack([weight, weight * rows.label[before]]))
            )
        weight_R, positive_R = np.concatenate(parts, axis=1)
        rate = inputs.item_rate[query_rows(rows, specs).rows]
        found: Floats = (positive_R + shrinkage * rate) / (weight_R + shrinkage)
        return found

    return scores


def _of_items(item_R: Ints, before: slice, query: Ints, value_2S: npt.NDArray[np.float64]) -> Floats:
    """(2, Q) sums of the values over earlier rows with the same item; an unknown one is like no other."""
    items, inverse = np.unique(item_R[before], return_inverse=True)
    if not len(items):
        return np.zeros((2, len(query)))
    sums = np.stack([np.bincount(inverse, weights=value_S, minlength=len(items)) for value_S in value_2S])
    asked = item_R[query]
    at = np.minimum(np.searchsorted(items, asked), len(items) - 1)
    found: Floats = sums[:, at] * ((items[at] == asked) & (asked != UNKNOWN))
    return found
