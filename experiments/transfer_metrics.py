"""What is measured of judged rows and ranked catalogues, over several draws of new items, with intervals.

Pairs of rows are those within one draw, added up over draws: scores of different networks are never compared. A resample draws
users and items, each with replacement and once for all draws of new items, and a row weighs as its user times its item (Owen
2007, "The pigeonhole bootstrap"); every arm sees the same resamples, so that differences are paired.

    R rows of all draws, B resamples (the first: every weight 1), G ties of a list, L lists, P positives of the lists
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.cached_jobs import Arrays
from experiments.evidence.measure import TOP, Mask, gain
from experiments.transfer_jobs import GROUPS, Draw, inside
from limaml.metrics import Floats, Ints, draw_users, expected_calibration_error, log_loss

Draws = dict[str, Floats]
"""Metric -> (B,), in points."""
RESAMPLES, _AT_ONCE = 500, 32


class Rows(NamedTuple):
    """Rows of all draws that are scored alike by every arm."""

    draw_R: Ints
    user_R: Ints
    item_R: Ints
    day_R: Ints
    """Since the first one that is judged; those before it validate."""
    label_R: Floats
    seen_R: Ints
    """Rows of the item before the day."""
    user_seen_R: Ints

    @classmethod
    def of(cls, draws: Sequence[Draw], events: Sequence[Ints]) -> "Rows":
        """These events of each draw."""
        parts = []
        for number, (draw, at) in enumerate(zip(draws, events, strict=True)):
            user, item, day = draw.user_E[at], draw.item_E[at], draw.day_E[at]
            seen, user_seen = draw.before(draw.item_E, item, day), draw.before(draw.user_E, user, day)
            parts.append((np.full(len(at), number), user, item, day - draw.first_judged, draw.label_E[at], seen, user_seen))
        return cls._make(np.concatenate(each) for each in zip(*parts, strict=True))

    def where(self, mask_R: Mask) -> "Rows":
        return Rows._make(each[mask_R] for each in self)


class Resamples(NamedTuple):
    """How often each user and each item is in each resample."""

    user_BU: Floats
    item_BI: Floats

    @classmethod
    def draw(cls, num_users: int, num_items: int, number: int) -> "Resamples":
        ones = [np.ones((1, count)) for count in (num_users, num_items)]
        drawn = [draw_users(count, draws=number, seed=seed) for seed, count in enumerate((num_users, num_items))]
        return cls(*(np.concatenate(pair) for pair in zip(ones, drawn, strict=True)))


def measured(rows: Rows, score_R: Floats, mask_R: Mask, resamples: Resamples) -> Draws:
    """AUC over all pairs of rows within a draw, and the mean of users' own AUCs within a draw."""
    draw, user, item, _, label, _, _ = rows.where(mask_R)
    score = score_R[mask_R]
    own, list_R = np.unique(draw * (user.max(initial=0) + 1) + user, return_inverse=True)
    owner_L = own % (user.max(initial=0) + 1)
    found: dict[str, list[Floats]] = {"pooled_auc": [], "per_user_auc": []}
    for start in range(0, len(resamples.user_BU), _AT_ONCE):
        user_bU, item_bI = (each[start : start + _AT_ONCE] for each in resamples)
        weight_bR = user_bU[:, user] * item_bI[:, item]
        ordered_bL, pairs_bL = ordered_pairs(label, score, draw, weight_bR)
        with np.errstate(invalid="ignore"):
            found["pooled_auc"].append(ordered_bL.sum(axis=1) / pairs_bL.sum(axis=1))
            ordered_bL, pairs_bL = ordered_pairs(label, score, list_R, weight_bR)
            auc_bL, weight_bL = np.nan_to_num(ordered_bL / pairs_bL), user_bU[:, owner_L] * (pairs_bL > 0)
            found["per_user_auc"].append((auc_bL * weight_bL).sum(axis=1) / weight_bL.sum(axis=1))
    return {name: 100 * np.concatenate(each) for name, each in found.items()}


def ordered_pairs(label_R: Floats, score_R: Floats, list_R: Ints, weight_BR: Floats) -> tuple[Floats, Floats]:
    """(B, L) weight of each list's pairs of a positive and a negative row whose positive scores higher, ties counting a half,
    and of all its pairs.
    """
    order = np.lexsort((score_R, list_R))
    lists, scores = list_R[order], score_R[order]
    start_G = np.flatnonzero(np.r_[True, (scores[1:] != scores[:-1]) | (lists[1:] != lists[:-1])][: len(order)])
    start_L = np.flatnonzero(np.r_[True, lists[start_G][1:] != lists[start_G][:-1]][: len(start_G)])
    if not len(order):
        return np.zeros((len(weight_BR), 0)), np.zeros((len(weight_BR), 0))
    weight_BR = weight_BR[:, order]
    positive_BG = np.add.reduceat(weight_BR * label_R[order], start_G, axis=1)
    negative_BG = np.add.reduceat(weight_BR, start_G, axis=1) - positive_BG
    below_BG = np.cumsum(negative_BG, axis=1) - negative_BG / 2
    positive_BL, negative_BL = (np.add.reduceat(each, start_L, axis=1) for each in (positive_BG, negative_BG))
    before_BL = np.cumsum(negative_BL, axis=1) - negative_BL
    return np.add.reduceat(positive_BG * below_BG, start_L, axis=1) - positive_BL * before_BL, positive_BL * negative_BL


