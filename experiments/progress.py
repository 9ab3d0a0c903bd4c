"""Run jobs while somebody watches: a bar on a terminal, a line a job in a log."""

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.cached_jobs import Job, JobCache, JobOutput, Run, run_jobs


def follow(
    jobs: Sequence[Job], run: Mapping[str, Run], cache: JobCache, workers: int, console: Console
) -> dict[Job, JobOutput]:
    """All outputs."""
    outputs, started = {}, time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("jobs", total=len(jobs))
        for job, output, is_new in run_jobs(jobs, run, cache, workers):
            outputs[job] = output
            progress.update(task, advance=1, description=f"{job.table}/{job.key}")
            if is_new and not console.is_terminal:
                done = f"{time.monotonic() - started:5.0f} s  {len(outputs)}/{len(jobs)}  {job.table}/{job.key}"
                console.print(f"{done}  {output.values['seconds']:.1f} s", soft_wrap=True)
    return outputs
