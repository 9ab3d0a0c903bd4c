"""One outer step: this worker's share of the meta-batch, one all-reduce over all gradients, clip, optimizer.

Every worker draws the same meta-batch and, in order of length, takes every `size`-th task of it: as many tasks as the others,
and about as many rows. Its loss is its sum over tasks divided by the tasks of all workers, so the all-reduced sum is the mean
over tasks however many workers there are, and however a worker's tasks are divided into runs of like length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from limaml.config import Config, TrainingConfig
from limaml.errors import TrainingError
from limaml.meta.losses import OuterLoss
from limaml.tasks.sampling import TaskRows, build_batch, by_length, length_groups, meta_batch
from limaml.training.optimizer import set_learning_rate

_NAMED_TASKS = 20

Model = TypeVar("Model", bound=nn.Module)
Named = tuple[Sequence[str], Any]
"""Entities of a batch's tasks, so that one whose loss is not finite can be named, and the batch as the loss reads it."""


class BatchLoss(NamedTuple):
    """What the outer loop reads of an `OuterLoss`, where there is no embedding."""

    loss: Tensor
    per_task_T: Tensor


@dataclass(frozen=True)
class OuterObjective:
    """What the outer loop minimises."""

    batches: Callable[[int], Iterable[Named]]
    """This worker's tasks of a step, by its number, in batches whose gradients are summed."""
    loss: Callable[..., OuterLoss | BatchLoss]
    """(model, batch, *, generator, num_tasks), as `limaml.meta.engine.outer_loss`."""
    generator: torch.Generator | None = None
    """Draws dropout for the whole run; by default each step has its own, so that a resumed run draws the same."""
    penalty: Callable[[nn.Module], Tensor] | None = None
    """Of the weights, added to the loss of a step."""


@dataclass(frozen=True)
class Workers:
    """This process among those that train together; without a process group it is alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Workers":
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, names: list[str]) -> list[str]:
        """All workers' names, in the order of their ranks."""
        if self.size == 1:
            return names
        gathered: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, names)
        return [name for part in gathered for name in part]


def meta_batches(rows: TaskRows, cfg: Config, workers: Workers, weight: Tensor) -> Callable[[int], Iterator[Named]]:
    """This worker's share of each step's meta-batch, in runs of like length, on the device and of the type of `weight`."""

    def batches(step: int) -> Iterator[Named]:
        specs = by_length(meta_batch(rows, cfg, seed=cfg.training.seed, step=step))[workers.rank :: workers.size]
        for group in length_groups(specs):
            batch = build_batch(rows, group).to(weight.device, weight.dtype)
            yield batch.entities, batch

    return batches


def outer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: OuterObjective,
    cfg: TrainingConfig,
    step: int,
    workers: Workers,
) -> float:
    """Update the model with the tasks of step number `step` and return their loss, the same on every worker.

    Raises TrainingError on every worker, before any weight is changed, if the loss or its gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, loss = backward(model, objective, cfg, step, workers)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise _not_finite(losses, float(loss), float(norm), step, workers)
    set_learning_rate(optimizer, cfg, step, cfg.max_steps)
    optimizer.step()
    return float(loss)


def backward(
    model: nn.Module, objective: OuterObjective, cfg: TrainingConfig, step: int, workers: Workers
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Leave the whole step's gradient in `model`; returns this worker's tasks with their losses, and the whole loss."""
    weight = next(model.parameters())
    generator = objective.generator or dropout_generator(cfg.seed, step, workers.rank, weight.device)
    losses: list[tuple[str, Tensor]] = []
    total = torch.zeros((), dtype=weight.dtype, device=weight.device)
    for entities, batch in objective.batches(step):
        found = objective.loss(model, batch, generator=generator, num_tasks=cfg.tasks_per_step)
        torch.autograd.backward(found.loss)
        total += found.loss.detach()
        losses += zip(entities, found.per_task_T, strict=True)
    if objective.penalty is not None and workers.rank == 0:
        # Losses and gradients are summed over workers.
        penalty = objective.penalty(model)
        torch.autograd.backward(penalty)
        total += penalty.detach()
    return losses, reduce_gradients(model, total, workers)


def reduce_gradients(model: nn.Module, loss: Tensor, workers: Workers) -> Tensor:
    """Sum gradients and loss over workers in one flat all-reduce, in place; returns the summed loss.

    A parameter that got no gradient takes part with zeros, so that all workers reduce (and decay) the same parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if workers.size == 1:
        return loss
    flat = workers.sum(torch.cat([p.grad.flatten() for p in trained if p.grad is not None] + [loss.reshape(1)]))
    start = 0
    for p in trained:
        p.grad = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return flat[-1]


def dropout_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """A function of its arguments alone, so that a resumed run draws what an uninterrupted one would have drawn."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


def _not_finite(losses: list[tuple[str, Tensor]], loss: float, norm: float, step: int, workers: Workers) -> TrainingError:
    mine = [entity for entity, value in losses if not torch.isfinite(value)]
    names = workers.gather(mine)
    if names:
        whose = f"tasks {', '.join(names[:_NAMED_TASKS])}" + (
            f" and {len(names) - _NAMED_TASKS} more" if names[_NAMED_TASKS:] else ""
        )
    else:
        whose = "every task's loss is finite, the gradient is not"
    return TrainingError(
        f"outer loss must stay finite, got loss {loss:g} and gradient norm {norm:g} at step {step} ({whose}); "
        "look at these entities' rows, or lower meta.inner_lr or training.outer_lr"
    )
