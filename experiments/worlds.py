"""Synthetic worlds to experiment on: logged rows by the real ingestion, users divided by arrival, and the truth beside them.

R rows, U users, I items, L latent dimensions
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from experiments.data import TODAY, logged_rows, placed
from experiments.oracle import Support
from limaml.config import Config, load
from limaml.evaluation.scoring_method import MethodInput
from limaml.events.sources import open_source
from limaml.events.synthetic import SyntheticSource, expected_auc
from limaml.features.encoder import Encoder
from limaml.tasks.sampling import TaskSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CONFIG = "experiments/worlds.toml"


@dataclass(frozen=True)
class World:
    """`cfg` as it was ingested; `logged` holds every row of every user."""

    cfg: Config
    logged: pa.Table

    @classmethod
    def ingested(cls, overrides: Sequence[str], root: Path) -> "World":
        """Generate and ingest a world below `root`, or read what an earlier call has ingested there."""
        cfg = placed(load(CONFIG, overrides), root)
        return cls(cfg, logged_rows(cfg))

    @cached_property
    def source(self) -> SyntheticSource:
        source = open_source(self.cfg, TODAY)
        assert isinstance(source, SyntheticSource)
        return source

    def users(self, first: float, last: float) -> tuple[str, ...]:
        """Users between two shares of the order of arrival, which is the order of their numbers."""
        count = self.cfg.source.synthetic_users
        return tuple(f"u{number}" for number in range(round(count * first), round(count * last)))

    def rows_of(self, users: Sequence[str], before_us: int | None = None) -> pa.Table:
        """Their rows, those before an instant (microseconds, UTC) where one is given."""
        mine = pc.is_in(self.logged["user_id"], value_set=pa.array(users, pa.string()))
        if before_us is not None:
            mine = pc.and_(mine, pc.less(self.logged["timestamp"].cast(pa.int64()), before_us))
        return self.logged.filter(mine)

    def arrival_rows_of(self, users: Sequence[str]) -> pa.Table:
        """Their rows of the day each arrived: what was logged before any snapshot held an event of the user."""
        logged = self.rows_of(users)
        return logged.filter(pc.equal(pc.fill_null(logged["user_events"], 0), 0))

    def known(self, logged: pa.Table, encoder: Encoder) -> "KnownRows":
        inputs = MethodInput.from_logged(logged, encoder, self.cfg)
        order = inputs.rows.source_row
        item = np.array([int(text[1:]) for text in logged["item_id"].to_pylist()], np.int64)
        return KnownRows(inputs, item[order], self.source.true_probability(logged)[order], *self.source.true_items())


@dataclass(frozen=True)
class KnownRows:
    """Encoded rows with what the generator knows about them, in the order of `inputs.rows`."""

    inputs: MethodInput
    item_R: Ints
    probability_R: Floats
    """P(label = 1)."""
    popularity_I: Floats
    loading_IL: Floats

    def support(self, specs: Sequence[TaskSpec]) -> Support:
        """The specs' support rows as the oracle reads them, padded to the longest (at least one row)."""
        width = max(1, *(spec.support_size for spec in specs))
        at_TS, mask_TS = np.zeros((len(specs), width), np.int64), np.zeros((len(specs), width))
        for task, spec in enumerate(specs):
            at_TS[task, : spec.support_size] = np.arange(spec.support_start, spec.support_stop)
            mask_TS[task, : spec.support_size] = 1.0
        item_TS = self.item_R[at_TS]
        label_TS = self.inputs.rows.label[at_TS].astype(np.float64)
        return Support(self.popularity_I[item_TS], self.loading_IL[item_TS], label_TS, mask_TS)


def expected_peruser_auc(probability: Floats, scores: Floats, users: Ints) -> float:
    """Mean over users of the expected AUC inside each one's rows; a user with one row has none."""
    groups = [np.flatnonzero(users == user) for user in np.unique(users)]
    return float(np.mean([expected_auc(probability[rows], scores[rows]) for rows in groups if len(rows) > 1]))
