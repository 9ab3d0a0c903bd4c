"""How good the network is on the rows that validate, as the split has them judged; the number that training stops on."""

from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit, logit

from limaml import metrics
from limaml.config import Config
from limaml.models.network import Network
from limaml.tasks.protocols import as_served, first_k, query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec
from limaml.training.scoring import Floats, embed_others, score_specs
from limaml.training.step import Workers

OBJECTIVE = "validation_auc"
_LEAST, _LARGEST_SHIFT = 1e-9, 60.0
"""Probabilities are kept this far from 0 and 1; no shift beyond that can be needed then."""
_T = TypeVar("_T")


class Validator:
    """The tasks of the rows that validate, and what is measured on them."""

    def __init__(self, rows: TaskRows, cfg: Config, from_us: int | None = None, users: Collection[str] | None = None) -> None:
        """`rows` are those of validation users, as new ones: first-k, and as served from their first row on.

        With `users` only they are judged, and the other rows are support of other kinds' entities. With `from_us`
        (Split.validate_from_us) rows before it are support only, and rows from it on are judged as served. The users have been
        known for as long as they may be: first-k of them would be no test.
        """
        n = cfg.support_rows_of(cfg.task_kind.name)
        self._rows, ks, least = rows, cfg.evaluation.first_k, cfg.evaluation.min_query_rows
        served = as_served(rows, from_us=from_us or 0, support_rows=n, users=users)
        if from_us is None:
            judged = rows.entities if users is None else users
            by_k = [*first_k(rows, judged, ks, min_query_rows=least, support_rows=n).values()]
        else:
            by_k = [_first_rows(rows, served, from_us, min(k, n)) for k in ks]
        self._of_few_rows: list[list[TaskSpec]] = [*by_k, served]
        self.tasks: list[list[TaskSpec]] = self._of_few_rows if from_us is None else [served]
        """One list for each k if first-k is judged, then the as-served tasks."""

    def __call__(self, network: Network, workers: Workers) -> dict[str, float]:
        """`measure` of the network's scores; each worker scores a share of the tasks and all get the same numbers."""
        return self.measure(self._scores(network, workers, self.tasks))

    def of_few_rows(self, network: Network, workers: Workers) -> float:
        """`validation_auc` over first-k and as served, by which the prior's rows are chosen.

        Of known users the query rows are those that validate, since the others trained.
        """
        return self._measure(self._of_few_rows, self._scores(network, workers, self._of_few_rows))[OBJECTIVE]

    def level(self, network: Network, workers: Workers) -> float:
        """What is to be added to all logits, so that the mean score as served is the share of positive rows."""
        served = self.tasks[-1:]
        return level_of(self._scores(network, workers, served)[0], query_rows(self._rows, served[0]).labels)

    def measure(self, scores: Sequence[Floats]) -> dict[str, float]:
        """AUCs from one array of scores for each of `tasks`; first-k values, where it is judged, are means over k.

        `validation_auc` is the mean over lists of pooled and of per-user AUC, which count the same; NaN if no list has a value.
        A value that is not defined (no user has both classes) is left out of its mean.
        """
        return self._measure(self.tasks, scores)

    def _measure(self, tasks: Sequence[Sequence[TaskSpec]], scores: Sequence[Floats]) -> dict[str, float]:
        pooled, per_user = [], []
        for specs, part in zip(tasks, scores, strict=True):
            queries = query_rows(self._rows, specs)
            pooled.append(metrics.auc(queries.labels, part))
            per_user.append(metrics.mean_per_user_auc(queries.labels, part, queries.users, queries.num_users))
        found = {OBJECTIVE: _mean(pooled + per_user)}
        if len(tasks) > 1:
            found["validation_first_k_auc"] = _mean(pooled[:-1])
            found["validation_first_k_user_auc"] = _mean(per_user[:-1])
        return found | {"validation_as_served_auc": pooled[-1], "validation_as_served_user_auc": per_user[-1]}

    def _scores(self, network: Network, workers: Workers, tasks: Sequence[Sequence[TaskSpec]]) -> list[Floats]:
        """Scores of every part; one flat sum over workers, each adding its own tasks to zeros."""
        shares = [_share(specs, workers) for specs in tasks]
        others = embed_others(network, self._rows, [spec for specs in shares for spec in specs])
        mine = [score_specs(network, self._rows, specs, others) for specs in shares]
        bounds = np.cumsum([0] + [sum(len(spec.query) for spec in specs) for specs in tasks])
        flat = np.zeros(bounds[-1])
        for start, specs, part in zip(bounds, tasks, mine, strict=False):
            positions = [np.arange(a, b) for a, b in _query_bounds(specs)]
            index = [start + at for at in _share(positions, workers)]
            flat[np.concatenate(index) if index else np.zeros(0, np.int64)] = part
        device = next(network.parameters()).device
        total = workers.sum(torch.from_numpy(flat).to(device)).cpu().numpy()
        return [total[a:b] for a, b in pairwise(bounds)]


def _first_rows(rows: TaskRows, served: Sequence[TaskSpec], from_us: int, k: int) -> list[TaskSpec]:
    """A task for each entity of `served`, with all its query rows: as of `from_us`, by the entity's first k rows before it."""
    tasks = []
    for entity, mine in groupby(served, lambda spec: spec.entity):
        start, query = int(rows.offsets[entity]), np.concatenate([spec.query for spec in mine])
        stop = min(start + k, rows.first_row_at(entity, from_us))
        tasks.append(TaskSpec(entity, from_us, start, stop, query))
    return tasks


def level_of(probability_R: Floats, labels_R: Floats) -> float:
    """What added to these scores' logits makes their mean the share of positive labels; 0 where only one label occurs."""
    if len(np.unique(labels_R)) < 2:
        return 0.0
    logit_R, wanted = logit(np.clip(probability_R, _LEAST, 1.0 - _LEAST)), labels_R.mean()
    found: float = brentq(lambda shift: expit(logit_R + shift).mean() - wanted, -_LARGEST_SHIFT, _LARGEST_SHIFT)
    return found


def _share(tasks: Sequence[_T], workers: Workers) -> Sequence[_T]:
    return tasks[workers.rank :: workers.size]


def _query_bounds(specs: Sequence[TaskSpec]) -> list[tuple[int, int]]:
    ends = np.cumsum([len(spec.query) for spec in specs])
    return [(int(end) - len(spec.query), int(end)) for end, spec in zip(ends, specs, strict=True)]


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
