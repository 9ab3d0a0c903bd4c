"""Refresh under synthetic drift: AUC as served by embeddings refreshed never, weekly, daily, hourly, in ten minutes, at once.

A user's taste and level drift from day to day with half-lives of 60, 10 and 2 days, or not at all: the correlation of a user's
factors t days apart is (1 - delta^2)^(t / 2), so a half-life h has delta^2 = 1 - 2^(-2 / h). LiMAML is trained on the users who
arrived before a cut, chooses its number of support rows on the users who arrived next, and scores every later row of the first
(returning) and of those who arrive after the validation users (new). Beside it the item mean with one shrunk number per user
(`user_level`), which needs the same refresh, the item mean alone (`none`), and the true probabilities (`truth`).

The logged aggregates among the features are refreshed daily at every cadence. AUCs are expected ones, under the rows' true
probabilities: pooled over rows, and inside each user's rows, each user counting once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cached_jobs import Job, JobOutput
from experiments.data import WORK
from experiments.origin_data import CADENCES, NEVER
from experiments.worlds import CONFIG, KnownRows, World, expected_peruser_auc
from limaml import metrics
from limaml.config import load
from limaml.evaluation.baselines import choose_shrinkage, item_mean
from limaml.evaluation.scoring_method import MethodInput, MethodValidator, ScoringMethod
from limaml.events.synthetic import expected_auc
from limaml.features.encoder import Encoder
from limaml.schema import day_start
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import TaskSpec, microseconds, support_spec
from limaml.training.scoring import score_specs
from limaml.training.twin_and_refit import fit_twin
from limaml.training.validation import Validator

TABLE = "drift"
HALF_LIVES = {"none": None, "slow": 60.0, "medium": 10.0, "fast": 2.0}
"""Days until the correlation of a user's factors with what they were is a half."""
SUPPORT_ROWS = (16, 64)
_FULL = {"users": 1000, "steps": 200}
_QUICK = {"users": 100, "steps": 25}
_QUICK_SCALES = ("none", "fast")
_DAYS = 42
_TRAINED, _VALIDATING = 0.6, 0.75
"""Shares of the order of arrival: users trained on, users validated on until the second; the later ones are new."""
_WORLD = (
    "source.synthetic_items=200",
    f"source.synthetic_days={_DAYS}",
    "source.synthetic_rows_per_user=360",
    "source.synthetic_session_rows=12",
    "source.synthetic_pace_s=480",
    "source.synthetic_factors=2",
    "source.synthetic_level=0.7",
)
"""180 rows on the day of arrival, then visits of 12 rows within 40 minutes, 15 over what is left of the days."""
_NETWORK = (
    "model.embedding_dim=5",
    "training.inner_lr_scale=1.0",
    "meta.factor_inner_lr=12.0",
    "meta.factor_damping=30.0",
    "meta.inner_lr=1.0",
    "meta.damping=10.0",
    "training.patience=1000",
)


JUDGED_SEEDS = (1, 2, 3)
"""Settings were chosen on the world of seed 0, some of them after a look at its judged rows; these were not looked at."""


def jobs(quick: bool) -> list[Job]:
    size = _QUICK if quick else _FULL
    scales = _QUICK_SCALES if quick else HALF_LIVES
    return [
        Job(TABLE, f"{scale}/seed{seed}", {**size, "scale": scale, "seed": seed, "root": str(WORK)})
        for scale in scales
        for seed in JUDGED_SEEDS[: 1 if quick else None]
    ]


def run(job: Job) -> JobOutput:
    """`params["root"]`: the folder of all data; the world is ingested into a folder of its own below it."""
    params = job.params
    world = World.ingested(_world(params), Path(params["root"]) / TABLE / f"{job.key}-{params['users']}")
    trained_users, new_users = world.users(0.0, _TRAINED), world.users(_VALIDATING, 1.0)
    validating_users = world.users(_TRAINED, _VALIDATING)
    train_end_us, test_start_us = (_arrival_day_us(world, users[0]) for users in (validating_users, new_users))
    training = world.rows_of(trained_users, train_end_us)
    encoder = Encoder.fit(training, world.cfg)
    validation = world.known(world.rows_of(validating_users, test_start_us), encoder).inputs
    known = world.known(world.rows_of((*trained_users, *new_users)), encoder)
    limaml, support_rows, found = _limaml(params, world.known(training, encoder).inputs, validation, encoder)
    methods: dict[str, tuple[ScoringMethod, int]] = {
        "limaml": (limaml, support_rows),
        "user_level": (choose_shrinkage(MethodValidator(validation, world.cfg)), world.cfg.meta.support_rows),
        "none": (item_mean, support_rows),
        "truth": (lambda _, specs: known.probability_R[query_rows(known.inputs.rows, specs).rows], support_rows),
    }
    aucs, user_aucs = {}, {}
    for name, (method, rows) in methods.items():
        values = {
            cadence: _aucs(known, specs, method, trained_users) for cadence, specs in _task_sets(known, test_start_us, rows)
        }
        aucs[name] = {cadence: pair[0] for cadence, pair in values.items()}
        user_aucs[name] = {cadence: pair[1] for cadence, pair in values.items()}
    notes = {"support_rows": support_rows, "validation": found}
    return JobOutput({"scale": params["scale"], "auc": aucs, "peruser_auc": user_aucs, **notes})


