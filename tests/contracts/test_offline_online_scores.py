"""Contract 7: published through day D, the service scores every row of day D+1 as the as-served evaluation does; on three days.

Offline takes its features from the logged rows (the point-in-time join) and its embeddings from a history that ends with D;
online, everything was fetched from the feature store over HTTP. The features fetched are compared too; they are of every kind.
"""

import asyncio
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
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


# The generated columns under other names, two of them left out, columns of events, and a context: nothing may know what films
# have. A user's maps hold fewer keys than users have.
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
    feature("user", "paid", "number", aggregate="mean", of="paid_price", window_days=2),
    feature("user", "away", "number", aggregate="days_since"),
    feature("item", "segment_of", "category", column="segment"),
    feature("item", "unsold", "number", aggregate="days_since"),
    feature("user", "same", "number", aggregate="count", by="item_id", max_keys=4, window_days=2),
    feature("user", "same_rate", "number", aggregate="rate", by="item_id", max_keys=4, prior_rows=2.0),
    feature("user", "same_away", "number", aggregate="days_since", by="item_id", max_keys=4),
    feature("user", "likes", "number", aggregate="rate", by="segment_of", max_keys=3),
    feature("context", "page", "category", per_candidate=True),
    feature("context", "temperature", "number"),
    feature("context", "hour_of_day", "cycle", clock="hour"),
    feature("context", "day_of_week", "cycle", clock="weekday"),
    feature("event", "paid_price", "number"),
)
TABLES = schema.tables(FEATURES)


