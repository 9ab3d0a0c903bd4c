"""The lease: two real processes contend for it, a dead holder is succeeded, and the old holder is stopped."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from limaml.config import Config, EmbeddingsConfig, FeastConfig, SourceConfig
from limaml.errors import BusyError, ConfigError, StoreError
from limaml.io.lease import _LeaseTable, holder_name, lease, store_identity
from tests.polling import wait_for

DEADLINE_S = 20.0
# Holds the lease; each line on its standard input is a check, its end releases the lease.
HOLDER = """
import sys
from limaml.config import Config
from limaml.io.lease import lease
with lease(Config.model_validate_json(sys.argv[1]), "publish of run-1") as held:
    print(held.fence, flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("held", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
"""


def config(root: Path, *, ttl_s: float = 60.0, wait_s: float = 0.0, online: str = "online.db") -> Config:
    return Config(
        source=SourceConfig(kind="synthetic"),
        feast=FeastConfig(online_connection=str(root / online)),
        embeddings=EmbeddingsConfig(lease_url=f"sqlite:///{root}/new/lease.db", lease_ttl_s=ttl_s, lease_wait_s=wait_s),
    )


class Holder:
    """A process that holds the lease."""

    def __init__(self, cfg: Config) -> None:
        command = [sys.executable, "-c", HOLDER, cfg.model_dump_json()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "1"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def check(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.line()

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def start_holder() -> Iterator[Callable[[Config], Holder]]:
    started: list[Holder] = []

    def start(cfg: Config) -> Holder:
        started.append(Holder(cfg))
        return started[-1]

    yield start
    for holder in started:
        holder.process.kill()
        holder.process.wait()
        for pipe in (holder.process.stdin, holder.process.stdout):
            assert pipe is not None
            pipe.close()


def test_the_loser_is_told_who_holds_it_and_since_when(tmp_path: Path, start_holder: Callable[[Config], Holder]) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    start_holder(config(tmp_path))
    with pytest.raises(BusyError) as refused, lease(config(tmp_path), "fill of run-2"):
        raise AssertionError("two processes held one lease")
    told = re.fullmatch(r"busy: publish of run-1 since (\S+)Z; wait until it has ended and run again .*", str(refused.value))
    assert told is not None
    assert before <= datetime.fromisoformat(told[1]).replace(tzinfo=UTC) <= datetime.now(UTC)


def test_a_waiting_process_gets_it_when_the_holder_ends(tmp_path: Path, start_holder: Callable[[Config], Holder]) -> None:
    start_holder(config(tmp_path)).end_input()
    with lease(config(tmp_path, wait_s=DEADLINE_S), "fill of run-2") as held:
        assert held.fence == 2
        held.check()


@pytest.mark.fault("kill -9 of a holder of the lease", after="another gets it after `lease_ttl_s`, with a higher number")
def test_a_killed_holder_is_succeeded_after_the_ttl(tmp_path: Path, start_holder: Callable[[Config], Holder]) -> None:
    holder = start_holder(config(tmp_path, ttl_s=1.0))
    holder.process.kill()
    with lease(config(tmp_path, ttl_s=1.0, wait_s=DEADLINE_S), "fill of run-2") as held:
        assert held.fence == 2


def test_a_live_holder_keeps_it_beyond_the_ttl(tmp_path: Path, start_holder: Callable[[Config], Holder]) -> None:
    holder = start_holder(config(tmp_path, ttl_s=0.6))
    with pytest.raises(BusyError, match="busy: publish of run-1"), lease(config(tmp_path, ttl_s=0.6, wait_s=1.5), "fill"):
        raise AssertionError("a renewed lease was taken")
    assert holder.check() == "held"


@pytest.mark.fault(
    "a holder of the lease that stands still for longer than `lease_ttl_s`",
    after="it is stopped before its next write, and its successor keeps the lease",
)
def test_a_holder_that_slept_too_long_can_neither_write_nor_release(
    tmp_path: Path, start_holder: Callable[[Config], Holder]
) -> None:
    holder = start_holder(config(tmp_path, ttl_s=1.0))
    holder.process.send_signal(signal.SIGSTOP)
    with lease(config(tmp_path, wait_s=DEADLINE_S), "fill of run-2") as held:
        assert held.fence == 2
        holder.process.send_signal(signal.SIGCONT)
        assert re.match(
            r"BusyError: publish of run-1 has lost the lease of .* \(fence 1\): busy: fill of run-2", holder.check()
        )
        holder.end_input()
        assert holder.process.wait(DEADLINE_S) == 0
        held.check()
        with pytest.raises(BusyError, match="busy: fill of run-2"), lease(config(tmp_path), "third"):
            raise AssertionError("the old holder's release freed the new holder's lease")


@pytest.mark.fault("the lease's database away for a moment", after="the holder still holds it, nobody else got it")
def test_a_database_that_is_away_for_a_moment_costs_nobody_the_lease(tmp_path: Path) -> None:
    database, aside = tmp_path / "new" / "lease.db", tmp_path / "aside.db"
    with capture_logs() as said, lease(config(tmp_path, ttl_s=1.5), "publish of run-1") as held:
        database.rename(aside)
        wait_for(lambda: any(line["event"] == "lease_renewal_failed" for line in said), "a renewal that fails")
        aside.replace(database)
        with pytest.raises(BusyError, match="busy: publish of run-1"), lease(config(tmp_path, wait_s=2.0), "fill of run-2"):
            raise AssertionError("the lease was not renewed any more")
        held.check()


def test_a_lease_is_free_from_the_instant_on_at_which_it_expires(tmp_path: Path) -> None:
    table = _LeaseTable(f"sqlite:///{tmp_path}/lease.db", "a store", ttl_s=10.0)
    for now, fence in ((100.0, 1), (109.5, None), (110.0, 2)):
        table._now = sa.literal(now)
        assert table.acquire("fill") == fence


@pytest.mark.parametrize("losses", [2, 3])
def test_who_loses_the_race_to_make_the_table_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: int) -> None:
    lost, transaction = list(range(losses)), _LeaseTable._transaction

    @contextmanager
    def losing(table: _LeaseTable) -> Iterator[Any]:
        if lost:
            lost.pop()
            raise StoreError("table limaml_lease already exists")
        with transaction(table) as connection:
            yield connection

    monkeypatch.setattr(_LeaseTable, "_transaction", losing)
    with pytest.raises(StoreError, match="already exists") if losses == 3 else nullcontext():
        assert _LeaseTable(f"sqlite:///{tmp_path}/lease.db", "a store", ttl_s=10.0).acquire("fill") == 1


def test_different_stores_have_different_leases(tmp_path: Path) -> None:
    with lease(config(tmp_path), "publish"):
        with lease(config(tmp_path, online="other.db"), "publish") as other:
            other.check()
        with pytest.raises(BusyError, match="busy: publish since"), lease(config(tmp_path), "fill"):
            raise AssertionError("the end of one lease freed the other")


def test_a_store_is_named_without_its_secrets() -> None:
    redis = FeastConfig(online_store="redis", online_connection="redis:6379,ssl=true", online_password="${REDIS_PASSWORD}")
    assert store_identity(redis) == "limaml@redis:redis:6379,ssl=true"
    named = redis.model_copy(update={"online_connection": "redis:6379,username=writer,ssl=true"})
    assert store_identity(named) == store_identity(redis), "whoever logs in, it is the same store"
    assert store_identity(redis.model_copy(update={"project": "other"})) == "other@redis:redis:6379,ssl=true"
    relative, absolute = (FeastConfig(online_connection=path) for path in ("x/online.db", str(Path("x/online.db").absolute())))
    assert store_identity(relative) == store_identity(absolute)


def test_the_holder_names_verb_run_and_process() -> None:
    assert re.fullmatch(r"fill of scheduled__1 \(.+, process \d+\)", holder_name("fill", "scheduled__1"))


@pytest.mark.parametrize(
    ("url", "message"),
    [("nonsense", "must be an SQLAlchemy URL"), ("mysql://h/d", "must be of sqlite or postgresql, got mysql")],
)
def test_a_wrong_url_is_a_configuration_error(tmp_path: Path, url: str, message: str) -> None:
    cfg = config(tmp_path).model_copy(update={"embeddings": EmbeddingsConfig(lease_url=url)})
    with pytest.raises(ConfigError, match=message), lease(cfg, "publish"):
        raise AssertionError("unreachable")


def test_a_database_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "lease.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"lease database sqlite:///.*lease\.db failed"), lease(config(tmp_path), "publish"):
        raise AssertionError("unreachable")
