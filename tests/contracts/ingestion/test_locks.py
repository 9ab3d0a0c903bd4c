"""One ingestion and one apply at a time, on a folder and on a URL (contract 11)."""

import threading

import pytest

from limaml.config import FeatureConfig, StorageConfig
from limaml.errors import BusyError, GateError
from limaml.events import catalogue, ingest, snapshots
from limaml.events.day_store import EventStore
from limaml.features import feature_store
from limaml.io import locks
from limaml.io.lease import lease_named
from limaml.io.locks import exclusive
from tests import declared

DEADLINE_S = 60.0


@pytest.fixture(params=["folder", "url"])
def cfg(delivery, request):
    """A root of each kind; a `file://` URL is one, and takes the lock of URLs."""
    root = f"{'file://' if request.param == 'url' else ''}{delivery.folder}/data"
    lease = delivery.cfg.embeddings.model_copy(update={"lease_url": f"sqlite:///{delivery.folder}/lease.db"})
    storage = delivery.cfg.storage.model_copy(update={"root": root})
    return delivery.cfg.model_copy(update={"storage": storage, "embeddings": lease})


def test_a_second_one_waits_for_the_first(cfg):
    entered, leave, order = threading.Event(), threading.Event(), []

    def first():
        with exclusive(cfg, "ingest", 1.0) as lock:
            entered.set()
            assert leave.wait(DEADLINE_S)
            lock.check()
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(DEADLINE_S)
    busy = r"^busy: (another ingest has held .*ingest\.lock|ingest \(.+, process \d+\) since 2)"
    with pytest.raises(BusyError, match=busy), exclusive(cfg, "ingest", 0.05):
        order.append("both")
    with exclusive(cfg, "feast-apply", 1.0):
        order.append("another lock")
    leave.set()
    with exclusive(cfg, "ingest", DEADLINE_S):
        order.append("second")
    thread.join(DEADLINE_S)
    assert order == ["another lock", "first", "second"]


def test_two_spellings_of_one_url_are_one_place(delivery):
    lease = delivery.cfg.embeddings.model_copy(update={"lease_url": f"sqlite:///{delivery.folder}/lease.db"})
    plain, more = (
        delivery.cfg.model_copy(update={"storage": StorageConfig(root=f"s3://bucket/folder{end}"), "embeddings": lease})
        for end in ("", "/?region=here")
    )
    with exclusive(plain, "ingest", 1.0), pytest.raises(BusyError, match=r"^busy: ingest"), exclusive(more, "ingest", 0.05):
        pass


def test_ingest_and_apply_take_it(cfg, delivery, monkeypatch):
    monkeypatch.setattr(ingest, "_LOCK_WAIT_S", 0.05)
    monkeypatch.setattr(feature_store, "_APPLY_WAIT_S", 0.05)
    day = delivery.days[0]
    with exclusive(cfg, "ingest", 1.0), exclusive(cfg, "feast-apply", 1.0):
        for verb in (
            lambda: ingest.ingest_day(cfg, day, delivery.today),
            lambda: ingest.ingest_history(cfg, day, delivery.today),
            lambda: feature_store.apply(cfg),
        ):
            with pytest.raises(BusyError, match=r"^busy: "):
                verb()
    assert ingest.ingest_day(cfg, day, delivery.today)["status"] == "ingested"


@pytest.mark.fault("an ingestion that loses its lock", after="it writes nothing more")
def test_who_has_lost_the_lock_writes_nothing_more(delivery, monkeypatch):
    """On a URL the lease frees itself when its holder stops renewing; the holder then stops before its next write."""
    lease = {"lease_url": f"sqlite:///{delivery.folder}/lease.db", "lease_ttl_s": 0.2}
    cfg = delivery.cfg.model_copy(
        update={
            "storage": delivery.cfg.storage.model_copy(update={"root": f"file://{delivery.folder}/data"}),
            "embeddings": delivery.cfg.embeddings.model_copy(update=lease),
        }
    )
    monkeypatch.setattr("limaml.io.lease._keep_renewing", lambda *_: None)
    read, entered = ingest._read, threading.Event()

    def slowly(*arguments):
        with lease_named(cfg.embeddings, f"ingest of file://{delivery.folder}/data", "another", DEADLINE_S):
            entered.set()
        return read(*arguments)

    monkeypatch.setattr(ingest, "_read", slowly)
    with pytest.raises(BusyError, match="has lost the lease of ingest of file://"):
        ingest.ingest_day(cfg, delivery.days[0], delivery.today)
    assert entered.is_set()
    assert delivery.files("events", "snapshots", "logged", "days") == {}


def test_the_lock_is_checked_before_every_write(delivery, monkeypatch):
    """Accepted days, days without data, on which windows move, and refused ones."""
    lately = FeatureConfig(entity="user", name="seen_lately", type="number", aggregate="count", window_days=2)
    delivery.cfg = delivery.cfg.model_copy(update={"features": (*declared.FEATURES, lately)})
    feature_store.apply(delivery.cfg)
    seen, inside = [], []

    def recorded(owner, name):
        original = getattr(owner, name)

        def wrapper(*arguments, **named):
            if not inside:  # what a write writes in turn is a part of it
                seen.append(name)
            inside.append(name)
            try:
                return original(*arguments, **named)
            finally:
                inside.pop()

        monkeypatch.setattr(owner, name, wrapper)

    writes = [(EventStore, "place"), (EventStore, "commit"), (EventStore, "quarantine"), (catalogue, "record"),
              (snapshots, "write"), (ingest, "write_logged")]  # fmt: skip
    for owner, name in ((locks._FileLock, "check"), *writes):
        recorded(owner, name)
    first, second, third, fourth, fifth, last = delivery.days
    for day in (second, fourth, fifth):
        delivery.path(day).unlink()
    delivery.history(third)
    delivery.day(fourth)
    delivery.history(fifth)
    delivery.deliver(last, delivery.table(last).slice(0, 0))
    with pytest.raises(GateError):
        delivery.day(last)
    changes = [at for at, what in enumerate(seen) if what != "check"]
    assert {seen[at] for at in changes} == {name for _, name in writes}
    assert [seen[at - 1] for at in changes] == ["check"] * len(changes)
    statuses = {status: EventStore(delivery.storage).days(status) for status in ("passed", "no_data", "quarantined")}
    assert statuses == {"passed": [first, third], "no_data": [second, fourth, fifth], "quarantined": [last]}
