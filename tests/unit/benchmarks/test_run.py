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
    for model in ("reference", "shipped"):
        ours, peer = (found["tasks_per_s"][model][engine]["8"]["1"] for engine in ("limaml", "torch_func"))
        assert found["ratio_to"][model]["torch_func"]["8"]["1"] == pytest.approx(ours / peer)
    assert set(found["gemm_peak_gflops"]) == {"mkl", "onednn"}
    assert found["max_gradient_error"]["torch_func"] < 1e-4
    assert {"device", "machine", "versions"} <= set(found)


def test_a_peer_that_cannot_run_is_named_with_the_reason(quick):
    shown, found = quick
    assert set(found["not_run"]) == set(PEERS) - {"torch_func"}
    assert found["not_run"]["higher"] == "ModuleNotFoundError: No module named 'higher'"
    assert "why it did not build stands in benchmarks/.venv/learn2learn.log" in found["not_run"]["learn2learn"]
    assert "jax could not run here" in shown


def test_without_a_gpu_nothing_is_measured(tmp_path):
    """The lock holds torch's CPU build, which sees no GPU on any machine."""
    done = bench("--quick", "--device", "cuda", "--out", tmp_path)
    assert done.returncode == 2
    assert "needs a GPU that torch sees, got none" in done.stdout
    assert not list(tmp_path.iterdir())
