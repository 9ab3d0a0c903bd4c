"""Every peer beside ours, one process each, one after the other; a peer that cannot run is named with the reason."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.engine_peers import NOT_RUN
from benchmarks.options import ROOT, BenchmarkError, Options
from benchmarks.peers import PEERS
from benchmarks.results import Results, merge

# Three peers in about four minutes on a free machine; twice that on a busy one, where GRACE_S ends it (`skipped`).
BUDGET_S = 70.0
QUICK_BUDGET_S = 1.0
# Imports, JAX's compilations, and slow peers' three rounds come on top of the budget.
_DEADLINE_FACTOR = 4


def measure(options: Options) -> Results:
    """Speeds, ratios, the largest gradient error, the GEMM peak, who could not run. BenchmarkError where a process fails."""
    joined: Results = {}
    for peer in PEERS:
        options.say(f"{peer} beside ours")
        peaks = joined.get("gemm_peak_gflops", {})
        joined = merge([joined, _measure_one(peer, options, max(peaks.values(), default=0.0))])
    return joined


def _measure_one(peer: str, options: Options, known_gflops: float) -> Results:
    budget_s = QUICK_BUDGET_S if options.quick else BUDGET_S
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [options.peers_python, "-m", "benchmarks.engine_peers", peer, "--out", str(out), "--budget-s", str(budget_s)]
        command += ["--known-gflops", str(known_gflops), *(["--quick"] if options.quick else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        deadline_s = 60.0 + _DEADLINE_FACTOR * budget_s
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=deadline_s, check=False
            )
        except subprocess.TimeoutExpired:
            return {"not_run": {peer: f"took longer than {deadline_s:.0f} s"}}
        if done.returncode not in (0, NOT_RUN):
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        part: Results = json.loads(out.read_text())
        return part
