"""How far Newton's prior may let a task move, chosen on the rows that validate.

What the outer loop learns of the prior's width is too wide: training tasks are adapted on items whose vectors were fitted to
those very rows. So the twin's widths are multiplied by what validates best, down to almost nothing where no personalisation
helps; the refit gets the same factors.
"""

from collections.abc import Callable, Mapping

from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network

FACTORS = (0.5, 0.25, 0.1, 0.01)
"""Tried one after another, as long as they validate better."""
_MOST_TENSORS = 2
"""Of more than these, all tensors of a block share one factor."""


def choose(network: Network, value: Callable[[], float]) -> dict[str, float]:
    """Shrink the priors of `network`; returns what was multiplied, by the names that `apply` takes.

    `value` is the network's validation, better if larger.
    """
    chosen: dict[str, float] = {}
    groups = _groups(network)
    best = value() if groups else 0.0
    for group in groups:
        factor = 1.0
        for smaller in FACTORS:
            apply(network, dict.fromkeys(group, smaller / factor))
            found = value()
            if not found > best:
                apply(network, dict.fromkeys(group, factor / smaller))
                break
            best, factor = found, smaller
        chosen |= dict.fromkeys(group, factor)
    return chosen


def apply(network: Network, factors: Mapping[str, float]) -> None:
    """Multiply the widths of priors; names are `kind.tensor`."""
    for name, factor in factors.items():
        kind, _, tensor = name.partition(".")
        step = network.step(kind)
        assert isinstance(step, NewtonStep)
        step.widen(tensor, factor)


def undo(network: Network, factors: Mapping[str, float]) -> None:
    """Inverse of `apply`: what is chosen next is again of the widths as trained."""
    apply(network, {name: 1.0 / factor for name, factor in factors.items()})


def _groups(network: Network) -> list[list[str]]:
    groups: list[list[str]] = []
    for kind in network.kinds:
        step = network.step(kind)
        if isinstance(step, NewtonStep) and network.block(kind).has_steps:
            names = [f"{kind}.{name}" for name in step.names]
            groups += [names] if len(names) > _MOST_TENSORS else [[name] for name in names]
    return groups
