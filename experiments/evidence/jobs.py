"""A job: one of ours, or a group of rivals, fitted at one origin with one seed, and its scores of the rows that are judged.

served   from T2 on, as embeddings refreshed daily serve; of some of ours at other cadences, too
first    held-out users after their first k rows, for every k on the same rows
lists    whole lists (`experiments.evidence.catalogue`)
halves   of what ships: known users' rows of the first half of the judged days, by the prior, by what was known before them, and
         by an embedding of the second half's rows: what rows of the same weeks could say at best

Arrays: a protocol's name -> the places of its rows among the logged ones (of lists: among the candidates), ascending;
`protocol|variant|method` -> scores in that order.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from experiments import sequence_rival
from experiments.cached_jobs import Job, JobOutput
from experiments.data import TODAY
from experiments.evidence import catalogue
from experiments.evidence.arms import FITTED_OTHERWISE, FULL, REFRESHED, RIVALS, SEQUENCE_MODEL, VECTORS, configured, retraining
from experiments.evidence.fit_data import FitData
from experiments.evidence.rivals import WITH_OTHERS, fit_rivals
from experiments.evidence.worlds import Origin, ingested, origin
from experiments.methods.full_network import full
from experiments.methods.history_mlp import with_history
from limaml.config import Config
from limaml.errors import NothingToDo
from limaml.evaluation.scoring_method import ScoringMethod
from limaml.metrics import Floats, Ints
from limaml.tasks.protocols import as_served, first_k, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows, TaskSpec, support_spec
from limaml.tasks.splits import Split
from limaml.training.scoring import embed_specs, score_specs
from limaml.training.twin_and_refit import fit_twin
from limaml.transfer.embed_items import embed_items

SERVED, FIRST, LISTS, HALVES = "served", "first", "lists", "halves"
TRUTH = "truth"
"""What labels were drawn by, where a world is generated: no method can do better."""
DAILY, NEVER = "daily", "never"
NOTHING, PAST, FUTURE = "nothing", "past", "future"
"""What of a user's rows an embedding has seen."""
CADENCES = {
    "at_once": 1,
    "hourly": MICROSECONDS_PER_DAY // 24,
    DAILY: MICROSECONDS_PER_DAY,
    "weekly": 7 * MICROSECONDS_PER_DAY,
    "monthly": 28 * MICROSECONDS_PER_DAY,
}
"""Name -> microseconds between refreshes."""
KS = (0, 1, 2, 3, 5, 10, 20)
SEQUENCE_TRIALS = ({"layers": "sasrec"}, {"layers": "ligr"})
"""SASRec's layers and eSASRec's; other options won trials on the grocer's rows (experiments/LOG.md)."""
_FLOAT_BYTES = 4
_EPOCH = date(1970, 1, 1)
Tasks = Mapping[tuple[str, str], Sequence[TaskSpec]]
"""Protocol and variant (a cadence, or k) -> tasks."""


