"""Choices made for each band of support size, on validation users: a user of one row wants other steps than one of 50."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from limaml import metrics
from limaml.config import Config
from limaml.evaluation.scoring_method import Floats
from limaml.tasks.protocols import first_k, query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec

BANDS = (1, 2, 3, 5, 10, 20, 50)
"""Smallest support of each band; the band's choice is made on first-k tasks of that k."""
_QUERY_AFTER = 20
"""Query rows lie after this row for every smaller k, so that all of those bands are judged on the same rows."""
_LEAST_USERS = 10

Choice = Mapping[str, Any]
Score = Callable[[Sequence[TaskSpec], Choice], Floats]
"""Probability of every query row of some specs under a choice."""


def band_of(support_size: int) -> int:
    """Position in BANDS, -1 for an empty support."""
    return bisect_right(BANDS, support_size) - 1


def band_tasks(rows: TaskRows, cfg: Config) -> list[list[TaskSpec]]:
    """First-k tasks of `rows`' users for every band; no task where fewer than 10 users have enough rows."""
    tasks = []
    for k in BANDS:
        found = first_k(
            rows,
            rows.entities,
            sorted({k, max(k, _QUERY_AFTER)}),
            min_query_rows=cfg.evaluation.min_query_rows,
            support_rows=cfg.meta.support_rows,
        )[k]
        tasks.append(found if len(found) >= _LEAST_USERS else [])
    return tasks


def choose_by_band(
    rows: TaskRows, tasks: Sequence[Sequence[TaskSpec]], choices: Sequence[Choice], score: Score
) -> list[Choice]:
    """The best of `choices` for each band, by pooled AUC and then by log loss; a band without tasks takes the one below's.

    The lowest takes the middle choice if it has none.
    """
    chosen: list[Choice] = []
    for specs in tasks:
        if specs:
            goodness = [_goodness(rows, specs, score(specs, choice)) for choice in choices]
            chosen.append(choices[goodness.index(max(goodness))])
        else:
            chosen.append(chosen[-1] if chosen else choices[len(choices) // 2])
    return chosen


def _goodness(rows: TaskRows, specs: Sequence[TaskSpec], scores: Floats) -> tuple[float, float]:
    labels = query_rows(rows, specs).labels
    value = metrics.auc(labels, scores)
    return -np.inf if np.isnan(value) else round(value, 9), -metrics.log_loss(labels, scores)


def by_band(specs: Iterable[TaskSpec]) -> dict[int, list[int]]:
    """Positions of the specs of each band, -1 for those without support."""
    found: dict[int, list[int]] = {}
    for position, spec in enumerate(specs):
        found.setdefault(band_of(spec.support_size), []).append(position)
    return found
