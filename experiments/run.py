"""`make experiments`: every table, its plots and a report.

    .venv/bin/python -m experiments.run [--quick] [--tables methods,cost] [--workers 2]

Finished units are kept below experiments/.work, so that an interrupted run goes on where it was; each unit is a run in the
MLflow database there. Designs are not chosen here: they are frozen in designs.json (`experiments.search`). A quick run is a
look at whether everything works: its figures mean nothing, and it writes them beside the kept units, not into results/.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from experiments import report
from experiments.cases import movielens
from experiments.code import revision
from experiments.data import MOVIELENS, WORK
from experiments.progress import follow
from experiments.results import RESULTS, merge, write
from experiments.tables import cost, drift, methods, recovery, sensitivity
from experiments.units import Output, Run, Store, Unit
from limaml import telemetry
from limaml.config import RegistryConfig
from limaml.registry import Registry

TABLES: dict[str, ModuleType] = {module.TABLE: module for module in (methods, sensitivity, recovery, drift, cost)}
ALONE = (cost.TABLE,)
"""Timed, so nothing else runs beside them."""


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
    console.print("ingesting MovieLens, if it is not yet")
    movielens(str(MOVIELENS))
    log = mlflow_log(WORK / "mlflow", "experiments-quick" if quick else "experiments")
    parts: list[dict[str, Any]] = []
    together = [name for name in names if name not in ALONE]
    for group, processes in ((together, workers), *(([name], 1) for name in names if name in ALONE)):
        parts += _measure(group, quick, processes, console, log)
    minutes = (time.monotonic() - started) / 60
    results = merge(parts, {"quick": quick, "minutes": round(minutes, 1), "tables": names})
    write(results, folder)
    report.write(results, folder)
    console.print(f"{minutes:.0f} min; {folder / 'REPORT.md'}", soft_wrap=True)


def _measure(
    names: list[str], quick: bool, workers: int, console: Console, log: Callable[[Unit, Output], None]
) -> list[dict[str, Any]]:
    """The results' parts of some tables, their units side by side."""
    outputs: dict[str, dict[str, Output]] = {name: {} for name in names}
    runs: Mapping[str, Run] = {name: TABLES[name].run for name in names}
    for name in names:
        store = Store(WORK / "units", revision("cases", "methods", "oracle", "worlds", f"tables/{name}"))
        found = follow(TABLES[name].units(quick), runs, store, workers, console, log)
        outputs[name] = {unit.key: output for unit, output in found.items()}
    return [TABLES[name].assemble(outputs[name]) for name in names]


def mlflow_log(folder: Path, experiment: str) -> Callable[[Unit, Output], None]:
    """What logs a unit as a run of the MLflow database in `folder`: its parameters, and every number among its values."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(
        RegistryConfig(
            tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=str(folder / "artifacts"), experiment=experiment
        )
    )

    def log(unit: Unit, output: Output) -> None:
        run = registry.start_run(f"{unit.table}/{unit.key}", unit.params, {"table": unit.table})
        numbers = {name: value for name, value in output.values.items() if isinstance(value, (int, float))}
        registry.log_metrics(run, numbers)
        registry.end_run(run)

    return log


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(experiments)
    app()
