"""An origin as a fit reads it: rows that train, validate and are judged, encoded by what the training rows say."""

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from experiments.evidence.worlds import Origin
from limaml.config import Config
from limaml.evaluation.scoring_method import MethodInput, MethodValidator
from limaml.events.catalogue import item_vectors
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.schema import tables
from limaml.tasks.sampling import TaskSpec
from limaml.training.prepare import validating_rows
from limaml.training.validation import Validator


@dataclass(frozen=True)
class FitData:
    """`cfg` is the arm's own; `origin` may hold more features than it declares."""

    cfg: Config
    origin: Origin

    @cached_property
    def encoder(self) -> Encoder:
        items = item_vectors(Storage(self.cfg.storage.root), tables(self.cfg.features))
        return Encoder.fit(self.origin.split.train_rows(self.origin.logged), self.cfg, items).with_items(items)

    @cached_property
    def training(self) -> MethodInput:
        rows = self.origin.split.train_rows(self.origin.logged)
        return MethodInput.from_logged(rows, self.encoder, self.cfg, to_train=True)

    @cached_property
    def test(self) -> MethodInput:
        """All rows: what is judged, and what comes before it."""
        return MethodInput.from_logged(self.origin.logged, self.encoder, self.cfg)

    @cached_property
    def lists(self) -> tuple[MethodInput, list[TaskSpec]] | None:
        """Of whole lists the rows and tasks; items' tasks would need everybody's rows, so that these have none."""
        is_of_users = [kind.entity_column for kind in self.cfg.task_kinds] == ["user_id"]
        return self.origin.lists.tasks(self.encoder, self.cfg) if self.origin.lists is not None and is_of_users else None

    @cached_property
    def validation(self) -> MethodInput:
        return MethodInput.from_logged(self._validating[0], self.encoder, self.cfg)

    @cached_property
    def validator(self) -> MethodValidator:
        """For methods."""
        return MethodValidator(self.validation, self.cfg, self.origin.split.validate_from_us, self._validating[1])

    @cached_property
    def network_validator(self) -> Validator:
        """For the network's training: the same tasks and the same number."""
        return Validator(self.validation.rows, self.cfg, self.origin.split.validate_from_us, self._validating[1])

    @cached_property
    def _validating(self) -> tuple[pa.Table, tuple[str, ...] | None]:
        return validating_rows(self.cfg, self.origin.logged, self.origin.split)
