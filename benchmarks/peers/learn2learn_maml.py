"""learn2learn: `MAML` around the meta block, one clone a task.

The class is the installed package's, unchanged; only its package's __init__, which imports every corner of the library, is
not run: its vision part needs torchvision, whose wheels on PyPI are for CUDA and do not load beside a CPU build of torch, and
its reinforcement learning needs gym.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from benchmarks.peers.modules import make_problem
from benchmarks.work import Gradients, Work


def _package(name: str) -> None:
    """Make `name` importable as a plain folder of modules, without running its __init__."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{name} is not installed; why it did not build stands in benchmarks/.venv/learn2learn.log")
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


def _maml() -> Any:
    _package("learn2learn")
    _package("learn2learn.algorithms")
    return importlib.import_module("learn2learn.algorithms.maml").MAML


MAML = _maml()


def prepare(work: Work, steps: int) -> Callable[[], Gradients]:
    problem = make_problem(work)
    maml = MAML(problem.meta, lr=work.inner_lr)

    def run() -> Gradients:
        problem.zero()
        problem.begin()
        embeddings = []
        for task, x_SF in enumerate(problem.support):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(problem.support_loss(task, learner(x_SF)))
            embeddings.append(learner(x_SF))
        problem.outer_loss(embeddings).backward()
        return problem.gradients()

    return run
