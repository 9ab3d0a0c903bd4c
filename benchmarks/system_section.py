"""Adapting entities and publishing embeddings, each through the product's own path in a process of its own."""

import json
import subprocess
import sys

from benchmarks import adapt
from benchmarks.options import ROOT, BenchmarkError, Options
from benchmarks.results import Results

# row -> entities: a million where memory is to be seen flat, fewer where only the rate is.
ENTITIES = {"task_vector": 1_000_000, "paper": 300_000}
QUICK_ENTITIES = 5_000
ROWS, AGAIN_ROWS = 1_000_000, 200_000
QUICK_ROWS = 5_000


def measure(options: Options) -> Results:
    """`adapt_entities_per_s`, `adapt_peak_mib`, `publish_rows_per_s` and what else publishing took.

    A store whose program is missing is in `not_run`.
    """
    return _adapt(options) | _publish(options)


def _adapt(options: Options) -> Results:
    rates, peak = {}, 0.0
    for row, entities in ENTITIES.items():
        entities = QUICK_ENTITIES if options.quick else entities
        options.say(f"adapting {entities:,} entities, {row}")
        found = adapt.measure(row, entities)
        rates[row] = {f"{found['steps']:.0f}": found["entities_per_s"]}
        peak = max(peak, found["peak_rss_bytes"] / 2**20)
    return {"adapt_entities_per_s": rates, "adapt_peak_mib": peak, "adapt_entities": float(max(ENTITIES.values()))}


def _publish(options: Options) -> Results:
    rows, again = (QUICK_ROWS, QUICK_ROWS) if options.quick else (ROWS, AGAIN_ROWS)
    rates: Results = {}
    details: Results = {}
    missing: Results = {}
    for store in ("sqlite", "redis"):
        options.say(f"publishing {rows:,} rows into {store}")
        command = [sys.executable, "-m", "benchmarks.publish", "--store", store, "--rows", str(rows), "--again", str(again)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode and "must be installed" in done.stderr:
            missing[store] = done.stderr.strip().splitlines()[-1]
            continue
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        found = json.loads(done.stdout)
        rates[store] = float(found["rows_per_s"])
        details[store] = {name: float(value) for name, value in found.items() if name != "store"}
    return {"publish_rows_per_s": rates, "publish": details} | ({"not_run": missing} if missing else {})
