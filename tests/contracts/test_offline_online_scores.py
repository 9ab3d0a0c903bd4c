"""Contract 7: published through day D, the service scores every row of day D+1 as the as-served evaluation does.

Offline takes its features from the logged rows (the point-in-time join) and its embeddings from a history that ends with D;
online, everything was fetched from the feature store over HTTP. The features fetched are compared too.
"""

import asyncio
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from limaml import registry, schema
from limaml.config import Config, FeatureConfig, ServingConfig
from limaml.embeddings import daily, slots, switch
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.events.sources import week_shift
from limaml.events.synthetic import SyntheticSource
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.monitoring.consistency import compare_day
from limaml.monitoring.export import Gauges
from limaml.registry import Registry
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import TaskRows
from limaml.training.scoring import score_specs
from serving.features import OnlineFeatures
from serving.store_calls import StoreCalls

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 3, 2)
# Contract 7's own bound; both sides compute in float32, in batches of different sizes.
TOLERANCE = 1e-5
RUN = "contract-7"


def feature(entity, name, kind, **how):
    return FeatureConfig(entity=entity, name=name, type=kind, **how)


# The generated columns under other names, two of them left out, and a context of two: nothing may know what films have.
FEATURES = (
    feature("item", "price", "number", column="year", minimum=0.0),
    feature("user", "segment", "category", column="age_band"),
    feature("item", "label_text", "text", column="title"),
    feature("item", "tags", "categories", column="genres"),
    feature("item", "shown", "number", aggregate="count"),
    feature("item", "bought", "number", aggregate="rate", prior=0.3, prior_rows=4.0),
    feature("user", "seen", "number", aggregate="count"),
    feature("user", "buys", "number", aggregate="rate"),
    feature("user", "buys_lately", "number", aggregate="rate", window_days=1),
    feature("item", "shown_lately", "number", aggregate="count", window_days=3),
    feature("context", "hour_of_day", "cycle", clock="hour"),
    feature("context", "day_of_week", "cycle", clock="weekday"),
)
TABLES = schema.tables(FEATURES)


def make_config(folder):
    return Config.model_validate(
        {
            "features": FEATURES,
            "source": {
                "kind": "synthetic",
                "synthetic_users": 60,
                "synthetic_items": 30,
                "synthetic_days": 12,
                "synthetic_rows_per_user": 24,
            },
            "storage": {"root": str(folder / "data")},
            # The days lie in the past: how far does not matter here.
            "task_kinds": [{"name": "user", "max_lag_s": 1e10}],
            "model": {"embedding_dim": 6, "global_hidden": [16, 8]},
            "meta": {"support_rows": 16},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "registry.db"),
                "online_connection": str(folder / "online.db"),
            },
            "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db"},
            # On a busy machine a read may take longer than the default; here it must not fall back.
            "serving": {
                "poll_interval_s": 0.1,
                "store_timeout_s": 2.0,
                "log_share": 1.0,
                "log_path": str(folder / "requests"),
            },
        }
    )


class Chain:
    """Filled and cut over through day D-1, day D published by a daily run, day D+1 ingested but never published.

    D+1 is chosen so that users arrive on it who were never seen before; the encoder has not seen every item.
    """

    def __init__(self, cfg, folder):
        days = SyntheticSource(cfg.source).days()
        shift = week_shift(days[-1], TODAY)
        self.day_before, self.day, self.next_day = (day + shift for day in days[6:9])
        self.cfg = cfg
        self.folder = folder
        self.storage = Storage(cfg.storage.root)
        self.registry = Registry(cfg.registry)

    def run(self):
        apply(self.cfg)
        ingest_history(self.cfg, self.day_before, TODAY)
        self._promote()
        ingest_day(self.cfg, self.day, TODAY)
        daily.adapt_day(self.cfg, self.day)
        daily.publish_day(self.cfg, self.day, RUN)
        ingest_day(self.cfg, self.next_day, TODAY)

    def _promote(self):
        logged = read_logged(self.storage, TABLES, through=self.day_before)
        encoder = Encoder.fit(logged.filter(pc.invert(pc.ends_with(logged["item_id"], "7"))), self.cfg)
        network = build_network(self.cfg, encoder.dims, seed=7)
        # Untrained layers hardly tell rows apart: make them, so that a wrong feature or embedding is seen.
        with torch.no_grad():
            for parameter in network.global_block.parameters():
                parameter.mul_(2.5)
        self.model = bundle.Model(network, encoder)
        bundle.save(bundle.Bundle(config=self.cfg, refit=self.model, twin=self.model), self.folder / "bundle")
        run_id = self.registry.start_run(RUN)
        version = self.registry.register(self.folder / "bundle", run_id, {})
        for shard in slots.plan_fill(self.cfg, version, self.day_before, RUN)["shards"]:
            slots.fill_shard(self.cfg, version, shard, RUN)
        switch.cut_over(self.cfg, version, RUN)
        self.version = version

    def offline(self, support_through=None):
        """Logged rows of D+1 and their as-served scores, in one order.

        `support_through` leaves later days out of the supports, as if they had not been published.
        """
        logged = read_logged(self.storage, TABLES, through=self.next_day)
        if support_through is not None:
            end = pa.scalar(schema.day_end(support_through), schema.TIMESTAMP)
            start = pa.scalar(schema.day_start(self.next_day), schema.TIMESTAMP)
            logged = logged.filter(pc.or_(pc.less(logged["timestamp"], end), pc.greater_equal(logged["timestamp"], start)))
        rows = TaskRows.from_logged(logged, self.model.encoder, self.cfg.task_kind)
        start_us = int(schema.day_start(self.next_day).timestamp() * 1e6)
        specs = as_served(rows, from_us=start_us, support_rows=self.cfg.meta.support_rows)
        queries = query_rows(rows, specs)
        return logged.take(rows.source_row[queries.rows]), score_specs(self.model.network, rows, specs), queries


