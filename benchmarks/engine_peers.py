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
from benchmarks.work import MODELS, Gradients, Work, limaml_batch, limaml_gradients, limaml_network, make_work
from limaml.allocator import keep_freed_memory
from limaml.meta import fused
from limaml.meta.engine import outer_loss, portable

Prepare = Callable[[Work, int], Callable[[], Gradients]]

THREADS = 2
NOT_RUN = 3
GRACE_S = 40.0
"""Cells that have not begun this long after the budget are left out."""
MAX_ERROR = 1e-4
"""||g - ours|| / ||ours|| per tensor, float32. Correct engines differ by 1e-6 here; a wrong term by 1e-2 and more."""


@dataclass(frozen=True)
class Grid:
    """What is measured."""

    tasks: tuple[int, ...] = (32, 256)
    steps: tuple[int, ...] = (1, 3, 5)


QUICK = Grid(tasks=(8,), steps=(1,))


def main() -> int:
    args = _arguments()
    _limit_threads()
    keep_freed_memory()  # for the peer as for ours
    try:
        part = measure(args.peer, QUICK if args.quick else Grid(), args.device, args.budget_s, args.known_gflops)
    except NotRunError as error:
        part = {"not_run": {args.peer: str(error)}}
    args.out.write_text(json.dumps(part))
    return NOT_RUN if "not_run" in part else 0


class NotRunError(Exception):
    """The peer cannot run here; the message says why."""


def measure(peer: str, grid: Grid, device: str, budget_s: float, known_gflops: float = 0.0) -> dict[str, Any]:
    """The peer's part: speeds of both engines, their ratio, the largest error, the GEMM peak.

    `known_gflops` is what this machine reached before: without it a machine that is busy throughout looks free.
    """
    prepare = _load(peer, device)
    gemm = GemmPeak(device, known_gflops)
    gemm.measure()
    part: dict[str, Any] = {"versions": {peer: version(PEERS[peer].distribution)}, "busy": [], "skipped": []}
    works = {(model, tasks): make_work(model, tasks).to(device) for model in MODELS for tasks in grid.tasks}
    cells = [(model, tasks, steps) for model, tasks in works for steps in grid.steps]
    deadline, worst = time.monotonic() + budget_s, 0.0
    for done, (model, tasks, steps) in enumerate(cells):
        name = f"{peer}.{model}.{tasks}.{steps}"
        # A slow peer on a busy machine: what it has no time for is named, never estimated.
        if time.monotonic() > deadline + GRACE_S:
            part["skipped"].append(name)
            continue
        work = works[model, tasks]
        ours, peers = Ours(work, steps), prepare(work, steps)
        where = f"{peer}, {model}, {tasks} tasks, {steps} steps"
        with portable():
            worst = max(worst, check_gradients(ours(), peers(), f"portable, {where}"))
        worst = max(worst, check_gradients(ours(), peers(), where))
        # What fast cells leave goes to the ones behind them; a slow peer's three rounds may take longer than their share.
        share_s = max(deadline - time.monotonic(), 0.0) / (len(cells) - done)
        # The compiled kernel does one of the models; what the portable form reaches is measured for both.
        forms = {"limaml_portable": ("ratio_to_portable", ours.timed_portable)} if ours.compiled else {}
        # Last, so that the peer's speed that is kept is the one its ratio was taken with.
        forms["limaml"] = ("ratio_to", ours.timed)
        for engine, (ratio, timed) in forms.items():
            pair = best_of_interleaved(timed, _timed(peers, device), gemm.probe, budget_s=share_s / 2 / len(forms))
            _put(part, ["tasks_per_s", model, engine, tasks, steps], tasks / pair.ours_s)
            _put(part, ["tasks_per_s", model, peer, tasks, steps], tasks / pair.peer_s)
            _put(part, [ratio, model, peer, tasks, steps], pair.peer_s / pair.ours_s)
            if pair.busy:
                part["busy"].append(f"{engine}.{name}")
    gemm.measure()
    return part | {"max_gradient_error": {peer: worst}, "gemm_peak_gflops": gemm.best_gflops}


class Ours:
    """limaml's engine on one work: a call gives the gradients, `timed` the seconds of one outer loss with its backward pass."""

    def __init__(self, work: Work, steps: int) -> None:
        self._network, self._batch, self._steps = limaml_network(work), limaml_batch(work), steps
        self._synchronize = _synchronize(str(work.items_IK.device))

    def __call__(self) -> Gradients:
        self.timed()
        return limaml_gradients(self._network)

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernel does this work."""
        return fused.reason(self._network, (self._batch.support, self._batch.query), dropout=False) is None

    def timed_portable(self) -> float:
        with portable():
            return self.timed()

    def timed(self) -> float:
        self._network.zero_grad(set_to_none=True)
        self._synchronize()
        start = time.perf_counter()
        outer_loss(self._network, self._batch, num_steps=self._steps).loss.backward()
        self._synchronize()
        return time.perf_counter() - start


def _load(peer: str, device: str) -> Prepare:
    if device != "cpu" and not PEERS[peer].on_gpu:
        raise NotRunError(f"the pinned {PEERS[peer].distribution} is a CPU build")
    try:
        prepare: Prepare = importlib.import_module(PEERS[peer].module).prepare
    except ImportError as error:
        raise NotRunError(f"{type(error).__name__}: {error}") from error
    return prepare


def _timed(call: Callable[[], Any], device: str) -> Callable[[], float]:
    synchronize = _synchronize(device)

    def timed() -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start

    return timed


def _synchronize(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def check_gradients(ours: Gradients, theirs: Gradients, where: str) -> float:
    """Largest relative error; raises BenchmarkError where a gradient is missing or differs."""
    worst = 0.0
    if set(ours) != set(theirs):
        raise BenchmarkError(
            f"{where}: the gradients must be of {sorted(ours)}, got {sorted(theirs)}; correct the peer's prepare"
        )
    for name in ours:
        a, b = (np.asarray(x.cpu() if hasattr(x, "cpu") else x, dtype=np.float64) for x in (ours[name], theirs[name]))
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
    """Every library gets the same two cores; XLA sizes its pool by them when JAX starts, which is later."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(THREADS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--budget-s", type=float, default=50.0)
    parser.add_argument("--known-gflops", type=float, default=0.0)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
