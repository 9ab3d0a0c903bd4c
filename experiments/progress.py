"""Run jobs while somebody watches: a bar on a terminal, a line a job in a log; and each one as a run in MLflow."""

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.cached_jobs import Job, JobCache, JobOutput, Run, run_jobs

Finished = Callable[[Job, JobOutput], None]


def follow(
    jobs: Sequence[Job],
    run: Mapping[str, Run],
    cache: JobCache,
    workers: int,
    console: Console,
    finished: Finished = lambda _job, _output: None,
) -> dict[Job, JobOutput]:
    """All outputs; `finished` is called for each job that was computed now, as soon as it is kept."""
    outputs, started = {}, time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("jobs", total=len(jobs))
        for job, output, is_new in run_jobs(jobs, run, cache, workers):
            outputs[job] = output
            progress.update(task, advance=1, description=f"{job.table}/{job.key}")
            if is_new:
                finished(job, output)
                if not console.is_terminal:
                    console.print(
                        f"{time.monotonic() - started:5.0f} s  {len(outputs)}/{len(jobs)}  {job.table}/{job.key}  "
                        f"{output.values['seconds']:.1f} s",
                        soft_wrap=True,
                    )
    return outputs
