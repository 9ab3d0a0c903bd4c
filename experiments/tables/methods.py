"""Tables 1, 2, 4 and 5: every method on the same query rows of MovieLens, by both protocols, with intervals.

A job fits one method at one origin with one seed and scores all of the origin's task sets; what is made of the scores is cheap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.cached_jobs import Job, JobOutput
from experiments.data import MOVIELENS
from experiments.designs import read_designs
from experiments.intervals import AUC, CALIBRATION_ERROR, LOG_LOSS, PERUSER_AUC, Measured, TaskSetRows, mean_difference, measure
from experiments.methods.registry import METHODS
from experiments.origin_data import CADENCES, KS, NEVER, OriginData, movielens
from experiments.origins import NUM_ORIGINS
from limaml.metrics import Floats, draw_users
from limaml.tasks.protocols import query_rows

TABLE = "methods"
OURS = ("stored", "full", "history")
"""What differences to all other methods are reported of."""
PRIOR = "prior"
"""The shipped network scored with its prior: what it says of somebody unknown."""
DETERMINISTIC = ("item_mean", "user_level")
SEEDS, DRAWS = 3, 2000
METRICS = {AUC: "auc", PERUSER_AUC: "peruser_auc", LOG_LOSS: "log_loss", CALIBRATION_ERROR: "calibration_error"}
PERSONAL_KS = (20, 50)
"""k >= 20 is the mean of these differences."""
FEW_KS = (0, 1, 2, 3, 5)


def jobs(quick: bool) -> list[Job]:
    """One for every method, origin and seed."""
    designs = read_designs()
    found = []
    for name in METHODS:
        for origin in range(1 if quick else NUM_ORIGINS):
            for seed in range(1 if quick or name in DETERMINISTIC else SEEDS):
                design = dict(designs[name]["design"])
                if quick and "overrides" in design:
                    design["overrides"] = [*design["overrides"], "training.max_steps=40", "evaluation.baseline_steps=40"]
                params = {"method": name, "design": design, "origin": origin, "seed": seed, "root": str(MOVIELENS)}
                found.append(Job(TABLE, f"{name}/origin{origin}/seed{seed}", params))
    return found


def run(job: Job) -> JobOutput:
    """Fit, and score every task set."""
    params = job.params
    data = movielens(params["root"])[params["origin"]]
    fitted = METHODS[params["method"]](data, params["design"], params["seed"])
    arrays = {task_set: fitted.score(data.test, specs) for task_set, specs in data.task_sets().items()}
    if fitted.prior is not None:
        arrays |= {f"{PRIOR}/{task_set}": fitted.prior(data.test, specs) for task_set, specs in data.task_sets().items()}
    return JobOutput({"validation": fitted.validation, "notes": fitted.notes}, arrays)


@dataclass(frozen=True)
class MeasuredTaskSet:
    """One task set at all origins: its query rows, and groups of them by who they belong to."""

    rows: list[TaskSetRows]
    groups: list[dict[str, npt.NDArray[np.bool_]]]

    def part(self, group: str) -> list[TaskSetRows]:
        return [rows.part(groups[group]) for rows, groups in zip(self.rows, self.groups, strict=True)]


class Scores:
    """Outputs of all jobs, by method, task set, origin and seed."""

    def __init__(self, outputs: Mapping[str, JobOutput], num_origins: int) -> None:
        self._found: dict[str, list[list[JobOutput]]] = {}
        for key, output in sorted(outputs.items()):
            name, origin, _ = key.split("/")
            seeds = self._found.setdefault(name, [[] for _ in range(num_origins)])
            seeds[int(origin.removeprefix("origin"))].append(output)

    @property
    def methods(self) -> list[str]:
        return list(self._found)

    @property
    def num_seeds(self) -> int:
        """Of those methods that have seeds."""
        return max(len(seeds) for origins in self._found.values() for seeds in origins)

    def of(self, method: str, task_set: str) -> list[list[Floats]]:
        """[origin][seed] scores of the task set's query rows. `prior` is the shipped network's."""
        name, task_set = ("stored", f"{PRIOR}/{task_set}") if method == PRIOR else (method, task_set)
        return [[output.arrays[task_set] for output in seeds] for seeds in self._found[name]]


class Assembly:
    """All measured values that tables are made of; each is made once."""

    def __init__(self, outputs: Mapping[str, JobOutput], origins: Sequence[OriginData]) -> None:
        self.scores = Scores(outputs, len(origins))
        everybody = sorted({user for data in origins for user in (*data.origin.returning_users, *data.origin.held_out_users)})
        self._number = {user: number for number, user in enumerate(everybody)}
        self._weights_BU = draw_users(len(everybody), draws=DRAWS, seed=0)
        self._origins, self._task_sets = origins, [data.task_sets() for data in origins]
        self._task_set: dict[str, MeasuredTaskSet] = {}
        self._measured: dict[tuple[str, str, str, bool], Measured] = {}

    def task_set(self, name: str) -> MeasuredTaskSet:
        if name not in self._task_set:
            found = [self._rows(data, task_sets, name) for data, task_sets in zip(self._origins, self._task_sets, strict=True)]
            self._task_set[name] = MeasuredTaskSet([rows for rows, _ in found], [groups for _, groups in found])
        return self._task_set[name]

    def measured(self, method: str, task_set: str, group: str = "all", *, draws: bool = True) -> Measured:
        """Without draws it takes a tenth of the time, and has no intervals."""
        key = method, task_set, group, draws
        if key not in self._measured:
            groups = self.task_set(task_set).groups
            masked = [
                [part[groups[origin][group]] for part in seeds] for origin, seeds in enumerate(self.scores.of(method, task_set))
            ]
            self._measured[key] = measure(self.task_set(task_set).part(group), masked, self._weights_BU if draws else None)
        return self._measured[key]

    def _rows(
        self, data: OriginData, task_sets: Mapping[str, Sequence[Any]], name: str
    ) -> tuple[TaskSetRows, dict[str, npt.NDArray[np.bool_]]]:
        rows = data.test.rows
        queries = query_rows(rows, task_sets[name])
        entity = np.repeat([spec.entity for spec in task_sets[name]], [len(spec.query) for spec in task_sets[name]])
        number = np.array([self._number[user] for user in rows.entities])
        back = np.isin(rows.entities, data.origin.returning_users)[entity]
        # Halves of the users who are judged, by how many rows they have.
        sizes = np.diff(rows.offsets)
        frequent = sizes[entity] >= np.median(sizes[np.unique(entity)])
        groups = {"all": np.ones(len(entity), np.bool_), "returning": back, "new": ~back}
        groups |= {"frequent": frequent, "infrequent": ~frequent}
        return TaskSetRows(queries.labels, number[entity]), groups


def assemble(outputs: Mapping[str, JobOutput]) -> dict[str, Any]:
    """The results' part of tables 1, 2, 4 and 5."""
    num_origins = 1 + max(int(key.split("/")[1].removeprefix("origin")) for key in outputs)
    origins = movielens(str(MOVIELENS))[:num_origins]
    found = Assembly(outputs, origins)
    methods = [*found.scores.methods, PRIOR]
    ours = [name for name in OURS if name in methods]
    results: dict[str, Any] = {"protocol": protocol(found, origins)}
    for metric, name in METRICS.items():
        results[name] = {m: {str(k): found.measured(m, f"first/{k}").mean(metric) for k in KS} for m in methods}
        results[f"as_served_{name}"] = {m: as_served(found, m, metric) for m in methods}
    for metric, name in {AUC: "delta_auc", PERUSER_AUC: "delta_peruser_auc"}.items():
        results[name] = {one: {rival: by_k(found, one, rival, metric) for rival in methods if rival != one} for one in ours}
        results[f"frequency_{name}"] = {
            one: {rival: by_frequency(found, one, rival, metric) for rival in methods if rival != one} for one in ours
        }
        results[f"as_served_{name}"] = {
            one: {rival: served_delta(found, one, rival, metric) for rival in methods if rival != one} for one in ours
        }
    pooled = results["as_served_delta_auc"]
    results["as_served_delta"] = {
        one: {rival: {**groups["all"], **groups} for rival, groups in pooled[one].items()} for one in ours
    }
    return results | few_rows(found, num_origins) | refresh(found, methods)


