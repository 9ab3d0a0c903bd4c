"""One origin's rows as methods read them, and its test tasks by both protocols, as lists of specs over one set of rows.

A task set is one list of tasks; a method gives one probability for every query row of it. Names of task sets:

    first/<k>                 first-k, all with the same query rows (test users)
    served/<cadence>          as served with embeddings refreshed at that cadence (test and returning users)
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa

from experiments.data import logged_rows, placed
from experiments.origins import Origin, rolling_origins
from limaml.config import Config, load
from limaml.evaluation.scoring_method import MethodInput, MethodValidator
from limaml.features.encoder import Encoder
from limaml.tasks.protocols import as_served, first_k
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskSpec, support_spec

CONFIG = "experiments/movielens.toml"
KS = (0, 1, 2, 3, 5, 10, 20, 50)
MIN_QUERY_ROWS = 5
CADENCES = {
    "weekly": 7 * MICROSECONDS_PER_DAY,
    "daily": MICROSECONDS_PER_DAY,
    "hourly": MICROSECONDS_PER_DAY // 24,
    "ten_minutes": MICROSECONDS_PER_DAY // 144,
    "at_once": 1,
}
NEVER = "never"
TaskSets = dict[str, list[TaskSpec]]


@dataclass(frozen=True)
class OriginData:
    """One origin's rows as the encoder of its training rows sees them."""

    cfg: Config
    origin: Origin
    logged: pa.Table

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.fit(self.origin.train_rows(self.logged), self.cfg)

    @cached_property
    def training(self) -> MethodInput:
        return MethodInput.from_logged(self.origin.train_rows(self.logged), self.encoder, self.cfg, to_train=True)

    @cached_property
    def validation(self) -> MethodInput:
        return MethodInput.from_logged(self.origin.validation_rows(self.logged), self.encoder, self.cfg)

    @cached_property
    def test(self) -> MethodInput:
        return MethodInput.from_logged(self.origin.test_rows(self.logged), self.encoder, self.cfg)

    @cached_property
    def validator(self) -> MethodValidator:
        """The validation users' tasks by both protocols, and the number that choices are made by."""
        return MethodValidator(self.validation, self.cfg)

    def task_sets(self) -> TaskSets:
        """All lists of tasks that the origin's methods are tested on."""
        rows, origin, n = self.test.rows, self.origin, self.cfg.meta.support_rows
        firsts = first_k(rows, origin.held_out_users, KS, min_query_rows=MIN_QUERY_ROWS, support_rows=n)
        task_sets = {f"first/{k}": specs for k, specs in firsts.items()}
        users = (*origin.returning_users, *origin.held_out_users)
        for cadence, every_us in CADENCES.items():
            task_sets[f"served/{cadence}"] = as_served(
                rows, from_us=origin.validation_end_us, support_rows=n, users=users, every_us=every_us
            )
        task_sets[f"served/{NEVER}"] = [
            replace(support_spec(rows, spec.entity, origin.validation_end_us, n), query=spec.query)
            for spec in task_sets["served/daily"]
        ]
        return task_sets


@lru_cache(maxsize=1)
def movielens(root: str) -> list[OriginData]:
    """MovieLens' origins from the rows ingested below `root`, kept for the jobs that follow in the same process."""
    cfg = placed(load(CONFIG), Path(root))
    logged = logged_rows(cfg)
    return [OriginData(cfg, origin, logged) for origin in rolling_origins(logged)]
