"""Rows a second when tasks' lengths have a long tail, against the same rows in tasks of one length.

256 tasks of the reference model, n support and n query rows each, n from 1 to 200 with probability proportional to 1 / n: Zipf;
worked through in the runs of like length that training uses (limaml.tasks.sampling.length_groups, which is timed too). The
tasks of one length have the same number of rows in all, to a rounding; padded to the longest, the tail's tasks are one batch.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.options import Options
from benchmarks.results import Results
from benchmarks.work import limaml_batch, limaml_network, make_work
from limaml.meta.engine import outer_loss
from limaml.models.network import LiMAML
from limaml.tasks.rows import Rows, TaskBatch
from limaml.tasks.sampling import TaskSpec, length_groups

TASKS = 256
LONGEST = 200
_ROUNDS, _QUICK_ROUNDS = 12, 2


def measure(options: Options) -> Results:
    """`long_tail_ratio`, and the rows a second behind it."""
    tail = zipf_lengths(TASKS, seed=0)
    equal = [round(sum(tail) / TASKS)] * TASKS
    network = limaml_network(make_work("reference", 1))
    calls = {
        "equal": _grouped(network, equal),
        "tail": _grouped(network, tail),
        "tail_padded": _padded(network, tail),
    }
    rows = {"equal": 2 * sum(equal), "tail": 2 * sum(tail), "tail_padded": 2 * sum(tail)}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(_QUICK_ROUNDS if options.quick else _ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(call))
    per_s = {name: rows[name] / best[name] for name in calls}
    shares = {
        "long_tail_ratio": per_s["tail"] / per_s["equal"],
        "long_tail_ratio_padded": per_s["tail_padded"] / per_s["equal"],
    }
    groups = len(length_groups(_specs(tail)))
    return shares | {"long_tail": {"rows_per_s": per_s, "rows": rows["tail"], "groups": groups, "steps": 1}}


def zipf_lengths(num_tasks: int, seed: int) -> list[int]:
    weight = 1.0 / np.arange(1, LONGEST + 1)
    drawn = np.random.default_rng(seed).choice(np.arange(1, LONGEST + 1), num_tasks, p=weight / weight.sum())
    return [int(n) for n in drawn]


def _grouped(network: LiMAML, lengths: Sequence[int]) -> Callable[[], None]:
    specs = _specs(lengths)
    batches = [random_batch([spec.support_size for spec in group]) for group in length_groups(specs)]

    def run() -> None:
        length_groups(specs)
        for batch in batches:
            outer_loss(network, batch, num_steps=1, num_tasks=len(lengths)).loss.backward()

    return run


def _padded(network: LiMAML, lengths: Sequence[int]) -> Callable[[], None]:
    batch = random_batch(lengths)
    return lambda: outer_loss(network, batch, num_steps=1).loss.backward()


def _specs(lengths: Sequence[int]) -> list[TaskSpec]:
    return [TaskSpec(task, 0, 0, n, query=np.arange(n)) for task, n in enumerate(lengths)]


def random_batch(lengths: Sequence[int]) -> TaskBatch:
    """Random rows, as wide as the longest; the mask says which are real."""
    width = max(lengths)
    like = limaml_batch(make_work("reference", 1))
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).float()

    def rows(one: Rows) -> Rows:
        features = [torch.randn(*mask.shape, getattr(one, name).shape[-1]) for name in _FEATURES]
        label = (torch.rand(mask.shape) < 0.5).float() * mask
        index = torch.ones(mask.shape, dtype=torch.int64)
        return Rows(index, *features, mask_TR=mask, gap_s_TR=torch.zeros_like(mask), label_TR=label)

    entities = tuple(map(str, range(len(lengths))))
    return TaskBatch(rows(like.support), rows(like.query), torch.zeros(len(lengths), dtype=torch.int64), entities)


_FEATURES = ("item_dense_TRF", "user_dense_TRF", "context_TRF")


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
