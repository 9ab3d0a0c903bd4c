"""`make experiments`: every table, its plots and a report.

    .venv/bin/python -m experiments.run [--quick] [--tables methods,cost] [--workers 2]

Finished jobs are kept below experiments/.work, so that an interrupted run goes on where it was; each job is a run in the
MLflow database there. A run from nothing takes about 70 minutes on two cores. Designs are not chosen here: they are frozen in
designs.json (`experiments.search`). A quick run is a look at whether everything works: its figures mean nothing, and it writes
them beside the kept jobs, not into results/.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from experiments import report
from experiments.cached_jobs import Job, JobCache, JobOutput
from experiments.code_digest import revision
from experiments.data import MOVIELENS, WORK
from experiments.origin_data import movielens
from experiments.progress import follow
from experiments.results import RESULTS, merge, write
from experiments.tables import cost, drift, methods, recovery, sensitivity
from limaml import telemetry
from limaml.config import RegistryConfig
from limaml.registry import Registry

TABLES: dict[str, ModuleType] = {module.TABLE: module for module in (methods, sensitivity, recovery, drift, cost)}
ALONE = (cost.TABLE,)
"""Timed, so its jobs run one at a time."""


def experiments(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, 5 minutes; writes nothing into results/.")] = False,
    tables: Annotated[str, typer.Option(help="Names, with commas; all if empty.")] = "",
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; by default experiments/results.")] = None,
) -> None:
    """Measure ours and the rivals on the same rows, with intervals."""
    console, started = Console(), time.monotonic()
    telemetry.configure(json_lines=False, level=logging.WARNING)
    folder = out or (WORK / "quick" if quick else RESULTS)
    names = [name for name in tables.split(",") if name] or list(TABLES)
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise typer.BadParameter(f"--tables must be among {', '.join(TABLES)}, got {', '.join(unknown)}")
    if folder == RESULTS and set(names) != set(TABLES):
        raise typer.BadParameter(f"--tables must be all of them where {RESULTS} is written, got {tables}; name another --out")
    console.print("ingesting MovieLens, if it is not yet")
    movielens(str(MOVIELENS))
    log = mlflow_log(WORK / "mlflow", "experiments-quick" if quick else "experiments")
    parts = [_measure(name, quick, 1 if name in ALONE else workers, console, log) for name in names]
    minutes = (time.monotonic() - started) / 60
    results = merge(parts, {"quick": quick, "minutes": round(minutes, 1), "tables": names})
    write(results, folder)
    report.write(results, folder)
    console.print(f"{minutes:.0f} min; {folder / 'REPORT.md'}", soft_wrap=True)


def _measure(name: str, quick: bool, workers: int, console: Console, log: Callable[[Job, JobOutput], None]) -> dict[str, Any]:
    """One table's part of the results."""
    table = TABLES[name]
    cache = JobCache(WORK / "units", revision("origin_data", "methods", "oracle", "worlds", f"tables/{name}"))
    outputs = follow(table.jobs(quick), {name: table.run}, cache, workers, console, log)
    part: dict[str, Any] = table.assemble({job.key: output for job, output in outputs.items()})
    return part


def mlflow_log(folder: Path, experiment: str) -> Callable[[Job, JobOutput], None]:
    """What logs a job as a run of the MLflow database in `folder`: its parameters, and every number among its values."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(
        RegistryConfig(
            tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=str(folder / "artifacts"), experiment=experiment
        )
    )

    def log(job: Job, output: JobOutput) -> None:
        run = registry.start_run(f"{job.table}/{job.key}", job.params, {"table": job.table})
        numbers = {name: value for name, value in output.values.items() if isinstance(value, (int, float))}
        registry.log_metrics(run, numbers)
        registry.end_run(run)

    return log


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(experiments)
    app()
