"""One engine swapped at a time: Redis with TLS and a password, a cluster, Sentinel; Postgres for registry and lease; S3."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
import pytest
import redis
from sqlalchemy import make_url

from limaml import registry
from limaml.config import Config, ServingConfig
from limaml.embeddings.cutover import cut_over
from limaml.errors import BusyError, StoreError
from limaml.events.ingest import ingest_history
from limaml.features.feature_store import apply, open_store
from limaml.io.lease import lease
from limaml.io.storage import Storage
from serving.features import OnlineFeatures
from serving.store_calls import StoreCalls
from tests.contracts.embedding_world import TODAY, World
from tests.postgres import create_database, postgres_server
from tests.servers import S3_KEYS, create_bucket, redis_cluster, redis_sentinel, redis_with_tls, s3_server

# Feast closes none of its clients; theirs are left to the garbage collector, which says so.
pytestmark = [pytest.mark.services, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def swap(world: World, section: str, **values: object) -> Config:
    """Another engine in one section; what Feast keeps is made on it."""
    part = getattr(world.cfg, section).model_copy(update=values)
    world.cfg = world.cfg.model_copy(update={section: part})
    apply(world.cfg)
    return world.cfg


def publish_all(world: World) -> None:
    """Fill, cut over, and a day after it: every row of the day is read back."""
    version = world.new_version(0)
    world.fill(version)
    cut_over(world.cfg, version, "a run")
    assert world.daily(world.next_day())["written"] > 0


def assert_served_as_published(world: World) -> None:
    """The service's own reader, an asynchronous client, finds for each user what its newest partition holds."""
    champion = world.champion()
    storage = Storage(world.cfg.storage.root)
    newest: dict[str, Any] = {}
    for path in sorted(storage.walk(f"embeddings/kind=user/version={champion.version}")):
        if path.endswith(".parquet") and "shard-" in path:
            newest |= {row["user_id"]: row for row in storage.read_table(path).to_pylist()}
    online, calls = OnlineFeatures(world.cfg, champion.tags[registry.SLOT]), StoreCalls(ServingConfig(store_timeout_s=4.0))
    online.open()

    async def scene() -> list[Any]:
        try:
            return [await online.read_user(user, calls) for user in newest]
        finally:
            online.close()

    try:
        found = asyncio.run(scene())
    finally:
        calls.stop()
    assert len(found) > 10
    for row, fetched in zip(newest.values(), found, strict=True):
        stored = fetched.embeddings["user"]
        assert stored is not None
        np.testing.assert_array_equal(stored.vector, np.array(row["embedding"], np.float32))
        assert (stored.model_version, stored.as_of) == (champion.version, row["as_of"])
        assert fetched.user["gender"] == "F"


def test_redis_with_tls_and_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redis").mkdir()
    world = World(tmp_path)
    with redis_with_tls(tmp_path / "redis") as server:
        monkeypatch.setenv("REDIS_PASSWORD", server.password)
        where = {"online_store": "redis", "online_connection": server.connection, "online_password": "${REDIS_PASSWORD}"}
        swap(world, "feast", **where)
        publish_all(world)
        assert_served_as_published(world)
        for name, value in (("ssl_ca_certs", "/etc/ssl/certs/ca-certificates.crt"), ("username", "nobody")):
            connection = ",".join(part for part in server.connection.split(",") if not part.startswith(name))
            cfg = swap(world, "feast", online_connection=f"{connection},{name}={value}")
            with pytest.raises((redis.ConnectionError, redis.AuthenticationError)):
                open_store(cfg).provider.online_store._get_client(open_store(cfg).config.online_store).ping()


