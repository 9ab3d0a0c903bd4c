"""Rows a second when tasks' lengths have a long tail, against the same rows in tasks of one length.

256 tasks of the task vector that ships, n support and n query rows each, n from 1 to 200 with probability proportional to
1 / n: Zipf; worked through in the runs of like length that training uses (limaml.tasks.sampling.length_groups, which is timed
too). The tasks of one length have the same number of rows in all, to a rounding; padded to the longest, the tail's tasks are
one batch.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.options import Options
from benchmarks.results import Results
from benchmarks.work import TaskBatch, make_work
from limaml.allocator import keep_freed_memory
from limaml.meta.engine import outer_loss
from limaml.models.network import Network
from limaml.tasks.sampling import TaskSpec, length_groups

TASKS = 256
LONGEST = 200
_ROUNDS, _QUICK_ROUNDS = 12, 1


def measure(options: Options) -> Results:
    """`long_tail_ratio`, and the rows a second behind it."""
    options.say("long-tailed tasks")
    torch.set_num_threads(1)
    keep_freed_memory()
    tail = zipf_lengths(TASKS, seed=0)
    equal = [round(sum(tail) / TASKS)] * TASKS
    network = make_work("task_vector", 1).network
    calls = {"equal": _grouped(network, equal), "tail": _grouped(network, tail), "tail_padded": _run(network, [_batch(tail)])}
    rows = {"equal": 2 * sum(equal), "tail": 2 * sum(tail), "tail_padded": 2 * sum(tail)}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(_QUICK_ROUNDS if options.quick else _ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    per_s = {name: rows[name] / best[name] for name in calls}
    groups = len(length_groups(_specs(tail)))
    return {
        "long_tail_ratio": per_s["tail"] / per_s["equal"],
        "long_tail_ratio_padded": per_s["tail_padded"] / per_s["equal"],
        "long_tail": {"rows_per_s": per_s, "rows": rows["tail"], "groups": groups},
    }


def zipf_lengths(num_tasks: int, seed: int) -> list[int]:
    weight = 1.0 / np.arange(1, LONGEST + 1)
    drawn = np.random.default_rng(seed).choice(np.arange(1, LONGEST + 1), num_tasks, p=weight / weight.sum())
    return [int(n) for n in drawn]


def _grouped(network: Network, lengths: Sequence[int]) -> Callable[[], None]:
    specs = _specs(lengths)
    run = _run(network, [_batch([spec.support_size for spec in group]) for group in length_groups(specs)])

    def grouped() -> None:
        length_groups(specs)
        run()

    return grouped


def _run(network: Network, batches: Sequence[TaskBatch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            outer_loss(network, batch, num_tasks=TASKS).loss.backward()

    return run


def _specs(lengths: Sequence[int]) -> list[TaskSpec]:
    return [TaskSpec(task, 0, 0, n, query=np.arange(n)) for task, n in enumerate(lengths)]


def _batch(lengths: Sequence[int]) -> TaskBatch:
    return make_work("task_vector", len(lengths), lengths=torch.tensor(lengths)).batch
