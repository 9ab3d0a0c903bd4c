"""Names, labels and sums of the service's metrics, in one process and over several."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram

from serving.freshness import Lookup
from serving.metrics import SCORE_BUCKETS, Metrics

PUBLISHED = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    metrics = Metrics(registry)
    metrics.start(["user"])
    return metrics


def moved_by(metrics, registry, act):
    """How much each sample grew while `act` ran, those that did; a dictionary by (name, labels).

    Differences, because values outlive a registry where another package has put prometheus_client in multi-process mode.
    """

    def samples():
        return {(s.name, frozenset(s.labels.items())): s.value for m in registry.collect() for s in m.samples}

    before = samples()
    act()
    metrics.flush()
    grown = {key: value - before[key] for key, value in samples().items() if "_created" not in key[0]}
    return {key: growth for key, growth in grown.items() if growth}


def sample(name, **labels):
    return name, frozenset(labels.items())


def test_every_status_is_there_from_the_start_and_counted_by_kind(metrics, registry):
    total = "limaml_meta_embedding_lookups_total"
    for status in ("fresh", "stale", "missing", "version_mismatch", "store_error", "withheld"):
        assert registry.get_sample_value(total, {"kind": "user", "status": status}) is not None
        assert moved_by(metrics, registry, lambda status=status: metrics.looked_up("user", Lookup(status))) == {
            sample(total, kind="user", status=status): 1.0
        }


def test_a_found_embedding_has_a_lag(metrics, registry):
    def look_up():
        metrics.looked_up("user", Lookup("fresh", (1.0,), 7200.0))
        metrics.looked_up("user", Lookup("stale", None, 4e5))
        metrics.looked_up("user", Lookup("missing"))

    moved, name = moved_by(metrics, registry, look_up), "limaml_meta_embedding_lag_seconds"
    assert moved[sample(f"{name}_count", kind="user")] == 2.0
    assert moved[sample(f"{name}_sum", kind="user")] == 407200.0
    assert sample(f"{name}_bucket", kind="user", le="3600.0") not in moved
    assert moved[sample(f"{name}_bucket", kind="user", le="21600.0")] == 1.0
    assert moved[sample(f"{name}_bucket", kind="user", le="604800.0")] == 2.0


def test_scores_are_counted_as_one_by_one(metrics, registry):
    """`flush` fills the histogram's buckets itself, a bound belonging to the bucket below it."""
    scores = [0.0, 0.05, 0.050001, 0.5, 0.95, 0.950001, 1.0, 0.5]
    single = Histogram("single", "", buckets=SCORE_BUCKETS, registry=registry)
    by_ours = moved_by(metrics, registry, lambda: metrics.ranked(np.array(scores)))
    by_theirs = moved_by(metrics, registry, lambda: [single.observe(score) for score in scores])
    ours = {labels: value for (name, labels), value in by_ours.items() if name.startswith("limaml_score")}
    assert ours == {labels: pytest.approx(value) for (_, labels), value in by_theirs.items()}


def test_requests_of_every_code_are_counted(metrics, registry):
    for code in (200, 400, 401, 415, 500, 503, 504):
        assert registry.get_sample_value("limaml_rank_requests_total", {"code": str(code)}) is not None
        moved = moved_by(metrics, registry, lambda code=code: metrics.answered(code))
        assert moved == {sample("limaml_rank_requests_total", code=str(code)): 1.0}


def test_requests_of_an_arm_are_counted_by_what_answered_and_timed(registry):
    metrics, total = Metrics(registry), "limaml_arm_requests_total"
    metrics.start(["user"], arms=["a", "b"])
    for arm in ("a", "b"):
        for answer in ("personalised", "prior", "other_version"):
            assert registry.get_sample_value(total, {"arm": arm, "answer": answer}) is not None

    def ranked():
        metrics.of_arm("a", "prior", 0.25)
        metrics.of_arm("a", "prior", 0.5)
        metrics.of_arm("b", "other_version", 0.125)

    moved = moved_by(metrics, registry, ranked)
    assert moved[sample(total, arm="a", answer="prior")] == 2.0
    assert moved[sample(total, arm="b", answer="other_version")] == 1.0
    assert moved[sample("limaml_arm_seconds_sum", arm="a")] == 0.75
    assert moved[sample("limaml_arm_seconds_count", arm="b")] == 1.0
    assert len([labels for name, labels in moved if name == total]) == 2


