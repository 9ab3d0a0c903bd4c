"""A scoring method: what it is given, what it gives, and how one is chosen on the rows that validate."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limaml.config import Config
from limaml.features.encoder import Encoder
from limaml.schema import own_rate_feature, rate_feature
from limaml.tasks.sampling import TaskRows, TaskSpec
from limaml.training.validation import OBJECTIVE, Validator

Floats = npt.NDArray[np.float64]
_UNDECLARED_RATE = 0.5


@dataclass(frozen=True)
class MethodInput:
    """Encoded rows, and what the rate rules read of them."""

    rows: TaskRows
    item_rate: Floats
    """(R,) the item's smoothed positive rate as logged with the row, if one is declared; the prior where none is known."""
    own_rate: Floats | None = None
    """(R,) the user's own smoothed rate of the item, if one of all time is declared (`by = "item_id"`)."""

    @classmethod
    def from_logged(cls, logged: pa.Table, encoder: Encoder, cfg: Config, *, to_train: bool = False) -> "MethodInput":
        """`to_train` as of `TaskRows.of`."""
        rows = TaskRows.of(logged, encoder, cfg, to_train=to_train)
        declared, own = rate_feature(cfg.features, "item"), own_rate_feature(cfg.features)
        own_rate = None if own is None else encoder.values_of(own, logged).to_numpy()[rows.source_row]
        if declared is None:
            return cls(rows, np.full(len(rows.label), _UNDECLARED_RATE), own_rate)
        rate = logged[declared.name].fill_null(declared.prior).to_numpy().astype(np.float64)
        return cls(rows, rate[rows.source_row], own_rate)


ScoringMethod = Callable[[MethodInput, Sequence[TaskSpec]], Floats]
"""Probability of every query row of the specs, one spec after another."""


class MethodValidator:
    """Rows that validate with their tasks: the same ones that the network's training stops on."""

    def __init__(
        self, inputs: MethodInput, cfg: Config, from_us: int | None = None, users: Collection[str] | None = None
    ) -> None:
        """`from_us` and `users` as of Validator: None for new users, otherwise where what is judged begins; who is judged."""
        self.inputs = inputs
        self._validator = Validator(inputs.rows, cfg, from_us, users)
        self.tasks = self._validator.tasks

    def auc(self, scores: Sequence[Floats]) -> float:
        """The number that choices are made by, from one array of scores a task list; -inf where it is not defined."""
        value = self._validator.measure(scores)[OBJECTIVE]
        return -math.inf if math.isnan(value) else value

    def auc_of(self, method: ScoringMethod) -> float:
        return self.auc([method(self.inputs, specs) for specs in self.tasks])
