"""Ratios to the no-op, what is wanted of them, and the table in the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from benchmarks.results import Results
from benchmarks.serving.processes import OURS, SERVICES
from benchmarks.serving.rounds import CONCURRENCIES
from benchmarks.serving.soak import FLAT_MB

MAX_P50_RATIO, MAX_P99_RATIO, MIN_RPS_RATIO = 2.0, 2.5, 0.5
GOAL_P50_RATIO = 1.5
MAX_P99_MS = 15.0
"""At concurrency 8."""
_METRICS = {"p50": "p50_ms", "p99": "p99_ms", "rps": "rps"}


def ratios(found: Results) -> Results:
    """Best figures as multiples of the no-op's, and of the plain service's.

    `ratio_to_noop.<metric>.<concurrency>` is the worse of our two, and so is `ratio_to_plain`;
    `ratio_to_noop_by_service.<metric>.<service>.<concurrency>` has each.
    """
    by_service = {metric: _multiples(found[key], "noop") for metric, key in _METRICS.items()}
    to_plain = {metric: _multiples(found[key], "plain") for metric, key in _METRICS.items()}
    return {
        "ratio_to_noop": {metric: _worse_of_ours(metric, cells) for metric, cells in by_service.items()},
        "ratio_to_noop_by_service": by_service,
        "ratio_to_plain": {metric: _worse_of_ours(metric, cells) for metric, cells in to_plain.items()},
    }


def _multiples(figures: Results, base: str) -> Results:
    return {
        name: {c: round(value / figures[base][c], 3) for c, value in cells.items()}
        for name, cells in figures.items()
        if name != base
    }


def _worse_of_ours(metric: str, multiples: Results) -> Results:
    worst = min if metric == "rps" else max
    return {c: worst(multiples[name][c] for name in OURS) for c in multiples[OURS[0]]}


def stage_shares(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> tuple[Results, Results]:
    """Each stage's share of all stages' time, or of `total`'s where the service measures that; and its mean milliseconds."""
    seconds, means = {}, {}
    for stage, (total, count) in after.items():
        total_before, count_before = before.get(stage, (0.0, 0.0))
        if count > count_before:
            seconds[stage] = total - total_before
            means[stage] = round(1e3 * seconds[stage] / (count - count_before), 4)
    whole = seconds.get("total", sum(seconds.values()))
    return {stage: round(value / whole, 4) for stage, value in seconds.items()}, means


def wanted(found: Results) -> list[tuple[str, str, float, bool]]:
    """(what, limit, value, whether it is met)."""
    rows, ratio = [], found["ratio_to_noop"]
    for concurrency in map(str, CONCURRENCIES):
        p50, p99, rps = (ratio[metric][concurrency] for metric in _METRICS)
        at = f"at concurrency {concurrency}"
        rows.append((f"p50 to the no-op's {at}", f"<= {MAX_P50_RATIO} (goal {GOAL_P50_RATIO})", p50, p50 <= MAX_P50_RATIO))
        rows.append((f"p99 to the no-op's {at}", f"<= {MAX_P99_RATIO}", p99, p99 <= MAX_P99_RATIO))
        rows.append((f"requests/s to the no-op's {at}", f">= {MIN_RPS_RATIO}", rps, rps >= MIN_RPS_RATIO))
    for name in OURS:
        p99_ms = found["p99_ms"][name]["8"]
        rows.append((f"p99 of {name} at concurrency 8, ms", f"< {MAX_P99_MS:g}", p99_ms, p99_ms < MAX_P99_MS))
    for name, run in found.get("soak", {}).items():
        rows.append((f"growth of {name}, MiB", f"< {FLAT_MB:g}", run["growth_mb"], run["growth_mb"] < FLAT_MB))
        rows.append((f"errors of {name} in {run['requests']:,} requests", "0", float(run["errors"]), run["errors"] == 0))
    return rows


def print_tables(found: Results, console: Console) -> None:
    """Speeds, stages, and what is wanted with what was found."""
    speeds = Table(
        "service", *(f"{metric}, {c} at once" for c in CONCURRENCIES for metric in ("p50 ms", "p99 ms", "requests/s"))
    )
    for name in SERVICES:
        cells = [_cell(found, name, metric, str(c)) for c in CONCURRENCIES for metric in _METRICS]
        speeds.add_row(name, *cells, style="bold" if name in OURS else "")
    console.print(speeds)
    for name, shares in found["stage_share"].items():
        means = found["stage_mean_ms"][name]
        console.print(
            f"{name}: " + ", ".join(f"{stage} {share:.0%} ({means[stage]:.2f} ms)" for stage, share in shares.items())
        )
    for name, cells in found["fallback_share"].items():
        if any(cells.values()):
            shares = ", ".join(f"{share:.2%} at {c}" for c, share in cells.items())
            console.print(f"[yellow]{name} fell back to the prior in[/] {shares}", soft_wrap=True)
    table = Table("wanted", "limit", "found", "")
    for what, limit, value, met in wanted(found):
        table.add_row(what, limit, f"{value:.2f}", "met" if met else "[red]missed[/]")
    console.print(table)
    if found["busy"]:
        console.print(
            f"[yellow]The machine was never free during[/] {', '.join(found['busy'])}: read these as upper bounds",
            soft_wrap=True,
        )


def _cell(found: Results, name: str, metric: str, concurrency: str) -> str:
    value = found[_METRICS[metric]][name][concurrency]
    text = f"{value:,.0f}" if metric == "rps" else f"{value:.2f}"
    ratio = found["ratio_to_noop_by_service"][metric].get(name, {}).get(concurrency)
    return text if ratio is None else f"{text} ({ratio:.2f}x)"
