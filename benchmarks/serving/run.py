"""`make bench-serving`: measure, print a table, write benchmarks/results/serving.json.

    .venv/bin/python -m benchmarks.serving.run [--quick] [--soak 200000]

Needs Debian's redis-server. Everything is made in a temporary folder and ended with the run.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import results
from benchmarks.options import ROOT, BenchmarkError
from benchmarks.publish import redis_server
from benchmarks.results import Results
from benchmarks.serving import processes, report, rounds, same_work
from benchmarks.serving.soak import soak as run_soak
from benchmarks.serving.world import CANDIDATES, Size, World

RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
QUICK_RESULTS = ROOT / "build" / "serving-quick.json"
SOAK_REQUESTS = 200_000
_PACKAGES = ("bentoml", "fastapi", "feast", "pydantic", "redis", "uvicorn", "uvloop")
# A look must end on any machine, so it judges nothing: its shares of fallbacks are only shown.
_QUICK = rounds.Plan(rounds=1, seconds=0.5, max_fallback_share=1.0)

Say = Callable[[str], None]


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One short round, under a minute, written to build/ only.")] = False,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each service at each concurrency.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a turn.")] = 5.0,
    soak: Annotated[int | None, typer.Option(min=0, help="Requests at each of ours; 200,000, or none in a quick run.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of the results.")] = None,
) -> None:
    """Speed of the service, beside a no-op and a plain service in the same run."""
    console, start = Console(), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - start:4.0f} s  {line}", soft_wrap=True)

    plan = _QUICK if quick else rounds.Plan(num_rounds, seconds)
    out = out or (QUICK_RESULTS if quick else RESULTS)
    try:
        found = measure(plan, (0 if quick else SOAK_REQUESTS) if soak is None else soak, Size(), say)
    except BenchmarkError as error:
        console.print(f"[red]nothing was written:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    found["wall_minutes"] = round((time.monotonic() - start) / 60, 2)
    results.write(found, out)
    report.print_tables(found, console)
    say(f"{out}")


def measure(plan: rounds.Plan, soak_requests: int, size: Size, say: Say) -> Results:
    """Everything that stands in serving.json but the time it took. Raises BenchmarkError."""
    if shutil.which("redis-server") is None:
        raise BenchmarkError("redis-server must be installed for this benchmark: apt-get install redis-server")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limaml-bench-serving-")))
        world = World(folder, stack.enter_context(redis_server(folder)), size)
        say(f"filling SQLite and Redis with {size.items:,} items and {size.users:,} users")
        world.build()
        say("starting " + ", ".join(processes.SERVICES))
        services = stack.enter_context(processes.running(world))
        difference = same_work.check(services, world.bodies)
        say(f"scores agree to {difference:.1e}; {plan.rounds} rounds of {plan.seconds:g} s turns")
        ours = {name: services[name] for name in processes.OURS}
        before = {name: service.stages() for name, service in ours.items()}
        found = rounds.summary(rounds.take_turns(services, world.requests, plan, say), plan.max_fallback_share)
        shares = {name: report.stage_shares(before[name], service.stages()) for name, service in ours.items()}
        soaked = {
            name: run_soak(service, world.requests, soak_requests, say) for name, service in ours.items() if soak_requests
        }
    return {
        **found,
        **report.ratios(found),
        "stage_share": {name: share for name, (share, _) in shares.items()},
        "stage_mean_ms": {name: means for name, (_, means) in shares.items()},
        "max_score_difference": difference,
        "soak": soaked,
        "settings": {**asdict(plan), **asdict(size), "candidates": CANDIDATES, "best_of": "interleaved turns"},
        "machine": results.machine(),
        "versions": results.versions() | {name: version(name) for name in _PACKAGES},
    }


def main() -> None:
    os.environ["TZ"] = "UTC"  # SQLite's event timestamps pass through the process's time zone
    time.tzset()
    # Ended by SIGTERM it leaves no service behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    typer.run(bench)


if __name__ == "__main__":
    main()
