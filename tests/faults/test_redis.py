"""Redis is killed while it is published to, and the network between delays, cuts and drops. It writes what it acknowledges to
its log first, as one does from which embeddings must not be lost.
"""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from limaml.config import FeastConfig
from limaml.features.feature_store import repo_config
from tests.faults.installation import Installation, require_same
from tests.faults.process import DEADLINE_S
from tests.faults.test_killed_verbs import BLUE, WRITING
from tests.polling import wait_for
from tests.ports import unused_ports
from tests.proxy import Proxy

pytestmark = pytest.mark.services

MOST_TRIES = 20
SAME = "rows, files and tags equal an undisturbed run's, byte for byte"


class Redis:
    """A server of our own."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.fail("redis-server must be installed for this test: apt-get install redis-server")
        (self._port,) = unused_ports(1)
        self.address = f"127.0.0.1:{self._port}"
        self.client = redis.Redis(port=self._port)
        self._argv = [program, "--bind", "127.0.0.1", "--port", str(self._port), "--dir", str(folder), "--save", ""]
        self._argv += ["--appendonly", "yes", "--appendfsync", "always"]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)
        wait_for(self._answers, "redis-server's PONG", DEADLINE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def rows(self) -> dict[bytes, dict[bytes, bytes]]:
        return {key: self.client.hgetall(key) for key in self.client.scan_iter()}

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"redis-server ended with {self._process.returncode}"
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:  # also while it loads its log
            return False


class InRedis(Installation):
    """An installation whose rows are in Redis."""

    redis: Redis

    def online(self) -> dict[str, Any]:
        return {key.hex(): row for key, row in self.redis.rows().items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, server: Redis) -> tuple[InRedis, dict[bytes, dict[bytes, bytes]]]:
    """Up to the publication; and what is in Redis before it."""
    installation = InRedis.build(tmp_path_factory.mktemp("faults") / "installation", server.address)
    assert isinstance(installation, InRedis)
    installation.redis = server
    installation.undisturbed(("ingest", "adapt"))
    before = server.rows()
    installation.undisturbed(("publish",))
    return installation, before


@pytest.fixture
def installation(built: tuple[InRedis, dict[bytes, dict[bytes, bytes]]], server: Redis) -> Iterator[InRedis]:
    """Before the publication."""
    installation, before = built
    installation.begin("publish")
    server.client.flushall()
    for key, row in before.items():
        server.client.hset(key, mapping=row)
    yield installation
    installation.end()


@pytest.fixture
def proxy(server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(server.address)
    yield proxy
    proxy.stop()


@pytest.mark.fault(
    "Redis killed while it is published to",
    after=f"the publication fails; with Redis back, the next one leaves all as it should be: {SAME}",
)
def test_redis_is_killed_while_it_is_published_to(installation: InRedis, server: Redis) -> None:
    publisher = installation.start("publish", at=replace(WRITING, call=2, of=BLUE, sends=signal.SIGSTOP))
    publisher.wait_until_stopped()
    server.kill()
    publisher.send(signal.SIGCONT)
    code, result = publisher.ended()
    assert (code, result["status"]) == (1, "failed")
    server.start()
    assert installation.online() != installation.left_by("publish")["online"]
    installation.start("publish").done()
    require_same(installation.state(), installation.left_by("publish"))


@pytest.mark.fault(
    "a network to Redis that delays every answer and cuts every eighth connection",
    after=f"published, at once or by a retry: {SAME}",
)
def test_the_network_delays_and_cuts(installation: InRedis, proxy: Proxy) -> None:
    proxy.delay_s, proxy.cut_every = 0.02, 8
    for _ in range(MOST_TRIES):
        code, result = installation.start("publish", f"--set=feast.online_connection={proxy.address}").ended()
        if code == 0:
            break
        assert code == 1, result
    assert code == 0
    require_same(installation.state(), installation.left_by("publish"))


@pytest.mark.fault(
    "a network to Redis that drops whatever is sent", after=f"the publication fails in time; with the network back, {SAME}"
)
def test_the_network_drops(installation: InRedis, proxy: Proxy) -> None:
    # As it does by default, sooner.
    connection = f"--set=feast.online_connection={proxy.address},socket_timeout=0.3"
    publisher = installation.start("publish", connection, at=replace(WRITING, call=2, of=BLUE, sends=signal.SIGSTOP))
    publisher.wait_until_stopped()
    proxy.silent = True
    publisher.send(signal.SIGCONT)
    code, result = publisher.ended()
    assert code == 1
    assert "Timeout" in result["error"] + result["message"]
    installation.start("publish").done()
    require_same(installation.state(), installation.left_by("publish"))


@pytest.mark.parametrize(
    ("connection", "limits"), [("h:1", ["socket_timeout=10"]), ("h:1,socket_timeout=0.3", ["socket_timeout=0.3"])]
)
def test_redis_is_not_waited_for_for_ever(connection: str, limits: list[str]) -> None:
    settings = repo_config(FeastConfig(online_store="redis", online_connection=connection))
    assert [part for part in settings.online_store.connection_string.split(",") if part.startswith("socket_timeout")] == limits
