"""Table 3, sensitivity of the shipped network to its inner and outer loop, on validation users only.

inner steps x first inner rate x fixed or learned from there (Meta-SGD) x outer rate x order, every combination. Rates are
multiples of the shipped ones. Damping stays learned. A cell's figures are means over the origins and seeds.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.cached_jobs import Job, JobOutput
from experiments.data import MOVIELENS
from experiments.origin_data import OriginData, movielens
from limaml import metrics
from limaml.config import Config, load
from limaml.errors import TrainingError
from limaml.evaluation.scoring_method import Floats, MethodValidator
from limaml.tasks.protocols import query_rows
from limaml.training.checkpoint import Progress
from limaml.training.scoring import score_specs
from limaml.training.twin_and_refit import fit_twin
from limaml.training.validation import Validator

TABLE = "sensitivity"
SHIPPED = "configs/movielens.toml"
INNER_STEPS, RATES, OUTER_RATES = (1, 3, 10), (0.3, 1.0, 3.0), (0.3, 1.0, 3.0)
"""Rates are multiples of the shipped ones."""
QUICK_STEPS = 20
SEEDS = (0, 1, 2)


def jobs(quick: bool, root: str = str(MOVIELENS)) -> list[Job]:
    """One for each cell; `root` is the folder of the ingested MovieLens."""
    found, shipped = [], load(SHIPPED).fingerprint("model", "meta", "training", "evaluation")
    for cell in _quick_cells() if quick else _cells():
        order = "second" if cell["second_order"] else "first"
        rates = f"{'learned' if cell['learned'] else 'fixed'}{cell['inner_rate']}"
        key = f"steps{cell['inner_steps']}/{rates}/outer{cell['outer_rate']}/{order}"
        seeds = SEEDS[: 1 if quick else None]
        params = {**cell, "seeds": seeds, "root": root, "origins": 1 if quick else None, "quick": quick, "shipped": shipped}
        found.append(Job(TABLE, key, params))
    return found


def run(job: Job) -> JobOutput:
    params = job.params
    data = movielens(params["root"])[: params["origins"]]
    fitted = [fit_cell(one, [*overrides(params), f"training.seed={seed}"]) for one in data for seed in params["seeds"]]
    means = {name: float(np.mean([each[name] for each in fitted])) for name in fitted[0]}
    order = "second" if params["second_order"] else "first"
    cell = {name: params[name] for name in ("inner_steps", "inner_rate", "learned", "outer_rate")}
    return JobOutput({"cell": {**cell, "order": order, **means}})


def assemble(outputs: dict[str, JobOutput]) -> dict[str, Any]:
    """{"sensitivity": [cell, ...]}, in the order of their settings."""
    found = [output.values["cell"] for output in outputs.values()]
    settings = ("order", "outer_rate", "learned", "inner_steps", "inner_rate")
    return {TABLE: sorted(found, key=lambda cell: [cell[name] for name in settings])}


def overrides(params: Mapping[str, Any]) -> list[str]:
    """The configuration's settings of one cell; rates multiply those of the shipped configuration."""
    shipped = load(SHIPPED)
    found = [
        f"meta.inner_steps={params['inner_steps']}",
        f"meta.inner_lr={shipped.meta.inner_lr * params['inner_rate']}",
        f"meta.factor_inner_lr={shipped.meta.factor_inner_lr * params['inner_rate']}",
        f"meta.learn_inner_lr={str(params['learned']).lower()}",
        f"meta.second_order={str(params['second_order']).lower()}",
        f"training.outer_lr={shipped.training.outer_lr * params['outer_rate']}",
    ]
    return [*found, f"training.max_steps={QUICK_STEPS}"] if params["quick"] else found


def parts(validator: MethodValidator, scores: Sequence[Floats]) -> dict[str, float]:
    """The number that choices are made by, and its two halves: means over the task lists of pooled and of per-user AUC."""
    pooled, peruser = [], []
    for specs, part in zip(validator.tasks, scores, strict=True):
        rows = query_rows(validator.inputs.rows, specs)
        pooled.append(metrics.auc(rows.labels, part))
        peruser.append(metrics.mean_per_user_auc(rows.labels, part, rows.users, rows.num_users))
    return {"validation_auc": validator.auc(scores), "pooled": float(np.nanmean(pooled)), "peruser": float(np.nanmean(peruser))}


def fit_cell(data: OriginData, settings: list[str]) -> dict[str, float]:
    """One fit's figures; one whose loss does not stay finite ranks nothing."""
    cfg = load(SHIPPED, settings)
    try:
        network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, Validator(data.validation.rows, cfg))
    except TrainingError:
        chance = dict.fromkeys(("validation_auc", "pooled", "peruser"), 0.5)
        return {**chance, "diverged": 1.0, "best_step": 0.0, "train_seconds": 0.0}
    validator = MethodValidator(data.validation, cfg)
    scores = [score_specs(network, data.validation.rows, specs) for specs in validator.tasks]
    found = {"diverged": 0.0, "best_step": progress.best_step, "train_seconds": _train_seconds(cfg, progress)}
    return {**parts(validator, scores), **found}


def _train_seconds(cfg: Config, progress: Progress) -> float:
    """Of the outer steps alone, without validations."""
    steps = np.diff([0.0, *(entry["step"] for entry in progress.history)])
    rates = [entry["tasks_per_s"] for entry in progress.history]
    return float((steps * cfg.training.tasks_per_step / rates).sum())


def _cells() -> list[dict[str, Any]]:
    every = itertools.product(INNER_STEPS, RATES, (True, False), OUTER_RATES, (True, False))
    return [_cell(*cell) for cell in every]


def _quick_cells() -> list[dict[str, Any]]:
    """The shipped one, and one other value of three settings."""
    return [
        _cell(3, 1.0, True, 1.0, True),
        _cell(3, 1.0, True, 1.0, False),
        _cell(1, 1.0, True, 1.0, True),
        _cell(3, 0.3, False, 1.0, True),
    ]


def _cell(steps: int, rate: float, learned: bool, outer: float, second_order: bool) -> dict[str, Any]:
    return {"inner_steps": steps, "inner_rate": rate, "learned": learned, "outer_rate": outer, "second_order": second_order}
