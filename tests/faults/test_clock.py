"""The clock steps back: of the database that holds the lease, and of the machine on which the verbs run."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from limaml.config import EmbeddingsConfig
from limaml.errors import BusyError
from limaml.io import lease as leases
from limaml.io.lease import _LeaseTable, lease_named
from tests.faults.installation import Installation, require_same
from tests.faults.test_killed_verbs import BLUE, SAME, WRITING

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@pytest.fixture
def settings(tmp_path: Path) -> EmbeddingsConfig:
    return EmbeddingsConfig(lease_url=f"sqlite:///{tmp_path}/lease.db", lease_ttl_s=1.0)


@pytest.fixture
def set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the lease's database back, for all who have it open."""
    with closing(sqlite3.connect(tmp_path / "lease.db")) as database, database:
        database.execute("CREATE TABLE clock AS SELECT 0.0 AS behind_s")
    monkeypatch.setitem(leases._NOW, "sqlite", f"({leases._NOW['sqlite']} - (SELECT behind_s FROM clock))")

    def change(seconds: float) -> None:
        with closing(sqlite3.connect(tmp_path / "lease.db", timeout=10)) as database, database:
            database.execute("UPDATE clock SET behind_s = ?", [seconds])

    return change


@pytest.mark.fault(
    "the clock of the lease's database steps back an hour after its holder died",
    after="the lease is free `lease_ttl_s` after it is next asked for, not an hour later",
)
def test_a_dead_holders_lease_frees_itself_though_the_clock_went_back(
    settings: EmbeddingsConfig, set_back: Callable[[float], None]
) -> None:
    assert _LeaseTable(settings.lease_url, "a store", settings.lease_ttl_s).acquire("a holder that dies") == 1
    set_back(HOUR_S)
    with lease_named(settings, "a store", "another", wait_s=30.0) as held:
        assert held.fence == 2
        held.check()


@pytest.mark.fault(
    "the clock of the lease's database steps back an hour while its holder lives",
    after="nobody else gets the lease, and the holder may write",
)
def test_a_live_holder_keeps_its_lease_though_the_clock_went_back(
    settings: EmbeddingsConfig, set_back: Callable[[float], None]
) -> None:
    with lease_named(settings, "a store", "a holder that lives", wait_s=0.0) as held:
        set_back(HOUR_S)
        with pytest.raises(BusyError, match="busy: a holder that lives"), lease_named(settings, "a store", "another", 2.5):
            raise AssertionError("two held one lease")
        held.check()


@pytest.mark.fault("the clock steps back a day between a publisher that is killed and the next", after=SAME)
def test_a_day_is_published_though_the_clock_went_back(installation: Installation) -> None:
    installation.begin("publish")
    installation.start("publish", at=replace(WRITING, call=2, of=BLUE)).killed()
    installation.start("publish", clock_back_s=DAY_S).done()
    require_same(installation.state(), installation.left_by("publish"))
