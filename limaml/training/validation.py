"""How good the network is on validation users, by both protocols; the number that training stops on."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from limaml import metrics
from limaml.config import Config
from limaml.data.protocols import QueryRows, as_served, first_k, query_rows
from limaml.data.tasks import TaskRows, TaskSpec
from limaml.models.network import LiMAML
from limaml.training.scoring import score_specs
from limaml.training.step import Workers

OBJECTIVE = "validation_auc"
_T = TypeVar("_T")


class Validator:
    """Scores the validation users' tasks; each worker takes a share of them and all get the same numbers."""

    def __init__(self, rows: TaskRows, cfg: Config) -> None:
        n = cfg.meta.support_rows
        tasks = first_k(
            rows, rows.entities, cfg.evaluation.first_k, min_query_rows=cfg.evaluation.min_query_rows, support_rows=n
        )
        self._rows = rows
        self._parts: list[tuple[str, list[TaskSpec]]] = [(f"first_{k}", specs) for k, specs in tasks.items()]
        self._parts.append(("as_served", as_served(rows, from_us=0, support_rows=n)))
        self._queries: list[QueryRows] = [query_rows(rows, specs) for _, specs in self._parts]

    def __call__(self, network: LiMAML, workers: Workers) -> dict[str, float]:
        """AUCs by protocol, and their mean `validation_auc`.

        first-k values are means over k. A protocol without a value (no user has both classes) is left out of the mean.
        """
        scores = self._scores(network, workers)
        pooled, per_user = [], []
        for queries, part in zip(self._queries, scores, strict=True):
            pooled.append(metrics.auc(queries.labels, part))
            per_user.append(metrics.mean_per_user_auc(queries.labels, part, queries.users, queries.num_users))
        found = {
            "validation_first_k_auc": _mean(pooled[:-1]),
            "validation_first_k_user_auc": _mean(per_user[:-1]),
            "validation_as_served_auc": pooled[-1],
        }
        return {OBJECTIVE: _mean(list(found.values())), **found}

    def _scores(self, network: LiMAML, workers: Workers) -> list[np.ndarray]:
        """Scores of every part; one flat sum over workers, each adding its own tasks to zeros."""
        mine = [score_specs(network, self._rows, _share(specs, workers)) for _, specs in self._parts]
        flat = np.zeros(sum(len(queries) for queries in self._queries))
        bounds = np.cumsum([0] + [len(queries) for queries in self._queries])
        for start, (_, specs), part in zip(bounds, self._parts, mine, strict=False):
            positions = [np.arange(a, b) for a, b in _query_bounds(specs)]
            index = [start + at for at in _share(positions, workers)]
            flat[np.concatenate(index) if index else np.zeros(0, np.int64)] = part
        device = next(network.parameters()).device
        total = workers.sum(torch.from_numpy(flat).to(device)).cpu().numpy()
        return [total[a:b] for a, b in pairwise(bounds)]


def _share(tasks: Sequence[_T], workers: Workers) -> Sequence[_T]:
    return tasks[workers.rank :: workers.size]


def _query_bounds(specs: Sequence[TaskSpec]) -> list[tuple[int, int]]:
    ends = np.cumsum([len(spec.query) for spec in specs])
    return [(int(end) - len(spec.query), int(end)) for end, spec in zip(ends, specs, strict=True)]


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