def run(job: Job) -> JobOutput:
    """Fit, and score every judged row."""
    params = job.params
    world, through, name = params["config"], params["through"], params["arm"]
    if retraining(name)[1]:
        return _retrained(job)
    at = origin(world, through)
    cfg = configured(Config.model_validate_json(world), name, history=params["history"], seed=params["seed"])
    if cfg.transfer:
        cfg = _with_vectors(cfg)
    data = FitData(cfg, at)
    rows = data.test.rows
    tasks = judged_tasks(cfg, rows, at.split, every_cadence=name in REFRESHED, halves=name == "shipped")
    if params.get("served_alone"):
        tasks = {(SERVED, DAILY): tasks[SERVED, DAILY]}
    if name == SEQUENCE_MODEL:
        places = np.sort(rows.source_row[query_rows(rows, tasks[SERVED, DAILY]).rows])
        asked = None if at.lists is None else at.lists.candidates
        found, best = _best_sequence_model(at, places, asked, params["seed"])
        ends = {SERVED: places} if at.lists is None else {SERVED: places, LISTS: np.arange(at.lists.num_candidates)}
        scores = {rival: np.split(found[rival].astype(np.float32), [len(places)]) for rival in RIVALS[SEQUENCE_MODEL]}
        # A list is ranked as of its day.
        ranked = {f"{LISTS}|{DAILY}|sasrec_daily": scores["sasrec_daily"][1]} if at.lists is not None else {}
        return JobOutput(best, ends | {f"{SERVED}|{DAILY}|{rival}": part[0] for rival, part in scores.items()} | ranked)
    if name in RIVALS:
        truth_R = at.truth() if name == "rules" else None
        known = {} if truth_R is None else {TRUTH: truth_R}
        return JobOutput({}, _arrays(data, tasks, fit_rivals(name, data), known))
    if name in FITTED_OTHERWISE:
        score, progress = full(data) if name == FULL else with_history(data)
        return JobOutput({"validation": progress.best_value}, _arrays(data, tasks, [(name, score)]))
    started = time.perf_counter()
    network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, data.network_validator)
    train_seconds = time.perf_counter() - started
    arrays = _arrays(data, tasks, [(name, lambda inputs, specs: score_specs(network, inputs.rows, specs))])
    served = tasks[SERVED, DAILY]
    started = time.perf_counter()
    embedding_TD = embed_specs(network, rows, served)
    values: dict[str, Any] = {
        "validation": progress.best_value,
        "best_step": progress.best_step,
        "shrinkage": progress.shrinkage | progress.prior_rows,
        "train_seconds": train_seconds,
        "adapt_us": 1e6 * (time.perf_counter() - started) / len(served),
        "stored_bytes": _FLOAT_BYTES * embedding_TD.shape[1],
    }
    return JobOutput(values, arrays)


def _with_vectors(cfg: Config) -> Config:
    """In a storage of its own, since a storage keeps to its features: the same rows, and vectors of the items."""
    root = Path(f"{cfg.storage.root}-{VECTORS}")
    cfg = cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"root": str(root)})})
    with suppress(NothingToDo):
        embed_items(cfg, TODAY)
    return ingested(cfg, root)


def _best_sequence_model(
    at: Origin, places: Ints, asked: pa.Table | None, seed: int
) -> tuple[Mapping[str, Floats], dict[str, Any]]:
    """Scores of the trial that validates best, and what it was."""
    validating, trials = _validating(at), []
    for options in SEQUENCE_TRIALS:
        scores, report = sequence_rival.score(at.logged, at.split, places, validating, asked, seed=seed, options=options)
        trials.append((scores, {"validation": report["validation"]["sasrec_daily"], **options}))
    return max(trials, key=lambda trial: np.nan_to_num(trial[1]["validation"]))


