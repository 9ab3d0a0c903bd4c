"""Contract 7 over HTTP on the grocer's year: three days, windows of 28 and 84 days, and what a household did with an item."""

from collections import Counter
from datetime import date, timedelta

import numpy as np
import pytest

from limaml import config
from limaml.events.sources import open_source
from tests.contracts.served_days import TOLERANCE, Chain, Day, scores
from tests.contracts.test_offline_online_scores import ROOT

TODAY = date(2026, 3, 2)
EVERY = 7
"""Of so many rows one is asked about: a few hundred a day."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory, start_server):
    folder = tmp_path_factory.mktemp("grocery")
    places = {
        "storage.root": folder / "data",
        "registry.tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "registry.artifact_root": folder / "artifacts",
        "feast.repo_path": ROOT / "feature_repo",
        "feast.registry": folder / "registry.db",
        "feast.online_connection": folder / "online.db",
        "embeddings.lease_url": f"sqlite:///{folder}/lease.db",
        "serving.log_path": folder / "requests",
    }
    settings = ["serving.poll_interval_s=0.1", "serving.store_timeout_s=2.0"]
    cfg = config.load(ROOT / "configs" / "grocery.toml", [*(f'{key}="{place}"' for key, place in places.items()), *settings])
    # The days lie in the past: how far does not matter here.
    kinds = tuple(kind.model_copy(update={"max_lag_s": 1e10}) for kind in cfg.task_kinds)
    cfg = cfg.model_copy(update={"task_kinds": kinds})
    last = open_source(cfg, TODAY).days()[-1]
    # The week before the last one: Christmas, in the last, has no rows.
    found = Chain(cfg, folder, last - timedelta(days=14), TODAY)
    assert found.registry.champion() is None
    found.server = start_server(cfg, folder)
    found.run()
    found.server.wait_until("/readyz", 200)
    return found


@pytest.mark.worlds
def test_every_seventh_row_of_three_days_is_scored_and_fetched_as_it_was_logged(chain):
    for number in (1, 2, 3):
        day = Day(chain, chain.day_before + timedelta(days=number), EVERY)
        assert len(day.answers) > 150
        assert Counter(name for _, name in day.mismatches) == {}
        assert np.abs(scores(day.answers) - day.offline).max() <= TOLERANCE
        assert day.offline.std() > 0.05
        for name in ("same_positive_rate_28d", "same_positive_rate_84d"):
            window = name.rsplit("_", 1)[1].rstrip("d")
            counts = [row[f"by_item_id_events_{window}"] for row in day.rows]
            assert len({count for count in counts if count}) > 3, f"{name} says nothing"
