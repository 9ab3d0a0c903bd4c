"""Retraining from the champion's weights against training from scratch, over consecutive origins.

    python -m experiments.continual --out experiments/results/continual.json [--world NAME ...]

At an origin a version is trained on every row before it of the users who train, and serves the days up to the next origin: the
new days. Every arm is a chain of versions that begins with one and the same version from scratch; what starts from a champion
starts from the version before it in its own chain. A tenth of the users, by hash, never train: on their rows of the days behind
the first version every later version is judged, and what it has lost there against that first version is forgotten.

Nothing is stopped early: each arm takes the steps that its name says. Rows are judged as a daily refresh serves them, by pooled
AUC and by the mean of users' own; differences to scratch are paired over users. What ships is chosen on the first chained
version's new days, and judged on those after it.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import typer
from rich.console import Console

from experiments.data import TODAY
from experiments.evidence import measure as measures
from experiments.evidence.measure import PER_USER, POOLED, Draws, Part
from experiments.evidence.worlds import RETURNING, Origin, ingested
from limaml.config import Config, FeatureConfig, MetaConfig, ModelConfig, TrainingConfig, load
from limaml.evaluation.agreement import versions_agree
from limaml.events.catalogue import item_vectors
from limaml.events.sources import open_source
from limaml.features.derived import timestamps_us
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.metrics import draw_users
from limaml.models.bundle import Model
from limaml.models.network import build_network
from limaml.schema import tables
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows
from limaml.tasks.splits import rows_of
from limaml.training.champion import pull
from limaml.training.fit import fit
from limaml.training.scoring import score_specs
from limaml.training.step import Workers
from limaml.training.twin_and_refit import network_objective
from limaml.training.warm_start import start_from_champion, take_weights, warm_start

_SHARES = (0.4, 0.55, 0.7, 0.85, 1.0)
"""Of the rows in order of time: origins, and the end of the last one's new days."""
_DRAWS = 500


@dataclass(frozen=True)
class Arm:
    """How each version behind the first is trained."""

    steps: float = 1.0
    """Share of the steps from scratch."""
    start: Literal["scratch", "champion"] = "champion"
    rounds: int = 1
    """Of the factor model, from the champion's item vectors on; 0: they are kept, and new items have them by their content."""
    pull: float = 0.0
    """Strength of L2 towards the champion."""


ARMS = {
    "scratch": Arm(start="scratch"),
    "scratch_quarter": Arm(0.25, start="scratch"),
    "champion": Arm(),
    "champion_quarter": Arm(0.25),
    "champion_quarter_kept": Arm(0.25, rounds=0),
    "champion_quarter_15_rounds": Arm(0.25, rounds=15),
    "champion_quarter_pull_1": Arm(0.25, pull=1.0),
    "champion_quarter_pull_10": Arm(0.25, pull=10.0),
}


@dataclass(frozen=True)
class World:
    """Rows of a world, and where its origins are."""

    cfg: Config
    logged: pa.Table
    instants_us: list[int]
    held_out: frozenset[str]

    @cached_property
    def users(self) -> list[str]:
        return sorted(set(self.logged["user_id"].to_pylist()))

    def train_rows(self, origin: int) -> pa.Table:
        """Rows before an origin of users who train."""
        return rows_of(self.logged, sorted({*self.users} - self.held_out), before_us=self.instants_us[origin])


def drifting(**source: float) -> Config:
    """The generated world of users who come back and whose tastes move; it declares the vector which tells what it planted."""
    own = RETURNING | {"synthetic_label_rate": 0.5, "synthetic_vector_scale": 1.0, "synthetic_drift": 0.3} | source
    cfg = load("configs/synthetic.toml", [*(f"source.{key}={value}" for key, value in own.items()), "evaluation.held_out=hash"])
    declared = {"entity": "item", "name": "taste_vector", "type": "vector", "encoder": "generated-1", "licence": "none"}
    vector = FeatureConfig.model_validate(declared | {"width": cfg.source.synthetic_factors})
    return cfg.model_copy(update={"features": (*cfg.features, vector)})


WORLDS: Mapping[str, Callable[[], Config]] = {"movielens": lambda: load("configs/movielens.toml"), "drifting": drifting}


