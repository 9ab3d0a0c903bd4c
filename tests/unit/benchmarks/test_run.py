"""The whole of `make bench`, small, with the project's own environment in place of the peers': only torch.func runs there."""

import json
import subprocess
import sys

import pytest

from benchmarks.options import ROOT
from benchmarks.peers import PEERS
from benchmarks.work import ROWS
from tools import figures


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
    for row in ROWS:
        ours, peer = (found["tasks_per_s"][row][engine]["8"]["1"] for engine in ("limaml", "torch_func"))
        assert found["ratio_to"][row]["torch_func"]["8"]["1"] == pytest.approx(ours / peer)
    assert set(found["gemm_peak_gflops"]) == {"mkl", "onednn"}
    assert found["max_gradient_error"]["torch_func"] < 1e-6
    assert {"device", "machine", "versions"} <= set(found)


def test_a_peer_that_cannot_run_is_named_with_the_reason(quick):
    shown, found = quick
    assert set(found["not_run"]) - {"redis"} == set(PEERS) - {"torch_func"}
    assert found["not_run"]["jax"] == "ModuleNotFoundError: No module named 'jax'"
    assert "why it did not build stands in benchmarks/.venv/learn2learn.log" in found["not_run"]["learn2learn"]
    assert "jax could not run here" in shown


def test_a_quick_run_measures_the_rest_of_the_system(quick):
    """Keys that readers of the results rely on; how fast is not judged on whatever machine runs this."""
    _, found = quick
    assert found["long_tail_ratio"] > 0
    assert {row: list(rates) for row, rates in found["adapt_entities_per_s"].items()} == {"task_vector": ["3"], "paper": ["1"]}
    assert found["adapt_peak_mib"] > 1
    assert set(found["publish_rows_per_s"]) | set(found["not_run"]) >= {"sqlite", "redis"}
    assert found["publish_rows_per_s"]["sqlite"] > 0


def test_the_page_is_written_from_a_runs_results(quick):
    _, found = quick
    page = "\n".join(figures.engine(found))
    assert "| torch.func vmap(grad) |" in page
    assert "Adapting from Parquet to Parquet" in page
