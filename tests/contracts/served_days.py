"""A chain of daily runs, and the service asked about every row of the days after them (contract 7)."""

import asyncio
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from limaml import registry, schema
from limaml.config import ServingConfig
from limaml.embeddings import cutover, daily, fill
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.registry import Registry
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import TaskRows
from limaml.training.scoring import score_specs
from serving.features import OnlineFeatures
from serving.store_calls import StoreCalls

# Contract 7's own bound; both sides compute in float32, in batches of different sizes.
TOLERANCE = 1e-5
RUN = "contract-7"


class Chain:
    """Filled and cut over through a day; daily runs then publish the days after it one by one.

    Of each the next day is ingested, but not published. The encoder has not seen every item.
    """

    def __init__(self, cfg, folder, through, today):
        self.cfg, self.folder, self.day_before, self.today = cfg, folder, through, today
        self.tables = schema.tables(cfg.features)
        self.storage = Storage(cfg.storage.root)
        self.registry = Registry(cfg.registry)

    def run(self):
        apply(self.cfg)
        ingest_history(self.cfg, self.day_before, self.today)
        self._promote()

    def publish(self, day):
        """Publish `day`, and take the next one in."""
        ingest_day(self.cfg, day, self.today)
        daily.adapt_day(self.cfg, day)
        daily.publish_day(self.cfg, day, RUN)
        ingest_day(self.cfg, day + timedelta(days=1), self.today)

    def _promote(self):
        logged = read_logged(self.storage, self.tables, through=self.day_before)
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
        for shard in fill.plan_fill(self.cfg, version, self.day_before, RUN)["shards"]:
            fill.fill_shard(self.cfg, version, shard, RUN)
        cutover.cut_over(self.cfg, version, RUN)
        self.version = version

    def offline(self, next_day, support_through=None):
        """Logged rows of a day and their as-served scores, in one order.

        `support_through` leaves later days out of the supports, as if they had not been published.
        """
        logged = read_logged(self.storage, self.tables, through=next_day)
        if support_through is not None:
            end = pa.scalar(schema.day_end(support_through), schema.TIMESTAMP)
            start = pa.scalar(schema.day_start(next_day), schema.TIMESTAMP)
            logged = logged.filter(pc.or_(pc.less(logged["timestamp"], end), pc.greater_equal(logged["timestamp"], start)))
        rows = TaskRows.of(logged, self.model.encoder, self.cfg)
        start_us = int(schema.day_start(next_day).timestamp() * 1e6)
        specs = as_served(rows, from_us=start_us, support_rows=self.cfg.meta.support_rows)
        queries = query_rows(rows, specs)
        return logged.take(rows.source_row[queries.rows]), score_specs(self.model.network, rows, specs), queries


def context_of(tables, row):
    """The context of a logged row, as a request with its item alone says it."""
    once = {column.name: row.get(column.name) for column in tables.context(per_candidate=False).columns}
    of_item = {column.name: [row.get(column.name)] for column in tables.context(per_candidate=True).columns}
    return {"at": row["timestamp"].isoformat(), **once, **of_item}


class Day:
    """Answers of the service for the rows of the day after a published one, asked at the row's time; and what was fetched."""

    def __init__(self, chain, day, every=1):
        """`every`: of so many rows one is asked about."""
        self.day, self.next_day = day, day + timedelta(days=1)
        chain.publish(day)
        # The server reads the moved `complete_through` at its next poll; the age of any embedding shows that it has.
        lag_s = (datetime.now(UTC) - schema.day_end(day)).total_seconds()
        logged, offline, queries = chain.offline(self.next_day)
        chosen = np.arange(0, logged.num_rows, every)
        self.logged, self.offline, self.support_sizes = logged.take(chosen), offline[chosen], queries.support_sizes[chosen]
        self.rows = self.logged.to_pylist()
        known = self.rows[int(np.argmax(self.support_sizes))]
        chain.server.ranked_when(
            lambda answer: (answer["embeddings"]["user"]["age_s"] or 1e12) < lag_s + 3600,
            known["user_id"],
            [known["item_id"]],
            context=context_of(chain.tables, known),
        )
        self.answers = [
            chain.server.ranked(row["user_id"], [row["item_id"]], context=context_of(chain.tables, row)) for row in self.rows
        ]
        self.mismatches = differing(chain, self.rows)


def differing(chain, rows):
    """Values fetched from the online store now that are not those the rows were logged with."""
    online = OnlineFeatures(chain.cfg, chain.registry.get(chain.version).tags[registry.SLOT])
    online.open()
    calls, found = StoreCalls(ServingConfig(store_timeout_s=4.0)), []
    for row in rows:
        [item] = online.read_items([row["item_id"]]).values()
        fetched = asyncio.run(online.read_user(row["user_id"], calls))
        values = {**fetched.user, **dict(zip(chain.tables.names("item"), item.values, strict=True))}
        for affinity in chain.tables.affinities:
            key = row["item_id"] if affinity.by == "item_id" else row[affinity.by]
            keys = fetched.affinities[affinity.keys_column] or []
            for name in affinity.counts:
                number = fetched.affinities[name][keys.index(key)] if key in keys else schema.NO_NUMBER
                values[name] = None if number == schema.NO_NUMBER else number
        found += [(row["event_id"], name) for name, value in values.items() if value != row[name]]
    return found


def scores(answers):
    return np.array([answer["items"][0]["score"] for answer in answers])
