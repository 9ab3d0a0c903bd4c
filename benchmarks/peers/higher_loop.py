"""higher: `innerloop_ctx` around the meta block, one a task."""

from collections.abc import Callable

import higher
import torch

from benchmarks.peers.modules import make_problem
from benchmarks.work import Gradients, Work


def prepare(work: Work, steps: int) -> Callable[[], Gradients]:
    problem = make_problem(work)
    optimizer = torch.optim.SGD(problem.meta.parameters(), lr=work.inner_lr)

    def run() -> Gradients:
        problem.zero()
        problem.begin()
        embeddings = []
        for task, x_SF in enumerate(problem.support):
            with higher.innerloop_ctx(problem.meta, optimizer, copy_initial_weights=False) as (meta, inner):
                for _ in range(steps):
                    inner.step(problem.support_loss(task, meta(x_SF)))
                embeddings.append(meta(x_SF))
        problem.outer_loss(embeddings).backward()
        return problem.gradients()

    return run
