"""An outer loop for networks that are compared: steps, a moving average of the weights, and the average that validates best.

Optimizer, rates, averaging and patience are those of the network's own training, so that what differs is the network.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import TrainingConfig
from limaml.errors import TrainingError
from limaml.tasks.rows import Rows
from limaml.training.optimizer import averaged_copy, make_optimizer, set_learning_rate, update_average

Model = TypeVar("Model", bound=nn.Module)


def best_average(
    cfg: TrainingConfig, model: Model, num_steps: int, backward: Callable[[int], None], quality: Callable[[Model], float]
) -> tuple[Model, float, int]:
    """Train `model` and return the average that validates best, its quality and its step.

    `backward(step)` leaves the gradient of one outer step in `model`, which has none before. Raises TrainingError, before any
    weight is changed, if it is not finite.
    """
    optimizer, average = make_optimizer(model, cfg), averaged_copy(model)
    best, best_value, best_step, stale = averaged_copy(model), -torch.inf, 0, 0
    for step in range(num_steps):
        optimizer.zero_grad(set_to_none=True)
        backward(step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the outer gradient must stay finite, got norm {float(norm):g} at step {step} of {type(model).__name__}; "
                "lower training.outer_lr or meta.inner_lr"
            )
        set_learning_rate(optimizer, cfg, step, num_steps)
        optimizer.step()
        update_average(average, model, cfg, step)
        if (step + 1) % cfg.validate_every and step + 1 != num_steps:
            continue
        value, stale = quality(average), stale + 1
        if value > best_value:
            best, best_value, best_step, stale = averaged_copy(average), value, step + 1, 0
        if stale >= cfg.patience:
            break
    return best, float(best_value), best_step


def query_loss(logits_TQ: Tensor, query: Rows) -> Tensor:
    """Mean over tasks of the mean cross-entropy of their query rows. Raises ValueError if they have no labels."""
    if query.label_TR is None:
        raise ValueError("query rows must carry labels to have a loss, got none; build them with build_batch")
    loss_TQ = F.binary_cross_entropy_with_logits(logits_TQ, query.label_TR, reduction="none") * query.mask_TR
    return (loss_TQ.sum(dim=1) / query.mask_TR.sum(dim=1)).mean()
