"""TorchOpt: differentiable SGD, functional, around the meta block."""

from collections.abc import Callable

import torch
import torchopt

from benchmarks.peers.modules import make_problem
from benchmarks.work import Gradients, Work


def prepare(work: Work, steps: int) -> Callable[[], Gradients]:
    problem = make_problem(work)
    names = [name for name, _ in problem.meta.named_parameters()]

    def run() -> Gradients:
        problem.zero()
        problem.begin()
        embeddings = []
        for task, x_SF in enumerate(problem.support):
            optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=work.inner_lr))
            phi = tuple(problem.meta.parameters())
            for _ in range(steps):
                embedding_D = torch.func.functional_call(problem.meta, dict(zip(names, phi, strict=True)), (x_SF,))
                phi = optimizer.step(problem.support_loss(task, embedding_D), phi)
            embeddings.append(torch.func.functional_call(problem.meta, dict(zip(names, phi, strict=True)), (x_SF,)))
        problem.outer_loss(embeddings).backward()
        return problem.gradients()

    return run
