"""configs/production.toml on real servers: both DAGs by the real scheduler, requests, a cut-over and a roll-back.

Postgres, Redis with TLS and a password, S3, a Ray cluster of a head and two nodes, and MLflow as a server run on loopback, each
with files of its own. Only addresses, ports and paths differ from the file that ships; `limaml up`, which is `make run`, starts
what is ours. One run for all tests here; the last one stops it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from rich.console import Console
from sqlalchemy import make_url

from limaml.config import Config, load
from limaml.errors import LimamlError
from limaml.io.storage import Storage
from limaml.local import demo, processes, stack
from limaml.local.airflow_api import AirflowApi
from limaml.local.follow import Display, Timing, follow
from tests.polling import wait_for
from tests.postgres import create_database, postgres_server
from tests.servers import S3_KEYS, RayCluster, Redis, create_bucket, ray_cluster, redis_with_tls, s3_server

pytestmark = pytest.mark.production

ROOT = Path(__file__).parents[2]
DATABASES = ("airflow", "mlflow", "feast", "limaml")
DAILY_STATES = {
    "embed_items": "skipped",
    "ingest": "success",
    "adapt": "success",
    "publish": "success",
    "consistency": "skipped",
    "drift": "success",
    "retain": "skipped",
}
SWITCH_DEADLINE_S = 60.0
FLUSH_DEADLINE_S = 90.0
"""The service writes its log every 30 s."""


@dataclass
class World:
    """The servers, and what `limaml up` made on them."""

    cfg: Config
    folder: Path
    environment: dict[str, str]
    postgres: str
    redis: Redis
    ray: RayCluster
    output: str = ""
    moment: datetime = field(default_factory=lambda: datetime.now(UTC))

    def limaml(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "limaml.cli", *arguments, "--config", str(self.folder / "config.json")]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def status(self) -> dict[str, Any]:
        path = self.folder / "status.json"
        done = self.limaml("status", "--result", str(path))
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(path.read_text())
        return status

    def database(self, name: str, query: str) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(f"{self.postgres.rpartition('/')[0]}/{name}")
        try:
            with connection.cursor() as cursor:
                cursor.execute(query)
                return list(cursor.fetchall())
        finally:
            connection.close()

    def users(self) -> list[demo.DemoUser]:
        """Whom to ask for, at one moment, so that two answers of one version are equal."""
        at = {"at": self.moment.isoformat()}
        return [replace(user, context={**user.context, **at}) for user in demo.choose_users(self.cfg)]

    def answer(self, user: demo.DemoUser) -> dict[str, Any]:
        return demo.ask(f"http://127.0.0.1:{self.cfg.serving.port}", user, 60.0, demo.bearer(self.cfg))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("production")
    (folder / "home").mkdir()
    with ExitStack() as servers:
        postgres = servers.enter_context(postgres_server(folder))
        redis = servers.enter_context(redis_with_tls(folder))
        s3 = servers.enter_context(s3_server(folder))
        for name in DATABASES:
            create_database(postgres, name)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= S3_KEYS | {"AWS_ENDPOINT_URL": f"http://{s3}", "HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        ray = servers.enter_context(ray_cluster(folder, environment=S3_KEYS))
        # One secret comes from the environment, the other from a file.
        (folder / "postgres_password").write_text(str(make_url(postgres).password))
        environment |= {"REDIS_PASSWORD": redis.password, "POSTGRES_PASSWORD_FILE": str(folder / "postgres_password")}
        cfg = configuration(folder, postgres, redis, s3, ray, free_ports(3))
        (folder / "config.json").write_text(cfg.model_dump_json())
        made = World(cfg, folder, environment, postgres, redis, ray)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                done = made.limaml("up")
                made.output = done.stdout
                assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
                yield made
            finally:
                made.limaml("stop")


def configuration(folder: Path, postgres: str, redis: Redis, s3: str, ray: RayCluster, ports: list[int]) -> Config:
    """The file that ships, with the addresses of these servers."""
    airflow, mlflow, service = ports
    shipped, options, run = load(ROOT / "configs" / "production.toml"), create_bucket(s3, "limaml"), folder / "run"
    (folder / "token").write_text("a token for the service\n")
    place = f"127.0.0.1:{make_url(postgres).port}"

    def moved(url: str) -> str:
        return url.replace("@postgres:5432", f"@{place}")

    values = {
        "storage.root": shipped.storage.root + options,
        "serving.log_path": shipped.serving.log_path + options,
        "training.storage_path": shipped.training.storage_path + options,
        "registry.tracking_uri": f"http://127.0.0.1:{mlflow}",
        "local.prometheus_port": 0,
        "feast.registry": moved(shipped.feast.registry),
        "feast.online_connection": redis.connection,
        "embeddings.lease_url": moved(shipped.embeddings.lease_url),
        "embeddings.min_dwell_s": 0.0,
        "local.airflow_database": moved(shipped.local.airflow_database),
        "local.mlflow_database": moved(shipped.local.airflow_database).replace("/airflow", "/mlflow"),
        "ray.address": ray.client_address,
        "ray.token_file": ray.token_file,
        "serving.host": "127.0.0.1",
        "serving.token_file": folder / "token",
        "local.run_root": run,
        "local.airflow_port": airflow,
        "local.mlflow_port": mlflow,
        "serving.port": service,
        "monitoring.textfile_dir": run / "metrics",
        # The second candidate is there to be cut over to, not to be better.
        "promotion.per_user_margin": 1.0,
        "promotion.as_served_margin": 1.0,
        "promotion.champion_margin": 1.0,
        "promotion.max_refit_psi": 100.0,
    }
    return load(ROOT / "configs" / "production.toml", [f"{key}={value}" for key, value in values.items()])


@pytest.fixture
def api(world: World) -> Iterator[AirflowApi]:
    running = stack.load_stack(world.cfg, world.folder / "config.json")
    assert running is not None
    client = AirflowApi(running.urls["airflow"], "admin", running.password, 120.0)
    yield client
    client.close()


def run_dag(api: AirflowApi, dag_id: str, conf: dict[str, Any]) -> Timing:
    api.set_paused(dag_id, False)
    try:
        run_id = api.trigger(dag_id, conf)
        with Display(Console(quiet=True)) as display:
            return follow(api, dag_id, run_id, display, lambda: None)
    finally:
        api.set_paused(dag_id, True)


def test_both_dags_ran_and_all_days_are_online(world: World, api: AirflowApi) -> None:
    runs = api._call("GET", "/api/v2/dags/~/dagRuns", params={"order_by": "start_date"})["dag_runs"]
    assert [(run["dag_id"], run["state"]) for run in runs] == [("limaml_train", "success"), *[("limaml_daily", "success")] * 2]
    for run in runs[1:]:
        assert {task.task_id: task.state for task in api.task_instances("limaml_daily", run["dag_run_id"])} == DAILY_STATES
    status = world.status()
    assert (status["champion"], status["current"], status["pending"]) == ("1", True, [])


def test_each_engine_holds_its_part_and_the_machine_none_of_it(world: World) -> None:
    assert world.database("airflow", "SELECT count(*) FROM dag_run WHERE state = 'success'") == [(3,)]
    assert world.database("mlflow", "SELECT name, version FROM model_versions") == [("limaml", 1)]
    views = {name for (name,) in world.database("feast", "SELECT feature_view_name FROM feature_views")}
    assert {"user_features", "item_features", "meta_embedding_user_blue", "meta_embedding_user_green"} <= views
    leases = {name for (name,) in world.database("limaml", "SELECT store FROM limaml_lease WHERE fence > 0")}
    assert {"ingest of s3://limaml/data", "feast-apply of s3://limaml/data"} <= leases
    assert any(name.startswith("limaml@redis:127.0.0.1:") and "ssl_ca_certs" not in name for name in leases)
    assert world.redis.client.dbsize() > 90, "a key a user"
    bucket = Storage(world.cfg.storage.root.replace("limaml/data", "limaml"))
    assert {"data", "mlflow"} <= set(bucket.list(""))
    assert [path for path in bucket.walk("mlflow") if path.endswith("refit.safetensors")]
    assert not list(bucket.walk("ray")), "what a training run leaves is removed when it is done"
    local = [path for path in world.folder.joinpath("run").rglob("*") if path.is_file() and "candidates" not in path.parts]
    # The service's workers add their metrics up through files of prometheus_client, which have the same ending.
    assert not [path for path in local if path.suffix in (".db", ".parquet", ".safetensors") and "bentoml" not in path.parts]


def test_training_and_adapting_ran_on_the_cluster(world: World) -> None:
    logs = "".join(path.read_text() for path in (world.folder / "run" / "airflow" / "logs").rglob("*.log"))
    assert "adapting_on_cluster" in logs
    sessions = [node for node in world.ray.nodes if processes.is_alive(node)]
    assert len(sessions) == 3
    assert not (world.folder / "run" / "ray").exists(), "no Ray of its own was started"


def test_what_is_stored_is_what_one_machine_stores(world: World) -> None:
    """The same verb on a folder, a file's lock and a file registry: every byte of events, logged rows and snapshots."""
    alone = world.folder / "alone"
    local = {
        "storage.root": alone / "data",
        "feast.registry_type": "file",
        "feast.registry": alone / "registry.db",
        "feast.online_store": "sqlite",
        "feast.online_connection": alone / "online.db",
        "feast.online_password": "",
        "embeddings.lease_url": f"sqlite:///{alone}/lease.db",
    }
    settings = [part for key, value in local.items() for part in ("--set", f"{key}={value}")]
    assert world.limaml("apply", *settings).returncode == 0
    last = world.status()["last_day"]
    done = world.limaml("ingest", "--through", last, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    here, there = Storage(str(alone / "data")), Storage(world.cfg.storage.root)
    for folder in ("catalogue", "events", "logged", "snapshots"):
        paths = list(here.walk(folder))
        assert paths == list(there.walk(folder))
        for path in paths:
            assert here.read_bytes(path) == there.read_bytes(path), path


def test_the_service_ranks_for_whoever_has_its_token(world: World) -> None:
    much, few, never = world.users()
    for user, fallback in ((much, None), (few, None), (never, "missing")):
        answer = world.answer(user)
        assert answer["model_version"] == "1"
        assert sorted(item["item_id"] for item in answer["items"]) == sorted(user.candidates)
        assert answer["embeddings"]["user"]["fallback"] == fallback
    with pytest.raises(LimamlError, match="401"):
        demo.ask(f"http://127.0.0.1:{world.cfg.serving.port}", much, 10.0)


def test_a_second_version_is_filled_and_cut_over_to_and_rolled_back(world: World, api: AirflowApi) -> None:
    through = date.fromisoformat(world.status()["last_day"]) - timedelta(days=world.cfg.local.daily_days)
    much = world.users()[0]
    first = world.answer(much)
    timing = run_dag(api, "limaml_train", {"through": through.isoformat(), "inner_steps": 1})
    assert set(timing.skipped) == {"embed_items"}
    status = world.status()
    assert (status["champion"], status["previous"], status["pending"]) == ("2", "1", [])
    wait_for(lambda: world.answer(much)["model_version"] == "2", "the service with version 2", SWITCH_DEADLINE_S)
    second = world.answer(much)
    assert second["embeddings"]["user"]["fallback"] is None
    assert [item["score"] for item in second["items"]] != [item["score"] for item in first["items"]]

    done = world.limaml("rollback", "--version", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    wait_for(lambda: world.answer(much)["model_version"] == "1", "the service with version 1 again", SWITCH_DEADLINE_S)
    assert world.answer(much)["items"] == first["items"]


def test_stop_ends_what_is_ours_and_the_requests_are_logged(world: World) -> None:
    log = Storage(world.cfg.serving.log_path)

    def logged() -> set[str]:
        return {version for path in log.walk("") for version in log.read_table(path)["model_version"].to_pylist()}

    wait_for(lambda: logged() == {"1", "2"}, "requests of both versions in the log", FLUSH_DEADLINE_S)
    assert world.limaml("stop").returncode == 0
    assert all(processes.is_alive(node) for node in world.ray.nodes), "the cluster is somebody else's"