def make_config(folder):
    return Config.model_validate(
        {
            "features": FEATURES,
            "source": {
                "kind": "parquet",
                "path": str(folder / "delivered"),
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


def deliver(cfg, folder):
    """Generated days as a source's files, with columns of events and a category of items beside them; returns the days."""
    plain = SyntheticSource(cfg.source)
    source = plain.moved(week_shift(plain.days()[-1], TODAY))
    users, items = source.catalogue()
    segments = [("a", "b", "c", "d", None)[at % 5] for at in range(items.num_rows)]
    write(folder / "users.parquet", users)
    write(folder / "items.parquet", items.append_column("segment", pa.array(segments)))
    for day in source.days():
        table = source.read_day(day)
        pages = [("front", "back", None)[at % 3] for at in range(table.num_rows)]
        degrees = [None if at % 7 == 0 else at % 11 - 3.5 for at in range(table.num_rows)]
        prices = [None if at % 4 == 0 else at % 13 / 8 for at in range(table.num_rows)]
        for name, column in (("page", pages), ("temperature", degrees), ("paid_price", prices)):
            table = table.append_column(name, pa.array(column))
        write(folder / "events" / f"dt={day}" / "part.parquet", table)
    return source.days()


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


class Chain:
    """Filled and cut over through the day before the first of three, which daily runs then publish one by one.

    Of each the next day is ingested, but not published. Users arrive on them who were never seen before; the encoder has not
    seen every item.
    """

    def __init__(self, cfg, folder):
        days = deliver(cfg, folder / "delivered")
        self.day_before, *self.days = days[5:10]
        self.cfg = cfg
        self.folder = folder
        self.storage = Storage(cfg.storage.root)
        self.registry = Registry(cfg.registry)

    def run(self):
        apply(self.cfg)
        ingest_history(self.cfg, self.day_before, TODAY)
        self._promote()

    def publish(self, day):
        """Publish `day`, and take the next one in."""
        ingest_day(self.cfg, day, TODAY)
        daily.adapt_day(self.cfg, day)
        daily.publish_day(self.cfg, day, RUN)
        ingest_day(self.cfg, day + timedelta(days=1), TODAY)

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

    def offline(self, next_day, support_through=None):
        """Logged rows of a day and their as-served scores, in one order.

        `support_through` leaves later days out of the supports, as if they had not been published.
        """
        logged = read_logged(self.storage, TABLES, through=next_day)
        if support_through is not None:
            end = pa.scalar(schema.day_end(support_through), schema.TIMESTAMP)
            start = pa.scalar(schema.day_start(next_day), schema.TIMESTAMP)
            logged = logged.filter(pc.or_(pc.less(logged["timestamp"], end), pc.greater_equal(logged["timestamp"], start)))
        rows = TaskRows.from_logged(logged, self.model.encoder, self.cfg.task_kind)
        start_us = int(schema.day_start(next_day).timestamp() * 1e6)
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


def context_of(row):
    return {"at": row["timestamp"].isoformat(), "temperature": row["temperature"], "page": [row["page"]]}


class Day:
    """Answers of the service for every row of the day after a published one, asked at the row's time; and what was fetched."""

    def __init__(self, chain, day):
        self.day, self.next_day = day, day + timedelta(days=1)
        chain.publish(day)
        # The server reads the moved `complete_through` at its next poll; the age of any embedding shows that it has.
        lag_s = (datetime.now(UTC) - schema.day_end(day)).total_seconds()
        anything = {"temperature": None, "page": [None]}
        chain.server.ranked_when(
            lambda answer: answer["embeddings"]["user"]["age_s"] < lag_s + 3600, "u0", ["i0"], context=anything
        )
        self.logged, self.offline, self.queries = chain.offline(self.next_day)
        self.rows = self.logged.to_pylist()
        self.answers = [chain.server.ranked(row["user_id"], [row["item_id"]], context=context_of(row)) for row in self.rows]
        self.mismatches = differing(chain, self.rows)


def differing(chain, rows):
    """Values fetched from the online store now that are not those the rows were logged with."""
    online = OnlineFeatures(chain.cfg, chain.registry.get(chain.version).tags[registry.SLOT])
    online.open()
    calls, found = StoreCalls(ServingConfig(store_timeout_s=4.0)), []
    for row in rows:
        [item] = online.read_items([row["item_id"]]).values()
        fetched = asyncio.run(online.read_user(row["user_id"], calls))
        values = {**fetched.user, **dict(zip(TABLES.names("item"), item.values, strict=True))}
        for affinity in TABLES.affinities:
            key = row["item_id"] if affinity.by == "item_id" else row[affinity.by]
            keys = fetched.affinities[affinity.keys_column] or []
            for name in affinity.counts:
                values[name] = fetched.affinities[name][keys.index(key)] if key in keys else None
        found += [(row["event_id"], name) for name, value in values.items() if value != row[name]]
    return found


@pytest.fixture(scope="module")
def asked(chain):
    return [Day(chain, day) for day in chain.days[:3]]


def scores(answers):
    return np.array([answer["items"][0]["score"] for answer in answers])


def test_every_row_of_the_next_day_is_scored_alike(chain, asked):
    for day in asked:
        assert day.logged.num_rows == len(day.answers) > 100
        assert {answer["model_version"] for answer in day.answers} == {chain.version}
        assert np.abs(scores(day.answers) - day.offline).max() <= TOLERANCE
        assert day.offline.std() > 0.05
    # The rows are worth comparing: with and without history, known and unknown items, and scores that differ.
    sizes = np.concatenate([day.queries.support_sizes for day in asked])
    assert (sizes == 0).any()
    assert (sizes > 0).any()
    items = [item for day in asked for item in day.logged["item_id"].to_pylist()]
    assert 0 < sum(item in set(chain.model.encoder.items) for item in items) < len(items)


def test_the_service_says_missing_exactly_for_users_without_history(asked):
    for day in asked:
        fallbacks = [answer["embeddings"]["user"]["fallback"] for answer in day.answers]
        assert fallbacks == ["missing" if size == 0 else None for size in day.queries.support_sizes]


def test_the_comparison_sees_a_day_that_was_not_published(chain, asked):
    _, behind, _ = chain.offline(asked[0].next_day, support_through=chain.day_before)
    assert np.abs(scores(asked[0].answers) - behind).max() > 100 * TOLERANCE


def test_the_features_fetched_are_those_the_row_was_logged_with(asked):
    for day in asked:
        assert day.mismatches == []
    for name in ("paid", "away", "unsold", *(column.name for column in TABLES.joined if column.name.startswith("by_"))):
        assert len({value for day in asked for value in day.logged[name].to_pylist()}) > 1, f"{name} says nothing"


def test_candidates_are_scored_alike_in_whatever_order_they_stand(chain, asked):
    """Each with its own context and the user's own entry; at the moment of one row, so not as logged."""
    user = max((row["user_id"] for row in asked[-1].rows), key=[row["user_id"] for row in asked[-1].rows].count)
    mine = {row["item_id"]: row for row in asked[-1].rows if row["user_id"] == user}
    items, at = sorted(mine), context_of(next(iter(mine.values())))

    def ask(chosen):
        answer = chain.server.ranked(user, chosen, context=at | {"page": [mine[item]["page"] for item in chosen]})
        return {found["item_id"]: found["score"] for found in answer["items"]}

    together = ask(items)
    assert len(items) > 3
    assert ask(items[::-1]) == pytest.approx(together, abs=1e-6)
    assert {item: ask([item])[item] for item in items} == pytest.approx(together, abs=1e-6)
    assert len({round(score, 4) for score in together.values()}) > 1


def test_the_requests_that_the_service_logged_agree_with_the_offline_join(chain, asked):
    """Last, as it ends the server: what the log still holds is written then."""
    chain.server.stop()
    started = datetime.now(UTC).date()
    result = compare_day(chain.cfg, started, Gauges())
    assert result["requests"] > sum(len(day.answers) for day in asked)  # some were asked while the server caught up
    views = {"user_features", "item_features", "meta_embedding_user", "user_by_item_id", "user_by_segment_of"}
    assert {view["view"] for view in result["views"]} == views
    for view in result["views"]:
        assert (view["mismatch_ratio"], view["missing_ratio"], view["max_difference"]) == (0.0, 0.0, 0.0)
        assert view["rows"] > 0
