"""What a stored embedding adds where people return: arms and rivals on the same rows, as a daily refresh serves them.

    python -m experiments.served --world grocery --out experiments/results/served.json [--origins 3] [--seeds 3]

An origin is a last day: each has its own training, validation and judged days, those of an earlier origin end where the next
one's judged days begin. Of every arm the steps, of all arms the one that ships, are chosen on the rows that validate. Judged
are rows from T2 on, by who asks; users are drawn with replacement for one interval and days for another, since the rows of a
day have things in common. A fit is a job that is kept, and an interrupted run goes on where it was.

Arms and rivals come with and without the history features (affinities: what a user did with an item before).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import typer
from rich.console import Console

from experiments.cached_jobs import Job, JobCache, JobOutput
from experiments.code_digest import revision
from experiments.data import TODAY, WORK
from experiments.inner_loop import worlds
from experiments.progress import follow
from experiments.results import plain
from limaml import metrics
from limaml.config import Config
from limaml.evaluation.baselines import fit_baselines
from limaml.evaluation.scoring_method import MethodInput, MethodValidator
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.metrics import Bootstrap, Floats, Ints, draw_users
from limaml.tasks.protocols import as_served, first_k, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows, TaskSpec
from limaml.tasks.splits import Split, split_events
from limaml.training.prepare import fit_encoders, load_training_data, read_history, validating_rows
from limaml.training.scoring import score_specs
from limaml.training.twin_and_refit import fit_twin

TABLE, RIVALS = "served", "rivals"
_WITHOUT = ", without history"
ARMS: Mapping[str, Mapping[str, Any]] = {
    "shipped": {},
    "newton": {"meta": {"inner_step": "newton"}},
    "posterior": {"meta": {"inner_step": "newton"}, "model": {"meta_block": "posterior"}},
    "hybrid": {"meta": {"inner_step": "newton"}, "model": {"meta_block": "hybrid", "start": "prior"}},
    "set": {"meta": {"inner_step": "newton"}, "model": {"meta_block": "set", "start": "prior"}},
    "sequence": {"meta": {"inner_step": "newton"}, "model": {"meta_block": "sequence", "start": "prior"}},
}
"""Ours -> what it changes in the world's configuration, by section."""
K = 20
_DRAWS = 1000
VISITS = {"1": (1, 1), "2-4": (2, 4), "5-9": (5, 9), "10+": (10, 2**31)}
"""Days with rows before."""
DAYS_AWAY = {"1": (1, 1), "2-7": (2, 7), "8-30": (8, 30), "more": (31, 2**31)}
METRICS = ("pooled_auc", "per_user_auc", "per_visit_auc")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Origin:
    """A last day, and its rows."""

    cfg: Config
    through: date

    @cached_property
    def logged(self) -> pa.Table:
        return read_history(self.cfg, self.through)

    @cached_property
    def split(self) -> Split:
        return split_events(self.logged, self.cfg.evaluation)


def configured(world: Config, arm: str, *, history: bool, seed: int) -> Config:
    """A world's configuration for an arm; without history its features by a key of the user's are not declared."""
    values = world.model_dump(mode="json")
    if not history:
        values["features"] = [feature for feature in values["features"] if not feature["by"]]
    for section, changes in ARMS.get(arm, {}).items():
        values[section] |= changes
    values["training"] |= {"seed": seed, "num_workers": 1}
    return Config.model_validate(values)


def fit_and_score(job: Job) -> JobOutput:
    """An arm, or all rivals, of one origin and seed: probabilities of the rows that are judged."""
    params = job.params
    world = Config.model_validate(params["config"])
    cfg = configured(world, params["arm"], history=params["history"], seed=params["seed"])
    origin = Origin(cfg, date.fromisoformat(params["through"]))
    split, encoders = origin.split, fit_encoders(cfg, origin.logged, origin.split)
    inputs = MethodInput.from_logged(origin.logged, encoders[0], cfg)
    if params["arm"] == RIVALS:
        rows, users = validating_rows(cfg, origin.logged, split)
        validator = MethodValidator(MethodInput.from_logged(rows, encoders[0], cfg), cfg, split.validate_from_us, users)
        training = MethodInput.from_logged(split.train_rows(origin.logged), encoders[0], cfg, to_train=True)
        methods = fit_baselines(cfg, training, validator, encoders[0])
        scores = {
            name: [method(inputs, specs) for specs in _tasks(cfg, inputs.rows, split)] for name, method in methods.items()
        }
        return JobOutput({}, _arrays(inputs.rows, _tasks(cfg, inputs.rows, split), scores))
    data = load_training_data(cfg, origin.through, *encoders)
    network, progress = fit_twin(cfg, data.twin_rows, data.twin_dims, data.validator)
    tasks = _tasks(cfg, inputs.rows, split)
    scores = {params["arm"]: [score_specs(network, inputs.rows, specs) for specs in tasks]}
    values = {"validation": progress.best_value, "best_step": progress.best_step, "shrinkage": progress.shrinkage}
    return JobOutput(values, _arrays(inputs.rows, tasks, scores))


