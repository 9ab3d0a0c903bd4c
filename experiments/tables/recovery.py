"""Recovery of a known answer: how much of what k rows can tell about a synthetic user LiMAML finds.

Users with a planted level, a planted one-dimensional and a planted ten-dimensional taste, without drift. A user who was not
trained on is judged with k rows of support on the rows after the largest k. Share recovered at k =

    (AUC of LiMAML with k rows - AUC of no personalisation) / (AUC of the oracle with k rows - AUC of no personalisation)

The oracle is the posterior-predictive probability given the same k rows with the items' parameters known
(`experiments.oracle`); no personalisation is the oracle without rows. AUCs are pooled, and once more inside each user's rows;
they are expected over the query rows' labels under their true probabilities, so that only the support's labels are noise, which
both sides share.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.cached_jobs import Job, JobOutput
from experiments.data import WORK
from experiments.oracle import posterior
from experiments.worlds import CONFIG, KnownRows, World, expected_peruser_auc
from limaml.config import Config, load
from limaml.events.synthetic import expected_auc
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import first_k, query_rows
from limaml.tasks.sampling import TaskSpec
from limaml.training.scoring import score_specs
from limaml.training.twin_and_refit import fit_twin
from limaml.training.validation import Validator

Floats = npt.NDArray[np.float64]

TABLE = "recovery"
KS = (0, 1, 2, 5, 10, 20, 50, 100, 200)
TASTES = {
    "level": ("source.synthetic_factors=0", "source.synthetic_level=1.0"),
    "one_dimension": ("source.synthetic_factors=1",),
    "ten_dimensions": ("source.synthetic_factors=10",),
}

LEAST_GAP = 0.002
"""Less than this between the oracle and no personalisation is nothing to recover: a level ranks no item above another."""
_ITEMS = 200
_TRAINED, _VALIDATING = 0.75, 0.85
"""Shares of the order of arrival: users trained on, users validated on until the second, users judged."""
_FULL = {"users": 2000, "steps": 400, "draws": 2048}
_QUICK = {"users": 300, "steps": 60, "draws": 512}
_SEEDS = {True: (0,), False: (0, 1, 2)}
_NETWORK = (
    "meta.support_rows=256",
    "meta.factor_inner_lr=12.0",
    "meta.factor_damping=30.0",
    "meta.inner_lr=1.0",
    "meta.damping=10.0",
    "training.inner_lr_scale=1.0",
    "training.patience=1000",
    "evaluation.first_k=[0,2,5,10,20,50,200]",
)
"""One configuration for all tastes, chosen on validation users (experiments/LOG.md)."""


def jobs(quick: bool) -> list[Job]:
    size = _QUICK if quick else _FULL
    return [
        Job(TABLE, f"{taste}/seed{seed}", {**size, "taste": taste, "seed": seed, "root": str(WORK)})
        for taste in TASTES
        for seed in _SEEDS[quick]
    ]


def run(job: Job) -> JobOutput:
    """`params["root"]`: the folder of all data; the world is ingested into a folder of its own below it."""
    params = job.params
    world = World.ingested(_world(params), Path(params["root"]) / TABLE / f"{job.key}-{params['users']}")
    training = world.arrival_rows_of(world.users(0.0, _TRAINED))
    encoder = Encoder.fit(training, world.cfg)
    validation = world.known(world.arrival_rows_of(world.users(_TRAINED, _VALIDATING)), encoder)
    known = world.known(world.arrival_rows_of(world.users(_VALIDATING, 1.0)), encoder)
    cfg = load(CONFIG, [*_NETWORK, f"training.max_steps={params['steps']}", f"training.seed={params['seed']}"])
    trained = world.known(training, encoder).inputs.rows
    network, progress = fit_twin(cfg, trained, encoder.dims, Validator(validation.inputs.rows, cfg))
    tasks = first_k_tasks(known, cfg)
    ours = [score_specs(network, known.inputs.rows, specs) for specs in tasks.values()]
    best = [best_scores(known, specs, params["draws"]) for specs in tasks.values()]
    found = {}
    for name, metric in {"aucs": expected, "peruser_aucs": expected_peruser}.items():
        limaml = {k: metric(known, specs, scores) for (k, specs), scores in zip(tasks.items(), ours, strict=True)}
        oracle = {k: metric(known, specs, scores) for (k, specs), scores in zip(tasks.items(), best, strict=True)}
        found[name] = shares(limaml, oracle)
    return JobOutput({"taste": params["taste"], **found, "best_step": progress.best_step})


def _world(params: Mapping[str, Any]) -> list[str]:
    """Half of a user's rows fall on the day of arrival, the only one used: 250 rows, more than the longest support."""
    sizes = {"users": params["users"], "items": _ITEMS, "days": 12, "rows_per_user": 500, "seed": params["seed"]}
    return [*(f"source.synthetic_{name}={value}" for name, value in sizes.items()), *TASTES[params["taste"]]]


