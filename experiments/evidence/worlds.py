"""Worlds to measure on, and their origins: a last day each, with training, validation and judged days of its own."""

from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa

from experiments.data import TODAY
from experiments.evidence.catalogue import Lists, sampled
from limaml.config import Config, load
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.events.synthetic import SyntheticSource
from limaml.metrics import Floats
from limaml.tasks.splits import Split, split_events
from limaml.training.prepare import read_history

RETURNING = {
    "synthetic_users": 600,
    "synthetic_items": 150,
    "synthetic_days": 40,
    "synthetic_rows_per_user": 120,
    "synthetic_factors": 2,
    "synthetic_level": 0.7,
    "synthetic_first_share": 0.05,
    "synthetic_arrival_share": 0.2,
    "synthetic_session_rows": 8,
    "min_rows_ratio": 0.01,
    "max_rows_ratio": 100.0,
    "min_label_rate": 0.0,
    "max_label_rate": 1.0,
}
"""[source] of users who come back."""
HALF_LIFE_DAYS, OTHER_HALF_LIVES = 10, (2, 60)
"""Of the drifting world: until the correlation of a user's factors with what they were is a half; and of worlds beside it."""
KUAIRAND_FILES = {"events": "impressions.parquet", "users": "users.parquet", "items": "videos.parquet"}
"""Where the folder has them, in place of the public ones; the same columns."""
_KUAIRAND_DAYS = ("evaluation.validate_from=2022-05-05", "evaluation.test_from=2022-05-07")
"""Of its fourteen days the last two are judged, so that three origins have days to train on."""

ABOUT = {
    "movielens": ("MovieLens-100K", "research only", "people who return: most rate on one day"),
    "grocery": (
        "A grocer's mailer",
        "education and exploration",
        "whether these are people, since the package calls itself simulated, nor what was not promoted",
    ),
    "kuairand": ("KuaiRand-Pure", "CC BY-SA 4.0", "more than two weeks, so no slow drift, and no new videos"),
    "drifting": (
        "Generated, tastes drift",
        "generated here",
        "people: tastes are two planted factors, so it says what could be had, not what is",
    ),
}
"""World -> its name, what its terms allow, and what it cannot show."""


def evidence_worlds(kuairand: str = "") -> dict[str, Config]:
    """Name -> configuration; KuaiRand where its folder is given."""
    found = {"movielens": load("configs/movielens.toml"), "grocery": load("configs/grocery.toml"), "drifting": drifting()}
    if kuairand:
        files = [f"source.{table}={name}" for table, name in KUAIRAND_FILES.items() if (Path(kuairand) / name).exists()]
        found["kuairand"] = load("configs/kuairand.toml", [f"source.path={kuairand}", *files, *_KUAIRAND_DAYS])
    return found


def drifting(half_life_days: float = HALF_LIFE_DAYS) -> Config:
    """Users who come back, and whose tastes change (Ornstein & Uhlenbeck's walk, a step a day)."""
    drift = (1.0 - 2.0 ** (-2.0 / half_life_days)) ** 0.5
    source = [f"source.{key}={value}" for key, value in (RETURNING | {"synthetic_drift": drift}).items()]
    steps = ["training.max_steps=2400", "training.validate_every=100", "evaluation.baseline_steps=2400"]
    return load("configs/synthetic.toml", [*source, *steps, "evaluation.held_out=hash"])


@dataclass(frozen=True)
class Origin:
    """Rows up to a last day; `cfg` splits them."""

    cfg: Config
    logged: pa.Table

    @classmethod
    def read(cls, cfg: Config, through: date) -> "Origin":
        return cls(cfg, read_history(cfg, through))

    @cached_property
    def split(self) -> Split:
        return split_events(self.logged, self.cfg.evaluation)

    @cached_property
    def lists(self) -> Lists | None:
        return sampled(self.cfg, self.logged, self.split)

    def truth(self) -> Floats | None:
        """(R,) the probability by which each label was drawn, where the world is generated."""
        source = open_source(self.cfg, TODAY)
        return source.true_probability(self.logged) if isinstance(source, SyntheticSource) else None


@lru_cache(maxsize=2)
def origin(cfg_json: str, through: str) -> Origin:
    """The origin of a job: those that follow in the same process find its rows read."""
    return Origin.read(Config.model_validate_json(cfg_json), date.fromisoformat(through))


def ingested(world: Config, root: Path) -> Config:
    """The world with its storage in `root`, ingested where it is not yet."""
    world = world.model_copy(update={"storage": world.storage.model_copy(update={"root": str(root)})})
    ingest_history(world, open_source(world, TODAY).days()[-1], TODAY)
    return world


def origins(world: Config, number: int) -> list[tuple[Config, date]]:
    """Configurations and last days: an earlier origin's judged days end where the next one's begin."""
    days = open_source(world, TODAY).days()
    evaluation = world.evaluation
    if evaluation.test_from is None or evaluation.validate_from is None:
        share = 1 - evaluation.train_share_of_days - evaluation.validation_share_of_days
        judged = timedelta(days=round(len(days) * share))
        return [(world, days[-1] - at * judged) for at in range(number)]
    judged = days[-1] - evaluation.test_from + timedelta(days=1)
    found = []
    for at in range(number):
        back = at * judged
        moved = {"validate_from": evaluation.validate_from - back, "test_from": evaluation.test_from - back}
        found.append((world.model_copy(update={"evaluation": evaluation.model_copy(update=moved)}), days[-1] - back))
    return found
