"""kill -9 of whoever ingests, adapts, publishes or switches, at an exact point: the verb run again, as Airflow does, leaves
what an undisturbed one leaves.
"""

import signal
from dataclasses import replace

import pytest

from limaml import schema
from tests.faults.installation import Installation, require_same
from tests.faults.process import DEADLINE_S, Point

ADAPTING = Point("limaml.embeddings.stream:Adapter.embed", call=2)
"""One batch of entities is adapted, and the next one begins."""
WRITING = Point("limaml.embeddings.publish:OnlineView.write")
"""The lease was checked, and the rows come next."""
BLUE, GREEN = (schema.embedding_view("user", slot) for slot in schema.SLOTS)
SAME = "files, rows and tags equal an undisturbed run's, byte for byte"


@pytest.mark.parametrize("step", ["fill 0", "adapt"])
@pytest.mark.fault("kill -9 of an adapting task mid-shard, in a fill and in a daily run", after=SAME)
def test_an_adaptation_that_is_killed(installation: Installation, step: str) -> None:
    installation.begin(step)
    before = installation.state()
    installation.start(step, at=ADAPTING).killed()
    require_same(installation.state(), before)
    installation.start(step).done()
    require_same(installation.state(), installation.left_by(step))


@pytest.mark.parametrize(("step", "view"), [("fill 0", GREEN), ("publish", BLUE)])
@pytest.mark.fault("kill -9 of the publisher mid-slot, in a fill and in a daily run", after=SAME)
def test_a_publisher_that_is_killed_mid_slot(installation: Installation, step: str, view: str) -> None:
    installation.begin(step)
    before, complete = installation.state(), installation.left_by(step)
    installation.start(step, at=replace(WRITING, call=2, of=view)).killed()
    half = installation.state()
    assert half["registry"] == before["registry"], "nothing counts as complete"
    assert half["online"][view] not in (before["online"][view], complete["online"][view])
    installation.start(step).done()
    require_same(installation.state(), complete)


@pytest.mark.fault(
    "kill -9 of the holder of the lease between its check and its write, while another waits for it",
    after=f"the other gets the lease once it has expired; {SAME}",
)
def test_a_holder_of_the_lease_that_is_killed_before_it_writes_is_succeeded(installation: Installation) -> None:
    installation.begin("publish")
    # Long enough that nobody takes it from the one that stands still before it is killed.
    ttl = "--set=embeddings.lease_ttl_s=15"
    holder = installation.start("publish", ttl, at=replace(WRITING, of=BLUE, sends=signal.SIGSTOP))
    holder.wait_until_stopped()
    successor = installation.start("publish", ttl)
    successor.wait_for_log("lease_awaited")
    holder.send(signal.SIGKILL)
    holder.killed()
    assert successor.done()["entities"] > 0
    require_same(installation.state(), installation.left_by("publish"))


@pytest.mark.parametrize(
    "at",
    [Point("limaml.registry:Registry.set_tags", call=2), Point("limaml.registry:Registry.set_champion")],
    ids=["between two tags", "before the alias"],
)
@pytest.mark.fault(
    "kill -9 of a cut-over between two tags, and before the alias", after=f"readers see the version they saw; then {SAME}"
)
def test_a_cut_over_that_is_killed(installation: Installation, at: Point) -> None:
    installation.begin("cut-over")
    [champion] = [one for one in installation.registered() if one[-1] == "champion"]
    installation.start("cut-over", at=at).killed()
    assert champion in installation.registered()
    installation.start("cut-over").done()
    require_same(installation.state(), installation.left_by("cut-over"))


@pytest.mark.fault("kill -9 of an ingestion in each of its writes, one after another", after=SAME)
def test_an_ingestion_that_is_killed_in_each_of_its_writes(installation: Installation) -> None:
    installation.begin("ingest")
    for write in range(1, 100):
        # The content lies beside its place, under a hidden name.
        verb = installation.start("ingest", at=Point("limaml.io.atomic:os.replace", call=write))
        verb.process.join(DEADLINE_S)
        if verb.process.exitcode != -signal.SIGKILL:
            break
    assert verb.done()["status"] == "unchanged", "the last write was of the result"
    assert write > 5, "a day has more files"
    require_same(installation.state(), installation.left_by("ingest"))
