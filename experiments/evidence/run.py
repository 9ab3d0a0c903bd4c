"""`make experiments`: arms and rivals of every world, on the same rows.

    python -m experiments.evidence.run [--world grocery ...] [--kuairand FOLDER] [--job set ...] [--seeds 3] [--quick]

Finished jobs are kept below experiments/.work, so that an interrupted run goes on where it was. Named jobs are measured beside
what is chosen, and put into its results. A quick run's figures mean nothing.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from experiments.cached_jobs import Job, JobCache
from experiments.code_digest import revision
from experiments.data import WORK
from experiments.evidence import jobs, report
from experiments.evidence.answers import SIDES, Answers
from experiments.evidence.arms import ARMS, FITTED_OTHERWISE, HISTORY, ONCE, RIVALS, SEQUENCE_MODEL, configured, retraining
from experiments.evidence.worlds import ABOUT, OTHER_HALF_LIVES, Origin, drifting, evidence_worlds, ingested, origins
from experiments.progress import follow
from experiments.results import RESULTS, plain
from limaml import telemetry
from limaml.config import Config
from limaml.io import atomic

TABLE = "evidence"
_FITTED_BY = (
    "sequence_rival",
    "sequence",
    "transfer_jobs",
    *(f"evidence/{module}" for module in ("arms", "catalogue", "fit_data", "jobs", "rivals", "worlds")),
)
"""What a job's output follows from, beside the core."""
_BRIEF, _WITHOUT = ("grocery", "kuairand"), (*RIVALS, "shipped", "newton", "gradient", "set", "hybrid", HISTORY)
"""Worlds where a fit takes minutes, and what alone is run there without history features."""
_ONE_SEED = ("rules", "tables")
"""Jobs that no seed changes."""
_QUICK = "drifting"
_RETRAINED = dict.fromkeys(
    ("drifting", "kuairand"), ("shipped, retrained daily", "networks, retrained daily", f"{SEQUENCE_MODEL}, retrained daily")
) | {"grocery": ("networks, retrained weekly", f"{SEQUENCE_MODEL}, retrained weekly")}
"""World -> jobs that are fitted anew for judged days as well, where days are what splits."""


def measured(
    world: Config,
    name: str,
    *,
    arms: Sequence[str],
    rivals: Sequence[str] = tuple(RIVALS),
    retrained: Sequence[str] = (),
    num_origins: int,
    seeds: int,
    workers: int,
    root: Path,
    console: Console,
) -> dict[str, Any]:
    """Everything of a world; `rivals` are jobs of theirs."""
    world = ingested(world, root / name)
    at, has_history = origins(world, num_origins), any(feature.by for feature in world.features)
    wanted: dict[tuple[bool, str, int, int], Job] = {}
    for number, (cfg, through) in enumerate(at):
        for history in (True, False) if has_history else (True,):
            for arm in (*rivals, *arms, *retrained):
                if not history and (arm in ONCE or (name in _BRIEF and arm not in _WITHOUT)):
                    continue
                for seed in range(seeds_of(arm, seeds)):
                    key = f"{name}/{through}/{arm}/{seed}{'' if history else '/without'}"
                    params = {"arm": arm, "history": history, "seed": seed, "through": str(through)}
                    wanted[history, arm, number, seed] = Job(TABLE, key, params | {"config": cfg.model_dump_json()})
    cache = JobCache(root / "jobs", revision("methods", *_FITTED_BY))
    outputs = follow(list(wanted.values()), {TABLE: jobs.run}, cache, workers, console)
    of = {
        (history, arm): [
            [outputs[job] for key, job in wanted.items() if key[:3] == (history, arm, number)] for number in range(len(at))
        ]
        for history, arm in dict.fromkeys(key[:2] for key in wanted)
    }
    about = dict(zip(("title", "terms", "cannot_show"), ABOUT.get(name, (name, "", "")), strict=True)) | {"seeds": seeds}
    return about | {"origins": [str(through) for _, through in at]} | Answers([Origin.read(*each) for each in at], of).all()


