"""`make bench`: measure, print a table, write benchmarks/results/engine.json and engine.png.

    .venv/bin/python -m benchmarks.run [--quick]

Each section is a function of the options that gives a part of the results; `SECTIONS` lists them. What a GPU does is
benchmarks/gpu.py.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import long_tail, peers_section, results, system_section, table
from benchmarks.options import ROOT, BenchmarkError, Options

SECTIONS: tuple[Callable[[Options], results.Results], ...] = (
    peers_section.measure,
    long_tail.measure,
    system_section.measure,
)


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One small cell, under a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "benchmarks" / "results",
    peers_python: Annotated[str, typer.Option(help="Interpreter of the peers' environment.")] = "benchmarks/.venv/bin/python",
) -> None:
    """Speed of the engine, beside its peers in the same runs."""
    console, start = Console(), time.monotonic()
    options = Options(quick, peers_python, lambda line: console.print(f"{time.monotonic() - start:4.0f} s  {line}"))
    try:
        parts = [section(options) for section in SECTIONS]
    except BenchmarkError as error:
        console.print(f"[red]nothing was written:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    joined = results.merge([{"device": "cpu", "machine": results.machine(), "versions": results.versions()}, *parts])
    results.write(joined, out / "engine.json")
    table.plot(joined, out / "engine.png")
    table.print_tables(joined, console)
    console.print(f"{time.monotonic() - start:.0f} s; {out / 'engine.json'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(bench)