def read_world(cfg: Config, root: Path, steps: int = TrainingConfig().max_steps) -> World:
    """Ingest into `root`; the model and training are the defaults, but for the steps."""
    training = TrainingConfig(num_workers=1, max_steps=steps, validate_every=steps, warmup_steps=min(20, steps // 4))
    defaults = {"model": ModelConfig(), "meta": MetaConfig(), "training": training}
    evaluation = cfg.evaluation.model_copy(update={"held_out": "hash"})
    cfg = ingested(cfg.model_copy(update={**defaults, "evaluation": evaluation}), root)
    origin = Origin.read(cfg, open_source(cfg, TODAY).days()[-1])
    stamps = np.sort(timestamps_us(origin.logged))
    instants = [int(stamps[min(round(share * len(stamps)), len(stamps) - 1)]) for share in _SHARES]
    return World(cfg, origin.logged, instants, frozenset(origin.split.held_out_users))


def train(world: World, arm: Arm, origin: int, champion: Model | None) -> tuple[Model, float]:
    """Train a version on the rows before an origin; without a champion, or by the arm, from scratch. And the seconds."""
    cfg, logged = world.cfg, world.train_rows(origin)
    items = item_vectors(Storage(cfg.storage.root), tables(cfg.features))
    start = None if arm.start == "scratch" else champion
    steps = max(round((arm.steps if champion is not None else 1.0) * cfg.training.max_steps), 1)
    training = cfg.training.model_copy(update={"max_steps": steps, "validate_every": steps})
    encoder = Encoder.fit(logged, cfg, items) if start is None else start.encoder.grown(logged, cfg)
    encoder = encoder.with_items(items)
    rows = TaskRows.of(logged, encoder, cfg, to_train=True)
    started = time.process_time()
    network = build_network(cfg, encoder.dims, cfg.training.seed)
    if start is None:
        warm_start(network, rows, cfg)
    elif not arm.rounds:
        take_weights(network, start.network, rows)
    else:
        start_from_champion(network, start.network, rows, cfg, arm.rounds)
    penalty = None if start is None or not arm.pull else pull(start.network, arm.pull)
    trained, _ = fit(network, training, network_objective(network, rows, cfg, Workers(), penalty))
    return Model(trained, encoder), time.process_time() - started


def judge(world: World, version: Model, users: frozenset[str] | None, from_us: int, until_us: int) -> Draws:
    """Rows between two instants as served daily, of some users or of all."""
    before = world.logged.filter(pa.array(timestamps_us(world.logged) < until_us))
    rows = TaskRows.of(before, version.encoder, world.cfg)
    support_rows = world.cfg.support_rows_of(world.cfg.task_kind.name)
    specs = as_served(rows, from_us=from_us, support_rows=support_rows, users=users)
    queries, number = query_rows(rows, specs), {name: at for at, name in enumerate(world.users)}
    users_R = np.repeat([number[rows.entities[spec.entity]] for spec in specs], [len(spec.query) for spec in specs])
    part = Part(queries.labels, users_R, rows.timestamp_us[queries.rows] // MICROSECONDS_PER_DAY)
    weights_BU = draw_users(len(world.users), draws=_DRAWS, seed=0)
    return part.measured(score_specs(version.network, rows, specs), weights_BU, by_day=False, pooled=True)


def chain(world: World, arm: Arm, first: Model) -> list[dict[str, Any]]:
    """Of an arm's versions behind the first: seconds of training, how far each agrees with the version before it on the same
    users as of one instant and on the same items' vectors (`drift`), and how it judges `new` and `old` days.
    """
    bounds, found, champion = list(pairwise(world.instants_us)), [], first
    for origin in range(1, len(bounds)):
        (version, seconds), at_us = train(world, arm, origin, champion), world.instants_us[origin]
        until = world.logged.filter(pa.array(timestamps_us(world.logged) < at_us))
        drift = versions_agree((world.cfg, champion), (world.cfg, version), until, at_us)
        new, old = judge(world, version, None, *bounds[origin]), judge(world, version, world.held_out, *bounds[0])
        found.append({"seconds": seconds, "drift": drift, "new": new, "old": old})
        champion = version
    return found


def measure(world: World, arms: Mapping[str, Arm] = ARMS) -> dict[str, Any]:
    """All arms' chains on the first origin after the start, which chooses, and on those after it, which judge."""
    first, _ = train(world, Arm(start="scratch"), 0, None)
    chains = {name: chain(world, arm, first) for name, arm in arms.items()}
    at_first, _ = judge(world, first, world.held_out, *world.instants_us[:2])[POOLED]
    found = {name: _report(steps, chains["scratch"]) for name, steps in chains.items()}
    return {"steps": world.cfg.training.max_steps, "old_auc_of_first": at_first, "arms": found}


def _report(steps: Sequence[Mapping[str, Any]], scratch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    judged = steps[1:]
    cosines = ("cosine", "rotated_cosine")
    return {
        "seconds": round(float(np.mean([step["seconds"] for step in judged])), 2),
        "drift": {
            what: {key: round(float(np.mean([step["drift"][what][key] for step in judged])), 4) for key in cosines}
            for what in ("embeddings", "items")
        },
        "chosen_on": _days(steps[:1], scratch[:1]),
        "judged_on": _days(judged, scratch[1:]),
    }


def _days(steps: Sequence[Mapping[str, Any]], scratch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """New and old days of some origins: points, and points over scratch."""
    found: dict[str, Any] = {"new": {}, "old": {}}
    for what, of in found.items():
        for metric, key in (("pooled", POOLED), ("per_user", PER_USER)):
            ours, theirs = (measures.mean([step[what][key] for step in each]) for each in (steps, scratch))
            of[metric] = {"auc": ours[0], "over_scratch": measures.gain(ours, theirs)}
    return found


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="movielens or drifting; both by default.")] = None,
) -> None:
    """Measure worlds one after another, and write after each."""
    console, results = Console(), json.loads(out.read_text()) if out.exists() else {}
    for name in world or WORLDS:
        started = time.monotonic()
        with TemporaryDirectory() as folder:
            found = measure(read_world(WORLDS[name](), Path(folder)))
        results[name] = found | {"wall_seconds": round(time.monotonic() - started)}
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, results[name])


if __name__ == "__main__":
    typer.run(main)
