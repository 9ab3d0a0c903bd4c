"""`make bench`: measure, print a table, write benchmarks/results/engine.json, engine.png and scaling.png.

    .venv/bin/python -m benchmarks.run [--quick] [--device cuda]

Each section is a module with `measure(options)`, which gives a part of the results; `SECTIONS` lists them.
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import engine_section, flops, peers_section, results, scaling, system_section, table
from benchmarks.options import ROOT, BenchmarkError, Options

SECTIONS: tuple[Callable[[Options], results.Results], ...] = (
    peers_section.measure,
    engine_section.measure,
    system_section.measure,
)

_PEERS_PYTHON = "benchmarks/.venv/bin/python"
_HAS_GPU = "import sys, torch; print(torch.__version__); sys.exit(not torch.cuda.is_available())"


def bench(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: ours and the torch peers on a GPU.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One small cell, under a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "benchmarks" / "results",
    peers_python: Annotated[str, typer.Option(help="Interpreter of the peers' environment.")] = _PEERS_PYTHON,
) -> None:
    """Speed of the engine, beside its peers in the same runs."""
    console, start = Console(), time.monotonic()
    if device == "cuda":
        _require_gpu(peers_python, console)
    options = Options(device, quick, peers_python, lambda line: console.print(f"{time.monotonic() - start:4.0f} s  {line}"))
    try:
        parts = [section(options) for section in SECTIONS]
    except BenchmarkError as error:
        console.print(f"[red]nothing was written:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    joined = results.merge([{"device": device, "machine": results.machine(), "versions": results.versions()}, *parts])
    joined = results.merge([joined, flops.measure(options, joined)])
    results.write(joined, out / "engine.json")
    table.plot(joined, out / "engine.png")
    if "scaling" in joined:
        scaling.plot(joined, out / "scaling.png")
    table.print_tables(joined, console)
    console.print(f"{time.monotonic() - start:.0f} s; {out / 'engine.json'}", soft_wrap=True)


def _require_gpu(python: str, console: Console) -> None:
    """End with 2 where torch sees no GPU: no figure is better than one of another device."""
    found = subprocess.run([python, "-c", _HAS_GPU], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        console.print(
            f"--device cuda needs a GPU that torch sees, got none with torch {found.stdout.strip()} of {python}; nothing was "
            "measured. On a machine that has one, install torch's CUDA build there",
            soft_wrap=True,
        )
        raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(bench)
