"""Two at once: of one day, and a cut-over with a daily publication. One is stopped at an exact point while the other comes."""

import signal
from dataclasses import replace

import pytest

from tests.faults.installation import Installation, require_same
from tests.faults.process import Point
from tests.faults.test_killed_verbs import ADAPTING, BLUE, WRITING

PATIENT = "--set=embeddings.lease_ttl_s=120"
"""Nobody takes the lease from one that stands still."""
MID_SLOT = replace(WRITING, call=2, of=BLUE, sends=signal.SIGSTOP)
SAME = "files, rows and tags equal those of one alone, byte for byte"
IN_TURN = "files, rows and tags equal those of one after the other, byte for byte"


@pytest.mark.fault("two ingestions of one day at once", after=f"the second waits and finds the work done; {SAME}")
def test_two_ingestions_of_one_day(installation: Installation) -> None:
    installation.begin("ingest")
    first = installation.start("ingest", at=Point("limaml.events.day_store:EventStore.commit", sends=signal.SIGSTOP))
    first.wait_until_stopped()
    second = installation.start("ingest", at=Point("filelock:FileLock.acquire", sends=signal.SIGSTOP))
    second.wait_until_stopped()
    second.send(signal.SIGCONT)
    first.send(signal.SIGCONT)
    assert first.done()["status"] == "ingested"
    assert second.done()["status"] == "unchanged"
    require_same(installation.state(), installation.left_by("ingest"))


@pytest.mark.fault("two adaptations of one day at once", after=SAME)
def test_two_adaptations_of_one_day(installation: Installation) -> None:
    installation.begin("adapt")
    first = installation.start("adapt", at=replace(ADAPTING, sends=signal.SIGSTOP))
    first.wait_until_stopped()
    installation.start("adapt").done()
    first.send(signal.SIGCONT)
    first.done()
    require_same(installation.state(), installation.left_by("adapt"))


@pytest.mark.fault("two publications of one day at once", after=f"the second waits and finds the work done; {SAME}")
def test_two_publications_of_one_day(installation: Installation) -> None:
    installation.begin("publish")
    first = installation.start("publish", PATIENT, at=MID_SLOT)
    first.wait_until_stopped()
    second = installation.start("publish", PATIENT)
    second.wait_for_log("lease_awaited")
    first.send(signal.SIGCONT)
    first.done()
    code, result = second.ended()
    assert (code, result["status"]) == (99, "unchanged")
    require_same(installation.state(), installation.left_by("publish"))


@pytest.mark.fault(
    "a cut-over while a daily run publishes", after=f"it waits, then brings its version up to that day; {IN_TURN}"
)
def test_a_cut_over_comes_while_a_day_is_published(installation: Installation) -> None:
    installation.begin("publish")
    daily = installation.start("publish", PATIENT, at=MID_SLOT)
    daily.wait_until_stopped()
    switch = installation.start("cut-over", PATIENT)
    switch.wait_for_log("lease_awaited")
    daily.send(signal.SIGCONT)
    daily.done()
    assert switch.done()["days_caught_up"] == 1
    require_same(installation.state(), installation.left_by("cut-over"))


@pytest.mark.fault(
    "a cut-over between a daily run's adaptation and its publication",
    after=f"the day is published for both versions; {IN_TURN}",
)
def test_a_day_is_published_while_a_cut_over_switches(installation: Installation) -> None:
    installation.begin("publish")
    switch = installation.start("cut-over", PATIENT, at=Point("limaml.registry:Registry.set_champion", sends=signal.SIGSTOP))
    switch.wait_until_stopped()
    daily = installation.start("publish", PATIENT)
    daily.wait_for_log("lease_awaited")
    switch.send(signal.SIGCONT)
    switch.done()
    daily.done()
    require_same(installation.state(), installation.left_by("cut-over"))
