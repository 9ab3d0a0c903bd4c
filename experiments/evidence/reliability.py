"""How much of what a network for everybody leaves unexplained repeats: the ceiling of whatever is fitted to a user's rows.

A row's residual is its label less that network's score. A user's judged days go to two halves in turn. The level is a user's
mean residual, the taste that of a user's rows with a category, less the level of that half. How the halves correlate is stepped
up to the length of both (Spearman 1910, Brown 1910): 0 is noise, and a predictor correlates at most by the square root of it.

R rows, C cells (users, or users' categories), U users, B draws
"""

import numpy as np

from experiments.evidence.measure import Part
from limaml.metrics import Floats, Ints

LEVEL, TASTE = "level", "taste"
LEAST = {LEVEL: 5, TASTE: 3}
"""Rows of a cell in either half."""


def repeats(part: Part, score_R: Floats, category_R: Ints, weights_BU: Floats) -> dict[str, tuple[float, Floats]]:
    """The reliability of levels and of tastes, with draws in which users have these weights; without cells it is left out."""
    user_R, residual_R = part.own_R, part.labels_R - score_R
    owners = np.unique(part.user_R)
    visit_user = user_R[np.unique(part.visit_R, return_index=True)[1]]  # Visits are in order of user, then day.
    rank = np.arange(len(visit_user)) - np.searchsorted(visit_user, visit_user)
    half_R = (rank % 2)[part.visit_R]
    level_R = _means(residual_R, 2 * user_R + half_R)[2 * user_R + half_R]
    found = {}
    for name, value_R, code_R in (
        (LEVEL, residual_R, user_R),
        (TASTE, residual_R - level_R, user_R * (category_R.max(initial=0) + 1) + category_R),
    ):
        cells, first, cell_R = np.unique(code_R, return_index=True, return_inverse=True)
        count_C2 = np.bincount(2 * cell_R + half_R, minlength=2 * len(cells)).reshape(-1, 2)
        kept_C = (count_C2 >= LEAST[name]).all(axis=1)
        if kept_C.sum() < 3:
            continue
        value_C2 = _means(value_R, 2 * cell_R + half_R, 2 * len(cells)).reshape(-1, 2)[kept_C]
        weights_BC = np.r_[np.ones((1, kept_C.sum())), weights_BU[:, owners[user_R[first][kept_C]]]]
        draws = _stepped_up(value_C2[:, 0], value_C2[:, 1], weights_BC)
        found[name] = float(draws[0]), draws[1:]
    return found


def _means(value_R: Floats, code_R: Ints, size: int = 0) -> Floats:
    with np.errstate(invalid="ignore"):
        found: Floats = np.bincount(code_R, weights=value_R, minlength=size) / np.bincount(code_R, minlength=size)
    return found


def _stepped_up(x_C: Floats, y_C: Floats, weights_BC: Floats) -> Floats:
    """(B,) reliabilities of two halves together, from the weighted correlation of one with the other; at least -1."""
    total_B = weights_BC.sum(axis=1)
    # A draw may have none of the cells, or two that contradict each other.
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y, xx, yy, xy = (weights_BC @ each / total_B for each in (x_C, y_C, x_C**2, y_C**2, x_C * y_C))
        r_B = np.clip((xy - mean_x * mean_y) / np.sqrt((xx - mean_x**2) * (yy - mean_y**2)), -1.0, 1.0)
        found: Floats = np.maximum(2 * r_B / (1 + r_B), -1.0)
    return found