def drift_of(half_life_days: float | None) -> float:
    """delta a day of a half-life; 0 where nothing drifts."""
    return 0.0 if half_life_days is None else float(np.sqrt(1.0 - 2.0 ** (-2.0 / half_life_days)))


def _world(params: Mapping[str, Any]) -> list[str]:
    drift = drift_of(HALF_LIVES[params["scale"]])
    own = {"users": params["users"], "seed": params["seed"], "drift": drift}
    return [*_WORLD, *(f"source.synthetic_{name}={value}" for name, value in own.items())]


def _arrival_day_us(world: World, user: str) -> int:
    """First instant of the day a user arrived, microseconds."""
    first = world.rows_of([user])["timestamp"].to_pylist()[0]
    return microseconds(day_start(first.date()))


def _limaml(
    params: Mapping[str, Any], training: MethodInput, validation: MethodInput, encoder: Encoder
) -> tuple[ScoringMethod, int, dict[str, float]]:
    """The network whose number of support rows serves validation users best, that number, and every AUC compared."""
    found, networks = {}, {}
    for rows in SUPPORT_ROWS:
        own = (f"meta.support_rows={rows}", f"training.max_steps={params['steps']}", f"training.seed={params['seed']}")
        cfg = load(CONFIG, [*_NETWORK, *own])
        networks[rows], _ = fit_twin(cfg, training.rows, encoder.dims, Validator(validation.rows, cfg))
        # Tasks with support: the rows of the day of arrival are half of all, and have none under a daily refresh.
        served = as_served(validation.rows, from_us=0, support_rows=rows)
        specs = [spec for spec in served if spec.support_size]
        found[rows] = metrics.auc(
            query_rows(validation.rows, specs).labels, score_specs(networks[rows], validation.rows, specs)
        )
    best = max(found, key=lambda rows: found[rows])
    network = networks[best]
    return lambda inputs, specs: score_specs(network, inputs.rows, specs), best, {str(k): v for k, v in found.items()}


def _task_sets(known: KnownRows, from_us: int, support_rows: int) -> list[tuple[str, list[TaskSpec]]]:
    """Cadence -> tasks, all with the same query rows in the same order."""
    rows = known.inputs.rows
    task_sets = {
        name: as_served(rows, from_us=from_us, support_rows=support_rows, every_us=us) for name, us in CADENCES.items()
    }
    stale = [replace(support_spec(rows, each.entity, from_us, support_rows), query=each.query) for each in task_sets["weekly"]]
    return [(NEVER, stale), *task_sets.items()]


def _aucs(
    known: KnownRows, specs: Sequence[TaskSpec], method: ScoringMethod, returning: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Pooled and per-user AUC of the specs' query rows, of all users and of the returning ones."""
    queries, scores = query_rows(known.inputs.rows, specs), method(known.inputs, specs)
    back, entities = set(returning), known.inputs.rows.entities
    rows_back = np.repeat([entities[spec.entity] in back for spec in specs], [len(spec.query) for spec in specs])
    pooled, per_user = {}, {}
    for name, rows in (("all", np.ones(len(queries), np.bool_)), ("returning", rows_back)):
        p, s = known.probability_R[queries.rows][rows], scores[rows]
        pooled[name], per_user[name] = expected_auc(p, s), expected_peruser_auc(p, s, queries.users[rows])
    return pooled, per_user


def assemble(outputs: Mapping[str, JobOutput]) -> dict[str, Any]:
    """Means over seeds by scale, with the number of support rows that each seed's validation users chose."""
    found = {}
    for scale, half_life in HALF_LIVES.items():
        seeds = [output.values for output in outputs.values() if output.values["scale"] == scale]
        if seeds:
            means = {name: _mean([values[name] for values in seeds]) for name in ("auc", "peruser_auc")}
            chosen = [values["support_rows"] for values in seeds]
            found[scale] = {"half_life_days": half_life, "delta": drift_of(half_life), "support_rows": chosen, **means}
    return {"synthetic_drift": found}


def _mean(values: Sequence[Any]) -> Any:
    """Mean of numbers, or of mappings of the same keys down to numbers."""
    if isinstance(values[0], Mapping):
        return {name: _mean([each[name] for each in values]) for name in values[0]}
    return float(np.mean(values))