def ndcg(draws: Sequence[Draw], rankings: Sequence[Arrays], group: str, resamples: Resamples) -> Floats:
    """(B,) mean NDCG@10 in points, over a sample of users' days, of the group's positives among what was no positive that day.

    A list weighs as its user, times its relevant items on average; `rankings` are as `experiments.transfer_jobs.rank` says.
    """
    discount = 1 / np.log2(np.arange(2, TOP + 2))
    values, weights = [], []
    for draw, ranking in zip(draws, rankings, strict=True):
        above = np.split(ranking["above"], np.cumsum([len(one.item_P) for one in draw.lists])[:-1])
        for one, above_P in zip(draw.lists, above, strict=True):
            if group in one.sampled:
                relevant_P = inside(one.seen_P, group)
                place = np.sort(above_P[relevant_P]) + np.arange(relevant_P.sum())
                values.append(discount[place[place < TOP]].sum() / discount[: len(place)].sum())
                weights.append(resamples.user_BU[:, one.user] * resamples.item_BI[:, one.item_P[relevant_P]].mean(axis=1))
    weight_BL = np.stack(weights, axis=1) if weights else np.zeros((len(resamples.user_BU), 0))
    with np.errstate(invalid="ignore"):
        found: Floats = 100 * (weight_BL @ np.array(values)) / weight_BL.sum(axis=1)
    return found


def difference(after: Draws, before: Draws) -> dict[str, dict[str, float]]:
    """Metric -> what `after` has over `before`, in points, and the central 95 % of its resamples; not what is undefined."""
    pairs = {metric: (after[metric], before[metric]) for metric in after}
    found = {metric: gain(*((float(draws_B[0]), draws_B[1:]) for draws_B in pair)) for metric, pair in pairs.items()}
    return {metric: one for metric, one in found.items() if not np.isnan(one["mean"])}


def of_groups(rows: Rows, score_R: Floats, alone: Resamples) -> dict[str, dict[str, float]]:
    """Group -> pooled AUC, mean score and label, log loss, and expected calibration error."""
    found = {}
    for group in GROUPS:
        mask_R = inside(rows.seen_R, group)
        label, score = rows.label_R[mask_R], score_R[mask_R]
        found[group] = {
            "pooled_auc": float(measured(rows, score_R, mask_R, alone)["pooled_auc"][0]),
            "mean_score": float(score.mean()),
            "label_rate": float(label.mean()),
            "log_loss": log_loss(label, score),
            "calibration_error": expected_calibration_error(label, score),
        }
    return found


def of_lists(draws: Sequence[Draw], rankings: Sequence[Arrays]) -> dict[str, float]:
    """Of the ten best of the day's catalogue: how alike they are, how rare, and whom they show; means over draws."""
    parts = [_of_lists(draw, ranking["top"]) for draw, ranking in zip(draws, rankings, strict=True)]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def _of_lists(draw: Draw, top_LT: Ints) -> dict[str, float]:
    mine = np.array(["all" in one.sampled for one in draw.lists])
    day_L, top_LT = np.array([one.day for one in draw.lists])[mine], top_LT[mine]
    vector_IW = np.array(draw.items["text_vector"].to_pylist(), np.float64)
    alike = []
    for top in (each[each >= 0] for each in top_LT):
        if len(top) > 1:
            cosine = vector_IW[top] @ vector_IW[top].T
            alike.append((cosine.sum() - np.trace(cosine)) / (len(top) * (len(top) - 1)))
    shown = top_LT[top_LT >= 0]
    seen = draw.before(draw.item_E, shown, np.repeat(day_L, (top_LT >= 0).sum(axis=1)))
    counts = np.sort(np.bincount(shown, minlength=draw.items.num_rows))
    place = np.arange(1, len(counts) + 1)
    return {
        "diversity": 1 - float(np.mean(alike)),
        "novelty": float(np.mean(-np.log2((seen + 1) / (len(draw.item_E) + 1)))),
        "coverage": float((counts > 0).mean()),
        "exposure_gini": float((2 * place - len(counts) - 1) @ counts / (len(counts) * counts.sum())),
        "unseen_share": float((seen == 0).mean()),
    }
