"""Jobs: what one process computes alone, kept on disk, so that an interrupted run goes on where it was.

A job's output is a folder: `values.json` (JSON values) and `arrays.npz` (numbers only, no pickles), written to a temporary
name and renamed. The folder's name is the job's own digest: other parameters, other code or other data make another job.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limaml import telemetry
from limaml.io import atomic

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of a table: `run` of the module that made it gets it back in a worker process."""

    table: str
    key: str
    """Unique within its table, e.g. `stored/origin0/seed1`."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""


@dataclass(frozen=True)
class JobOutput:
    values: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    arrays: Arrays = field(default_factory=dict)


Run = Callable[[Job], JobOutput]


class JobCache:
    """Outputs on disk below one folder; `mark` is a digest of what all jobs depend on (code, settings)."""

    def __init__(self, root: Path, mark: str) -> None:
        self._root, self._mark = root, mark

    def folder(self, job: Job) -> Path:
        text = json.dumps([self._mark, job.table, job.key, job.params], sort_keys=True)
        return self._root / job.table / f"{job.key.replace('/', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def read(self, job: Job) -> JobOutput | None:
        """What an earlier run left, None if it left nothing."""
        folder = self.folder(job)
        if not folder.is_dir():
            return None
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            return JobOutput(json.loads((folder / "values.json").read_text()), {name: arrays[name] for name in arrays.files})

    def write(self, job: Job, output: JobOutput) -> None:
        with atomic.replacing_folder(self.folder(job)) as temporary:
            (temporary / "values.json").write_text(json.dumps(output.values, sort_keys=True))
            np.savez_compressed(temporary / "arrays.npz", allow_pickle=False, **output.arrays)


def run_jobs(jobs: Sequence[Job], run: Mapping[str, Run], cache: JobCache, workers: int) -> Iterator[tuple[Job, JobOutput]]:
    """Yield every job with its output as soon as it is computed and kept.

    `run` maps a table's name to a function at the top level of a module. Each worker is a fresh process with one thread for its
    arithmetic: the networks are small, and two threads on two busy cores only wait for each other. The first failure ends the
    run with the job's name; finished jobs stay.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
    try:
        futures: dict[Future[JobOutput], Job] = {pool.submit(_timed, run[job.table], job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                output = future.result()
            except Exception as error:
                error.add_note(f"job {job.table}/{job.key} with {dict(job.params)}")
                raise
            cache.write(job, output)
            yield job, output
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _timed(run: Run, job: Job) -> JobOutput:
    started = time.perf_counter()
    output = run(job)
    return JobOutput({**output.values, "seconds": time.perf_counter() - started}, output.arrays)


def _begin() -> None:
    """A worker has one thread, and says only what is wrong: hundreds of fits would bury the progress."""
    import torch

    torch.set_num_threads(1)
    telemetry.configure(json_lines=False, level=logging.WARNING)
