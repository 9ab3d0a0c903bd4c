"""torch.func: vmap over tasks of one task's loss, whose inner steps are its `grad`, and one backward pass."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from benchmarks.formula import Formula, Library, rows_of
from benchmarks.work import Gradients, Work

TORCH = Library(
    concatenate=torch.concatenate,
    exp=torch.exp,
    log1p=torch.log1p,
    relu=F.relu,
    silu=F.silu,
    softmax=torch.softmax,
    softplus=F.softplus,
    take=lambda table, index: F.embedding(index, table),
    where=torch.where,
    arange=lambda count, like: torch.arange(count, device=like.device),
    grad=torch.func.grad,
)


def prepare(work: Work, steps: int) -> tuple[Callable[[], Gradients], Callable[[], Gradients]]:
    formula, (support, query) = Formula(TORCH, work), rows_of(work)
    trained, frozen = work.weights
    leaves = {name: weight.clone().requires_grad_() for name, weight in trained.items()}

    def run(draw: Callable[[], Sequence[Tensor]]) -> Gradients:
        loss = vmap(partial(formula.task_loss, leaves | frozen, steps))(support, query, draw()).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))

    return partial(run, lambda: work.keep), partial(run, work.draw)
