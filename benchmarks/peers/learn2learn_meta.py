"""learn2learn: `MetaSGD`, a module with a rate for each parameter, around what is adapted, one clone a task.

What does not depend on it is computed once for the whole batch, as somebody who wants speed would: the rows' pass through the
global block, and the query rows' loss after all tasks' embeddings are known.

The class is the installed package's, unchanged; only its package's __init__, which imports every corner of the library, is not
run: its vision part needs torchvision, whose wheels on PyPI are for CUDA and do not load beside a CPU build of torch, and its
reinforcement learning needs gym.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.formula import Formula, rows_of
from benchmarks.peers.torch_func import TORCH
from benchmarks.work import Gradients, Work


def _package(name: str) -> None:
    """Make `name` importable as a plain folder of modules, without running its __init__."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{name} is not installed; why it did not build stands in benchmarks/.venv/learn2learn.log")
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


def _algorithm(module: str, name: str) -> Any:
    _package("learn2learn")
    _package("learn2learn.algorithms")
    return getattr(importlib.import_module(f"learn2learn.algorithms.{module}"), name)


MetaSGD = _algorithm("meta_sgd", "MetaSGD")
clone_module = importlib.import_module("learn2learn.utils").clone_module
# Its update looks at `.grad` of tensors that are no leaves.
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


class _Adapted(nn.Module):
    """The adapted weights, and the task's support loss and embedding by them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(weights)
        for number, weight in enumerate(weights.values()):
            self.register_parameter(f"weight{number}", nn.Parameter(weight.clone()))

    def forward(self, of_task: Callable[..., Tensor], weights: dict[str, Tensor], *rest: Any) -> Tensor:
        phi = {name: getattr(self, f"weight{number}") for number, name in enumerate(self.names)}
        return of_task(weights | phi, *rest)


def prepare(work: Work, steps: int) -> tuple[Callable[[], Gradients], Callable[[], Gradients]]:
    formula, (support, query) = Formula(TORCH, work), rows_of(work)
    trained, frozen = work.weights
    module = _Adapted({name: trained.pop(name) for name in formula.adapted})
    leaves = {name: weight.clone().requires_grad_() for name, weight in trained.items()}
    every = leaves | dict(zip(formula.adapted, module.parameters(), strict=True))
    tasks = [dict(zip(support, values, strict=True)) for values in zip(*(v.unbind() for v in support.values()), strict=True)]

    def run(draw: Callable[[], Sequence[Tensor]]) -> Gradients:
        weights = leaves | frozen
        batched = torch.func.vmap(partial(formula.read, weights))(support)
        states = [dict(zip(batched, v, strict=True)) for v in zip(*(v.unbind() for v in batched.values()), strict=True)]
        embeddings = []
        for rows, state in zip(tasks, states, strict=True):
            sizes = formula.sizes(weights, rows)
            learner = MetaSGD(clone_module(module), lrs=[sizes[name] for name in formula.adapted])
            for _ in range(steps):
                learner.adapt(learner(formula.support_loss, weights, rows, state))
            embeddings.append(learner(formula.embed, weights, rows, state))
        loss = formula.query_loss(weights, query, torch.stack(embeddings), draw()).mean()
        return dict(zip(every, torch.autograd.grad(loss, list(every.values()), materialize_grads=True), strict=True))

    return partial(run, lambda: work.keep), partial(run, work.draw)
