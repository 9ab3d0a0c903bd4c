"""Quality of scores, as plain mathematics on numpy arrays; nothing here knows models or data sets.

# R rows, U users, B bootstrap draws, G groups of rows with one score

Undefined values (no row, or one class only) are NaN, never a number that looks like one.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NUM_CALIBRATION_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2
_PAIR_COLUMNS = 64
_PAIR_USERS = 2000
"""So many users at most have a table of every two: it and its products with the draws grow with their square."""
NUM_PSI_BINS = 10  # deciles, the usual choice (Siddiqi 2006, "Credit Risk Scorecards")


@dataclass(frozen=True)
class Interval:
    """A value with the central 95 % of its bootstrap distribution."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        return bool(self.low > 0.0 or self.high < 0.0)

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def auc(labels_R: npt.ArrayLike, scores_R: npt.ArrayLike) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2; NaN with one class only."""
    labels, scores = np.asarray(labels_R, dtype=np.float64), np.asarray(scores_R, dtype=np.float64)
    return float(per_user_aucs(labels, scores, np.zeros(len(labels), dtype=np.int64), 1)[0])


def per_user_aucs(labels_R: npt.ArrayLike, scores_R: npt.ArrayLike, users_R: npt.ArrayLike, num_users: int) -> Floats:
    """AUC inside each user's own rows, shape (U,); NaN for a user without both classes. `users_R` holds 0 .. U-1."""
    labels, scores = np.asarray(labels_R, dtype=np.float64), np.asarray(scores_R, dtype=np.float64)
    users = np.asarray(users_R, dtype=np.int64)
    order = np.lexsort((scores, users))
    labels, scores, users = labels[order], scores[order], users[order]
    positives = np.bincount(users, weights=labels, minlength=num_users)
    negatives = np.bincount(users, weights=1.0 - labels, minlength=num_users)
    if len(scores) == 0:
        return np.full(num_users, np.nan)
    new_group = np.r_[True, (scores[1:] != scores[:-1]) | (users[1:] != users[:-1])]
    starts = np.flatnonzero(new_group)
    sizes = np.diff(np.r_[starts, len(scores)])
    first_row_U = np.searchsorted(users, np.arange(num_users))
    # Mid-rank (from 1) of each row inside its user, ties sharing their mean (Mann-Whitney).
    mid_ranks = np.repeat(starts + (sizes + 1) / 2.0, sizes) - first_row_U[users]
    rank_sums = np.bincount(users, weights=mid_ranks * labels, minlength=num_users)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = (rank_sums - positives * (positives + 1.0) / 2.0) / (positives * negatives)
    return np.where((positives > 0) & (negatives > 0), result, np.nan)


def mean_per_user_auc(labels_R: npt.ArrayLike, scores_R: npt.ArrayLike, users_R: npt.ArrayLike, num_users: int) -> float:
    """Mean of `per_user_aucs` over the users who have both classes, each user counting once."""
    values = per_user_aucs(labels_R, scores_R, users_R, num_users)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def log_loss(labels_R: npt.ArrayLike, probabilities_R: npt.ArrayLike) -> float:
    """Mean negative log likelihood (nats); probabilities are kept 1e-7 away from 0 and 1, float32's own limit."""
    labels, p = np.asarray(labels_R, dtype=np.float64), np.clip(np.asarray(probabilities_R, dtype=np.float64), 1e-7, 1 - 1e-7)
    return float(-(labels * np.log(p) + (1.0 - labels) * np.log1p(-p)).mean()) if len(p) else float("nan")


@dataclass(frozen=True)
class CalibrationBins:
    """Rows of equal-width probability bins; empty bins have weight 0 and mean 0."""

    weight: Floats
    mean_probability: Floats
    mean_label: Floats


def calibration_bins(
    labels_R: npt.ArrayLike, probabilities_R: npt.ArrayLike, num_bins: int = NUM_CALIBRATION_BINS
) -> CalibrationBins:
    """Share of rows, mean probability and mean label of each of `num_bins` equal bins of [0, 1]."""
    labels, p = np.asarray(labels_R, dtype=np.float64), np.asarray(probabilities_R, dtype=np.float64)
    bins = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins).astype(np.float64)
    divisor = np.maximum(counts, 1.0)
    return CalibrationBins(
        weight=counts / max(len(p), 1),
        mean_probability=np.bincount(bins, weights=p, minlength=num_bins) / divisor,
        mean_label=np.bincount(bins, weights=labels, minlength=num_bins) / divisor,
    )