def test_scores_candidates_and_stages(metrics, registry):
    def rank():
        metrics.ranked(np.array([0.02, 0.98, 0.5]))
        metrics.stage("features", 0.5)

    metrics.stage("features", 0.5)
    metrics.flush()
    moved = moved_by(metrics, registry, rank)
    assert moved[sample("limaml_score_count")] == 3.0
    assert moved[sample("limaml_score_bucket", le="0.5")] == 2.0
    assert moved[sample("limaml_score_bucket", le="0.05")] == 1.0
    assert moved[sample("limaml_score_bucket", le="0.95")] == 2.0
    assert moved[sample("limaml_score_sum")] == pytest.approx(1.5)
    assert moved[sample("limaml_rank_candidates_count")] == 1.0
    assert moved[sample("limaml_rank_candidates_sum")] == 3.0
    assert moved[sample("limaml_rank_seconds_sum", stage="features")] == 0.5


def test_a_version_that_no_longer_serves_reads_zero(metrics, registry):
    metrics.serving("3", "blue", PUBLISHED)
    metrics.serving("4", "green", None)
    metrics.serving("4", "green", PUBLISHED)
    assert registry.get_sample_value("limaml_model_info", {"version": "3", "slot": "blue"}) == 0.0
    complete_through = "limaml_embeddings_complete_through_timestamp_seconds"
    assert registry.get_sample_value(complete_through, {"slot": "blue"}) == 0.0
    assert registry.get_sample_value(complete_through, {"slot": "green"}) == PUBLISHED.timestamp()
    assert registry.get_sample_value("limaml_model_info", {"version": "4", "slot": "green"}) == 1.0


WORKER = """
import sys
import numpy as np
from serving.freshness import Lookup
from serving.metrics import Metrics
metrics = Metrics()
metrics.start(["user"])
if sys.argv[1] == "in trouble":
    metrics.serving("3", "blue", None)
    metrics.load_failed(True)
    metrics.breaker_open(True)
else:
    metrics.polled()
metrics.serving("4", "green", None)
metrics.answered(200)
metrics.looked_up("user", Lookup("fresh", (1.0,), 60.0, 30.0))
metrics.ranked(np.array([0.1, 0.9]))
metrics.flush()
print("counted", flush=True)
sys.stdin.read()
"""

COLLECT = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.fixture
def worker(tmp_path):
    """Starts a process that counts as a worker does and lives until the test ends, or until its input is closed."""
    environment, started = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}, []

    def start(state):
        command = [sys.executable, "-c", WORKER, state]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "counted\n"
        return process

    yield start
    for process in started:
        process.communicate()


def collected(tmp_path):
    """Lines of /metrics over all workers."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COLLECT]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_two_workers_add_up(tmp_path, worker):
    worker("in trouble")
    worker("well")
    lines = collected(tmp_path)
    assert 'limaml_meta_embedding_lookups_total{kind="user",status="fresh"} 2.0' in lines
    assert 'limaml_meta_embedding_lookups_total{kind="user",status="stale"} 0.0' in lines
    assert 'limaml_meta_embedding_inactivity_seconds_count{kind="user"} 2.0' in lines
    assert 'limaml_rank_requests_total{code="200"} 2.0' in lines
    assert 'limaml_rank_requests_total{code="503"} 0.0' in lines
    assert "limaml_score_count 4.0" in lines
    assert "limaml_rank_candidates_sum 4.0" in lines
    assert 'limaml_model_info{slot="blue",version="3"} 0.0' in lines
    assert 'limaml_model_info{slot="green",version="4"} 1.0' in lines
    # One worker in trouble shows, also the one that never heard of the registry.
    assert "limaml_champion_load_failed 1.0" in lines
    assert "limaml_online_store_breaker_open 1.0" in lines
    assert "limaml_registry_poll_timestamp_seconds 0.0" in lines


def test_a_worker_that_died_no_longer_shows(tmp_path, worker):
    dead = worker("in trouble")
    dead.kill()
    dead.wait()
    worker("well")
    lines = collected(tmp_path)
    assert "limaml_champion_load_failed 0.0" in lines
    assert "limaml_registry_poll_timestamp_seconds 0.0" not in lines
    assert 'limaml_rank_requests_total{code="200"} 2.0' in lines, "what it counted stays"
