"""Retraining from the champion's weights against training from scratch, over consecutive origins.

    python -m experiments.continual --out experiments/results/continual.json [--world NAME ...] [--kuairand FOLDER]

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from experiments.data import TODAY
from experiments.evidence import measure as measures
from experiments.evidence.measure import PER_USER, POOLED, Draws, Part
from experiments.evidence.worlds import RETURNING
from experiments.inner_loop import Floats, with_vector, worlds
from limaml import metrics
from limaml.config import Config, MetaConfig, ModelConfig, TrainingConfig, load
from limaml.evaluation.agreement import versions_agree
from limaml.events.catalogue import item_vectors
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.features.derived import timestamps_us
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.models.bundle import Model
from limaml.models.network import Network, build_network
from limaml.schema import tables
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows
from limaml.tasks.splits import split_events
from limaml.training.champion import pull
from limaml.training.fit import fit
from limaml.training.prepare import read_history
from limaml.training.scoring import score_specs
from limaml.training.step import Workers, backward
from limaml.training.twin_and_refit import network_objective
from limaml.training.warm_start import start_from_champion, take_weights, warm_start

_SHARES = (0.4, 0.55, 0.7, 0.85, 1.0)
"""Of the rows in order of time: origins, and the end of the last one's new days."""
_DRAWS = 500
_FISHER_STEPS = 16
"""Meta-batches that EWC's diagonal is the mean squared gradient of."""
Penalty = Callable[[nn.Module], Tensor]


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
    ewc: float = 0.0
    """Strength of the same weighted by the diagonal of the champion's Fisher information, of mean 1."""


ARMS = {
    "scratch": Arm(start="scratch"),
    "scratch_quarter": Arm(0.25, start="scratch"),
    "champion": Arm(),
    "champion_quarter": Arm(0.25),
    "champion_quarter_kept": Arm(0.25, rounds=0),
    "champion_quarter_15_rounds": Arm(0.25, rounds=15),
    "champion_quarter_pull_1": Arm(0.25, pull=1.0),
    "champion_quarter_pull_10": Arm(0.25, pull=10.0),
    "champion_quarter_ewc_1": Arm(0.25, ewc=1.0),
    "champion_quarter_ewc_10": Arm(0.25, ewc=10.0),
}


@dataclass(frozen=True)
class Version:
    """A trained network with what it reads rows through."""

    network: Network
    encoder: Encoder
    rows: TaskRows
    """Its training rows."""
    seconds: float


@dataclass
class World:
    """Rows of a world, and where its origins are."""

    cfg: Config
    logged: pa.Table
    instants_us: list[int]
    held_out: frozenset[str]
    items: pa.Table | None

    def train_rows(self, origin: int) -> pa.Table:
        """Rows before an origin of users who train."""
        training = np.array([user not in self.held_out for user in self.logged["user_id"].to_pylist()])
        return self.logged.filter(pa.array(training & (timestamps_us(self.logged) < self.instants_us[origin])))


def drifting(rate: float) -> Config:
    """The generated world of users who come back, whose tastes move by `rate` a day."""
    own = RETURNING | {"synthetic_label_rate": 0.5, "synthetic_vector_scale": 1.0, "synthetic_drift": rate}
    cfg = load("configs/synthetic.toml", [*(f"source.{k}={v}" for k, v in own.items()), "evaluation.held_out=hash"])
    return with_vector(cfg)


def known_worlds(kuairand: str) -> dict[str, Config]:
    """MovieLens, a generated world that drifts, and KuaiRand where its folder is given."""
    known = worlds(kuairand)
    return {name: known[name] for name in ("movielens", "kuairand") if name in known} | {"drifting": drifting(0.3)}