def _tasks(cfg: Config, rows: TaskRows, split: Split) -> tuple[list[TaskSpec], list[TaskSpec]]:
    """As served from T2 on, and of held-out users after their first K rows."""
    support_rows = cfg.support_rows_of(cfg.task_kind.name)
    of_new = first_k(rows, split.held_out_users, [K], min_query_rows=cfg.evaluation.min_query_rows, support_rows=support_rows)
    return as_served(rows, from_us=split.validation_end_us, support_rows=support_rows), of_new[K]


def _arrays(
    rows: TaskRows, tasks: Sequence[Sequence[TaskSpec]], scores: Mapping[str, Sequence[Floats]]
) -> dict[str, npt.NDArray[Any]]:
    """Place of each judged row among the logged ones, ascending, and each method's scores in that order."""
    found: dict[str, npt.NDArray[Any]] = {}
    for number, (name, specs) in enumerate(zip(("served", "first_k"), tasks, strict=True)):
        place = rows.source_row[query_rows(rows, specs).rows]
        order = np.argsort(place)
        found[name] = place[order]
        found |= {f"{name}.{method}": each[number][order].astype(np.float32) for method, each in scores.items()}
    return found


@dataclass(frozen=True)
class Judged:
    """R rows of a protocol at one origin, and all about them that does not depend on a method."""

    labels_R: Floats
    user_R: Ints
    """Which of all users of the world."""
    day_R: Ints
    """Days since the first one with rows, which is that of every origin."""
    groups: Mapping[str, Mask]

    @classmethod
    def of(cls, origin: Origin, place_R: Ints, users: pa.Array, *, served: bool) -> "Judged":
        logged = origin.logged
        before_N, away_N = visits(logged, users)
        user_N, day_N = _users_and_days(logged, users)
        before_R, away_R = before_N[place_R], away_N[place_R]
        trained = pc.is_in(logged["user_id"], value_set=pa.array(origin.split.train_users, pa.string())).to_numpy()[place_R]
        every = np.ones(len(place_R), np.bool_)
        returning = trained & (before_R > 0)
        groups = (
            {"served_all": every, "served_returning": returning, "served_new": ~trained} if served else {"first_k20": every}
        )
        if served:
            groups |= {f"visits before: {name}": returning & _between(before_R, ends) for name, ends in VISITS.items()}
            groups |= {f"days away: {name}": returning & _between(away_R, ends) for name, ends in DAYS_AWAY.items()}
        labels = logged["label"].to_numpy()[place_R].astype(np.float64)
        return cls(labels, user_N[place_R], day_N[place_R] - day_N.min(), groups)


def visits(logged: pa.Table, users: pa.Array) -> tuple[Ints, Ints]:
    """Of each row the number of its user's earlier days with rows, and the days since the last of them, 0 without one."""
    user_N, day_N = _users_and_days(logged, users)
    order = np.lexsort((day_N, user_N))
    is_user = np.r_[True, np.diff(user_N[order]) != 0]
    is_visit = is_user | np.r_[True, np.diff(day_N[order]) != 0]
    visit = np.cumsum(is_visit) - 1
    before_N, away_N = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    before_N[order] = visit - np.maximum.accumulate(np.where(is_user, visit, 0))
    away_N[order] = np.r_[0, np.diff(day_N[order][is_visit])][visit]
    away_N[before_N == 0] = 0
    return before_N, away_N


