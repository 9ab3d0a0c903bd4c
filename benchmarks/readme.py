"""The README's figures, written from benchmarks/results/engine.json; a test holds that they are its figures.

.venv/bin/python -m benchmarks.readme
"""

import json

from benchmarks.options import ROOT
from benchmarks.results import Results

BEGIN, END = "<!-- figures of benchmarks/results/engine.json: python -m benchmarks.readme -->\n", "<!-- end of figures -->\n"
_TASKS, _STEPS = "256", ("1", "3", "5")
_OURS = {"limaml": "**ours, exact second order**", "limaml_portable": "ours without the compiled kernel"}
_PEERS = {
    "learn2learn": "learn2learn",
    "higher": "higher",
    "torchopt": "TorchOpt",
    "torch_func": "torch.func vmap(grad)",
    "jax": "JAX jit(vmap(grad))",
}


def block(results: Results) -> str:
    """The markdown between the markers."""
    machine = results["machine"]
    lines = [
        f"Measured by `make bench` on {machine['cores']} cores of {machine['cpu']} ({machine['vector_extension']}), ours and "
        "each peer in turns in one process, 256 tasks a step, equal gradients checked first:",
        "",
        "| outer steps of tasks/s, 1 / 3 / 5 inner steps | reference network | shipped network |",
        "|---|---|---|",
    ]
    for engine, name in (_OURS | _PEERS).items():
        lines.append(f"| {name} | {_cell(results, 'reference', engine)} | {_cell(results, 'shipped', engine)} |")
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
    # The kernel does not know the shipped network: there the portable form is the only one.
    speeds = engines.get(engine, engines["limaml"] if engine in _OURS else {}).get(_TASKS, {})
    found = " / ".join(f"{speeds[steps]:,.0f}" if steps in speeds else "-" for steps in _STEPS)
    ratios = results["ratio_to"][model].get(engine, {}).get(_TASKS, {})
    if engine in _OURS or not ratios:
        return found
    return found + " (ours: " + " / ".join(_times(ratios[steps]) if steps in ratios else "-" for steps in _STEPS) + ")"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    results = json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())
    path.write_text(before + BEGIN + block(results) + END + after)


if __name__ == "__main__":
    main()
