"""Every block is trained, judged, filled, cut over, published, served and rolled back by the same code (contracts 4 and 7).

One installation, one version after another in its two slots. What is served equals the as-served evaluation of the same rows.
"""

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from limaml import registry
from limaml.embeddings import cutover, fill
from limaml.evaluation.evaluate_verb import evaluate_and_register
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.features.feature_store import apply
from limaml.models import bundle
from limaml.models.blocks import BLOCKS
from tests.contracts.served_days import RUN, TOLERANCE, Chain, Day, context_of, scores
from tests.contracts.small_world import Service, config_of, train

TODAY = date(2026, 3, 2)
HISTORY_DAYS = 10
ONE_DAY = timedelta(days=1)
CASES = [*((block, "product") for block in BLOCKS), ("row_mlp", "concat")]


class Version(Chain):
    """A chain whose version was trained and passed the gate."""

    def _promote(self) -> None:
        candidate = train(self.cfg, self.day_before, self.folder / "candidate")
        self.result = evaluate_and_register(self.cfg, candidate)
        self.version = self.result["version"]
        self.model = bundle.load(self.registry.download(self.version, self.folder / "downloaded")).refit
        for shard in fill.plan_fill(self.cfg, self.version, self.day_before, RUN)["shards"]:
            fill.fill_shard(self.cfg, self.version, shard, RUN)
        cutover.cut_over(self.cfg, self.version, RUN)

    def served(self, rows: list[dict]) -> np.ndarray:
        """Scores of a day's rows now; all of them by the champion."""
        asked = ((row, context_of(self.tables, row)) for row in rows)
        answers = [self.server.ranked(row["user_id"], [row["item_id"]], context=context) for row, context in asked]
        assert {answer["model_version"] for answer in answers} == {self.registry.champion().version}
        return scores(answers)


class Installation:
    """A world whose days come one by one, and the versions that served it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cfg = folder, config_of(folder)
        self.days = open_source(self.cfg, TODAY).days()
        self.through = self.days[HISTORY_DAYS - 1]
        apply(self.cfg)
        ingest_history(self.cfg, self.through, TODAY)
        self.service = Service(self.cfg)
        self.champion = self.promote("first", {})

    def promote(self, name: str, model: dict[str, object]) -> Version:
        """Train, judge, fill and cut over on all days that were published."""
        folder = self.folder / name
        folder.mkdir()
        cfg = self.cfg.model_copy(update={"model": config_of(self.folder, model=model).model})
        version = Version(cfg, folder, self.through, TODAY)
        version.server = self.service
        version._promote()
        return version

    def next_day(self, version: Version) -> Day:
        """Publish a day and ask about every row of the one after it."""
        self.through += ONE_DAY
        return Day(version, self.through)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("blocks"))
    yield made
    made.service.stop()


@pytest.mark.parametrize(("block", "interaction"), CASES)
def test_a_block_is_trained_judged_filled_served_and_rolled_back(
    installation: Installation, block: str, interaction: str
) -> None:
    before = installation.champion
    version = installation.promote(f"{block}-{interaction}", {"meta_block": block, "interaction": interaction})
    assert version.result["decision"] == "passed"
    day = installation.next_day(version)
    assert {answer["model_version"] for answer in day.answers} == {version.version}
    assert np.abs(scores(day.answers) - day.offline).max() <= TOLERANCE
    assert day.mismatches == []
    # Worth comparing: users with an embedding of their own, which moves the scores.
    fallbacks = [answer["embeddings"]["user"]["fallback"] for answer in day.answers]
    assert fallbacks == ["missing" if size == 0 else None for size in day.support_sizes]
    assert len(day.answers) > 5
    assert fallbacks.count(None) > 0
    _, behind, _ = version.offline(day.next_day, support_through=installation.days[0])
    assert np.abs(scores(day.answers) - behind).max() > 10 * TOLERANCE

    cutover.rollback(installation.cfg, before.version, RUN)
    assert version.registry.get(version.version).tags[registry.STATE] == "ready"
    _, offline, _ = before.offline(day.next_day)
    assert np.abs(before.served(day.rows) - offline).max() <= TOLERANCE