def protocol(found: Assembly, origins: Sequence[OriginData]) -> dict[str, Any]:
    """How many users and rows each origin trains, chooses and judges on."""
    first = found.task_set(f"first/{KS[-1]}").rows
    served = found.task_set("served/daily")
    described = []
    for number, data in enumerate(origins):
        origin, groups = data.origin, served.groups[number]
        described.append(
            {
                "train_users": len(origin.train_users),
                "train_rows": len(data.training.rows.label),
                "validation_users": len(origin.validation_users),
                "test_users": len(origin.held_out_users),
                "first_k_users": len(np.unique(first[number].users)),
                "first_k_rows": len(first[number].labels),
                "served_rows": len(groups["all"]),
                "served_returning_rows": int(groups["returning"].sum()),
            }
        )
    return {"origins": described, "ks": list(KS), "draws": DRAWS, "seeds": found.scores.num_seeds}


def by_k(found: Assembly, ours: str, rival: str, metric: str) -> dict[str, Any]:
    """Differences at every k, and at `20+`: the mean of k = 20 and k = 50."""
    pairs = {k: (found.measured(ours, f"first/{k}"), found.measured(rival, f"first/{k}")) for k in KS}
    differences = {str(k): mean_difference([pair], metric).as_dict() for k, pair in pairs.items()}
    return differences | {"20+": mean_difference([pairs[k] for k in PERSONAL_KS], metric).as_dict()}


