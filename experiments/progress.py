"""Run units while somebody watches: a bar on a terminal, a line a unit in a log; and each one as a run in MLflow."""

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.units import Output, Run, Store, Unit, run_units

Finished = Callable[[Unit, Output], None]


def follow(
    units: Sequence[Unit],
    run: Mapping[str, Run],
    store: Store,
    workers: int,
    console: Console,
    finished: Finished = lambda _unit, _output: None,
) -> dict[Unit, Output]:
    """All outputs; `finished` is called for each unit that was computed now, as soon as it is kept."""
    outputs, started = {}, time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("units", total=len(units))
        for unit, output, is_new in run_units(units, run, store, workers):
            outputs[unit] = output
            progress.update(task, advance=1, description=f"{unit.table}/{unit.key}")
            if is_new:
                finished(unit, output)
                if not console.is_terminal:
                    console.print(
                        f"{time.monotonic() - started:5.0f} s  {len(outputs)}/{len(units)}  {unit.table}/{unit.key}  "
                        f"{output.values['seconds']:.1f} s",
                        soft_wrap=True,
                    )
    return outputs
