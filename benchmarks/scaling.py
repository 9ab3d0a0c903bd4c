"""How the cost of an outer loss with its backward pass grows in tasks, rows and steps: the fitted exponents and a plot.

The reference model. seconds = c * x^exponent, by least squares on logarithms, over sizes large enough that the fixed cost of a
call is small; for steps, which come on top of what no step costs, the seconds of 0 steps are taken off first.
"""

import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.long_tail import random_batch
from benchmarks.options import Options
from benchmarks.results import Results
from benchmarks.work import limaml_network, make_work
from limaml.io import atomic
from limaml.meta.engine import outer_loss

AXES: dict[str, tuple[int, ...]] = {
    "tasks": (128, 256, 512, 1024, 2048),
    "rows": (8, 16, 32, 64, 128, 256),
    "steps": (1, 2, 4, 8, 16),
}
_QUICK = 3
_AT = {"tasks": 128, "rows": 16, "steps": 1}
_ROUNDS, _CALLS = 4, 4


def measure(options: Options) -> Results:
    """`scaling.<axis>` = {exponent, sizes, seconds}."""
    network = limaml_network(make_work("reference", 1))
    found: Results = {}
    for axis, sizes in AXES.items():
        sizes = sizes[:_QUICK] if options.quick else sizes
        cells = {size: {**_AT, axis: size} for size in ((0, *sizes) if axis == "steps" else sizes)}
        seconds = dict.fromkeys(cells, float("inf"))
        batches = {size: random_batch([cell["rows"]] * cell["tasks"]) for size, cell in cells.items()}
        for _ in range(1 if options.quick else _ROUNDS):
            for size, cell in cells.items():
                # In a row, so that a size is not timed with the data of another in the cache.
                for _ in range(_CALLS):
                    start = time.perf_counter()
                    outer_loss(network, batches[size], num_steps=cell["steps"]).loss.backward()
                    seconds[size] = min(seconds[size], time.perf_counter() - start)
        base = seconds.pop(0, 0.0)
        grown = [seconds[size] - base for size in sizes]
        exponent = float(np.polyfit(np.log(sizes), np.log(np.maximum(grown, 1e-9)), 1)[0])
        found[axis] = {"exponent": exponent, "sizes": list(sizes), "seconds": grown}
    return {"scaling": found}


def plot(results: Results, path: Path) -> None:
    """One panel an axis, the fitted exponent in its title; written whole or not at all."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(3.6 * len(AXES), 3.2), layout="constrained")
    for panel, (axis, found) in zip(panels, results["scaling"].items(), strict=True):
        panel.loglog(found["sizes"], found["seconds"], marker="o")
        panel.set(title=f"{axis}: exponent {found['exponent']:.2f}", xlabel=axis, ylabel="seconds")
        panel.set_xticks(found["sizes"], [str(size) for size in found["sizes"]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
