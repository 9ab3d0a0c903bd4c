"""Postgres under the registry and the lease crashes and comes back, while verbs are at work."""

import signal
from collections.abc import Iterator
from dataclasses import replace

import psycopg2
import pytest

from limaml.config import EmbeddingsConfig
from limaml.errors import BusyError, StoreError
from limaml.io.lease import lease_named
from tests.faults.installation import STEPS, Installation, registered_in, require_same
from tests.faults.process import Point
from tests.faults.test_killed_verbs import BLUE, SAME, WRITING
from tests.postgres import Postgres, running_postgres

pytestmark = pytest.mark.services

STOPPED = {
    "publish": replace(WRITING, call=2, of=BLUE, sends=signal.SIGSTOP),
    "cut-over": Point("limaml.registry:Registry.set_champion", sends=signal.SIGSTOP),
}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with running_postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.mark.fault(
    "Postgres crashes and restarts under the lease",
    after="the holder still holds it, nobody else got it; while it is away nothing is written",
)
def test_the_lease_outlives_its_database(postgres: Postgres) -> None:
    settings = EmbeddingsConfig(lease_url=postgres.dsn)
    with lease_named(settings, "a store", "publish of run-1", wait_s=0.0) as held:
        postgres.stop(signal.SIGQUIT)
        with pytest.raises(StoreError, match=r"(?s)lease database .* failed: .*; is it running and writable\?"):
            held.check()
        postgres.start()
        with pytest.raises(BusyError, match="busy: publish of run-1"), lease_named(settings, "a store", "fill", wait_s=0.5):
            raise AssertionError("two held one lease")
        held.check()


@pytest.mark.fault(
    "Postgres crashes and restarts under MLflow and the lease, while a day is published and a cut-over switches", after=SAME
)
def test_verbs_outlive_the_database_of_registry_and_lease(
    built: Installation, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    installation = Installation.build(tmp_path_factory.mktemp("faults") / "installation", postgres=postgres.dsn)
    before_the_faults = STEPS[: STEPS.index("publish")]
    installation.registered = lambda: set()  # type: ignore[method-assign]
    installation.undisturbed(before_the_faults)
    for step in STEPS[len(before_the_faults) :]:
        verb = installation.start(step, at=STOPPED[step])
        verb.wait_until_stopped()
        postgres.stop(signal.SIGQUIT)
        postgres.start()
        verb.send(signal.SIGCONT)
        code, result = verb.ended()
        if code != 0:
            assert (code, result["error"]) == (1, "StoreError"), result
            installation.start(step).done()
        connection = psycopg2.connect(postgres.dsn)
        found = {"registry": registered_in(connection), "online": installation.online(), "files": installation.files()}
        connection.close()
        require_same(found, built.left_by(step))
    installation.end()
