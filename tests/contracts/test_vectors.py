"""A vector of an item is one number on both sides: what training and adaptation gather is what the service scores with.

A delivery of generated events whose items have vectors, from ingestion to an answer over HTTP. Some items have none, and some
are outside the vocabulary.
"""

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from limaml import schema
from limaml.config import Config, FeatureConfig
from limaml.embeddings import cutover, fill
from limaml.errors import DataError, GateError
from limaml.events import catalogue
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.events.synthetic import SyntheticSource
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.registry import Registry
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows
from limaml.training.scoring import score_specs
from tests.polling import wait_for

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 3, 2)
WIDTH = 24
TOLERANCE = 1e-5  # Contract 7's.
RUN = "vectors"
WITHOUT = ("i2", "i5")
FEATURES = (
    FeatureConfig(entity="user", name="seen", type="number", aggregate="count"),
    FeatureConfig(entity="item", name="tags", type="categories", column="genres"),
    FeatureConfig.model_validate(
        {"entity": "item", "name": "text", "type": "vector", "column": "meaning", "encoder": "noise-1", "licence": "MIT"}
        # No row that is judged, adapted or served loses a number to the dropout.
        | {"width": WIDTH, "project_to": 16, "norm": "length", "dropout": 0.5}
    ),
    FeatureConfig(entity="item", name="shown", type="number", aggregate="count"),
    FeatureConfig(entity="context", name="hour", type="cycle", clock="hour"),
)
TABLES = schema.tables(FEATURES)
STORED = ("days", "events", "snapshots", "logged", "catalogue", "catalogue_history", "catalogue_vectors")


def config(folder):
    return Config.model_validate(
        {
            "features": FEATURES,
            "source": {"kind": "parquet", "path": str(folder / "delivered"), "licence": "CC0-1.0"},
            "storage": {"root": str(folder / "data")},
            "task_kinds": [{"name": "user", "max_lag_s": 1e10}],
            "model": {"embedding_dim": 6, "global_hidden": [16, 8], "pool_half_life_days": 1.0},
            "meta": {"support_rows": 16},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "registry.db"),
                "online_connection": str(folder / "online.db"),
            },
            "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db"},
            "serving": {"poll_interval_s": 0.1, "store_timeout_s": 2.0, "items_refresh_s": 0.5},
        }
    )


class Shop:
    """Six days are ingested, the sixth after a model was filled and cut over; it is what is scored."""

    def __init__(self, folder):
        self.folder, self.cfg = folder, config(folder)
        self.storage, self.registry = Storage(self.cfg.storage.root), Registry(self.cfg.registry)
        world = self.cfg.source.model_copy(
            update={"synthetic_users": 40, "synthetic_items": 20, "synthetic_days": 6, "synthetic_rows_per_user": 20}
        )
        source = SyntheticSource(world, TODAY - timedelta(days=6) - date(2000, 1, 3))
        self.days, (users, self.items) = source.days(), source.catalogue()
        self.write("users.parquet", users)
        for day in self.days:
            self.write(f"events/dt={day}/part.parquet", source.read_day(day))
        numbers = np.random.default_rng(0).normal(3.0, 2.0, (self.items.num_rows, WIDTH))
        self.vectors = dict(zip(self.items["item_id"].to_pylist(), numbers.tolist(), strict=True)) | dict.fromkeys(WITHOUT)
        self.deliver_items(self.vectors)

    def write(self, name, table):
        path = self.folder / "delivered" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    def deliver_items(self, vectors):
        """Lists of doubles, as pandas writes them."""
        ids = self.items["item_id"].to_pylist()
        column = pa.array([vectors[item] for item in ids], pa.list_(pa.float64()))
        self.write("items.parquet", self.items.append_column("meaning", column))

    def promote(self):
        items = catalogue.item_vectors(self.storage, TABLES)
        logged = read_logged(self.storage, TABLES, through=self.days[4])
        encoder = Encoder.fit(logged.filter(pc.invert(pc.ends_with(logged["item_id"], "7"))), self.cfg, items)
        network = build_network(self.cfg, encoder.dims, seed=7)
        with torch.no_grad():
            for parameter in network.global_block.parameters():
                parameter.mul_(1.5)
            network.block("user").pool_weights.normal_(std=3.0, generator=torch.Generator().manual_seed(7))
        self.model = bundle.Model(network, encoder)
        bundle.save(bundle.Bundle(config=self.cfg, refit=self.model, twin=self.model), self.folder / "bundle")
        version = self.registry.register(self.folder / "bundle", self.registry.start_run(RUN), {})
        for shard in fill.plan_fill(self.cfg, version, self.days[4], RUN)["shards"]:
            fill.fill_shard(self.cfg, version, shard, RUN)
        cutover.cut_over(self.cfg, version, RUN)

    def offline(self, items):
        """Logged rows of the sixth day and their scores with the vectors `items`, in one order."""
        logged = read_logged(self.storage, TABLES, through=self.days[5])
        rows = TaskRows.from_logged(logged, self.model.encoder.with_items(items), self.cfg.task_kind)
        start_us = int(schema.day_start(self.days[5]).timestamp() * 1e6)
        specs = as_served(rows, from_us=start_us, support_rows=self.cfg.meta.support_rows)
        queries = query_rows(rows, specs)
        return logged.take(rows.source_row[queries.rows]), score_specs(self.model.network, rows, specs), queries

    def files(self):
        return {path: self.storage.read_bytes(path) for folder in STORED for path in self.storage.walk(folder)}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, start_server):
    shop = Shop(tmp_path_factory.mktemp("vectors"))
    assert shop.registry.champion() is None
    shop.server = start_server(shop.cfg, shop.folder)
    apply(shop.cfg)
    ingest_history(shop.cfg, shop.days[4], TODAY)
    shop.promote()
    ingest_day(shop.cfg, shop.days[5], TODAY)
    shop.server.wait_until("/readyz", 200)
    return shop


