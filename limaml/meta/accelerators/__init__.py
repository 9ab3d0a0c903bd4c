"""Closed forms and kernels that do the engine's work for the networks that they know, faster; none is needed.

The engine asks those of `ACCELERATORS` in order, and the first that applies runs. One is kept only while a configuration that
ships runs on it in `make bench` and is at least 1.5 times as fast as the engine there (docs/extend.md).

    T tasks, D embedding width
"""

import functools
from typing import Protocol

import torch
from torch import Tensor

from limaml import telemetry
from limaml.meta.losses import OuterLoss
from limaml.models.network import Network
from limaml.tasks.rows import Rows, TaskBatch


class Accelerator(Protocol):
    """Equal to the engine where it applies: one property-based test runs all of them (tests/contracts/test_extend.py)."""

    name: str

    def applies(self, network: Network, batch: TaskBatch | Rows, kind: str) -> str | None:
        """None, or the reason why not. `batch` is one to be lost on, or the supports of that kind that are to be embedded."""
        ...

    def embed(self, network: Network, kind: str, support: Rows, entity_index_T: Tensor, *, num_steps: int) -> Tensor:
        """As `limaml.meta.engine.embed_tasks`: (T, D)."""
        ...

    def outer_loss(
        self,
        network: Network,
        batch: TaskBatch,
        *,
        generator: torch.Generator | None,
        num_steps: int,
        second_order: bool,
        num_tasks: int | None,
    ) -> OuterLoss:
        """As `limaml.meta.engine.outer_loss`, with the graph of the loss."""
        ...


ACCELERATORS: list[Accelerator] = []
"""Another one is one more entry here."""

_log = telemetry.get_logger(__name__)


def choose(network: Network, batch: TaskBatch | Rows, kind: str) -> Accelerator | None:
    """The first that applies; None: the engine does it itself. Which one ran, and why none before it, is logged once."""
    reasons: list[str] = []
    for accelerator in ACCELERATORS:
        why_not = accelerator.applies(network, batch, kind)
        if why_not is None:
            _say(accelerator.name, *reasons)
            return accelerator
        reasons.append(f"{accelerator.name}: {why_not}")
    if reasons:
        _say("engine", *reasons)
    return None


@functools.cache
def _say(ran: str, *why_not: str) -> None:
    """Once in a process."""
    _log.info("inner_loop", runs_on=ran, why_not=list(why_not))
