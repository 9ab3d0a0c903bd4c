"""One peer beside ours, in one process of the peers' environment: first equal gradients, then time, in turns.

    PYTHONPATH=. benchmarks/.venv/bin/python -m benchmarks.engine_peers jax --out /tmp/jax.json

Writes the peer's part of the results (benchmarks/results.py joins them). A gradient that differs is an error, not a note. Exit
codes: 0, 1 for an error, NOT_RUN where the peer cannot run here, with the reason in the part.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gemm import GemmPeak
from benchmarks.options import BenchmarkError
from benchmarks.peers import PEERS
from benchmarks.timing import best_of_interleaved
from benchmarks.work import ROWS, Gradients, limaml_gradients, make_work
from limaml.allocator import keep_freed_memory

NOT_RUN = 3
GRACE_S = 40.0
"""Cells that have not begun this long after the budget are left out."""
MAX_ERROR = 1e-6
"""||g - ours|| / ||ours|| per tensor, float64, so that no task's ReLU is decided by rounding. Correct engines differ by 1e-9 at
most (fixed rates are stored in float32 as logarithms); a wrong term by 1e-2 and more."""
_COMPARED_TASKS = 32


@dataclass(frozen=True)
class Grid:
    """What is measured."""

    tasks: tuple[int, ...] = (256,)
    steps: tuple[int, ...] = (1, 3)


QUICK = Grid(tasks=(8,), steps=(1,))


def main() -> int:
    args = _arguments()
    _limit_threads()
    keep_freed_memory()  # for the peer as for ours
    try:
        part = measure(args.peer, QUICK if args.quick else Grid(), args.budget_s, args.known_gflops)
    except NotRunError as error:
        part = {"not_run": {args.peer: str(error)}}
    args.out.write_text(json.dumps(part))
    return NOT_RUN if "not_run" in part else 0


class NotRunError(Exception):
    """The peer cannot run here; the message says why."""


def measure(peer: str, grid: Grid, budget_s: float, known_gflops: float = 0.0) -> dict[str, Any]:
    """The peer's part: speeds of both engines, their ratio, the largest error, the GEMM peak.

    `known_gflops` is what this machine reached before: without it a machine that is busy throughout looks free.
    """
    try:
        prepare = importlib.import_module(PEERS[peer].module).prepare
    except ImportError as error:
        raise NotRunError(f"{type(error).__name__}: {error}") from error
    gemm = GemmPeak(known_gflops)
    gemm.measure()
    part: dict[str, Any] = {"versions": {peer: version(PEERS[peer].distribution)}, "busy": [], "skipped": []}
    cells = [(row, tasks, steps) for row in ROWS for tasks in grid.tasks for steps in grid.steps]
    deadline, worst = time.monotonic() + budget_s, 0.0
    for done, (row, tasks, steps) in enumerate(cells):
        name = f"{peer}.{row}.{tasks}.{steps}"
        # A slow peer on a busy machine: what it has no time for is named, never estimated.
        if time.monotonic() > deadline + GRACE_S:
            part["skipped"].append(name)
            continue
        exact, work = make_work(row, min(tasks, _COMPARED_TASKS), torch.float64), make_work(row, tasks)
        compared, _ = prepare(exact, steps)
        worst = max(worst, check_gradients(limaml_gradients(exact, steps), compared(), name))
        _, peers = prepare(work, steps)
        peers()  # compiles
        generator = torch.Generator()
        # What fast cells leave goes to the ones behind them; a slow peer's three rounds may take longer than their share.
        share_s = max(deadline - time.monotonic(), 0.0) / (len(cells) - done)
        ours = _timed(lambda work=work, steps=steps, generator=generator: limaml_gradients(work, steps, generator))
        pair = best_of_interleaved(ours, _timed(peers), gemm.probe, budget_s=share_s / 2)
        _put(part, ["tasks_per_s", row, "limaml", tasks, steps], tasks / pair.ours_s)
        _put(part, ["tasks_per_s", row, peer, tasks, steps], tasks / pair.peer_s)
        _put(part, ["ratio_to", row, peer, tasks, steps], pair.peer_s / pair.ours_s)
        if pair.busy:
            part["busy"].append(name)
    gemm.measure()
    return part | {"max_gradient_error": {peer: worst}, "gemm_peak_gflops": gemm.best_gflops}


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def check_gradients(ours: Gradients, theirs: Gradients, where: str) -> float:
    """Largest relative error; raises BenchmarkError where a gradient is missing or differs. None: the loss does not depend."""
    worst = 0.0
    if set(ours) != set(theirs):
        raise BenchmarkError(
            f"{where}: the gradients must be of {sorted(ours)}, got {sorted(theirs)}; correct the peer's prepare"
        )
    for name, ours_ in ours.items():
        b = np.asarray(theirs[name], dtype=np.float64)
        a = np.zeros_like(b) if ours_ is None else np.asarray(ours_, dtype=np.float64)
        error = float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-12))
        # Written so that NaN is an error too.
        if not error <= MAX_ERROR:
            raise BenchmarkError(
                f"{where}: gradient of {name} must equal ours to {MAX_ERROR:g}, got {error:g}; one of the two is wrong"
            )
        worst = max(worst, error)
    return worst


def _put(part: dict[str, Any], path: list[Any], value: float) -> None:
    *levels, last = map(str, path)
    for level in levels:
        part = part.setdefault(level, {})
    part[last] = value


def _limit_threads() -> None:
    """Every library gets one core, as a training worker has; XLA sizes its pool by it when JAX starts, which is later."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=50.0)
    parser.add_argument("--known-gflops", type=float, default=0.0)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
