"""What is measured of scores: metrics over all rows, over users and over visits, with draws of users and of days.

A visit is a user's rows of one day: the list that was shown. Rows that share a user or a day are not independent, so intervals
come from whole users, and a second time from whole days, drawn with replacement. Every method sees the same draws.

    R rows, P parts (users or visits), C clusters (users or days), B draws
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from limaml import metrics
from limaml.metrics import Bootstrap, Floats, Ints

POOLED, PER_USER, PER_VISIT, NDCG = "pooled_auc", "per_user_auc", "per_visit_auc", "ndcg10"
METRICS = (POOLED, PER_USER, PER_VISIT, NDCG)
"""In points."""
TOP = 10
_DAYS = 1_000_000

Mask = npt.NDArray[np.bool_]
Draws = dict[str, tuple[float, Floats]]
"""Metric -> its value and (B,) draws of it."""


@dataclass(frozen=True)
class Judged:
    """R rows of a protocol at one origin, and all about them that does not depend on a method."""

    labels_R: Floats
    user_R: Ints
    """Which of all users of the world."""
    day_R: Ints
    """Days since the world's first one."""
    groups: Mapping[str, Mask]
    category_R: Ints
    """Of the item; 0 without."""

    def part(self, group: str) -> "Part":
        mask_R = self.groups[group]
        return Part(self.labels_R[mask_R], self.user_R[mask_R], self.day_R[mask_R])


@dataclass(frozen=True)
class Part:
    """Rows of one group."""

    labels_R: Floats
    user_R: Ints
    day_R: Ints

    @cached_property
    def visit_R(self) -> Ints:  # noqa: N802
        found: Ints = np.unique(self.user_R * _DAYS + self.day_R, return_inverse=True)[1]
        return found

    @cached_property
    def own_R(self) -> Ints:  # noqa: N802
        """Users of these rows, from 0."""
        found: Ints = np.unique(self.user_R, return_inverse=True)[1]
        return found

    def measured(self, score_R: Floats, weights_BC: Floats, *, by_day: bool, pooled: bool) -> Draws:
        """Metrics in points, with draws in which clusters (users, or days) have these weights; the pooled AUC if wanted."""
        cluster_R = self.day_R if by_day else self.user_R
        mine, cluster_R = np.unique(cluster_R, return_inverse=True)
        weights_BC, found = weights_BC[:, mine], {}
        if pooled:
            draws_B = 100 * Bootstrap(cluster_R, weights_BC).pooled_auc(self.labels_R, score_R)
            found[POOLED] = 100 * metrics.auc(self.labels_R, score_R), draws_B
        if not by_day:  # A user's rows lie on many days.
            found[PER_USER] = _mean_of_parts(_aucs(self.labels_R, score_R, self.own_R), self.own_R, cluster_R, weights_BC)
        for name, of in ((PER_VISIT, _aucs), (NDCG, ndcgs)):
            found[name] = _mean_of_parts(of(self.labels_R, score_R, self.visit_R), self.visit_R, cluster_R, weights_BC)
        return found

    def values(self, score_R: Floats) -> dict[str, float]:
        """`METRICS` in points."""
        own, visits = (_aucs(self.labels_R, score_R, part_R) for part_R in (self.own_R, self.visit_R))
        lists = ndcgs(self.labels_R, score_R, self.visit_R)
        parts = {PER_USER: own, PER_VISIT: visits, NDCG: lists}
        means = {name: 100 * _mean(value_P) for name, value_P in parts.items()}
        return {POOLED: 100 * metrics.auc(self.labels_R, score_R)} | means

    def points(self, score_R: Floats) -> dict[str, float]:
        """Without intervals: share of visits (over ten rows, one positive or more) whose ten best hold one; two of all rows."""
        return {
            "hit10": 100 * _hit_rate(self.labels_R, score_R, self.visit_R),
            "log_loss": metrics.log_loss(self.labels_R, score_R),
            "calibration_error": metrics.expected_calibration_error(self.labels_R, score_R),
        }


def _mean_of_parts(value_P: Floats, part_R: Ints, cluster_R: Ints, weights_BC: Floats) -> tuple[float, Floats]:
    cluster_P = np.empty(len(value_P), np.int64)
    cluster_P[part_R] = cluster_R
    defined_P = ~np.isnan(value_P)
    weights_BP = weights_BC[:, cluster_P[defined_P]]
    with np.errstate(invalid="ignore"):
        draws_B = 100 * (weights_BP @ value_P[defined_P]) / weights_BP.sum(axis=1)
    return 100 * _mean(value_P), draws_B


def _mean(value_P: Floats) -> float:
    """Of what is defined."""
    defined = value_P[~np.isnan(value_P)]
    return float(defined.mean()) if len(defined) else float("nan")


def _aucs(labels_R: Floats, score_R: Floats, part_R: Ints) -> Floats:
    return metrics.per_user_aucs(labels_R, score_R, part_R, int(part_R.max(initial=-1)) + 1)


def ndcgs(labels_R: Floats, score_R: Floats, part_R: Ints) -> Floats:
    """(P,) NDCG@10 of each part's rows, the best score first; NaN where all labels are alike (Järvelin & Kekäläinen 2002)."""
    gain_R = 1.0 / np.log2(np.arange(2, TOP + 2))
    place_R, num_parts = _places(score_R, part_R), int(part_R.max(initial=-1)) + 1
    shown_R = place_R < TOP
    gained_P = np.bincount(part_R[shown_R], weights=(gain_R[place_R[shown_R]] * labels_R[shown_R]), minlength=num_parts)
    positives_P = np.bincount(part_R, weights=labels_R, minlength=num_parts)
    rows_P = np.bincount(part_R, minlength=num_parts)
    ideal_P = np.r_[np.nan, np.cumsum(gain_R)][np.minimum(positives_P, TOP).astype(np.int64)]
    return np.where(positives_P < rows_P, gained_P / ideal_P, np.nan)


def _hit_rate(labels_R: Floats, score_R: Floats, part_R: Ints) -> float:
    num_parts, shown_R = int(part_R.max(initial=-1)) + 1, _places(score_R, part_R) < TOP
    positives_P = np.bincount(part_R, weights=labels_R, minlength=num_parts)
    hits_P = np.bincount(part_R[shown_R], weights=labels_R[shown_R], minlength=num_parts) > 0
    counted_P = (np.bincount(part_R, minlength=num_parts) > TOP) & (positives_P > 0)
    return float(hits_P[counted_P].mean()) if counted_P.any() else float("nan")


def _places(score_R: Floats, part_R: Ints) -> Ints:
    """(R,) the place of each row in its part's ranking, from 0; ties are broken by chance, alike for every method."""
    chance_R = np.random.default_rng(0).random(len(score_R))
    order = np.lexsort((chance_R, -score_R, part_R))
    first = np.r_[True, np.diff(part_R[order]) != 0][: len(order)]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    place_R = np.empty(len(order), np.int64)
    place_R[order] = np.arange(len(order)) - starts
    return place_R


def gain(ours: tuple[float, Floats], theirs: tuple[float, Floats]) -> dict[str, float]:
    """What one method has over another, with the central 95 % of its draws."""
    found = metrics.interval(ours[0] - theirs[0], ours[1] - theirs[1])
    return {"mean": found.value, "low": found.low, "high": found.high}


def mean(parts: list[tuple[float, Floats]]) -> tuple[float, Floats]:
    """Over origins and seeds."""
    return float(np.mean([value for value, _ in parts])), np.mean([draws_B for _, draws_B in parts], axis=0)
