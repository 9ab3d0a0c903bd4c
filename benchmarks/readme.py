"""The README's figures, written from benchmarks/results/{engine,serving}.json; a test holds that they are theirs.

.venv/bin/python -m benchmarks.readme
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.options import ROOT
from benchmarks.results import Results

END = "<!-- end of figures -->\n"
_TASKS, _STEPS = "256", ("1", "3", "5")
_OURS = {"limaml": "**ours, exact second order**", "limaml_portable": "ours without the compiled kernel"}
_PEERS = {
    "learn2learn": "learn2learn",
    "higher": "higher",
    "torchopt": "TorchOpt",
    "torch_func": "torch.func vmap(grad)",
    "jax": "JAX jit(vmap(grad))",
}


_SERVICES = {
    "noop": "BentoML, no-op",
    "ours_redis": "**ours, Redis**",
    "ours_sqlite": "**ours, SQLite**",
    "plain": "FastAPI + redis-py + torch, same work",
}


def engine(results: Results) -> str:
    """The markdown of the engine's figures."""
    machine = results["machine"]
    lines = [
        f"Measured by `make bench` on {machine['cores']} cores of {machine['cpu']} ({machine['vector_extension']}), ours and "
        "each peer in turns in one process, 256 tasks a step, equal gradients checked first:",
        "",
        "| outer steps of tasks/s, 1 / 3 / 5 inner steps | reference | task vector |",
        "|---|---|---|",
    ]
    for key, name in (_OURS | _PEERS).items():
        lines.append(f"| {name} | {_cell(results, 'reference', key)} | {_cell(results, 'task_vector', key)} |")
    adapted = " / ".join(f"{results['adapt_entities_per_s'][steps]:,.0f}" for steps in ("1", "5"))
    stores = " and ".join(f"{rate:,.0f} ({store})" for store, rate in sorted(results["publish_rows_per_s"].items()))
    growth = ", ".join(f"{axis}^{found['exponent']:.2f}" for axis, found in sorted(results["scaling"].items()))
    lines += [
        "",
        f"Adapting from Parquet to Parquet, reference network, 1 / 5 steps: {adapted} entities/s, a million of them in "
        f"{results['adapt_peak_rss_bytes'] / 2**20:,.0f} MiB. Publishing a million embeddings of 64 floats: {stores} rows/s. "
        f"Tasks of 1 to 200 rows (Zipf): {results['long_tail_ratio']:.2f} of the rows/s of equal ones. Cost grows as {growth}. "
        f"Share of the oneDNN GEMM peak ({results['gemm_peak_gflops']['onednn']:,.0f} GFLOP/s), reference, 1 step: "
        f"{results['fraction_of_peak']:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(results: Results, model: str, engine: str) -> str:
    engines = results["tasks_per_s"][model]
    # The kernel does not know the task vector: there the portable form is the only one.
    speeds = engines.get(engine, engines["limaml"] if engine in _OURS else {}).get(_TASKS, {})
    found = " / ".join(f"{speeds[steps]:,.0f}" if steps in speeds else "-" for steps in _STEPS)
    ratios = results["ratio_to"][model].get(engine, {}).get(_TASKS, {})
    if engine in _OURS or not ratios:
        return found
    return found + " (ours: " + " / ".join(_times(ratios[steps]) if steps in ratios else "-" for steps in _STEPS) + ")"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def serving(results: Results) -> str:
    """The markdown of the service's figures."""
    settings, machine = results["settings"], results["machine"]
    lines = [
        f"A request of {settings['candidates']} candidates, measured by `make bench-serving` on {machine['cores']} cores of "
        f"{machine['cpu']}, one worker each, services in turns (in parentheses: to the no-op's):",
        "",
        "| 1 / 8 requests at once | p50, ms | p99, ms | requests/s |",
        "|---|---|---|---|",
    ]
    for key, name in _SERVICES.items():
        cells = [_pair(results, metric, key) for metric in ("p50", "p99", "rps")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    soaks = results["soak"]
    grown = ", ".join(
        f"{soaks[key]['growth_mb']:.1f} MiB ({name})" for key, name in (("ours_redis", "Redis"), ("ours_sqlite", "SQLite"))
    )
    errors = sum(soak["errors"] for soak in soaks.values())
    lines += [
        "",
        f"{soaks['ours_redis']['requests']:,} requests at each: {errors} errors, memory grew by {grown}.",
    ]
    return "\n".join(lines) + "\n"


def _pair(results: Results, metric: str, service: str) -> str:
    values = results["rps" if metric == "rps" else f"{metric}_ms"][service]
    ratios = results["ratio_to_noop_by_service"][metric].get(service, {})
    shown = " / ".join(f"{values[at]:,.0f}" if metric == "rps" else f"{values[at]:.2f}" for at in ("1", "8"))
    return shown + (f" ({' / '.join(f'{ratios[at]:.2f}x' for at in ('1', '8'))})" if ratios else "")


@dataclass(frozen=True)
class Block:
    """Figures of one results file, between two comments."""

    results: str
    markdown: Callable[[Results], str]

    @property
    def begin(self) -> str:
        """The comment before them."""
        return f"<!-- figures of benchmarks/results/{self.results}: python -m benchmarks.readme -->\n"

    def text(self) -> str:
        """What the results file says."""
        return self.markdown(json.loads((ROOT / "benchmarks" / "results" / self.results).read_text()))

    def shown(self, readme: str) -> str:
        """What the README says."""
        return readme.split(self.begin)[1].split(END)[0]


BLOCKS = (Block("engine.json", engine), Block("serving.json", serving))


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    for block in BLOCKS:
        readme = readme.replace(block.begin + block.shown(readme) + END, block.begin + block.text() + END)
    path.write_text(readme)


if __name__ == "__main__":
    main()
