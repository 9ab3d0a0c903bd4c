"""What tests of several folders share: their environment, and the real ranking service and a Redis server as processes.

The environment is set before any package that reads it is imported, and inherited by every process that a test starts: UTC,
nothing calls home, and a home of its own for packages that keep something there.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from tests.polling import wait_for
from tests.ports import unused_ports

_HOME = tempfile.mkdtemp(prefix="limaml-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("AIRFLOW", "BENTOML", "FEAST", "LIMAML", "MLFLOW", "RAY"))]:
    del os.environ[_name]
os.environ.update(
    {
        "HOME": _HOME,
        "TZ": "UTC",
        "OMP_NUM_THREADS": "1",
        "AIRFLOW_HOME": f"{_HOME}/airflow",
        "BENTOML_HOME": f"{_HOME}/bentoml",
        "MPLCONFIGDIR": f"{_HOME}/matplotlib",
        "GX_ANALYTICS_ENABLED": "False",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "BENTOML_DO_NOT_TRACK": "True",
        "OTEL_SDK_DISABLED": "true",
    }
)
time.tzset()

ROOT = Path(__file__).parents[1]
# Its start takes about ten seconds on an idle machine, most of it imports.
START_DEADLINE_S = 120.0


@pytest.fixture(scope="session")
def free_ports():
    return unused_ports


@pytest.fixture(scope="session")
def wait_until():
    return wait_for


# As `python -m serving.run`, but it ends with the tests even when they are killed (prctl(2), PR_SET_PDEATHSIG).
_START = """
import ctypes, runpy, signal
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
runpy.run_module("serving.run", run_name="__main__")
"""


class Server:
    """The real service on a free port, and a client for it."""

    def __init__(self, cfg, folder):
        (self.port,) = unused_ports(1)
        cfg = cfg.model_copy(update={"serving": cfg.serving.model_copy(update={"port": self.port})})
        self.config_path = folder / "config.json"
        self.config_path.write_text(json.dumps(cfg.model_dump(mode="json")))
        self.log_path = folder / "server.log"
        environment = {**os.environ, "BENTOML_HOME": str(folder / "bentoml"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _START, "--config", str(self.config_path)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10.0, trust_env=False)

    def wait_until(self, path, status):
        """Wait for an answer of `status` on `path`; fails at once, with the log, when the server has died."""

        def answered():
            if self.process.poll() is not None:
                raise AssertionError(f"server ended with {self.process.returncode}:\n{self.log_path.read_text()[-4000:]}")
            try:
                return self.client.get(path).status_code == status
            except httpx.TransportError:
                return False

        try:
            wait_for(answered, f"{path} {status}", START_DEADLINE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_path.read_text()[-4000:]}") from None

    def rank(self, user="much", items=("i1", "i2", "i3"), **more):
        """POST /rank with hour 12 unless told otherwise; returns the response."""
        body = {"user_id": user, "item_ids": list(items), "context": {"hour": 12}} | more
        return self.client.post("/rank", json=body)

    def ranked(self, *arguments, **more):
        response = self.rank(*arguments, **more)
        assert response.status_code == 200, response.text
        return response.json()

    def ranked_when(self, condition, *arguments, **more):
        """The first answer that fulfils `condition`."""
        found = []

        def fulfilled():
            found.append(self.ranked(*arguments, **more))
            return condition(found[-1])

        wait_for(fulfilled, f"an answer that fulfils the condition (last: {found[-1:]})")
        return found[-1]

    def metric(self, name, **labels):
        """Value of one sample on /metrics, None if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return None

    def wait_for_log(self, *texts):
        """Wait for a log line that holds all of `texts`."""

        def logged():
            return any(all(text in line for text in texts) for line in self.log_path.read_text().splitlines())

        wait_for(logged, f"a log line with {texts}")

    def stop(self):
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="module")
def start_server():
    """`start_server(cfg, folder)` starts a server that ends with the module; it chooses the port."""
    started = []

    def start(cfg, folder):
        started.append(Server(cfg, folder))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    """`host:port` of a Redis server of our own, empty and without files; for tests marked `services`."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail("redis-server must be installed for this test: apt-get install redis-server")
    (port,), folder = unused_ports(1), tmp_path_factory.mktemp("redis")
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def answers():
        if process.poll() is not None:
            raise AssertionError(f"redis-server ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
        except ConnectionRefusedError:
            return False

    try:
        wait_for(answers, "redis-server's PONG", deadline_s=20.0)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
