"""The results as people read them: a table in the terminal and a plot."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.results import Results
from limaml.io import atomic


def print_tables(results: Results, console: Console) -> None:
    """Speeds with ours as a multiple of each, then where a peer could not run."""
    speeds, ratios = results.get("tasks_per_s", {}), results.get("ratio_to", {})
    for model, engines in speeds.items():
        cells = _cells(engines)
        title = f"{_words(model)}: tasks/s (ours is x times)"
        table = Table("engine", *(f"{tasks} tasks\n{steps} steps" for tasks, steps in cells), title=title)
        for engine, by_tasks in engines.items():
            row = []
            for tasks, steps in cells:
                if steps not in by_tasks.get(tasks, {}):
                    row.append("-")
                    continue
                ratio = ratios[model].get(engine, {}).get(tasks, {}).get(steps)
                row.append(f"{by_tasks[tasks][steps]:,.0f}" + (f" ({ratio:.1f}x)" if ratio else ""))
            table.add_row(engine, *row, style="bold" if engine == "limaml" else "")
        console.print(table)
    _print_rest(results, console)
    for name, gflops in results.get("gemm_peak_gflops", {}).items():
        console.print(f"GEMM peak, {name}: {gflops:.0f} GFLOP/s")
    for peer, reason in results.get("not_run", {}).items():
        console.print(f"[yellow]{peer} could not run here:[/] {reason}", soft_wrap=True)
    if results.get("skipped"):
        console.print(f"[yellow]No time was left for[/] {', '.join(results['skipped'])}", soft_wrap=True)
    if results.get("busy"):
        console.print(
            f"[yellow]The machine was never free during[/] {', '.join(results['busy'])}: read these as lower bounds",
            soft_wrap=True,
        )


def _print_rest(results: Results, console: Console) -> None:
    """The single figures."""
    if "long_tail_ratio" in results:
        console.print(f"rows/s of long-tailed tasks, against equal ones: {results['long_tail_ratio']:.2f}")
    for row, rates in results.get("adapt_entities_per_s", {}).items():
        for steps, rate in rates.items():
            console.print(f"adapting, {_words(row)}, {steps} steps: {rate:,.0f} entities/s")
    if "adapt_peak_mib" in results:
        console.print(f"adapting: peak memory {results['adapt_peak_mib']:,.0f} MiB")
    for store, rate in results.get("publish_rows_per_s", {}).items():
        console.print(f"publishing to {store}: {rate:,.0f} rows/s")


# One colour an engine in all panels, whichever of them a panel has.
_COLOURS = {
    "limaml": "black",
    "learn2learn": "tab:orange",
    "torch_func": "tab:purple",
    "jax": "tab:blue",
}


def plot(results: Results, path: Path) -> None:
    """Speeds of every engine by model and number of tasks; written whole or not at all."""
    speeds = results["tasks_per_s"]
    tasks_of = {model: sorted({tasks for by in engines.values() for tasks in by}, key=int) for model, engines in speeds.items()}
    panels = [(model, tasks) for model, found in tasks_of.items() for tasks in found]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (model, tasks) in zip(axes[0], panels, strict=True):
        for engine, by_tasks in speeds[model].items():
            points = sorted((int(steps), speed) for steps, speed in by_tasks.get(tasks, {}).items())
            width = 2.5 if engine == "limaml" else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", label=engine, color=_COLOURS[engine], linewidth=width)
        axis.set(title=f"{_words(model)}, {tasks} tasks", xlabel="inner steps", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("tasks/s")
    axes[0][0].legend(fontsize="small")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def _words(model: str) -> str:
    return model.replace("_", " ")


def _cells(engines: Results) -> list[tuple[str, str]]:
    found = {(tasks, steps) for by_tasks in engines.values() for tasks, by_steps in by_tasks.items() for steps in by_steps}
    return sorted(found, key=lambda cell: (int(cell[0]), int(cell[1])))