def test_every_row_of_the_next_day_is_scored_alike(shop):
    items = catalogue.item_vectors(shop.storage, TABLES)
    logged, offline, queries = shop.offline(items)
    rows = logged.select(["user_id", "item_id", "timestamp"]).to_pylist()
    answers = [shop.server.ranked(row["user_id"], [row["item_id"]], context={"hour": row["timestamp"].hour}) for row in rows]
    served = np.array([answer["items"][0]["score"] for answer in answers])
    assert np.abs(served - offline).max() <= TOLERANCE
    asked, known = set(logged["item_id"].to_pylist()), set(shop.model.encoder.items)
    assert asked & set(WITHOUT)
    assert asked - known
    assert (queries.support_sizes > 0).any()
    # The vectors are what the scores come from: with those of other items they would be others.
    turned = items.set_column(1, items.schema.field(1), items["text"].take(pa.array(range(items.num_rows)[::-1])))
    assert np.abs(served - shop.offline(turned)[1]).max() > 1000 * TOLERANCE
    # So is what users took of them.
    weights = shop.model.network.block("user").pool_weights
    pooled = weights.data.clone()
    weights.data.zero_()
    assert np.abs(served - shop.offline(items)[1]).max() > 1000 * TOLERANCE
    weights.data.copy_(pooled)


def test_no_row_and_no_snapshot_holds_a_vector(shop):
    logged = read_logged(shop.storage, TABLES, through=shop.days[5])
    assert "text" not in logged.column_names
    for folder in ("logged", "snapshots", "catalogue", "catalogue_history"):
        for path in shop.storage.walk(folder):
            assert "text" not in shop.storage.read_table(path).column_names, path
    stored = catalogue.item_vectors(shop.storage, TABLES)
    found = dict(zip(stored["item_id"].to_pylist(), stored["text"].to_pylist(), strict=True))
    assert found == {i: v if v is None else np.float32(v).tolist() for i, v in shop.vectors.items()}


@pytest.mark.parametrize(
    ("spoiled", "error", "message"),
    [
        (
            [1.0] * (WIDTH - 1),
            GateError,
            rf"vector_width_to_be\(text\): width {WIDTH} \[1 rows, e\.g\. item_id i3: 23 numbers\]",
        ),
        ([1.0] * (WIDTH - 1) + [float("nan")], GateError, r"vector_values_to_be_finite\(text\).*item_id i3: nan at place 23\]"),
        (
            [0.0] * WIDTH,
            DataError,
            r"text must stay the vector .* got 0 instead of .* for item_id i3 \(1 items changed\); deliver",
        ),
    ],
)
def test_a_bad_vector_is_refused_and_nothing_is_written(shop, spoiled, error, message):
    """A label of the last day is turned, so that there is something to be ingested."""
    path = shop.folder / "delivered" / "events" / f"dt={shop.days[5]}" / "part.parquet"
    before, day, items = shop.files(), pq.read_table(path, partitioning=None), shop.vectors
    turned = pa.array([1 - label for label in day["label"].to_pylist()], pa.int8())
    shop.write(f"events/dt={shop.days[5]}/part.parquet", day.set_column(day.column_names.index("label"), "label", turned))
    shop.deliver_items(items | {"i3": spoiled})
    try:
        with pytest.raises(error, match=message):
            ingest_day(shop.cfg, shop.days[5], TODAY)
        assert shop.files() == before
    finally:
        pq.write_table(day, path)
        shop.deliver_items(items)


def test_an_item_that_arrives_is_scored_with_its_vector(shop):
    """Before any other feature of it is published, and by the version that serves."""
    new = shop.items.slice(0, 1).set_column(0, "item_id", pa.array(["brand-new"]))
    shop.items = pa.concat_tables([shop.items, new])
    shop.vectors["brand-new"] = np.linspace(-4.0, 4.0, WIDTH).tolist()
    shop.deliver_items(shop.vectors)
    path = shop.folder / "delivered" / "events" / f"dt={shop.days[5]}" / "part.parquet"
    day = pq.read_table(path, partitioning=None)
    pq.write_table(day.slice(0, day.num_rows - 1), path)
    assert ingest_day(shop.cfg, shop.days[5], TODAY)["status"] == "corrected"
    wait_for(lambda: shop.server.rank("nobody", ["brand-new"]).status_code == 200, "an answer about the new item")
    answer = shop.server.ranked("nobody", ["brand-new"], context={"hour": 12})
    encoder = shop.model.encoder.with_items(catalogue.item_vectors(shop.storage, TABLES))
    rows = Rows.from_encoded(encoder.encode({"item_id": ["brand-new"], "hour": 12}, 1))
    with torch.no_grad():
        score = torch.sigmoid(shop.model.network(rows, {})).item()
    assert abs(answer["items"][0]["score"] - score) <= TOLERANCE