def by_frequency(found: Assembly, ours: str, rival: str, metric: str) -> dict[str, Any]:
    """Differences at k >= 20 of users with many and with few rows, halves of those judged."""
    return {
        group: mean_difference(
            [(found.measured(ours, f"first/{k}", group), found.measured(rival, f"first/{k}", group)) for k in PERSONAL_KS],
            metric,
        ).as_dict()
        for group in ("frequent", "infrequent")
    }


SERVED_GROUPS = ("all", "returning", "new", "frequent", "infrequent")


def as_served(found: Assembly, method: str, metric: str) -> dict[str, float]:
    return {group: found.measured(method, "served/daily", group).mean(metric) for group in SERVED_GROUPS}


def served_delta(found: Assembly, ours: str, rival: str, metric: str) -> dict[str, Any]:
    return {
        group: mean_difference(
            [(found.measured(ours, "served/daily", group), found.measured(rival, "served/daily", group))], metric
        ).as_dict()
        for group in SERVED_GROUPS
    }


def few_rows(found: Assembly, num_origins: int) -> dict[str, Any]:
    """Table 4: the shipped network with the user's rows less the same network with the prior, at each origin."""
    table = {}
    for k in FEW_KS:
        pair = [(found.measured("stored", f"first/{k}"), found.measured(PRIOR, f"first/{k}"))]
        table[str(k)] = {
            name: [mean_difference(pair, metric, [origin]).as_dict() for origin in range(num_origins)]
            for metric, name in {AUC: "auc", PERUSER_AUC: "peruser_auc"}.items()
        }
    return {"few_rows": table}


def refresh(found: Assembly, methods: Sequence[str]) -> dict[str, Any]:
    """Table 5 on MovieLens: every method at every cadence of its support."""
    cadences = [NEVER, *CADENCES]
    results: dict[str, Any] = {
        name: {
            m: {
                c: {g: found.measured(m, f"served/{c}", g, draws=False).mean(metric) for g in ("all", "returning")}
                for c in cadences
            }
            for m in methods
        }
        for metric, name in {AUC: "refresh_auc_by_method", PERUSER_AUC: "refresh_peruser_auc_by_method"}.items()
    }
    results["refresh_auc"] = results["refresh_auc_by_method"]["stored"]
    results["refresh_delta"] = {
        name: {c: {g: _against_daily(found, c, g, metric) for g in ("all", "returning")} for c in cadences if c != "daily"}
        for metric, name in {AUC: "auc", PERUSER_AUC: "peruser_auc"}.items()
    }
    return results


def _against_daily(found: Assembly, cadence: str, group: str, metric: str) -> dict[str, float]:
    pair = found.measured("stored", f"served/{cadence}", group), found.measured("stored", "served/daily", group)
    return mean_difference([pair], metric).as_dict()