def first_k_tasks(known: KnownRows, cfg: Config) -> dict[int, list[TaskSpec]]:
    rows, least = known.inputs.rows, cfg.evaluation.min_query_rows
    return first_k(rows, rows.entities, KS, min_query_rows=least, support_rows=cfg.meta.support_rows)


def best_scores(known: KnownRows, specs: Sequence[TaskSpec], draws: int) -> Floats:
    """Posterior-predictive probability of every query row, one spec after another."""
    item_R = known.item_R[query_rows(known.inputs.rows, specs).rows]
    task_R = np.repeat(np.arange(len(specs)), [len(spec.query) for spec in specs])
    found = posterior(known.support(specs), draws)
    return found.predict(task_R, known.popularity_I[item_R], known.loading_IL[item_R])


def expected(known: KnownRows, specs: Sequence[TaskSpec], scores: Floats) -> float:
    """Expected pooled AUC of the specs' query rows."""
    return expected_auc(known.probability_R[query_rows(known.inputs.rows, specs).rows], scores)


def expected_peruser(known: KnownRows, specs: Sequence[TaskSpec], scores: Floats) -> float:
    """Expected AUC inside each user's query rows, each user counting once."""
    queries = query_rows(known.inputs.rows, specs)
    return expected_peruser_auc(known.probability_R[queries.rows], scores, queries.users)


def shares(limaml: Mapping[int, float], oracle: Mapping[int, float]) -> dict[str, dict[str, float]]:
    """AUCs and the share recovered by k; there is none where there is nothing to recover, as at k = 0."""
    none = oracle[0]
    found = {}
    for k in limaml:
        found[str(k)] = {"limaml": limaml[k], "oracle": oracle[k], "none": none}
        if k and oracle[k] - none > LEAST_GAP:
            found[str(k)]["share"] = (limaml[k] - none) / (oracle[k] - none)
    return found


def assemble(outputs: Mapping[str, JobOutput]) -> dict[str, Any]:
    """Means over seeds by taste and k, and over all tastes the worst of the pooled shares."""
    recovery, peruser = (_means(outputs, name) for name in ("aucs", "peruser_aucs"))
    ks = [str(k) for k in KS if k]
    worst = {k: min(by_k[k]["share"] for by_k in recovery.values()) for k in ks}
    return {"recovered_share": worst, "recovery": recovery, "recovery_peruser": peruser}


def _means(outputs: Mapping[str, JobOutput], name: str) -> dict[str, dict[str, dict[str, float]]]:
    found = {}
    for taste in TASTES:
        of_seeds = [output.values[name] for output in outputs.values() if output.values["taste"] == taste]
        found[taste] = {k: _mean([aucs[k] for aucs in of_seeds]) for k in of_seeds[0]}
    return found


def _mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what every seed has."""
    return {name: float(np.mean([each[name] for each in values])) for name in values[0] if all(name in each for each in values)}
