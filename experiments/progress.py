"""Run jobs while somebody watches: a bar on a terminal, a line a job in a log."""

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import track

from experiments.cached_jobs import Job, JobCache, JobOutput, Run, run_jobs


def follow(
    jobs: Sequence[Job], run: Mapping[str, Run], cache: JobCache, workers: int, console: Console
) -> dict[Job, JobOutput]:
    """All outputs: those that are kept, and the others computed."""
    outputs = {job: output for job in jobs if (output := cache.read(job)) is not None}
    started, shown = time.monotonic(), console.is_terminal
    ready = run_jobs([job for job in jobs if job not in outputs], run, cache, workers)
    for job, output in track(ready, "jobs", len(jobs), len(outputs), console=console, disable=not shown):
        outputs[job] = output
        if not shown:
            done = f"{time.monotonic() - started:5.0f} s  {len(outputs)}/{len(jobs)}  {job.table}/{job.key}"
            console.print(f"{done}  {output.values['seconds']:.1f} s", soft_wrap=True)
    return outputs