def expected_calibration_error(
    labels_R: npt.ArrayLike, probabilities_R: npt.ArrayLike, num_bins: int = NUM_CALIBRATION_BINS
) -> float:
    """Mean gap between probability and observed rate over equal-width bins, weighted by rows (Guo et al. 2017, equation 3)."""
    if len(np.asarray(labels_R)) == 0:
        return float("nan")
    bins = calibration_bins(labels_R, probabilities_R, num_bins)
    return float((bins.weight * np.abs(bins.mean_probability - bins.mean_label)).sum())


def population_stability_index(expected_R: npt.ArrayLike, actual_R: npt.ArrayLike, num_bins: int = NUM_PSI_BINS) -> float:
    """How far `actual` is distributed from `expected`: sum (a - e) ln(a / e) over bins cut at the quantiles of `expected`.

    0 means equal; 0.1 is usually called small and 0.25 a shift. Empty bins count as half a row, so that the sum stays finite.
    """
    expected, actual = np.asarray(expected_R, dtype=np.float64), np.asarray(actual_R, dtype=np.float64)
    if not len(expected) or not len(actual):
        return float("nan")
    edges = quantile_edges(expected, num_bins)
    return stability_of_counts(bin_counts(edges, expected), bin_counts(edges, actual))


def quantile_edges(values_R: npt.ArrayLike, num_bins: int = NUM_PSI_BINS) -> Floats:
    """Inner edges that cut `values` into bins of equal size; fewer where values are equal, none where there is no value."""
    values = np.asarray(values_R, dtype=np.float64)
    if not len(values):
        return np.zeros(0)
    return np.unique(np.quantile(values, np.linspace(0.0, 1.0, num_bins + 1)[1:-1]))


def bin_counts(edges: Floats, values_R: npt.ArrayLike) -> Floats:
    """(len(edges) + 1,) values in each bin; one that equals an edge lies above it."""
    bins = np.searchsorted(edges, np.asarray(values_R, dtype=np.float64), side="right")
    return np.bincount(bins, minlength=len(edges) + 1).astype(np.float64)


def stability_of_counts(expected: npt.ArrayLike, actual: npt.ArrayLike) -> float:
    """Population stability index of counts in the same bins; NaN where either holds nothing."""
    counts = [np.asarray(side, dtype=np.float64) for side in (expected, actual)]
    if not all(side.sum() > 0 for side in counts):
        return float("nan")
    filled = [np.maximum(side, 0.5) for side in counts]
    e, a = (side / side.sum() for side in filled)
    return float(((a - e) * np.log(a / e)).sum())


def draw_users(num_users: int, *, draws: int, seed: int) -> Floats:
    """(B, U) how often each user is in each draw of `num_users` users with replacement."""
    if not num_users:
        return np.zeros((draws, 0))
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_users, np.full(num_users, 1.0 / num_users), size=draws).astype(np.float64)


