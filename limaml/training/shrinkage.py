"""How far a task may move from the prior, chosen on the rows that validate; the refit gets the same.

Newton's prior: what the outer loop learns of its width is too wide, since training tasks are adapted on items whose vectors
were fitted to those very rows. So the widths are multiplied by what validates best, down to almost nothing where no
personalisation helps.

Prior rows: somebody's first rows come in one sitting and are alike in more than taste, which no row's loss says. What is
adapted on n rows counts n / (n + c), beside a full support's share, so that somebody new is not served worse than by the prior;
c is the largest that validates nearly as well as the best one, on first-k and as served, once for the level and once for the
factors.
"""

from collections.abc import Callable, Mapping

from limaml.models import blocks
from limaml.models.inner_step import NewtonStep
from limaml.models.network import Network

FACTORS = (0.5, 0.25, 0.1, 0.01)
"""Tried one after another, as long as they validate better."""
PRIOR_ROWS = (2.0, 5.0, 10.0, 20.0, 40.0)
PRIOR_ROWS_MAY_COST = 0.002
"""Tried one after another for each part, as long as they validate at most this AUC below its best (experiments/LOG.md)."""
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


def choose_prior_rows(network: Network, value: Callable[[], float]) -> dict[str, float]:
    """Set the prior's rows of `network`; returns them by the names that `apply_prior_rows` takes. `value` as of `choose`."""
    chosen = {f"{kind}.{part}": 0.0 for kind in network.kinds for part in _parts(network)}
    apply_prior_rows(network, chosen)
    last = value()
    for name in chosen:
        best = last
        for rows in PRIOR_ROWS:
            apply_prior_rows(network, chosen | {name: rows})
            found = value()
            if not found >= best - PRIOR_ROWS_MAY_COST:
                break
            best, last, chosen[name] = max(best, found), found, rows
    apply_prior_rows(network, chosen)
    return chosen


def apply_prior_rows(network: Network, rows: Mapping[str, float]) -> None:
    """Names are `kind.level` and `kind.factors` where embeddings are multiplied with rows' vectors, else `kind.embedding`."""
    parts = _parts(network)
    for name, value in rows.items():
        kind, _, part = name.partition(".")
        network.prior_rows(kind)[parts[part]] = value


def _parts(network: Network) -> dict[str, slice]:
    if network.global_block.product is None:
        return {"embedding": slice(None)}
    return {blocks.LEVEL: slice(-1, None), blocks.FACTORS: slice(None, -1)}


def _groups(network: Network) -> list[list[str]]:
    groups: list[list[str]] = []
    for kind in network.kinds:
        step = network.step(kind)
        if isinstance(step, NewtonStep) and network.block(kind).has_steps:
            names = [f"{kind}.{name}" for name in step.names]
            groups += [names] if len(names) > _MOST_TENSORS else [[name] for name in names]
    return groups