def beside(world: Config, kept: dict[str, Any], named: Sequence[str], measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Kept answers with those of named jobs, on the same draws. Raises ValueError where these change what is chosen."""
    chosen = {f"chosen{side}": end for side, end in SIDES.items() if f"chosen{side}" in kept}
    wanted = dict.fromkeys((*(kept[key].removesuffix(end) for key, end in chosen.items()), "networks", *named))
    arms, rivals = ([job for job in wanted if job in of] for of in (ARMS, RIVALS))
    found = measure(arms=distinct(world, arms), rivals=rivals, num_origins=len(kept["origins"]), seeds=kept["seeds"])
    if any(found[key] != kept[key] for key in chosen):
        raise ValueError(f"{', '.join(named)} would change {', '.join(chosen)}: measure the world without --job")
    return _put(kept, plain(found))


def _put(kept: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return kept | found | {key: _put(kept[key], found[key]) for key in kept.keys() & found if isinstance(kept[key], dict)}


def seeds_of(job: str, seeds: int) -> int:
    """How many of the wanted seeds a job is run with."""
    return 1 if job in _ONE_SEED or retraining(job)[1] else seeds


def distinct(world: Config, arms: list[str]) -> list[str]:
    """Without arms that are another one's configuration: a world may ship the default."""
    found: dict[str, str] = {}
    for arm in arms:
        cfg = configured(world, arm, history=True, seed=0).model_dump_json()
        found.setdefault(f"{arm if arm in FITTED_OTHERWISE else ''}{cfg}", arm)
    return list(found.values())


def short(world: Config) -> Config:
    """With fits of a few steps; what they give means nothing."""
    changes = {"training": {"max_steps": 20, "validate_every": 10}, "evaluation": {"baseline_steps": 10}}
    return world.model_copy(update={section: getattr(world, section).model_copy(update=of) for section, of in changes.items()})


def main(
    world: Annotated[list[str] | None, typer.Option(help="One of them; all by default.")] = None,
    kuairand: Annotated[str, typer.Option(help="Folder with KuaiRand's tables; without it that world is not measured.")] = "",
    job: Annotated[list[str] | None, typer.Option(help="An arm, or rivals, to put into the results; all anew without.")] = None,
    num_origins: Annotated[int, typer.Option("--origins", min=1)] = 3,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, one origin: whether everything works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results; a quick run's is beside its jobs.")] = RESULTS,
) -> None:
    """Measure worlds one after another, and write after each."""
    console, known = Console(), evidence_worlds(kuairand)
    if quick:
        num_origins, seeds, out, known = 1, 1, WORK / "quick", {"drifting": short(known["drifting"])}
    telemetry.configure(json_lines=False, level=logging.WARNING)
    for given, among in ((world, known), (job, (*ARMS, *RIVALS))):
        if unknown := [name for name in given or () if name not in among]:
            raise typer.BadParameter(f"must be among {', '.join(among)}, got {', '.join(unknown)}")
    measure = partial(measured, num_origins=num_origins, seeds=seeds, workers=workers, root=WORK / TABLE, console=console)
    for name in world or known:
        path, of = out / f"{name}.json", partial(measure, known[name], name)
        everything = {"arms": distinct(known[name], list(ARMS)), "retrained": () if quick else _RETRAINED.get(name, ())}
        found = beside(known[name], json.loads(path.read_text()), job, of) if job else of(**everything)
        for days in OTHER_HALF_LIVES if name == _QUICK and not (quick or job) else ():
            other = measure(drifting(days), f"{name}-{days}", arms=("shipped",), rivals=("networks",))
            found.setdefault("by_drift", {})[days] = other["staleness"]["shipped"]
        out.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(plain(found), indent=1, sort_keys=True, allow_nan=False) + "\n")
        console.print(name, found["chosen"], found["methods"][found["chosen"]])
    report.write({name: json.loads(path.read_text()) for name in ABOUT if (path := out / f"{name}.json").exists()}, out)


if __name__ == "__main__":
    typer.run(main)
