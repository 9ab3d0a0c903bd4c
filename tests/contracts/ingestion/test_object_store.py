"""Ingesting into an object store, by real processes at once: an S3 server of our own, and the lease as the lock (contract 11).

The winner is stopped by a signal while it writes, so that the other one comes while it is at work, on any machine.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import deltalake
import httpx
import pyarrow as pa
import pytest
from pyiceberg.catalog import load_catalog

from limaml import schema
from limaml.errors import DataError
from limaml.events import table_scans
from limaml.events.logged import read_logged
from limaml.features.feature_store import join_features, open_store
from limaml.io.locks import exclusive
from limaml.io.storage import Storage
from limaml.training import candidate as candidates
from limaml.training.candidate import Candidate, download_candidate, read_candidate
from tests import declared
from tests.polling import wait_for
from tests.proxy import Proxy
from tests.servers import s3_server

pytestmark = pytest.mark.services

DEADLINE_S = 120.0
ROOT = Path(__file__).parents[3]
FOLDERS = ("catalogue", "catalogue_history", "days", "events", "logged", "snapshots", "state")
# As `limaml`, which waits two minutes for the lock: here a moment.
IMPATIENT = """
from limaml import cli
from limaml.events import ingest
ingest._LOCK_WAIT_S = 0.3
cli.main()
"""


@pytest.fixture(scope="module")
def s3_address(tmp_path_factory):
    """`host:port` of an S3 server of our own, empty, in memory."""
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


class World:
    """A delivery, and a configuration whose storage is an empty bucket's folder."""

    def __init__(self, delivery, address, bucket, lease_ttl_s):
        self.delivery, self.lease_path = delivery, delivery.folder / "lease.db"
        httpx.put(f"http://{address}/{bucket}", trust_env=False).raise_for_status()
        root = f"s3://{bucket}/some/folder?endpoint_override={address}&scheme=http&region=us-east-1"
        cfg, registry = delivery.cfg, delivery.folder / "feast_of_s3" / "registry.db"
        lease = {"lease_url": f"sqlite:///{self.lease_path}", "lease_ttl_s": lease_ttl_s}
        self.cfg = cfg.model_copy(
            update={
                "storage": cfg.storage.model_copy(update={"root": root}),
                "embeddings": cfg.embeddings.model_copy(update=lease),
                "feast": cfg.feast.model_copy(
                    update={"registry": str(registry), "online_connection": str(registry.with_name("online.db"))}
                ),
            }
        )
        self.registry, self.storage = registry, Storage(root)
        self.config_path = delivery.folder / "s3.json"
        self.config_path.write_text(json.dumps(self.cfg.model_dump(mode="json")))
        self.started = []

    def reach_through(self, proxy):
        """From the next verb on; this process goes on reading at the server itself."""
        root = self.cfg.storage.root.replace(proxy.target, proxy.address)
        cfg = self.cfg.model_copy(update={"storage": self.cfg.storage.model_copy(update={"root": root})})
        self.config_path.write_text(json.dumps(cfg.model_dump(mode="json")))

    def start(self, verb, *arguments, program=("-m", "limaml.cli")):
        self.started.append(Verb(self, len(self.started), [*program, verb, "--config", self.config_path, *arguments]))
        return self.started[-1]

    def ingest(self, through, **more):
        return self.start("ingest", "--through", str(through), "--today", str(self.delivery.today), **more)

    def files(self, *folders):
        return {path: self.storage.read_bytes(path) for folder in folders for path in self.storage.walk(folder)}

    def lease_is_free_to_write(self):
        with closing(sqlite3.connect(self.lease_path, timeout=0, isolation_level=None)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True


class Verb:
    """A process of the command line, its log, and its result once it has ended."""

    def __init__(self, world, number, arguments):
        self.world, self.log_path = world, world.delivery.folder / f"verb{number}.log"
        self._result_path = world.delivery.folder / f"verb{number}.json"
        command = [sys.executable, *arguments, "--result", self._result_path]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def log(self):
        return self.log_path.read_text()

    def wait_for_log(self, text):
        def logged():
            assert self.process.poll() is None or text in self.log(), self.log()
            return text in self.log()

        wait_for(logged, f"{text} in the log of {self.process.args}", DEADLINE_S)

    def stop_while_it_writes_events(self):
        """Stop it between the first day's events and its first manifest, and not in a transaction of the lease's SQLite."""

        def stopped():
            assert self.process.poll() is None, self.log()
            if not self.world.storage.list("events"):
                return False
            self.process.send_signal(signal.SIGSTOP)
            state = Path(f"/proc/{self.process.pid}/stat")
            wait_for(lambda: state.read_text().rpartition(") ")[2].startswith("T"), "the process to stand still")
            if self.world.lease_is_free_to_write():
                return True
            self.process.send_signal(signal.SIGCONT)
            return False

        wait_for(stopped, "events in the bucket", DEADLINE_S)
        assert self.world.storage.list("days") == [], "it was stopped too late"

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def ended(self):
        """Its exit code and its result."""
        code = self.process.wait(DEADLINE_S)
        assert self._result_path.exists(), self.log()
        return code, json.loads(self._result_path.read_text())


@pytest.fixture
def s3_key(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def world(delivery, s3_address, s3_key, request):
    """Its lease can be taken from a holder that has not renewed for `param` seconds."""
    world = World(delivery, s3_address, uuid.uuid4().hex, getattr(request, "param", DEADLINE_S))
    yield world
    for verb in world.started:
        if verb.process.poll() is None:
            verb.process.kill()
            verb.process.wait()


def assert_as_on_a_folder(world, through):
    """Every day is there once, with the bytes of one ingestion into a local folder, and nothing else is there."""
    delivery = world.delivery
    delivery.history(through)
    assert [path.count("/") for path in world.storage.walk("events")] == [2] * (delivery.days.index(through) + 1)
    assert world.files(*FOLDERS) == delivery.files(*FOLDERS)
    code, result = world.ingest(through).ended()
    assert (code, result["status"]) == (0, "unchanged")
    assert world.files(*FOLDERS) == delivery.files(*FOLDERS)


@pytest.mark.fault(
    "two ingestions of the same days into S3 at once",
    after="the second waits and finds the work done: files equal one ingestion's, byte for byte",
)
def test_of_two_ingestions_at_once_the_second_waits_and_finds_the_work_done(world):
    through = world.delivery.days[-1]
    first = world.ingest(through)
    first.stop_while_it_writes_events()
    second = world.ingest(through)
    second.wait_for_log("lease_awaited")
    assert world.storage.list("days") == []
    first.go_on()
    (code, result), (second_code, second_result) = first.ended(), second.ended()
    assert (code, result["status"], result["ingested"]) == (0, "ingested", len(world.delivery.days))
    assert (second_code, second_result["status"], second_result["ingested"]) == (0, "unchanged", 0)
    assert_as_on_a_folder(world, through)


def test_who_does_not_get_the_lock_ends_busy_and_writes_nothing(world):
    through = world.delivery.days[-1]
    with exclusive(world.cfg, "ingest", 0.0):
        code, result = world.ingest(through, program=("-c", IMPATIENT)).ended()
        assert code == 1
        assert result["message"].startswith("busy: ingest (")
        assert world.files("") == {}
    assert world.ingest(through).ended()[1]["status"] == "ingested"
    assert_as_on_a_folder(world, through)


@pytest.mark.parametrize("world", [2.0], indirect=True)
@pytest.mark.fault(
    "an ingestion into S3 that stands still until another has its lock",
    after="it ends busy: files equal those of the other alone, byte for byte",
)
def test_who_has_lost_the_lock_while_it_stood_still_ends_busy_and_harms_nothing(world):
    through = world.delivery.days[-1]
    first = world.ingest(through)
    first.stop_while_it_writes_events()
    code, result = world.ingest(through).ended()
    assert (code, result["status"]) == (0, "ingested"), "the lease of a holder that stands still frees itself"
    first.go_on()
    code, result = first.ended()
    assert code == 1
    assert "has lost the lease of ingest of s3://" in result["message"]
    assert "busy: ingest (" in result["message"]
    assert_as_on_a_folder(world, through)


def test_a_correction_replaces_a_day_and_keeps_what_it_was(world):
    delivery, day = world.delivery, world.delivery.days[1]
    assert world.ingest(delivery.days[-1]).ended()[1]["status"] == delivery.history(delivery.days[-1])["status"] == "ingested"
    delivery.flip(day, 0)
    code, result = world.start("ingest", "--day", str(day), "--today", str(delivery.today)).ended()
    assert (code, result["status"], result["revision"]) == (0, "corrected", 2)
    assert delivery.day(day)["status"] == "corrected"
    every = (*FOLDERS, "events_superseded", "logged_superseded")
    assert world.files(*every) == delivery.files(*every)


def test_apply_takes_the_lock(world):
    with exclusive(world.cfg, "feast-apply", 0.0):
        second = world.start("apply")
        second.wait_for_log("lease_awaited")
        assert not world.registry.exists()
    code, result = second.ended()
    assert (code, result["status"]) == (0, "applied")
    assert world.start("apply").ended()[1]["status"] == "unchanged"


def test_a_candidate_goes_through_the_object_store(s3_address, s3_key, tmp_path):
    """What one machine trains another one judges: the location that `train` says is all it is given."""
    httpx.put(f"http://{s3_address}/candidates", trust_env=False).raise_for_status()
    root = f"s3://candidates/some/folder?endpoint_override={s3_address}&scheme=http&region=us-east-1"
    storage, files = Storage(root), {"bundle/refit.safetensors": bytes(range(256)), "history.json": b"{}"}
    found = Candidate("f" * 64, "run", "2026-01-31", 10, 0.75, 1.5)
    files |= {"candidate.json": json.dumps(asdict(found)).encode()}
    for name, data in files.items():
        (tmp_path / "trained" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "trained" / name).write_bytes(data)
    with pytest.raises(DataError, match=r"must hold candidate.json, which train writes last"):
        read_candidate(storage.path("candidates/0"))
    for number in range(candidates._KEPT + 2):
        candidates._upload(tmp_path / "trained", storage, f"candidates/{number}")
        candidates._keep_newest(storage, f"candidates/{number}")
    assert len(storage.list("candidates")) == candidates._KEPT
    download_candidate(storage.path(f"candidates/{number}"), tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    assert read_candidate(storage.path(f"candidates/{number}")) == found


def test_a_delta_and_an_iceberg_table_are_read_from_a_bucket(s3_address, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bucket, endpoint = uuid.uuid4().hex, f"http://{s3_address}"
    httpx.put(f"{endpoint}/{bucket}", trust_env=False).raise_for_status()
    table = pa.table({"sku": ["a", "b"], "stars": [1, 5]})
    options = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
    deltalake.write_deltalake(f"s3://{bucket}/delta", table, storage_options=options)
    keys = {"s3.endpoint": endpoint, "s3.region": "us-east-1", "s3.access-key-id": "key", "s3.secret-access-key": "secret"}
    catalogue = load_catalog("lake", type="sql", uri=f"sqlite:///{tmp_path}/lake.db", warehouse=f"s3://{bucket}/lake", **keys)
    catalogue.create_namespace("raw")
    written = catalogue.create_table("raw.events", schema=table.schema)
    written.append(table)
    query = f"?endpoint_override={s3_address}&scheme=http&region=us-east-1"
    for location in (f"delta:s3://{bucket}/delta{query}", f"iceberg:{written.metadata_location}{query}"):
        with table_scans.find("source.events", location).rows() as reader:
            assert reader.read_all().to_pylist() == table.to_pylist()
    catalogue.close()


def test_feast_joins_what_lies_in_the_bucket(world):
    """What `limaml consistency` compares with; duckdb's own way there is an extension, which must not be downloaded."""
    through = world.delivery.days[-1]
    assert world.ingest(through).ended()[0] == world.start("apply").ended()[0] == 0
    logged = read_logged(world.storage, declared.TABLES, through=through)
    joined = join_features(open_store(world.cfg), logged.select(list(schema.EVENTS.names)), declared.TABLES)
    assert joined.equals(logged)
    assert len(set(joined["user_events"].to_pylist())) > 2, "the features do vary"


@pytest.fixture
def proxy(s3_address):
    proxy = Proxy(s3_address)
    yield proxy
    proxy.stop()


@pytest.mark.fault(
    "S3 that answers 503 to everything, then to every tenth request, each answer late",
    after="the first ingestion fails and no day counts; the next one leaves the bytes of one into a local folder",
)
def test_an_ingestion_outlives_an_object_store_that_is_slow_and_refuses(world, proxy):
    through = world.delivery.days[1]  # Arrow's client waits 0.2 s after each refusal
    world.reach_through(proxy)
    proxy.refuse_every = 1
    code, result = world.ingest(through).ended()
    assert (code, result["status"]) == (1, "failed"), result
    assert "HTTP status 503" in result["message"]
    assert world.files("") == {}
    proxy.refuse_every, proxy.delay_s, proxy.refused = 10, 0.005, 0
    code, result = world.ingest(through).ended()
    assert (code, result["status"]) == (0, "ingested"), result
    assert proxy.refused > 5
    assert_as_on_a_folder(world, through)
