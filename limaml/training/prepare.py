"""From logged rows to what both fits read: split, encoders, encoded rows."""

from datetime import date

import pyarrow as pa

from limaml.config import Config
from limaml.errors import DataError
from limaml.events.catalogue import item_vectors
from limaml.events.logged import read_logged
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.schema import tables
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import Split, split_events
from limaml.training.champion import Champion
from limaml.training.twin_and_refit import TrainingData
from limaml.training.validation import Validator


def read_history(cfg: Config, through: date) -> pa.Table:
    """All logged rows up to `through` (inclusive). Raises DataError if there are none."""
    logged = read_logged(Storage(cfg.storage.root), tables(cfg.features), through=through)
    if not logged.num_rows:
        raise DataError(f"training through {through} needs logged rows, there are none in {cfg.storage.root}; ingest first")
    return logged


def fit_encoders(cfg: Config, logged: pa.Table, split: Split, champion: Champion | None = None) -> tuple[Encoder, Encoder]:
    """The twin's encoder, from the split's training rows alone, and the refit's, from all rows; with `champion` its own, grown
    by what is new in those rows.
    """
    if champion is not None:
        return champion.twin.encoder.grown(split.train_rows(logged), cfg), champion.refit.encoder.grown(logged, cfg)
    items = item_vectors(Storage(cfg.storage.root), tables(cfg.features))
    return Encoder.fit(split.train_rows(logged), cfg, items), Encoder.fit(logged, cfg, items)


def load_training_data(cfg: Config, through: date, twin: Encoder, refit: Encoder) -> TrainingData:
    """Read and encode the rows of both fits, and the rows that validate as the twin sees them."""
    logged = read_history(cfg, through)
    split = split_events(logged, cfg.evaluation)
    items = item_vectors(Storage(cfg.storage.root), tables(cfg.features))
    twin, refit = twin.with_items(items), refit.with_items(items)
    validation, users = validating_rows(cfg, logged, split)
    return TrainingData(
        twin_rows=TaskRows.of(split.train_rows(logged), twin, cfg, to_train=True),
        twin_dims=twin.dims,
        validator=Validator(TaskRows.of(validation, twin, cfg), cfg, from_us=split.validate_from_us, users=users),
        refit_rows=TaskRows.of(logged, refit, cfg, to_train=True),
        refit_dims=refit.dims,
    )


def validating_rows(cfg: Config, logged: pa.Table, split: Split) -> tuple[pa.Table, tuple[str, ...] | None]:
    """Rows that validate, and whose they are where others' are among them.

    With several kinds a row's item has the support that a daily refresh gives it: rows of everyone who is not held out.
    """
    if len(cfg.task_kinds) == 1:
        return split.validation_rows(logged), None
    return split.known_rows(logged), split.validation_users
