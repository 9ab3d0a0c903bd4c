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


def test_every_status_starts_at_zero_and_is_counted_by_kind(metrics, registry):
    def count(status):
        return registry.get_sample_value("limaml_meta_embedding_lookups_total", {"kind": "user", "status": status})

    statuses = ("fresh", "stale", "missing", "version_mismatch", "store_error")
    assert [count(status) for status in statuses] == [0.0] * 5
    metrics.looked_up("user", Lookup("fresh", (1.0,), 100.0, 5.0))
    metrics.looked_up("user", Lookup("missing"))
    metrics.looked_up("user", Lookup("missing"))
    assert [count(status) for status in statuses] == [1.0, 0.0, 2.0, 0.0, 0.0]


def test_only_a_found_embedding_has_a_lag(metrics, registry):
    for lookup in (Lookup("fresh", (1.0,), 7200.0), Lookup("stale", None, 4e5), Lookup("missing"), Lookup("store_error")):
        metrics.looked_up("user", lookup)
    name = "limaml_meta_embedding_lag_seconds"
    assert registry.get_sample_value(f"{name}_count", {"kind": "user"}) == 2.0
    assert registry.get_sample_value(f"{name}_sum", {"kind": "user"}) == 407200.0
    assert registry.get_sample_value(f"{name}_bucket", {"kind": "user", "le": "21600.0"}) == 1.0


def test_scores_candidates_and_stages(metrics, registry):
    metrics.ranked([0.02, 0.98, 0.5])
    metrics.stage("features", 0.003)
    assert registry.get_sample_value("limaml_score_count") == 3.0
    assert registry.get_sample_value("limaml_score_bucket", {"le": "0.5"}) == 2.0
    assert registry.get_sample_value("limaml_rank_candidates_sum") == 3.0
    assert registry.get_sample_value("limaml_rank_seconds_sum", {"stage": "features"}) == pytest.approx(0.003)


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