def _retrained(job: Job) -> JobOutput:
    """Each judged day's rows as scored by what was fitted last, on rows before it of which the last ones validate."""
    arm, last = job.params["arm"], date.fromisoformat(job.params["through"])
    fitted, every = retraining(arm)
    world = Config.model_validate_json(job.params["config"])
    at = origin(job.params["config"], job.params["through"])
    events = at.logged["event_id"].combine_chunks()
    judged_from = _EPOCH + timedelta(days=at.split.validation_end_us // MICROSECONDS_PER_DAY)
    day_N = at.logged["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY
    since_N = day_N - (judged_from - _EPOCH).days
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for number in np.unique(since_N[since_N >= 0] // every * every).tolist():
        start = judged_from + timedelta(days=number)
        moved = {"validate_from": start - timedelta(days=every), "test_from": start}
        today = world.model_copy(update={"evaluation": world.evaluation.model_copy(update=moved)}).model_dump_json()
        through = min(start + timedelta(days=every - 1), last)
        params = {"arm": fitted, "config": today, "through": str(through), "served_alone": True}
        found = run(replace(job, params={**job.params, **params})).arrays
        place = origin(today, params["through"]).logged["event_id"].take(pa.array(found[SERVED]))
        parts.setdefault(SERVED, []).append(pc.index_in(place, value_set=events).to_numpy())
        for key in found:
            if key.startswith(f"{SERVED}|{DAILY}|"):
                parts.setdefault(f"{key}{arm.removeprefix(fitted)}", []).append(found[key])
    arrays = {key: np.concatenate(each) for key, each in parts.items()}
    order = np.argsort(arrays[SERVED])
    return JobOutput({}, {key: values[order] for key, values in arrays.items()})


def _validating(at: Origin) -> Ints:
    """Places of the rows that validate."""
    split, logged = at.split, at.logged
    time_N = logged["timestamp"].cast(pa.int64()).to_numpy()
    mine_N = pc.is_in(logged["user_id"], value_set=pa.array(split.validation_users, pa.string())).to_numpy()
    return np.flatnonzero(mine_N & (time_N >= (split.validate_from_us or 0)) & (time_N < split.validation_end_us))


def judged_tasks(cfg: Config, rows: TaskRows, split: Split, *, every_cadence: bool, halves: bool = False) -> Tasks:
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
    if halves:
        found |= _halves(rows, split, support_rows)
    least = cfg.evaluation.min_query_rows
    by_k = first_k(rows, split.held_out_users, KS, min_query_rows=least, support_rows=support_rows)
    return found | {(FIRST, str(k)): specs for k, specs in by_k.items()}


def _halves(rows: TaskRows, split: Split, support_rows: int) -> Tasks:
    day_us = MICROSECONDS_PER_DAY
    start_us, stop_us = split.validation_end_us, (int(rows.timestamp_us.max()) // day_us + 1) * day_us
    middle_us = (start_us + stop_us) // 2 // day_us * day_us
    found: dict[tuple[str, str], list[TaskSpec]] = {(HALVES, variant): [] for variant in (NOTHING, PAST, FUTURE)}
    for entity in np.flatnonzero(np.isin(np.array(rows.entities, dtype=object), split.train_users)).tolist():
        first, middle, stop = (rows.first_row_at(entity, at_us) for at_us in (start_us, middle_us, stop_us))
        past, query = support_spec(rows, entity, start_us, support_rows), np.arange(first, middle)
        if past.support_size and len(query) and middle < stop:
            found[HALVES, NOTHING].append(TaskSpec(entity, start_us, first, first, query))
            found[HALVES, PAST].append(replace(past, query=query))
            found[HALVES, FUTURE].append(TaskSpec(entity, stop_us, max(middle, stop - support_rows), stop, query))
    return {key: specs for key, specs in found.items() if specs}


def _arrays(
    data: FitData, tasks: Tasks, methods: Iterable[tuple[str, ScoringMethod]], known: Mapping[str, Floats] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """`known`: scores of all logged rows."""
    rows, orders = data.test.rows, {}
    found: dict[str, npt.NDArray[Any]] = {}
    for key, specs in tasks.items():
        place = rows.source_row[query_rows(rows, specs).rows]
        orders[key] = np.argsort(place)
        assert np.array_equal(found.setdefault(key[0], place[orders[key]]), place[orders[key]]), f"{key} has other rows"
    for name, score_N in (known or {}).items():
        found |= {f"{protocol}|{variant}|{name}": score_N[found[protocol]] for protocol, variant in tasks}
    if data.lists is not None and data.origin.lists is not None:
        place = catalogue.place(data.origin.lists, *data.lists)
        found[LISTS] = np.sort(place)
    for name, method in methods:
        for (protocol, variant), specs in tasks.items():
            scores = method(data.test, specs)[orders[protocol, variant]]
            found[f"{protocol}|{variant}|{name}"] = scores.astype(np.float32)
        if data.lists is not None and name not in WITH_OTHERS:
            found[f"{LISTS}|{DAILY}|{name}"] = method(*data.lists)[np.argsort(place)].astype(np.float32)
    return found
