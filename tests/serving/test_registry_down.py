"""The real service while the MLflow server it polls is down."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from limaml.registry import Registry

NOW = datetime.now(UTC).replace(microsecond=0)
MUCH = {"blue": [2.0, -1.0, 0.5, 1.5], "green": [-2.0, 1.0, -0.5, 1.0]}
ITEMS = ["i1", "i2", "i3"]


class MlflowServer:
    """An MLflow server on a port of its own, which may be ended and started again."""

    def __init__(self, folder, port):
        self.url = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self.command += [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--default-artifact-root",
            f"{folder}/artifacts",
        ]
        self.log_path = folder / "mlflow.log"
        self.process = None

    def start(self, wait_for):
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, "MLflow's health", 180.0)

    def _answers(self):
        assert self.process.poll() is None, self.log_path.read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self):
        """Its workers too: they are its session, which nobody else is in."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory, free_ports, wait_until):
    (port,) = free_ports(1)
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), port)
    server.start(wait_until)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def world(make_world, tmp_path_factory, mlflow_server):
    world = make_world(tmp_path_factory.mktemp("world"))
    registry = world.cfg.registry.model_copy(update={"tracking_uri": mlflow_server.url})
    world.cfg = world.cfg.model_copy(update={"registry": registry})
    world.registry = Registry(registry)
    world.build()
    return world


def serve(world, slot, seed):
    version = world.register(seed=seed, slot=slot, complete_through=NOW - timedelta(days=1))
    world.publish(slot, version, {"much": MUCH[slot]}, as_of=NOW - timedelta(days=1))
    world.registry.set_champion(version)
    return version


def right(world, answer, version, slot):
    scores = {entry["item_id"]: entry["score"] for entry in answer["items"]}
    assert scores == pytest.approx(world.expected(version, "much", ITEMS, MUCH[slot]), abs=1e-6)
    return answer["model_version"] == version


@pytest.mark.fault("MLflow's server gone while serving", after="scores are as before throughout; back, it is followed again")
def test_it_serves_on_without_its_registry_and_follows_it_again(world, mlflow_server, start_server, wait_until):
    blue = serve(world, "blue", 1)
    server = start_server(world.cfg, world.folder)
    server.wait_until("/readyz", 200)
    mlflow_server.stop()
    server.wait_for_log("champion_poll_failed")
    for _ in range(50):
        assert right(world, server.ranked("much", ITEMS), blue, "blue")
    assert server.client.get("/readyz").status_code == 200
    mlflow_server.start(wait_until)
    green = serve(world, "green", 2)
    answer = server.ranked_when(lambda answer: answer["model_version"] == green, "much", ITEMS)
    assert right(world, answer, green, "green")
