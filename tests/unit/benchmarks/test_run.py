"""The whole of `make bench`, small, with the project's own environment in place of the peers': only torch.func runs there."""

import json
import subprocess
import sys

import pytest

from benchmarks.options import ROOT
from benchmarks.peers import PEERS


def bench(*arguments):
    command = [sys.executable, "-m", "benchmarks.run", "--peers-python", sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    done = bench("--quick", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "engine.json").read_text())


def test_a_quick_run_measures_ours_beside_a_peer(quick):
    _, found = quick
    for model in ("reference", "task_vector"):
        ours, peer = (found["tasks_per_s"][model][engine]["8"]["1"] for engine in ("limaml", "torch_func"))
        assert found["ratio_to"][model]["torch_func"]["8"]["1"] == pytest.approx(ours / peer)
    assert set(found["gemm_peak_gflops"]) == {"mkl", "onednn"}
    assert found["max_gradient_error"]["torch_func"] < 1e-4
    assert {"device", "machine", "versions"} <= set(found)


def test_a_peer_that_cannot_run_is_named_with_the_reason(quick):
    shown, found = quick
    assert set(found["not_run"]) - {"redis"} == set(PEERS) - {"torch_func"}
    assert found["not_run"]["higher"] == "ModuleNotFoundError: No module named 'higher'"
    assert "why it did not build stands in benchmarks/.venv/learn2learn.log" in found["not_run"]["learn2learn"]
    assert "jax could not run here" in shown


def test_a_quick_run_measures_the_rest_of_the_system(quick):
    """Keys that readers of the results rely on; how fast is not judged on whatever machine runs this."""
    _, found = quick
    assert found["long_tail_ratio"] > 0
    assert {"tasks", "rows", "steps"} == set(found["scaling"])
    assert {"1", "5"} == set(found["adapt_entities_per_s"])
    assert found["adapt_peak_rss_bytes"] > 2**20
    assert set(found["publish_rows_per_s"]) | set(found["not_run"]) >= {"sqlite", "redis"}
    assert found["publish_rows_per_s"]["sqlite"] > 0
    share = found["fraction_of_peak_by"]["reference"]["8"]["1"]
    assert 0 < share < 1


def test_without_a_gpu_nothing_is_measured(tmp_path):
    """The lock holds torch's CPU build, which sees no GPU on any machine."""
    done = bench("--quick", "--device", "cuda", "--out", tmp_path)
    assert done.returncode == 2
    assert "needs a GPU that torch sees, got none" in done.stdout
    assert not list(tmp_path.iterdir())
