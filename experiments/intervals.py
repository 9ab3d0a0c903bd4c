"""Metrics of scores over origins and seeds, with draws of users from which intervals are made.

A metric is computed within an origin and a seed, then averaged. A draw takes users with replacement from all origins together,
once for everything that is measured: the same draw weighs a user in every origin, task set, seed and method, so that
differences are paired.

    R rows, U users of all origins, B draws
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from limaml import metrics
from limaml.metrics import Bootstrap, Floats, Ints

AUC, PERUSER_AUC = "auc", "peruser_auc"
LOG_LOSS, CALIBRATION_ERROR = "log_loss", "calibration_error"


@dataclass(frozen=True)
class TaskSetRows:
    """Query rows of one task set at one origin."""

    labels: Floats
    users: Ints
    """(R,) which of the U users of all origins."""

    def part(self, mask_R: npt.NDArray[np.bool_]) -> "TaskSetRows":
        return TaskSetRows(self.labels[mask_R], self.users[mask_R])


@dataclass(frozen=True)
class Measured:
    """One method on one task set: means over seeds for each origin, and draws of them."""

    values: dict[str, list[float]]
    """Metric -> one value an origin."""
    draws: dict[str, list[Floats]]
    """Metric -> (B,) an origin; NaN for a draw in which it is not defined."""

    def mean(self, metric: str) -> float:
        return _mean_of_origins([np.array(value) for value in self.values[metric]]).item()


@dataclass(frozen=True)
class Difference:
    """Ours less a rival's: the mean over origins, and the central 95 % of its draws."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def measure(rows: Sequence[TaskSetRows], scores: Sequence[Sequence[Floats]], weights_BU: Floats | None) -> Measured:
    """Measure scores[origin][seed] on the origins' rows; the draws are those of `limaml.metrics.draw_users`, none for None."""
    values: dict[str, list[float]] = {name: [] for name in (AUC, PERUSER_AUC, LOG_LOSS, CALIBRATION_ERROR)}
    draws: dict[str, list[Floats]] = {AUC: [], PERUSER_AUC: []}
    for task_set, seeds in zip(rows, scores, strict=True):
        mine, users = np.unique(task_set.users, return_inverse=True)
        found = [_values(task_set.labels, part, users, len(mine)) for part in seeds]
        for name, kept in values.items():
            kept.append(float(np.mean([each[name] for each in found])))
        if weights_BU is None:
            continue
        bootstrap = Bootstrap(users, weights_BU[:, mine])
        draws[AUC].append(np.mean([bootstrap.pooled_auc(task_set.labels, part) for part in seeds], axis=0))
        draws[PERUSER_AUC].append(np.mean([bootstrap.per_user_auc(task_set.labels, part) for part in seeds], axis=0))
    return Measured(values, draws)


def difference(ours: Measured, rival: Measured, metric: str, origins: Sequence[int] | None = None) -> Difference:
    """Paired difference, over all origins or the given ones."""
    return mean_difference([(ours, rival)], metric, origins)


def mean_difference(
    pairs: Sequence[tuple[Measured, Measured]], metric: str, origins: Sequence[int] | None = None
) -> Difference:
    """Mean over several task sets of the paired differences, e.g. of k = 20 and k = 50."""
    chosen = origins if origins is not None else range(len(pairs[0][0].values[metric]))
    values = [np.array(ours.values[metric][o] - rival.values[metric][o]) for ours, rival in pairs for o in chosen]
    draws = [ours.draws[metric][o] - rival.draws[metric][o] for ours, rival in pairs for o in chosen]
    interval = metrics.interval(_mean_of_origins(values).item(), _mean_of_origins(draws))
    return Difference(interval.value, interval.low, interval.high)


def _mean_of_origins(parts: Sequence[Floats]) -> Floats:
    found: Floats = np.mean(np.stack(parts), axis=0)
    return found


def _values(labels: Floats, scores: Floats, users: Ints, num_users: int) -> dict[str, float]:
    return {
        AUC: metrics.auc(labels, scores),
        PERUSER_AUC: metrics.mean_per_user_auc(labels, scores, users, num_users),
        LOG_LOSS: metrics.log_loss(labels, scores),
        CALIBRATION_ERROR: metrics.expected_calibration_error(labels, scores),
    }
