"""What a card says beside the tables of an evaluation: quality by what is known of users, and what could not be seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml import metrics, schema
from limaml.config import Config
from limaml.evaluation.tables import LIMAML
from limaml.features.encoder import Encoder
from limaml.governance.leakage import spaced
from limaml.tasks.protocols import QueryRows
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import Split

Floats = npt.NDArray[np.float64]

_MAX_VALUES = 20
"""Of a category those with the most rows have a group each."""
_METHODS = (LIMAML, "global_mlp")


def by_category(
    cfg: Config, logged: pa.Table, rows: TaskRows, queries: QueryRows, scores: Mapping[str, Floats]
) -> dict[str, Any]:
    """`feature = value` -> rows, users and AUC, of every category of users; the value is the one a row was logged with."""
    groups = {}
    for feature in schema.tables(cfg.features).of("user"):
        if feature.type == "category":
            values = logged[feature.name].combine_chunks().take(pa.array(rows.source_row[queries.rows]))
            counts = sorted(pc.value_counts(values).to_pylist(), key=lambda one: (-one["counts"], str(one["values"])))
            for value in [one["values"] for one in counts[:_MAX_VALUES]]:
                same = pc.is_null(values) if value is None else pc.fill_null(pc.equal(values, value), False)
                name = "not known" if value is None else value
                groups[f"{feature.name} = {name}"] = _group(queries, scores, same.to_numpy(zero_copy_only=False))
    return groups


def limits(cfg: Config, logged: pa.Table, split: Split, encoder: Encoder, queries: QueryRows, rows: TaskRows) -> dict[str, Any]:
    """What the evaluation stands on, and how far its period is from training."""
    training = split.train_rows(logged)
    asked = logged.take(pa.array(rows.source_row[queries.rows]))
    before, now = encoder.values(spaced(training)), encoder.values(spaced(asked))
    drift = {
        name: metrics.population_stability_index(_numbers(before[name]), _numbers(now[name]))
        for name in before
        if pa.types.is_floating(before[name].type) or pa.types.is_integer(before[name].type)
    }
    largest = sorted(((value, name) for name, value in drift.items() if not np.isnan(value)), reverse=True)[:3]
    return {
        "users_judged": queries.num_users,
        "rows_judged": len(queries),
        "share_of_rows_without_support": _share(queries.support_sizes == 0),
        "share_of_rows_of_users_never_trained_on": _unseen(asked["user_id"], training["user_id"]),
        "share_of_rows_of_items_never_trained_on": _unseen(asked["item_id"], training["item_id"]),
        "label_rate_trained_and_judged": [_rate(training["label"]), round(float(queries.labels.mean()), 4)],
        "largest_drift_psi": {name: round(value, 4) for value, name in largest},
        "interval": f"95 % over {cfg.evaluation.bootstrap_draws} draws of users",
    }


def _group(queries: QueryRows, scores: Mapping[str, Floats], mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    labels, found = queries.labels[mask], np.unique(queries.users[mask])
    users = np.searchsorted(found, queries.users[mask])
    values = {
        method: {
            "pooled_auc": _plain(metrics.auc(labels, scores[method][mask])),
            "per_user_auc": _plain(metrics.mean_per_user_auc(labels, scores[method][mask], users, len(found))),
        }
        for method in _METHODS
    }
    return {"rows": int(mask.sum()), "users": len(found), **values}


def _numbers(values: pa.Array) -> Floats:
    return np.asarray(values.drop_null().cast(pa.float64()), np.float64)


def _unseen(asked: pa.ChunkedArray, trained: pa.ChunkedArray) -> float:
    known = pc.is_in(asked, value_set=pc.unique(trained))
    return _share(~known.to_numpy())


def _rate(labels: pa.ChunkedArray) -> float:
    return round(float(pc.mean(labels).as_py()), 4)


def _share(mask: Sequence[bool] | npt.NDArray[np.bool_]) -> float:
    return round(float(np.mean(mask)), 4) if len(mask) else 0.0


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
