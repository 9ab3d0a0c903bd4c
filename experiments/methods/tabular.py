"""Rivals on one table of features: logistic regression and boosted trees on a row's features and its user's aggregates.

N rows, F features
"""

from collections.abc import Callable, Sequence

import lightgbm
import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression

from experiments.methods.fitted import Data, Design, Fitted
from experiments.methods.history import HistorySettings, HistoryTasks, aggregates, history_tasks, in_batches
from limaml.config import Config
from limaml.evaluation.scoring_method import Floats, MethodInput, ScoringMethod
from limaml.tasks.sampling import TaskSpec, meta_batch

Table = npt.NDArray[np.float32]
_ROUNDS_BETWEEN_VALIDATIONS = 20
_ITERATIONS = 1000


def logistic(data: Data, design: Design, seed: int) -> Fitted:
    """Design: `steps` (meta-batches to train on), `C`, `history` (settings), `overrides`."""
    cfg, settings = data.configured(design, seed), HistorySettings(**design.get("history", {}))
    x_NF, label_N, weight_N = _training_table(data, cfg, settings, int(design.get("steps", 40)))
    mean_F, std_F = x_NF.mean(axis=0), np.maximum(x_NF.std(axis=0), 1e-3)
    model = LogisticRegression(C=float(design.get("C", 0.01)), max_iter=_ITERATIONS, random_state=seed)
    model.fit((x_NF - mean_F) / std_F, label_N, sample_weight=weight_N)

    def predict(table_NF: Table) -> Floats:
        found: Floats = model.predict_proba((table_NF - mean_F) / std_F)[:, 1].astype(np.float64)
        return found

    score = _method(predict, settings, data.encoder.dims.item_sets)
    return Fitted(score, data.validator.auc_of(score), notes={"iterations": int(model.n_iter_[0])})


def boosted(data: Data, design: Design, seed: int) -> Fitted:
    """LightGBM. Design: `steps`, `rounds` (at most), `params` (LightGBM's own names), `history`, `overrides`."""
    cfg, settings = data.configured(design, seed), HistorySettings(**design.get("history", {}))
    x_NF, label_N, weight_N = _training_table(data, cfg, settings, int(design.get("steps", 40)))
    params = {
        "objective": "binary",
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "seed": seed,
        "bagging_freq": 1,
        **design.get("params", {}),
    }
    rounds = int(design.get("rounds", 300))
    booster = lightgbm.train(params, lightgbm.Dataset(x_NF, label_N, weight=weight_N), num_boost_round=rounds)
    tables = [_table(data.validation, specs, settings, data.encoder.dims.item_sets) for specs in data.validator.tasks]
    values = {
        used: data.validator.auc([_predict(booster, table_NF, used) for table_NF in tables])
        for used in range(_ROUNDS_BETWEEN_VALIDATIONS, rounds + 1, _ROUNDS_BETWEEN_VALIDATIONS)
    }
    best = max(values, key=lambda used: values[used])
    score = _method(lambda table_NF: _predict(booster, table_NF, best), settings, data.encoder.dims.item_sets)
    return Fitted(score, values[best], notes={"rounds": best})


def _predict(booster: lightgbm.Booster, table_NF: Table, rounds: int) -> Floats:
    if not len(table_NF):
        return np.zeros(0)  # an empty table has no columns either, which LightGBM refuses
    return np.asarray(booster.predict(table_NF, num_iteration=rounds, num_threads=1), np.float64)


def _training_table(
    data: Data, cfg: Config, settings: HistorySettings, steps: int
) -> tuple[Table, npt.NDArray[np.float32], Floats]:
    """Features, labels and weights of the query rows of the network's own first meta-batches; each task weighs the same."""
    tables, labels, weights = [], [], []
    for step in range(steps):
        specs = meta_batch(data.training.rows, cfg, seed=cfg.training.seed, step=step)
        tasks = history_tasks(data.training, specs, data.encoder.dims.item_sets)
        tables.append(_real_rows(tasks, settings))
        labels += [data.training.rows.label[spec.query] for spec in specs]
        weights += [np.full(len(spec.query), 1.0 / len(spec.query)) for spec in specs]
    weight_N = np.concatenate(weights)
    return np.concatenate(tables), np.concatenate(labels), weight_N / weight_N.mean()


def _method(predict: Callable[[Table], Floats], settings: HistorySettings, num_sets: int) -> ScoringMethod:
    def score(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        table_NF = _table(inputs, specs, settings, num_sets)
        return predict(table_NF) if len(table_NF) else np.zeros(0)

    return score


def _table(inputs: MethodInput, specs: Sequence[TaskSpec], settings: HistorySettings, num_sets: int) -> Table:
    """Features of all query rows, one spec after another."""
    parts = [(_real_rows(history_tasks(inputs, part, num_sets), settings), places) for part, places in in_batches(specs)]
    if not parts:
        return np.zeros((0, 0), np.float32)
    table_NF = np.empty((sum(len(spec.query) for spec in specs), parts[0][0].shape[1]), np.float32)
    for rows_NF, places in parts:
        table_NF[places] = rows_NF
    return table_NF


def _real_rows(tasks: HistoryTasks, settings: HistorySettings) -> Table:
    """(N, F) the row's own features and its user's aggregates, without padding."""
    query = tasks.batch.query
    found: Table = torch.cat([query.dense, aggregates(tasks, settings)], dim=2)[query.mask_TR > 0].numpy()
    return found
