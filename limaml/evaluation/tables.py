"""Every method measured on the same rows: values, and paired intervals over users against two rivals.

What comes out is plain JSON values; what is not defined is null.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from limaml import metrics
from limaml.config import EvaluationConfig
from limaml.metrics import Bootstrap, Interval, draw_users, interval
from limaml.tasks.protocols import QueryRows, days_seen, query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec
from limaml.tasks.splits import Split

Floats = npt.NDArray[np.float64]
Masks = Mapping[str, npt.NDArray[np.bool_]]

LIMAML = "limaml"
RIVALS = ("global_mlp", "user_residual")
# Smallest and largest support size of the groups that as-served rows are reported in.
SUPPORT_GROUPS = (("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20+", 20, 2**31))
# Fewest and most earlier days with rows of the groups that known users' rows are reported in. None occurs only where T1 and T2,
# being arrivals, lie on one day.
DAY_GROUPS = (("0", 0, 0), ("1", 1, 1), ("2-4", 2, 4), ("5-9", 5, 9), ("10+", 10, 2**31))


def measure(queries: QueryRows, scores: Mapping[str, Floats], cfg: EvaluationConfig) -> dict[str, Any]:
    """Table of one set of query rows: {"rows", "users", "methods": {name: values}}."""
    bootstrap = Bootstrap(queries.users, draw_users(queries.num_users, draws=cfg.bootstrap_draws, seed=cfg.seed))
    draws = {
        name: {
            "pooled_auc": bootstrap.pooled_auc(queries.labels, part),
            "per_user_auc": bootstrap.per_user_auc(queries.labels, part),
        }
        for name, part in scores.items()
    }
    values = {name: _values(queries, part) for name, part in scores.items()}
    methods = {name: _with_intervals(name, values, draws) for name in scores}
    return {"rows": len(queries), "users": queries.num_users, "methods": methods}


def measure_groups(
    rows: TaskRows, specs: Sequence[TaskSpec], scores: Mapping[str, Floats], split: Split, cfg: EvaluationConfig
) -> dict[str, Any]:
    """Tables of as-served rows: of all users, by who they are and for how many days they have been there, by support size."""
    sizes = np.array([len(spec.query) for spec in specs])
    tables = {}
    for name, chosen in _groups(rows, specs, split).items():
        mask = np.repeat(chosen, sizes)
        queries = query_rows(rows, [spec for spec, mine in zip(specs, chosen, strict=True) if mine])
        tables[name] = measure(queries, {method: part[mask] for method, part in scores.items()}, cfg)
    return tables


def gain(table: Mapping[str, Any], metric: str, rival: str) -> Interval:
    """LiMAML's paired difference to `rival` in one table of `measure`."""
    found = table["methods"][LIMAML][f"{metric}_vs_{rival}"]
    return Interval(*(math.nan if found[key] is None else found[key] for key in ("value", "low", "high")))


def calibration(queries: QueryRows, scores: Mapping[str, Floats]) -> dict[str, Any]:
    """Curve of every method: weight, mean probability and mean label of each bin."""
    curves = {}
    for name, part in scores.items():
        bins = metrics.calibration_bins(queries.labels, part)
        curves[name] = {
            "weight": bins.weight.tolist(),
            "mean_probability": bins.mean_probability.tolist(),
            "mean_label": bins.mean_label.tolist(),
        }
    return curves


def _values(queries: QueryRows, scores: Floats) -> dict[str, float]:
    return {
        "pooled_auc": metrics.auc(queries.labels, scores),
        "per_user_auc": metrics.mean_per_user_auc(queries.labels, scores, queries.users, queries.num_users),
        "log_loss": metrics.log_loss(queries.labels, scores),
        "calibration_error": metrics.expected_calibration_error(queries.labels, scores),
    }


def _with_intervals(
    name: str, values: Mapping[str, Mapping[str, float]], draws: Mapping[str, Mapping[str, Floats]]
) -> dict[str, Any]:
    mine = values[name]
    found: dict[str, Any] = {metric: _plain(value) for metric, value in mine.items()}
    for metric, my_draws in draws[name].items():
        found[f"{metric}_interval"] = _interval(mine[metric], my_draws)
        for rival in RIVALS:
            if rival in values and rival != name:
                difference = mine[metric] - values[rival][metric]
                found[f"{metric}_vs_{rival}"] = _interval(difference, my_draws - draws[rival][metric])
    return found


def _interval(value: float, draws: Floats) -> dict[str, float | None]:
    return {key: _plain(number) for key, number in interval(value, draws).as_dict().items()}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _groups(rows: TaskRows, specs: Sequence[TaskSpec], split: Split) -> Masks:
    """`known` and `new` divide `all`; held-out users are among the new ones, beside those who came after training ended."""
    known, held_out = (_are(rows, specs, users) for users in (split.train_users, split.held_out_users))
    masks = {"all": np.ones(len(specs), np.bool_), "known": known, "new": ~known, "held_out": held_out}
    days = days_seen(rows, specs)
    by_days = {f"known days {name}": known & (days >= low) & (days <= high) for name, low, high in DAY_GROUPS}
    masks |= {name: mask for name, mask in by_days.items() if mask.any()}
    support = np.array([spec.support_size for spec in specs])
    return masks | {f"support {name}": (support >= low) & (support <= high) for name, low, high in SUPPORT_GROUPS}


def _are(rows: TaskRows, specs: Sequence[TaskSpec], users: Sequence[str]) -> npt.NDArray[np.bool_]:
    named = set(users)
    return np.array([rows.entities[spec.entity] in named for spec in specs], np.bool_)