@pytest.fixture(scope="module")
def chain(tmp_path_factory, start_server):
    folder = tmp_path_factory.mktemp("contract7")
    chain = Chain(make_config(folder), folder)
    # Creates the registry's tables, which the server, started ahead because it takes seconds, would do at the same time.
    assert chain.registry.champion() is None
    chain.server = start_server(chain.cfg, folder)
    chain.run()
    chain.server.wait_until("/readyz", 200)
    return chain


def context_of(instant):
    return {"hour_of_day": instant.hour, "day_of_week": instant.weekday()}


@pytest.fixture(scope="module")
def served(chain):
    """Answer of the service for every row of D+1, each asked at the row's hour and weekday."""
    # The server reads the moved `complete_through` at its next poll; the age of any embedding shows that it has.
    lag_s = (datetime.now(UTC) - schema.day_end(chain.day)).total_seconds()
    chain.server.ranked_when(lambda answer: answer["embeddings"]["user"]["age_s"] < lag_s + 3600, "u0", ["i0"], context={})
    logged, _, _ = chain.offline()
    return [
        chain.server.ranked(row["user_id"], [row["item_id"]], context=context_of(row["timestamp"]))
        for row in logged.select(["user_id", "item_id", "timestamp"]).to_pylist()
    ]


def scores(answers):
    return np.array([answer["items"][0]["score"] for answer in answers])


def test_every_row_of_the_next_day_is_scored_alike(chain, served):
    logged, offline, queries = chain.offline()
    assert logged.num_rows == len(served) > 100
    assert {answer["model_version"] for answer in served} == {chain.version}
    assert np.abs(scores(served) - offline).max() <= TOLERANCE
    # The rows are worth comparing: with and without history, known and unknown items, and scores that differ.
    assert (queries.support_sizes == 0).any()
    assert (queries.support_sizes > 0).any()
    known = set(chain.model.encoder.items)
    assert 0 < sum(item in known for item in logged["item_id"].to_pylist()) < logged.num_rows
    assert offline.std() > 0.05


def test_the_service_says_missing_exactly_for_users_without_history(chain, served):
    _, _, queries = chain.offline()
    fallbacks = [answer["embeddings"]["user"]["fallback"] for answer in served]
    assert fallbacks == ["missing" if size == 0 else None for size in queries.support_sizes]


def test_the_comparison_sees_a_day_that_was_not_published(chain, served):
    _, behind, _ = chain.offline(support_through=chain.day_before)
    assert np.abs(scores(served) - behind).max() > 100 * TOLERANCE


def test_the_features_fetched_are_those_the_row_was_logged_with(chain, served):
    logged, _, _ = chain.offline()
    slot = chain.registry.get(chain.version).tags[registry.SLOT]
    online = OnlineFeatures(chain.cfg, slot)
    online.open()
    names = (*TABLES.names("user"), *TABLES.names("item"))
    calls = StoreCalls(ServingConfig(store_timeout_s=4.0))
    mismatches = 0
    for row in logged.to_pylist():
        [item] = online.read_items([row["item_id"]]).values()
        user = asyncio.run(online.read_user(row["user_id"], calls)).user
        found = {**user, **dict(zip(TABLES.names("item"), item.values, strict=True))}
        mismatches += sum(found[name] != row[name] for name in names)
    assert mismatches / (logged.num_rows * len(names)) == 0.0


def test_the_requests_that_the_service_logged_agree_with_the_offline_join(chain, served):
    """Last, as it ends the server: what the log still holds is written then."""
    chain.server.stop()
    started = datetime.now(UTC).date()
    result = compare_day(chain.cfg, started, Gauges())
    assert result["requests"] > len(served)  # some were asked while the server caught up
    assert {view["view"] for view in result["views"]} == {"user_features", "item_features", "meta_embedding_user"}
    for view in result["views"]:
        assert (view["mismatch_ratio"], view["missing_ratio"], view["max_difference"]) == (0.0, 0.0, 0.0)
        assert view["rows"] > 0
