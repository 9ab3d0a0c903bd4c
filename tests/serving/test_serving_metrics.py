"""Names, labels and sums of the service's metrics, in one process and over several."""

import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

from serving.freshness import Lookup
from serving.metrics import Metrics


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    metrics = Metrics(registry)
    metrics.start(["user"])
    return metrics


def moved_by(registry, act):
    """How much each sample grew while `act` ran, those that did; a dictionary by (name, labels).

    Differences, because values outlive a registry where another package has put prometheus_client in multi-process mode.
    """

    def samples():
        return {(s.name, frozenset(s.labels.items())): s.value for m in registry.collect() for s in m.samples}

    before = samples()
    act()
    grown = {key: value - before[key] for key, value in samples().items() if "_created" not in key[0]}
    return {key: growth for key, growth in grown.items() if growth}


def sample(name, **labels):
    return name, frozenset(labels.items())


def test_every_status_is_there_from_the_start_and_counted_by_kind(metrics, registry):
    total = "limaml_meta_embedding_lookups_total"
    for status in ("fresh", "stale", "missing", "version_mismatch", "store_error"):
        assert registry.get_sample_value(total, {"kind": "user", "status": status}) is not None
        assert moved_by(registry, lambda status=status: metrics.looked_up("user", Lookup(status))) == {
            sample(total, kind="user", status=status): 1.0
        }


def test_a_found_embedding_has_a_lag(metrics, registry):
    def look_up():
        metrics.looked_up("user", Lookup("fresh", (1.0,), 7200.0))
        metrics.looked_up("user", Lookup("stale", None, 4e5))
        metrics.looked_up("user", Lookup("missing"))

    moved, name = moved_by(registry, look_up), "limaml_meta_embedding_lag_seconds"
    assert moved[sample(f"{name}_count", kind="user")] == 2.0
    assert moved[sample(f"{name}_sum", kind="user")] == 407200.0
    assert sample(f"{name}_bucket", kind="user", le="3600.0") not in moved
    assert moved[sample(f"{name}_bucket", kind="user", le="21600.0")] == 1.0
    assert moved[sample(f"{name}_bucket", kind="user", le="604800.0")] == 2.0


def test_scores_candidates_and_stages(metrics, registry):
    def rank():
        metrics.ranked([0.02, 0.98, 0.5])
        metrics.stage("features", 0.5)

    metrics.stage("features", 0.5)
    moved = moved_by(registry, rank)
    assert moved[sample("limaml_score_count")] == 3.0
    assert moved[sample("limaml_score_bucket", le="0.5")] == 2.0
    assert moved[sample("limaml_rank_candidates_count")] == 1.0
    assert moved[sample("limaml_rank_candidates_sum")] == 3.0
    assert moved[sample("limaml_rank_seconds_sum", stage="features")] == 0.5


def test_a_version_that_no_longer_serves_reads_zero(metrics, registry):
    metrics.serving("3", "blue")
    metrics.serving("4", "green")
    metrics.serving("4", "green")
    assert registry.get_sample_value("limaml_model_info", {"version": "3", "slot": "blue"}) == 0.0
    assert registry.get_sample_value("limaml_model_info", {"version": "4", "slot": "green"}) == 1.0


WORKER = """
from serving.freshness import Lookup
from serving.metrics import Metrics
metrics = Metrics()
metrics.start(["user"])
metrics.serving("3", "blue")
metrics.serving("4", "green")
metrics.looked_up("user", Lookup("fresh", (1.0,), 60.0))
metrics.ranked([0.1, 0.9])
"""

COLLECT = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_two_workers_add_up(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def python(code):
        return subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout

    python(WORKER)
    python(WORKER)
    lines = python(COLLECT).splitlines()
    assert 'limaml_meta_embedding_lookups_total{kind="user",status="fresh"} 2.0' in lines
    assert 'limaml_meta_embedding_lookups_total{kind="user",status="stale"} 0.0' in lines
    assert "limaml_score_count 4.0" in lines
    assert "limaml_rank_candidates_sum 4.0" in lines
    assert 'limaml_model_info{slot="blue",version="3"} 0.0' in lines
    assert 'limaml_model_info{slot="green",version="4"} 1.0' in lines
