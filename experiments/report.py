"""REPORT.md and its plots, from the results alone: what is gained over what one has, and whether the claims hold."""

from pathlib import Path

from experiments.reporting import claims, gains, grids, support
from experiments.reporting.plots import write_plots
from experiments.reporting.text import Results
from experiments.results import plain
from limaml.io import atomic

SECTIONS = (
    claims.section,
    gains.protocol,
    gains.configurations,
    gains.methods,
    gains.stored_embedding,
    grids.sensitivity,
    support.few_rows,
    support.refresh,
    support.drift,
    grids.recovery,
    grids.cost,
)
"""In the report's order; one whose table was not run gives no lines."""


def render(results: Results) -> str:
    """The page's markdown; `results` as results.json holds them."""
    lines = ["# What LiMAML gains, and what it costs", ""]
    if results.get("quick"):
        lines += ["**A quick run: small sizes, to see whether everything works. Its figures mean nothing.**", ""]
    for section in SECTIONS:
        lines += section(results)
    made = (
        f"Written by `make experiments` from results.json; tables {_list(results['tables'])}. The last run took"
        f" {results['minutes']:g} minutes; what an earlier one had left was not computed again."
    )
    return "\n".join([*lines, made]) + "\n"


def write(results: Results, folder: Path) -> None:
    """Write the page and its plots; figures are rounded as in results.json, so that the page follows from that file."""
    found = plain(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_plots(found, folder)
    atomic.write(folder / "REPORT.md", render(found))


def _list(names: list[str]) -> str:
    return ", ".join(names)