def read_world(cfg: Config, root: str, max_steps: int | None) -> World:
    """Ingest into `root`, if it is not yet; the model and training are the defaults."""
    steps = max_steps or TrainingConfig().max_steps
    training = TrainingConfig(num_workers=1, max_steps=steps, validate_every=steps, warmup_steps=min(20, steps // 4))
    defaults = {"model": ModelConfig(), "meta": MetaConfig(), "training": training}
    evaluation = cfg.evaluation.model_copy(update={"held_out": "hash"})
    storage = cfg.storage.model_copy(update={"root": root})
    cfg = cfg.model_copy(update={**defaults, "storage": storage, "evaluation": evaluation})
    through = open_source(cfg, TODAY).days()[-1]
    ingest_history(cfg, through, TODAY)
    logged = read_history(cfg, through)
    stamps = np.sort(timestamps_us(logged))
    instants = [int(stamps[min(round(share * len(stamps)), len(stamps) - 1)]) for share in _SHARES]
    held_out = frozenset(split_events(logged, cfg.evaluation).held_out_users)
    return World(cfg, logged, instants, held_out, item_vectors(Storage(root), tables(cfg.features)))


def train(world: World, arm: Arm, origin: int, champion: Version | None) -> Version:
    """Train a version on the rows before an origin; without a champion, or by the arm, from scratch."""
    cfg, logged = world.cfg, world.train_rows(origin)
    start = None if arm.start == "scratch" else champion
    share = arm.steps if champion is not None else 1.0
    steps = max(round(share * cfg.training.max_steps), 1)
    training = cfg.training.model_copy(update={"max_steps": steps, "validate_every": steps})
    encoder = Encoder.fit(logged, cfg, world.items) if start is None else start.encoder.grown(logged, cfg)
    encoder = encoder.with_items(world.items)
    rows = TaskRows.of(logged, encoder, cfg, to_train=True)
    started = time.process_time()
    network = build_network(cfg, encoder.dims, cfg.training.seed)
    penalty: Penalty | None = None
    if start is None:
        warm_start(network, rows, cfg)
    elif not arm.rounds:
        take_weights(network, start.network, rows)
    else:
        start_from_champion(network, start.network, rows, cfg, arm.rounds)
    if start is not None and arm.pull:
        penalty = pull(start.network, arm.pull)
    if start is not None and arm.ewc:
        penalty = ewc(start, cfg, arm.ewc)
    objective = network_objective(network, rows, cfg, Workers(), penalty)
    trained, _ = fit(network, training, objective)
    return Version(trained, encoder, rows, time.process_time() - started)


def ewc(champion: Version, cfg: Config, strength: float) -> Penalty:
    """strength / 2 * sum of fisher * squared distance from the champion's weights (Kirkpatrick et al. 2017, equation 3).

    The diagonal is the mean over meta-batches of the squared gradient of the outer loss, divided by its mean over weights, so
    that strengths are those of an unweighted pull.
    """
    network = build_network(cfg, champion.encoder.dims)
    network.load_state_dict(champion.network.state_dict())
    objective = network_objective(network, champion.rows, cfg, Workers())
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    fisher = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    for step in range(_FISHER_STEPS):
        network.zero_grad()
        backward(network, objective, cfg.training, step, Workers())
        for name, weight in trained.items():
            assert weight.grad is not None
            fisher[name] += weight.grad.square()
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    anchors = {name: weight.detach().clone() for name, weight in trained.items()}

    def penalty(model: nn.Module) -> Tensor:
        mine = dict(model.named_parameters())
        parts = [(fisher[name] / mean * (_first(mine[name], at) - at).square()).sum() for name, at in anchors.items()]
        return 0.5 * strength * sum(parts[1:], parts[0])

    return penalty


def _first(weight: Tensor, anchor: Tensor) -> Tensor:
    return weight[: len(anchor)] if weight.ndim else weight


def judge(world: World, version: Version, users: frozenset[str] | None, from_us: int, until_us: int) -> tuple[Part, Floats]:
    """Rows between two instants as served daily, of some users or of all, and their scores."""
    before = world.logged.filter(pa.array(timestamps_us(world.logged) < until_us))
    rows = TaskRows.of(before, version.encoder, world.cfg)
    num_rows = world.cfg.support_rows_of(world.cfg.task_kind.name)
    known = None if users is None else sorted(users & set(rows.entities))
    specs = as_served(rows, from_us=from_us, support_rows=num_rows, users=known)
    names = sorted(set(world.logged["user_id"].to_pylist()))
    number = {name: at for at, name in enumerate(names)}
    queries = query_rows(rows, specs)
    users_R = np.repeat([number[rows.entities[spec.entity]] for spec in specs], [len(spec.query) for spec in specs])
    part = Part(queries.labels, users_R, rows.timestamp_us[queries.rows] // MICROSECONDS_PER_DAY)
    return part, score_specs(version.network, rows, specs)


def drift(world: World, before: Version, after: Version, at_us: int) -> dict[str, Any]:
    """How far two versions' embeddings of the same users as of one instant agree, and the same items' vectors."""
    until = world.logged.filter(pa.array(timestamps_us(world.logged) < at_us))
    old, new = ((world.cfg, Model(each.network, each.encoder)) for each in (before, after))
    return versions_agree(old, new, until, at_us)


@dataclass
class _Chain:
    """What an arm's versions are judged by."""

    seconds: list[float] = field(default_factory=list)
    drifts: list[dict[str, Any]] = field(default_factory=list)
    new: list[tuple[Part, Floats]] = field(default_factory=list)
    old: list[tuple[Part, Floats]] = field(default_factory=list)


def measure(world: World, arms: Mapping[str, Arm] = ARMS) -> dict[str, Any]:
    """All arms' chains: values, and differences to scratch with intervals, on the first origin after the start (which chooses)
    and on those after it (which judge).
    """
    bounds = list(pairwise(world.instants_us))
    first = train(world, Arm(start="scratch"), 0, None)
    chains: dict[str, _Chain] = {}
    for name, arm in arms.items():
        chain, champion = chains.setdefault(name, _Chain()), first
        for origin in range(1, len(bounds)):
            version = train(world, arm, origin, champion)
            chain.seconds.append(version.seconds)
            chain.drifts.append(drift(world, champion, version, world.instants_us[origin]))
            chain.new.append(judge(world, version, None, *bounds[origin]))
            chain.old.append(judge(world, version, world.held_out, *bounds[0]))
            champion = version
    at_first = metrics.auc(*_of(judge(world, first, world.held_out, *bounds[0])))
    return {"steps": world.cfg.training.max_steps, "old_auc_of_first": 100 * at_first, "arms": _report(world, chains)}


def _report(world: World, chains: Mapping[str, _Chain]) -> dict[str, Any]:
    num_users = len(set(world.logged["user_id"].to_pylist()))
    weights = metrics.draw_users(num_users, draws=_DRAWS, seed=0)
    measured = {
        (name, what): [rows.measured(score_R, weights, by_day=False, pooled=True) for rows, score_R in part]
        for name, chain in chains.items()
        for what, part in (("new", chain.new), ("old", chain.old))
    }
    found: dict[str, Any] = {}
    for name, chain in chains.items():
        num = len(chain.seconds)
        found[name] = {
            "seconds": round(sum(chain.seconds[1:]) / (num - 1), 2),
            "drift": {
                what: {key: _mean(one[what][key] for one in chain.drifts[1:]) for key in ("cosine", "rotated_cosine")}
                for what in ("embeddings", "items")
            },
            "chosen_on": _days(measured, name, [0]),
            "judged_on": _days(measured, name, list(range(1, num))),
        }
    return found


def _days(measured: Mapping[tuple[str, str], Sequence[Draws]], name: str, origins: Sequence[int]) -> dict[str, Any]:
    """New and old days of some origins: points, and points over scratch."""
    found: dict[str, Any] = {}
    for what in ("new", "old"):
        found[what] = {}
        for metric, key in (("pooled", POOLED), ("per_user", PER_USER)):
            ours, scratch = (measures.mean([measured[arm, what][at][key] for at in origins]) for arm in (name, "scratch"))
            found[what][metric] = {"auc": ours[0], "over_scratch": measures.gain(ours, scratch)}
    return found


def _of(judged: tuple[Part, Floats]) -> tuple[Floats, Floats]:
    return judged[0].labels_R, judged[1]


def _mean(values: Iterator[float]) -> float:
    return round(float(np.mean(list(values))), 4)


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="movielens, drifting or kuairand; all by default.")] = None,
    kuairand: Annotated[str, typer.Option(help="Folder with KuaiRand's tables; without it that world is not measured.")] = "",
    work: Annotated[str, typer.Option(help="Folder for ingested data, which is then kept.")] = "",
    max_steps: Annotated[int | None, typer.Option(help="From scratch; the defaults' by default.")] = None,
) -> None:
    """Measure worlds one after another, and write after each."""
    console, results, known = Console(), json.loads(out.read_text()) if out.exists() else {}, known_worlds(kuairand)
    for name in world or known:
        started = time.monotonic()
        with TemporaryDirectory() as folder:
            found = measure(read_world(known[name], f"{work}/{name}" if work else folder, max_steps))
        results[name] = found | {"wall_seconds": round(time.monotonic() - started)}
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, results[name])


if __name__ == "__main__":
    typer.run(main)
