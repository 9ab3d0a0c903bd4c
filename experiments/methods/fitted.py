"""What a method is: a function from an origin's data, a design and a seed to something that scores tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from limaml.config import Config
from limaml.evaluation.scoring_method import MethodInput, MethodValidator, ScoringMethod
from limaml.features.encoder import Encoder

Design = Mapping[str, Any]
"""JSON values. Methods built on the project's network read `overrides`: `section.key=value` strings."""


class Data(Protocol):
    """Rows that a method may read, as the encoder of the training rows sees them."""

    @property
    def encoder(self) -> Encoder: ...
    @property
    def training(self) -> MethodInput: ...
    @property
    def validation(self) -> MethodInput: ...
    @property
    def validator(self) -> MethodValidator: ...
    def configured(self, design: Design, seed: int, /) -> Config:
        """The configuration that a design asks for, with this seed."""
        ...


@dataclass(frozen=True)
class Fitted:
    score: ScoringMethod
    """Probability of every query row of some specs over the rows that are judged or that validate."""
    validation: float
    """The number that choices are made by, `MethodValidator.auc`, on the origin's validation users."""
    prior: ScoringMethod | None = None
    """The same network without what it learnt of the entity, where it has such a thing."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was chosen on the validation users (steps, shrinkage...), JSON values."""


Fit = Callable[[Any, Design, int], Fitted]
"""(data, design, seed). It may read `data.training` and `data.validation`, never `data.test`."""
