"""The whole of `make bench-serving`, small: four real services, a real Redis, and the file that readers rely on."""

import json
import subprocess
import sys

import pytest

from benchmarks.options import ROOT
from benchmarks.serving.processes import OURS, SERVICES
from benchmarks.serving.same_work import TOLERANCE


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "serving.json"
    command = [sys.executable, "-m", "benchmarks.serving.run", "--quick", "--soak", "200", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.services
def test_a_quick_run_measures_every_service(quick):
    shown, found = quick
    for metric in ("p50", "p99", "rps"):
        key = metric if metric == "rps" else f"{metric}_ms"
        assert set(found[key]) == set(SERVICES)
        assert all(value > 0 for cells in found[key].values() for value in cells.values())
        worst = min if metric == "rps" else max
        for concurrency in ("1", "8"):
            ratios = [found[key][name][concurrency] / found[key]["noop"][concurrency] for name in OURS]
            assert found["ratio_to_noop"][metric][concurrency] == pytest.approx(worst(ratios), rel=0.01, abs=1e-3)
    assert found["max_score_difference"] <= TOLERANCE
    assert {"machine", "versions", "settings", "wall_minutes", "busy"} <= set(found)
    assert "wanted" in shown


@pytest.mark.services
def test_a_quick_run_tells_where_the_time_went(quick):
    _, found = quick
    for name in OURS:
        assert {"features", "score"} <= set(found["stage_share"][name])
        assert all(0 < share <= 1 for share in found["stage_share"][name].values())


@pytest.mark.services
def test_a_soak_counts_requests_and_memory(quick):
    _, found = quick
    for name in OURS:
        soak = found["soak"][name]
        assert (soak["requests"], soak["errors"]) == (200, 0)
        assert 50 < soak["rss_start_mb"] < 5_000
        assert soak["growth_mb"] == pytest.approx(soak["rss_end_mb"] - soak["rss_start_mb"], abs=0.11)


def test_without_redis_nothing_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.serving.run", "--quick", "--out", str(tmp_path / "serving.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": "", "COLUMNS": "200"})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "redis-server must be installed for this benchmark: apt-get install redis-server" in done.stdout
    assert not list(tmp_path.iterdir())
