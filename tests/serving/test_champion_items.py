"""Embeddings of items, and of what requests name, as the poller reads them: at loading, when a day is published, and when
the store fails.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from limaml import registry, schema
from limaml.config import FeatureConfig, TaskKindConfig
from limaml.embeddings.published import PublishedEntities
from limaml.errors import ConfigError, StoreError
from limaml.features.columns import CategoryEncoder
from limaml.features.online.sqlite import BulkSqliteOnlineStore
from limaml.io.storage import Storage
from serving.champion import Champion
from serving.features import OnlineFeatures
from serving.metrics import Metrics

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
ITEM = TaskKindConfig(name="item", entity_column="item_id")
PAGE = TaskKindConfig(name="page", entity_column="page")
ITEM_TAG, PAGE_TAG = "limaml.complete_through.item", "limaml.complete_through.page"


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("items"))
    features = (*world.cfg.features, FeatureConfig(entity="context", name="page", type="category"))
    world.cfg = world.cfg.model_copy(update={"features": features, "task_kinds": (*world.cfg.task_kinds, ITEM, PAGE)})
    columns = world.encoder.columns | {"page": CategoryEncoder(("front",))}
    world.encoder = replace(world.encoder, features=features, columns=columns)
    world.build()
    world.version = world.register(seed=1, slot="blue", complete_through=NOW - DAY)
    world.registry.set_tags(world.version, dict.fromkeys((ITEM_TAG, PAGE_TAG), (NOW - DAY).isoformat()))
    world.registry.set_champion(world.version)
    publish(world, {item: [float(at), 0.0, 1.0, 0.0] for at, item in enumerate(world.items[:6])}, as_of=NOW - 2 * DAY)
    return world


def publish(world, vectors, *, as_of, version=None, kind=ITEM):
    rows = [
        {
            kind.entity_column: entity,
            "as_of": as_of,
            "embedding": vector,
            "model_version": version or world.version,
            "support_size": 3,
            "last_event_at": as_of - DAY,
        }
        for entity, vector in vectors.items()
    ]
    stem = f"embeddings/kind={kind.name}/version={world.version}/dt={as_of.date()}/shard-000"
    storage = Storage(world.cfg.storage.root)
    storage.write_table(f"{stem}.parquet", pa.Table.from_pylist(rows))
    storage.write_json(f"{stem}.json", {})
    world._write(schema.embedding_view(kind.name, "blue"), pa.Table.from_pylist(rows))


@pytest.fixture
def champion(world):
    made = Champion(world.cfg, Metrics(CollectorRegistry()))
    yield made
    made.stop()


def looked_up(champion):
    loaded = champion.loaded
    return loaded.held["item"].look_up(
        range(len(loaded.items.catalogue)), max_lag_s=30 * DAY.total_seconds(), use_stale=False, now=NOW
    )


def test_they_are_read_with_the_version_and_again_when_a_day_is_published(world, champion):
    champion.poll()
    assert champion.loaded.others_complete == {"item": NOW - DAY, "page": NOW - DAY}
    found = looked_up(champion)
    assert found.counts == {"fresh": 6, "missing": 2}
    np.testing.assert_array_equal(found.vector_RD[:6, 0], range(6))
    np.testing.assert_array_equal(found.vector_RD[6:], [champion.loaded.prior["item"]] * 2)
    assert found.age_s == DAY.total_seconds(), "what a day left alone is as fresh as the day"
    publish(world, {"i1": [9.0, 0.0, 1.0, 0.0], "i7": [8.0, 0.0, 1.0, 0.0]}, as_of=NOW)
    champion.poll()
    assert looked_up(champion).counts["missing"] == 2, "read when the day is complete, not before"
    world.registry.set_tags(world.version, {ITEM_TAG: NOW.isoformat()})
    champion.poll()
    found = looked_up(champion)
    assert (found.counts, found.age_s) == ({"fresh": 7, "missing": 1}, 0.0)
    assert found.vector_RD[0, 0] == 9.0
    assert found.vector_RD[6, 0] == 8.0
    assert champion.loaded.complete_through == NOW - DAY, "the user's kind has its own"


def test_rows_of_another_version_and_of_another_width_do_not_count(world, champion):
    publish(world, {"i2": [1.0] * 4}, as_of=NOW + DAY, version="999")
    publish(world, {"i3": [1.0] * 3}, as_of=NOW + DAY)
    champion.poll()
    assert looked_up(champion).counts["version_mismatch"] == 1
    assert looked_up(champion).counts["store_error"] == 1


def test_a_store_that_fails_leaves_what_was_read_with_the_day_it_was_of(world, champion, monkeypatch):
    champion.poll()
    before, through = looked_up(champion), champion.loaded.others_complete["item"]
    with monkeypatch.context() as broken, capture_logs() as said:

        def fails(*_):
            raise StoreError("the disk is gone")

        broken.setattr(OnlineFeatures, "read_embeddings", fails)
        world.registry.set_tags(world.version, {ITEM_TAG: (NOW + DAY).isoformat()})
        for _ in range(3):
            champion.poll()
    assert [line["event"] for line in said].count("embeddings_refresh_failed") == 1
    kept = champion.loaded.held["item"]
    assert kept.complete_through == through
    np.testing.assert_array_equal(looked_up(champion).vector_RD, before.vector_RD)
    champion.poll()
    assert champion.loaded.held["item"].complete_through == NOW + DAY


def test_a_version_that_loads_without_the_store_serves_the_prior(world, champion, monkeypatch):
    with monkeypatch.context() as broken:

        def fails(*_):
            raise StoreError("the disk is gone")

        broken.setattr(OnlineFeatures, "read_embeddings", fails)
        champion.poll()
        assert looked_up(champion).counts == {"store_error": 8}
    champion.poll()
    assert "fresh" in looked_up(champion).counts


def test_what_requests_name_is_found_by_the_partitions_and_kept_where_these_cannot_be_read(world, champion, monkeypatch):
    def statuses():
        held = champion.loaded.held["page"]
        of_now = {"max_lag_s": 30 * DAY.total_seconds(), "use_stale": False, "now": NOW}
        return [held.look_up([0], page, **of_now).status for page in ("front", "new", None)]

    with monkeypatch.context() as broken:

        def fails(*_):
            raise OSError("the disk is gone")

        broken.setattr(PublishedEntities, "read", fails)
        champion.poll()
        assert statuses() == ["store_error"] * 3
    publish(world, {"front": [1.0, 0.0, 1.0, 0.0]}, as_of=NOW - DAY, kind=PAGE)
    champion.poll()
    assert statuses() == ["fresh", "missing", "missing"]
    publish(world, {"new": [2.0, 0.0, 1.0, 0.0]}, as_of=NOW, kind=PAGE)
    world.registry.set_tags(world.version, {PAGE_TAG: NOW.isoformat()})
    with monkeypatch.context() as broken:
        broken.setattr(PublishedEntities, "read", fails)
        champion.poll()
        assert statuses() == ["fresh", "missing", "missing"]
        assert champion.loaded.held["page"].complete_through == NOW - DAY
    champion.poll()
    assert statuses() == ["fresh", "fresh", "missing"]


def test_one_row_that_feast_did_not_write_spoils_no_other(world, champion, monkeypatch):
    plain = BulkSqliteOnlineStore.read_rows

    def read(store, config, view, names, keys):
        rows = plain(store, config, view, names, keys)
        if "embedding" in names:
            stamp, values = rows[0]
            rows[0] = (stamp, (b"\xff\xff", *values[1:]))
        return rows

    monkeypatch.setattr(BulkSqliteOnlineStore, "read_rows", read)
    champion.poll()
    found = looked_up(champion)
    assert found.counts["fresh"] >= 3
    np.testing.assert_array_equal(found.vector_RD[0], champion.loaded.prior["item"])


def test_the_first_kind_must_be_the_user_s(world):
    cfg = world.cfg.model_copy(update={"task_kinds": (ITEM,)})
    with pytest.raises(ConfigError, match="item must hang on user_id to be served, got item_id"):
        Champion(cfg, Metrics(CollectorRegistry()))


def test_tags_move_in_an_order_in_which_the_first_kind_s_speaks_for_all():
    assert list(registry.complete_through_tags(["user", "item"]).items()) == [
        ("item", ITEM_TAG),
        ("user", registry.COMPLETE_THROUGH),
    ]
