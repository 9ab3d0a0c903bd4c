"""Rivals on one table of features: logistic regression and boosted trees on a row's features and its user's aggregates.

N rows, F features
"""

from collections.abc import Callable, Sequence

import lightgbm
import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression

from experiments.evidence.fit_data import FitData
from experiments.methods.history import HistorySettings, HistoryTasks, aggregates, history_tasks, in_batches
from limaml.evaluation.scoring_method import Floats, MethodInput, ScoringMethod
from limaml.tasks.sampling import TaskSpec, meta_batch

Table = npt.NDArray[np.float32]
_ROWS = 1_000_000
"""To train on, at most."""
_ROUNDS, _ROUNDS_BETWEEN_VALIDATIONS = 600, 20
_LEAVES = (15, 63)
_ITERATIONS = 1000
_FIXED = {"objective": "binary", "verbosity": -1, "num_threads": 1, "deterministic": True, "force_row_wise": True}
_WON = {"bagging_fraction": 0.5, "lambda_l2": 21.0, "learning_rate": 0.0254, "min_data_in_leaf": 100}


def logistic(data: FitData) -> ScoringMethod:
    """With the shrinkages and the strength that won among 20 on MovieLens' validation users."""
    settings = HistorySettings(shrinkage=20.0, slow_shrinkage=100.0, genre_shrinkage=30.0)
    x_NF, label_N, weight_N = _training_table(data, settings)
    mean_F, std_F = x_NF.mean(axis=0), np.maximum(x_NF.std(axis=0), 1e-3)
    model = LogisticRegression(C=0.00661, max_iter=_ITERATIONS, random_state=data.cfg.training.seed)
    model.fit((x_NF - mean_F) / std_F, label_N, sample_weight=weight_N)

    def predict(table_NF: Table) -> Floats:
        found: Floats = model.predict_proba((table_NF - mean_F) / std_F)[:, 1].astype(np.float64)
        return found

    return _method(predict, settings, data.encoder.dims.item_sets)


def boosted(data: FitData) -> ScoringMethod:
    """LightGBM, with the settings that won among 20 on MovieLens' validation users; leaves and rounds validate best here."""
    settings = HistorySettings(shrinkage=20.0, slow_shrinkage=30.0, genre_shrinkage=30.0, recent_rows=10)
    x_NF, label_N, weight_N = _training_table(data, settings)
    params = _FIXED | _WON | {"bagging_freq": 1, "seed": data.cfg.training.seed}
    tables = [_table(data.validation, specs, settings, data.encoder.dims.item_sets) for specs in data.validator.tasks]
    found = []
    for leaves in _LEAVES:
        rows = lightgbm.Dataset(x_NF, label_N, weight=weight_N)
        booster = lightgbm.train(params | {"num_leaves": leaves}, rows, num_boost_round=_ROUNDS)
        for used in range(_ROUNDS_BETWEEN_VALIDATIONS, _ROUNDS + 1, _ROUNDS_BETWEEN_VALIDATIONS):
            value = data.validator.auc([_predict(booster, table_NF, used) for table_NF in tables])
            found.append((value, booster, used))
    _, best, rounds = max(found, key=lambda one: one[0])
    return _method(lambda table_NF: _predict(best, table_NF, rounds), settings, data.encoder.dims.item_sets)


def _predict(booster: lightgbm.Booster, table_NF: Table, rounds: int) -> Floats:
    if not len(table_NF):
        return np.zeros(0)  # an empty table has no columns either, which LightGBM refuses
    return np.asarray(booster.predict(table_NF, num_iteration=rounds, num_threads=1), np.float64)


def _training_table(data: FitData, settings: HistorySettings) -> tuple[Table, npt.NDArray[np.float32], Floats]:
    """Features, labels and weights of the query rows of the global MLP's meta-batches; each task weighs the same."""
    tables, labels, weights, num_rows = [], [], [], 0
    for step in range(data.cfg.evaluation.baseline_steps):
        if num_rows >= _ROWS:
            break
        specs = meta_batch(data.training.rows, data.cfg, seed=data.cfg.training.seed, step=step)
        tasks = history_tasks(data.training, specs, data.encoder.dims.item_sets)
        tables.append(_real_rows(tasks, settings))
        num_rows += len(tables[-1])
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