def test_a_redis_cluster(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    world = World(tmp_path)
    with redis_cluster(tmp_path / "redis") as nodes:
        swap(world, "feast", online_store="redis", online_connection=nodes, redis_mode="cluster")
        publish_all(world)
        assert_served_as_published(world)
        sizes = []
        for node in nodes.split(","):
            host, port = node.split(":")
            with redis.Redis(host, int(port)) as client:
                sizes.append(client.dbsize())
        assert min(sizes) > 0, f"the keys are spread over the nodes, got {sizes}"
        # A view is emptied on every node before it is filled again.
        version = world.new_version(1)
        world.fill(version)
        cut_over(world.cfg, version, "a run")
        assert_served_as_published(world)


def test_a_master_that_sentinel_names(tmp_path: Path, redis_server: str) -> None:
    world = World(tmp_path)
    with redis_sentinel(tmp_path, redis_server, "ranking") as sentinel:
        where = {"online_store": "redis", "online_connection": sentinel, "redis_mode": "sentinel"}
        swap(world, "feast", **where, sentinel_master="ranking")
        publish_all(world)
        assert_served_as_published(world)
        cfg = world.cfg.model_copy(update={"feast": world.cfg.feast.model_copy(update={"sentinel_master": "nobody"})})
        with pytest.raises(redis.sentinel.MasterNotFoundError):
            open_store(cfg).provider.online_store._get_client(open_store(cfg).config.online_store).ping()


def test_postgres_holds_feasts_registry_and_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    with postgres_server(tmp_path) as dsn:
        url = make_url(dsn)
        # Named by a variable, held by a file.
        (tmp_path / "password").write_text(f"{url.password}\n")
        monkeypatch.setenv("POSTGRES_PASSWORD_FILE", str(tmp_path / "password"))
        place = f"postgresql+psycopg2://{url.username}:${{POSTGRES_PASSWORD}}@{url.host}:{url.port}"
        feast, limaml = (create_database(dsn, name) for name in ("feast", "limaml"))
        part = world.cfg.embeddings.model_copy(update={"lease_url": f"{place}/limaml"})
        world.cfg = world.cfg.model_copy(update={"embeddings": part})
        swap(world, "feast", registry_type="sql", registry=f"{place}/feast")
        assert apply(world.cfg)["status"] == "unchanged"
        publish_all(world)
        assert_served_as_published(world)
        with lease(world.cfg, "first") as held:
            with pytest.raises(BusyError, match=r"busy: first since"), lease(world.cfg, "second"):
                raise AssertionError("unreachable")
            held.check()
        assert rows(feast, "SELECT count(*) FROM feature_views") == [(4,)]
        [(_, fence)] = rows(limaml, "SELECT store, fence FROM limaml_lease")
        assert fence > 3
        # A second holder after the lease was cut: the database decides, not the holder.
        with lease(world.cfg, "late") as held:
            rows(limaml, "UPDATE limaml_lease SET fence = fence + 1, holder = 'another' RETURNING fence")
            with pytest.raises(BusyError, match=r"late has lost the lease of .*busy: another since"):
                held.check()
    with pytest.raises(StoreError, match=r"lease database postgresql\+psycopg2://limaml:\*\*\*@127\.0\.0\.1:\d+/limaml failed"):
        lease(world.cfg, "a publisher").__enter__()


def test_s3_holds_partitions_and_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    with s3_server(tmp_path) as address:
        for name, value in {**S3_KEYS, "AWS_ENDPOINT_URL": f"http://{address}"}.items():
            monkeypatch.setenv(name, value)
        options = create_bucket(address, "limaml")
        part = world.cfg.registry.model_copy(update={"artifact_root": "s3://limaml/artifacts"})
        world.cfg = world.cfg.model_copy(update={"registry": part})
        swap(world, "storage", root=f"s3://limaml/data{options}")
        world.registry = registry.Registry(world.cfg.registry)
        ingest_history(world.cfg, world.last, TODAY)
        publish_all(world)
        assert_served_as_published(world)
        bucket = Storage(f"s3://limaml{options}")
        assert [path for path in bucket.walk("artifacts") if path.endswith("bundle/refit.safetensors")]
        written = {path.removeprefix("data/") for path in bucket.walk("data")}
        assert {path.split("/")[0] for path in written} >= {"catalogue", "days", "embeddings", "events", "logged", "snapshots"}
        assert not (tmp_path / "data" / "embeddings").exists()
        assert not (tmp_path / "artifacts").exists()


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(dsn)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())
    finally:
        connection.close()
