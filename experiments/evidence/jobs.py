"""A job: one of ours, or a group of rivals, fitted at one origin with one seed, and its scores of the rows that are judged.

Two protocols of `limaml.tasks.protocols`: as served from T2 on, refreshed daily and, of some of ours, at other cadences; and
held-out users after their first k rows, for every k on the same rows. Arrays: a protocol's name -> the places of its rows among
the logged ones, ascending; `protocol|variant|method` -> scores in that order.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from experiments import sequence_rival
from experiments.cached_jobs import Job, JobOutput
from experiments.evidence.arms import FULL, REFRESHED, RIVALS, SEQUENCE_MODEL, configured
from experiments.evidence.fit_data import FitData
from experiments.evidence.rivals import fit_rivals
from experiments.evidence.worlds import Origin, origin
from experiments.methods.full_network import full
from limaml.config import Config
from limaml.metrics import Floats, Ints
from limaml.tasks.protocols import as_served, first_k, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows, TaskSpec, support_spec
from limaml.tasks.splits import Split
from limaml.training.scoring import embed_specs, score_specs
from limaml.training.twin_and_refit import fit_twin

SERVED, FIRST = "served", "first"
TRUTH = "truth"
"""What labels were drawn by, where a world is generated: no method can do better."""
DAILY, NEVER = "daily", "never"
CADENCES = {
    "at_once": 1,
    "hourly": MICROSECONDS_PER_DAY // 24,
    DAILY: MICROSECONDS_PER_DAY,
    "weekly": 7 * MICROSECONDS_PER_DAY,
    "monthly": 28 * MICROSECONDS_PER_DAY,
}
"""Name -> microseconds between refreshes."""
KS = (0, 1, 2, 3, 5, 10, 20)
_FLOAT_BYTES = 4
Tasks = Mapping[tuple[str, str], Sequence[TaskSpec]]
"""Protocol and variant (a cadence, or k) -> tasks."""


def run(job: Job) -> JobOutput:
    """Fit, and score every judged row."""
    params = job.params
    world, through, name = params["config"], params["through"], params["arm"]
    at = origin(world, through)
    cfg = configured(Config.model_validate_json(world), name, history=params["history"], seed=params["seed"])
    data = FitData(cfg, at)
    rows = data.test.rows
    tasks = judged_tasks(cfg, rows, at.split, every_cadence=name in REFRESHED)
    if name == SEQUENCE_MODEL:
        places = np.sort(rows.source_row[query_rows(rows, tasks[SERVED, DAILY]).rows])
        found, _ = sequence_rival.score(at.logged, at.split, places, _validating(at), seed=params["seed"])
        named = {f"{SERVED}|{DAILY}|{rival}": found[rival].astype(np.float32) for rival in RIVALS[SEQUENCE_MODEL]}
        return JobOutput({}, {SERVED: places, **named})
    if name in RIVALS:
        scores = {
            (*key, rival): method(data.test, specs) for rival, method in fit_rivals(name, data) for key, specs in tasks.items()
        }
        truth_R = at.truth() if name == "rules" else None
        if truth_R is not None:
            scores |= {(*key, TRUTH): truth_R[rows.source_row[query_rows(rows, specs).rows]] for key, specs in tasks.items()}
        return JobOutput({}, _arrays(rows, tasks, scores))
    if name == FULL:
        score, progress = full(data)
        scores = {(*key, name): score(data.test, specs) for key, specs in tasks.items()}
        return JobOutput({"validation": progress.best_value}, _arrays(rows, tasks, scores))
    started = time.perf_counter()
    network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, data.network_validator)
    train_seconds = time.perf_counter() - started
    scores = {(*key, name): score_specs(network, rows, specs) for key, specs in tasks.items()}
    served = tasks[SERVED, DAILY]
    started = time.perf_counter()
    embedding_TD = embed_specs(network, rows, served)
    values: dict[str, Any] = {
        "validation": progress.best_value,
        "best_step": progress.best_step,
        "shrinkage": progress.shrinkage,
        "train_seconds": train_seconds,
        "adapt_us": 1e6 * (time.perf_counter() - started) / len(served),
        "stored_bytes": _FLOAT_BYTES * embedding_TD.shape[1],
    }
    return JobOutput(values, _arrays(rows, tasks, scores))


def _validating(at: Origin) -> Ints:
    """Places of the rows that validate."""
    split, logged = at.split, at.logged
    time_N = logged["timestamp"].cast(pa.int64()).to_numpy()
    mine_N = pc.is_in(logged["user_id"], value_set=pa.array(split.validation_users, pa.string())).to_numpy()
    return np.flatnonzero(mine_N & (time_N >= (split.validate_from_us or 0)) & (time_N < split.validation_end_us))


def judged_tasks(cfg: Config, rows: TaskRows, split: Split, *, every_cadence: bool) -> Tasks:
    """All lists of tasks; those of a protocol have the same query rows."""
    support_rows, from_us = cfg.support_rows_of(cfg.task_kind.name), split.validation_end_us
    found: dict[tuple[str, str], Sequence[TaskSpec]] = {}
    for cadence, every_us in CADENCES.items():
        if every_cadence or cadence == DAILY:
            found[SERVED, cadence] = as_served(rows, from_us=from_us, support_rows=support_rows, every_us=every_us)
    if every_cadence:
        found[SERVED, NEVER] = [
            replace(support_spec(rows, spec.entity, from_us, support_rows), query=spec.query) for spec in found[SERVED, DAILY]
        ]
    if cfg.task_kind.entity_column != "user_id":
        return found
    least = cfg.evaluation.min_query_rows
    by_k = first_k(rows, split.held_out_users, KS, min_query_rows=least, support_rows=support_rows)
    return found | {(FIRST, str(k)): specs for k, specs in by_k.items()}


def _arrays(rows: TaskRows, tasks: Tasks, scores: Mapping[tuple[str, str, str], Floats]) -> dict[str, npt.NDArray[Any]]:
    found: dict[str, npt.NDArray[Any]] = {}
    orders = {}
    for key, specs in tasks.items():
        place = rows.source_row[query_rows(rows, specs).rows]
        orders[key] = np.argsort(place)
        assert np.array_equal(found.setdefault(key[0], place[orders[key]]), place[orders[key]]), f"{key} has other rows"
    for (protocol, variant, method), score_R in scores.items():
        found[f"{protocol}|{variant}|{method}"] = score_R[orders[protocol, variant]].astype(np.float32)
    return found