def _users_and_days(logged: pa.Table, users: pa.Array) -> tuple[Ints, Ints]:
    user_N = pc.index_in(logged["user_id"], value_set=users).to_numpy().astype(np.int64)
    return user_N, logged["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY


def _between(value_R: Ints, ends: tuple[int, int]) -> Mask:
    return (value_R >= ends[0]) & (value_R <= ends[1])


def measured(
    judged: Judged, score_R: Floats, mask_R: Mask, weights_BC: Floats, *, by_day: bool
) -> dict[str, tuple[float, Floats]]:
    """Metric -> its value, and draws of it in which clusters (users, or days) have these weights."""
    labels, scores, users, days = (each[mask_R] for each in (judged.labels_R, score_R, judged.user_R, judged.day_R))
    cluster_R = days if by_day else users
    mine, cluster_R = np.unique(cluster_R, return_inverse=True)
    weights_BC = weights_BC[:, mine]
    found = {"pooled_auc": (metrics.auc(labels, scores), Bootstrap(cluster_R, weights_BC).pooled_auc(labels, scores))}
    _, visit_R = np.unique(users * 100_000 + days, return_inverse=True)
    _, user_R = np.unique(users, return_inverse=True)
    for name, part_R in (("per_user_auc", user_R), ("per_visit_auc", visit_R)):
        if by_day and name == "per_user_auc":
            continue  # A user's rows lie on many days.
        auc_P = metrics.per_user_aucs(labels, scores, part_R, int(part_R.max()) + 1)
        cluster_P = np.empty(len(auc_P), np.int64)
        cluster_P[part_R] = cluster_R
        defined = ~np.isnan(auc_P)
        weights_BP = weights_BC[:, cluster_P[defined]]
        with np.errstate(invalid="ignore"):
            found[name] = float(auc_P[defined].mean()), (weights_BP @ auc_P[defined]) / weights_BP.sum(axis=1)
    return found


@dataclass
class Measurement:
    """Outputs of a world's jobs, by (history, arm), origin and seed."""

    origins: Sequence[Origin]
    outputs: Mapping[tuple[bool, str], Sequence[Sequence[JobOutput]]]

    @cached_property
    def judged(self) -> dict[str, list[Judged]]:
        """Protocol -> an origin's rows; every method has scored the same ones."""
        users = pc.unique(self.origins[0].logged["user_id"])
        found: dict[str, list[Judged]] = {}
        for name in ("served", "first_k"):
            places = [each[0].arrays[name] for each in next(iter(self.outputs.values()))]
            for arm, outputs in self.outputs.items():
                same = all(
                    np.array_equal(seed.arrays[name], at) for at, each in zip(places, outputs, strict=True) for seed in each
                )
                assert same, f"{arm} was judged on other rows of {name}"
            found[name] = [
                Judged.of(origin, place, users, served=name == "served")
                for origin, place in zip(self.origins, places, strict=True)
            ]
        return found

    def methods(self) -> Iterator[tuple[str, tuple[bool, str], str]]:
        """Name of each method in the results, the job that it comes from, and its name there."""
        for (history, arm), outputs in self.outputs.items():
            for key in outputs[0][0].arrays:
                protocol, _, method = key.partition(".")
                if protocol == "served" and method:
                    yield f"{method}{'' if history else _WITHOUT}", (history, arm), method

    def compare(self) -> dict[str, Any]:
        """Values of every method, and what the arm that validates best adds to each, by group."""
        arms = {
            arm: float(np.mean([seed.values["validation"] for each in outputs for seed in each]))
            for (history, arm), outputs in self.outputs.items()
            if history and arm != RIVALS
        }
        best = max(arms, key=arms.__getitem__)
        draws = {by_day: self._draws(by_day) for by_day in (False, True)}
        found: dict[str, Any] = {"chosen": best, "validation": arms, "groups": {}}
        for protocol, parts in self.judged.items():
            for group in parts[0].groups:
                if all(part.groups[group].any() for part in parts):
                    found["groups"][group] = self._of_group(protocol, group, best, draws)
        return found

    def _draws(self, by_day: bool) -> Floats:
        number = 1 + max(int((part.day_R if by_day else part.user_R).max()) for parts in self.judged.values() for part in parts)
        return draw_users(number, draws=_DRAWS, seed=int(by_day))

    def _of_group(self, protocol: str, group: str, best: str, draws: Mapping[bool, Floats]) -> dict[str, Any]:
        parts = self.judged[protocol]
        values: dict[str, dict[tuple[bool, str], tuple[float, Floats]]] = {}
        for name, job, method in self.methods():
            every: dict[tuple[bool, str], list[tuple[float, Floats]]] = {}
            for judged, outputs in zip(parts, self.outputs[job], strict=True):
                for seed in outputs:
                    score_R = seed.arrays[f"{protocol}.{method}"].astype(np.float64)
                    for by_day, weights in draws.items():
                        one = measured(judged, score_R, judged.groups[group], weights, by_day=by_day)
                        for metric, pair in one.items():
                            every.setdefault((by_day, metric), []).append(pair)
            values[name] = {
                key: (float(np.mean([value for value, _ in pairs])), np.mean([draw for _, draw in pairs], axis=0))
                for key, pairs in every.items()
            }
        gains = {"gains": _gains(values, best)}
        if (without := f"{best}{_WITHOUT}") in values:
            alike = {name: of for name, of in values.items() if name.endswith(_WITHOUT)}
            gains["gains_without_history"] = _gains(alike, without)
        masks = [judged.groups[group] for judged in parts]
        return {
            "rows": sum(int(mask.sum()) for mask in masks),
            "users": len(np.unique(np.concatenate([judged.user_R[mask] for judged, mask in zip(parts, masks, strict=True)]))),
            "methods": {name: {metric: 100 * found[False, metric][0] for metric in METRICS} for name, found in values.items()},
            **gains,
        }


def _gains(values: Mapping[str, Mapping[tuple[bool, str], tuple[float, Floats]]], best: str) -> dict[str, Any]:
    """Metric -> rival -> what one method adds to it."""
    ours = values[best]
    return {
        metric: {
            rival: _gain(ours[False, metric], theirs[False, metric])
            | ({"by_day": _gain(ours[True, metric], theirs[True, metric])} if (True, metric) in ours else {})
            for rival, theirs in values.items()
            if rival != best
        }
        for metric in METRICS
    }


def _gain(ours: tuple[float, Floats], theirs: tuple[float, Floats]) -> dict[str, float]:
    found = metrics.interval(100 * (ours[0] - theirs[0]), 100 * (ours[1] - theirs[1]))
    return {"mean": found.value, "low": found.low, "high": found.high}


def measure(
    world: Config, name: str, root: Path, *, arms: Sequence[str], num_origins: int, seeds: int, workers: int, console: Console
) -> dict[str, Any]:
    """All arms and rivals of a world."""
    world = world.model_copy(update={"storage": world.storage.model_copy(update={"root": str(root / name)})})
    days = open_source(world, TODAY).days()
    ingest_history(world, days[-1], TODAY)
    judged_days = round(len(days) * (1 - world.evaluation.train_share_of_days - world.evaluation.validation_share_of_days))
    ends = [days[-1] - timedelta(days=number * judged_days) for number in range(num_origins)]
    has_history = any(feature.by for feature in world.features)
    jobs = {
        (history, arm, end, seed): Job(
            TABLE,
            f"{name}/{end}/{arm}/{seed}{'' if history else '/without'}",
            {"arm": arm, "history": history, "seed": seed, "through": str(end), "config": world.model_dump(mode="json")},
        )
        for history in ((True, False) if has_history else (True,))
        for arm in (RIVALS, *arms)
        for end in ends
        for seed in range(seeds)
    }
    cache = JobCache(root / "jobs", revision("served", "inner_loop"))
    outputs = follow(list(jobs.values()), {TABLE: fit_and_score}, cache, workers, console)
    origins = [Origin(world, end) for end in ends]
    keys = dict.fromkeys((history, arm) for history, arm, _, _ in jobs)
    of = {key: [[outputs[jobs[*key, end, seed]] for seed in range(seeds)] for end in ends] for key in keys}
    seconds = {
        f"{arm}{'' if history else _WITHOUT}": float(
            np.mean([seed.values["seconds"] for each in of[history, arm] for seed in each])
        )
        for history, arm in keys
    }
    return Measurement(origins, of).compare() | {"origins": [str(end) for end in ends], "seeds": seeds, "seconds": seconds}


def main(
    out: Annotated[Path, typer.Option(help="File of the results; other worlds in it stay.")],
    world: Annotated[list[str], typer.Option(help="movielens, grocery, kuairand or one that is generated.")],
    kuairand: Annotated[str, typer.Option(help="Folder with KuaiRand's tables.")] = "",
    arm: Annotated[list[str] | None, typer.Option(help="One of ours; all by default.")] = None,
    origins: Annotated[int, typer.Option(min=1)] = 3,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
) -> None:
    """Measure worlds one after another, and write after each."""
    console, results = Console(), json.loads(out.read_text()) if out.exists() else {}
    for name in world:
        found = measure(
            worlds(kuairand)[name],
            name,
            WORK / TABLE,
            arms=arm or list(ARMS),
            num_origins=origins,
            seeds=seeds,
            workers=workers,
            console=console,
        )
        results[name] = found
        out.write_text(json.dumps(plain(results), indent=1, sort_keys=True, allow_nan=False) + "\n")
        console.print(name, found["chosen"], found["groups"]["served_returning"]["methods"])


if __name__ == "__main__":
    typer.run(main)
