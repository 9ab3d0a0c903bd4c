"""AdamW with warm-up and a cosine, and a moving average of the weights: the same for the network and for its rivals."""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from limaml.config import TrainingConfig

_FLOOR = 0.05  # share of the rate that is left at the end: steps beyond it would do nothing
_INNER = ".log_"  # logarithms of what the inner loop learns beside theta
_Network = TypeVar("_Network", bound=nn.Module)


def make_optimizer(network: nn.Module, cfg: TrainingConfig) -> torch.optim.AdamW:
    """AdamW in three groups: matrices; vectors, which are not decayed (zero is no better place for a bias or the prior); and
    what the inner loop learns (logarithms of rates and damping), slower and not decayed."""
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if _INNER in name]
    outer = [p for name, p in trained if _INNER not in name]
    groups = [
        {"params": [p for p in outer if p.ndim > 1], "weight_decay": cfg.weight_decay, "scale": 1.0},
        {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0, "scale": 1.0},
        {"params": inner, "weight_decay": 0.0, "scale": cfg.inner_lr_scale},
    ]
    # The second moment forgets in 100 steps, not 1,000: a run has a few hundred.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.outer_lr, betas=(0.9, 0.99))


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: TrainingConfig, step: int, num_steps: int) -> None:
    """Rate of outer step `step` (from 0) of `num_steps`: a line up, then half a cosine down."""
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    fall = _FLOOR + (1.0 - _FLOOR) * 0.5 * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = cfg.outer_lr * group["scale"] * warm * fall


def averaged_copy(network: _Network) -> _Network:
    """Where the moving average is kept; starts as the network is."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, cfg: TrainingConfig, step: int) -> None:
    """average = d * average + (1 - d) * weights, in place; d grows to `average_decay`, so that the start is soon forgotten."""
    decay = min(cfg.average_decay, (step + 1) / (step + 10))
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1.0 - decay)