class Bootstrap:
    """Whole users drawn with replacement, so that a user's rows stay together; every method sees the same draws (paired).

    `users_R` holds 0 .. U-1 for each row, `weights_BU` comes from `draw_users`.
    """

    def __init__(self, users_R: npt.ArrayLike, weights_BU: Floats) -> None:
        self.users: Ints = np.asarray(users_R, dtype=np.int64)
        self.weights_BU = weights_BU
        self.num_users = weights_BU.shape[1]

    def pooled_auc(self, labels_R: npt.ArrayLike, scores_R: npt.ArrayLike) -> Floats:
        """AUC over all rows of each draw, shape (B,); NaN for a draw with one class only.

        The AUC is a sum over pairs of rows, so a draw with weights w gives (w' A w) / (w'P * w'N) with A the ordered pairs of
        every two users and P and N their positives and negatives: the rows are gone through once, not once a draw. With many
        users once a draw is less. Either counts halves, so that both give the same bits.
        """
        labels, scores = np.asarray(labels_R, dtype=np.float64), np.asarray(scores_R, dtype=np.float64)
        if self.num_users > _PAIR_USERS:
            ordered_B = _ordered_of_draws(labels, scores, self.users, self.weights_BU)
        else:
            pairs_UU = _ordered_pairs(labels, scores, self.users, self.num_users)
            ordered_B = ((self.weights_BU @ pairs_UU) * self.weights_BU).sum(axis=1)
        positives_U = np.bincount(self.users, weights=labels, minlength=self.num_users)
        negatives_U = np.bincount(self.users, weights=1.0 - labels, minlength=self.num_users)
        num_pairs_B = (self.weights_BU * positives_U).sum(axis=1) * (self.weights_BU * negatives_U).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            aucs: Floats = ordered_B / num_pairs_B
        return np.where(num_pairs_B > 0, aucs, np.nan)

    def per_user_auc(self, labels_R: npt.ArrayLike, scores_R: npt.ArrayLike) -> Floats:
        """Mean per-user AUC of each draw, shape (B,); a user drawn twice counts twice."""
        values = per_user_aucs(labels_R, scores_R, self.users, self.num_users)
        defined = ~np.isnan(values)
        weights_BU = self.weights_BU[:, defined]
        with np.errstate(invalid="ignore"):
            means: Floats = (weights_BU * values[defined]).sum(axis=1) / weights_BU.sum(axis=1)
        return means


def interval(value: float, draws_B: Floats) -> Interval:
    """`value` with the 2.5 % and 97.5 % quantiles of its draws (percentile bootstrap); NaN bounds where no draw is defined."""
    defined = draws_B[~np.isnan(draws_B)]
    if not len(defined) or np.isnan(value):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _ordered_pairs(labels_R: Floats, scores_R: Floats, users_R: Ints, num_users: int) -> Floats:
    """(U, U) number of pairs (positive row of u, negative row of v) with the positive scored higher, ties counting a half.

    Costs rows * users, in blocks of columns, so that memory stays at rows * 64.
    """
    groups_R = np.unique(scores_R, return_inverse=True)[1]
    num_groups = int(groups_R.max(initial=-1)) + 1
    positives = np.flatnonzero(labels_R > 0.5)
    positives = positives[np.argsort(users_R[positives], kind="stable")]
    owners, starts = np.unique(users_R[positives], return_index=True)
    pairs_UU: Floats = np.zeros((num_users, num_users))
    for first in range(0, num_users if len(positives) else 0, _PAIR_COLUMNS):
        width = min(_PAIR_COLUMNS, num_users - first)
        mine = np.flatnonzero((labels_R < 0.5) & (users_R >= first) & (users_R < first + width))
        cells = groups_R[mine] * width + users_R[mine] - first
        negatives_GV = np.bincount(cells, minlength=num_groups * width).reshape(num_groups, width)
        below_GV = np.cumsum(negatives_GV, axis=0) - negatives_GV / 2.0
        pairs_UU[owners, first : first + width] = np.add.reduceat(below_GV[groups_R[positives]], starts, axis=0)
    return pairs_UU


def _ordered_of_draws(labels_R: Floats, scores_R: Floats, users_R: Ints, weights_BU: Floats) -> Floats:
    """(B,) what `_ordered_pairs` adds up to in each draw. Costs rows * draws, and memory of the rows."""
    order = np.argsort(scores_R, kind="stable")
    labels_R, users_R, scores_R = labels_R[order], users_R[order], scores_R[order]
    starts = np.flatnonzero(np.append(True, scores_R[1:] != scores_R[:-1])[: len(scores_R)])
    ordered_B: Floats = np.zeros(len(weights_BU))
    for draw, weights_U in enumerate(weights_BU if len(starts) else ()):
        weights_R = weights_U[users_R]
        positives_G = np.add.reduceat(weights_R * labels_R, starts)
        negatives_G = np.add.reduceat(weights_R, starts) - positives_G
        ordered_B[draw] = positives_G @ (np.cumsum(negatives_G) - negatives_G / 2.0)
    return ordered_B
