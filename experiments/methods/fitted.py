"""What a method is: a function from an origin's data, a design and a seed to something that scores tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.origin_data import CONFIG, OriginData
from limaml.config import Config, load
from limaml.evaluation.scoring_method import ScoringMethod

Design = Mapping[str, Any]
"""JSON values. Methods built on the project's network read `overrides`: `section.key=value` strings on `CONFIG`."""


@dataclass(frozen=True)
class Fitted:
    score: ScoringMethod
    """Probability of every query row of some specs over `OriginData.test` or `.validation`."""
    validation: float
    """The number that choices are made by, `MethodValidator.auc`, on the origin's validation users."""
    prior: ScoringMethod | None = None
    """The same network without what it learnt of the entity, where it has such a thing."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was chosen on the validation users (steps, shrinkage...), JSON values."""


Fit = Callable[[OriginData, Design, int], Fitted]
"""(data, design, seed). It may read `data.training` and `data.validation`, never `data.test`."""


def configured(data: OriginData, design: Design, seed: int) -> Config:
    """The configuration a design asks for, with the origin's storage and this seed."""
    found = load(CONFIG, [*design.get("overrides", ()), f"training.seed={seed}"])
    return found.model_copy(update={"storage": data.cfg.storage})
