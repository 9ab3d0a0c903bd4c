"""The services as processes, each with one worker on a free port of 127.0.0.1, and what can be read off them from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.options import ROOT, BenchmarkError
from benchmarks.serving.client import Check, answered, ranked
from benchmarks.serving.world import CANDIDATES, World
from limaml import telemetry

OURS = ("ours_sqlite", "ours_redis")
SERVICES = ("noop", *OURS, "plain")

_READY_S = 180.0
_STOP_S = 30.0
# As `python -m serving.run` sets them; for the no-op, which is started without it.
_ENVIRONMENT = {"TZ": "UTC", "OTEL_SDK_DISABLED": "true", "BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1"}
# A service ends with the benchmark even when that is killed (prctl(2), PR_SET_PDEATHSIG; it outlives the exec).
_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@dataclass(frozen=True)
class Service:
    name: str
    port: int
    process: "subprocess.Popen[bytes]"
    log_path: Path
    check: Check

    @property
    def is_ours(self) -> bool:
        return self.name in OURS

    def rss_mib(self) -> float:
        """Resident memory of the server and everything below it."""
        total = 0
        for process in _tree(self.process.pid):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 2**20

    def rank(self, body: dict[str, Any]) -> dict[str, Any]:
        """One ranking. Raises BenchmarkError unless it is answered with 200."""
        response = httpx.post(f"http://127.0.0.1:{self.port}/rank", json=body, timeout=10.0, trust_env=False)
        if response.status_code != 200:
            raise BenchmarkError(f"{self.name} must answer with 200, got {response.status_code}: {response.text[:500]}")
        found: dict[str, Any] = response.json()
        return found

    def stages(self) -> dict[str, tuple[float, float]]:
        """Stage -> (seconds so far, requests so far), from /metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=10.0, trust_env=False).text
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(text):
            if family.name == telemetry.RANK_SECONDS:
                for sample in family.samples:
                    if sample.name.endswith(("_sum", "_count")):
                        found.setdefault(sample.labels["stage"], {})[sample.name.rsplit("_", 1)[1]] = sample.value
        return {stage: (values["sum"], values["count"]) for stage, values in found.items()}


@contextmanager
def running(world: World) -> Iterator[dict[str, Service]]:
    """All services, ready; ended in the end, whatever happens."""
    with ExitStack() as stack:
        services = {name: stack.enter_context(_started(name, world)) for name in SERVICES}
        for service in services.values():
            _wait_until_ready(service)
        yield services


@contextmanager
def _started(name: str, world: World) -> Iterator[Service]:
    folder, port = world.folder / name, _free_port()
    folder.mkdir(exist_ok=True)
    log_path = folder / "server.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("BENTOML", "PROMETHEUS", "LIMAML"))}
    environment |= _ENVIRONMENT | {"BENTOML_HOME": str(folder / "bentoml")}
    Path(environment["BENTOML_HOME"]).mkdir()
    command = [sys.executable, "-c", _WITH_PARENT, *_arguments(name, port, folder, world)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield Service(name, port, process, log_path, answered if name == "noop" else ranked(CANDIDATES))
    finally:
        _stop(process)


def _arguments(name: str, port: int, folder: Path, world: World) -> list[str]:
    """Of Python, for each service."""
    if name == "noop":
        return ["-m", "bentoml", "serve", "benchmarks.serving.noop:Noop", "--host", "127.0.0.1", "--port", str(port)]
    if name == "plain":
        parts = {
            "port": port,
            "redis": world.redis,
            "bundle": world.bundle_path,
            "items": world.items_path,
            "version": world.version,
        }
        return ["-m", "benchmarks.serving.plain", *(text for key, value in parts.items() for text in (f"--{key}", str(value)))]
    cfg = world.configs[name].model_dump(mode="json")
    cfg["serving"]["port"] = port
    path = folder / "config.json"
    path.write_text(json.dumps(cfg))
    return ["-m", "serving.run", "--config", str(path)]


def _wait_until_ready(service: Service) -> None:
    deadline, last = time.monotonic() + _READY_S, "no connection"
    while time.monotonic() < deadline and service.process.poll() is None:
        try:
            response = httpx.get(f"http://127.0.0.1:{service.port}/readyz", timeout=5.0, trust_env=False)
            if response.status_code == 200:
                return
            last = f"/readyz {response.status_code}"
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    ended = service.process.poll()
    why = f"it ended with {ended}" if ended is not None else f"{last} after {_READY_S:g} s"
    raise BenchmarkError(f"{service.name} must become ready, but {why}:\n{service.log_path.read_text()[-4000:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL for whatever of it is still there after a while."""
    tree = _tree(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, timeout=_STOP_S)
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
