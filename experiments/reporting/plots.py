"""The report's plots, one file for each table that is there; each written whole or not at all."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from experiments.reporting.grids import BLOCKS, TASTES, at_base_steps, at_base_width
from experiments.reporting.support import REFRESHED
from experiments.reporting.text import CADENCES, METRICS, OURS, RIVALS, Results, by_number, name_of, ordered, pick
from limaml.io import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI, _COLOURS_KEPT = 120, 64
_BOLD = ("stored", "limaml")
_COLOURS = {
    "item_mean": "tab:gray",
    "user_level": "tab:olive",
    "logistic": "tab:pink",
    "lightgbm": "tab:brown",
    "global_mlp": "tab:blue",
    "user_id": "tab:purple",
    "history_mlp": "tab:orange",
    "full": "tab:green",
    "history": "tab:red",
    "stored": "black",
    "limaml": "black",
    "none": "tab:blue",
    "truth": "tab:green",
}
"""One colour a method in all plots."""


def write_plots(results: Results, folder: Path) -> list[Path]:
    """The files written."""
    makers: dict[str, tuple[str, Callable[[Results], Figure]]] = {
        "methods.png": ("auc", methods),
        "refresh.png": ("refresh_auc_by_method", refresh),
        "drift.png": ("synthetic_drift", drift),
        "sensitivity.png": ("sensitivity", sensitivity),
        "recovery.png": ("recovery", recovery),
        "cost.png": ("cost", cost),
    }
    written = []
    for name, (table, make) in makers.items():
        if not results.get(table):
            continue
        save(make(results), folder / name)
        written.append(folder / name)
    return written


def save(figure: "Figure", path: Path) -> None:
    """With a palette: true colours take three times the bytes, and the file is committed."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    plt.close(figure)
    with atomic.replacing(path) as temporary:
        Image.open(drawn).convert("RGB").quantize(_COLOURS_KEPT).save(temporary, format="png", optimize=True)


def methods(results: Results) -> "Figure":
    figure, axes = _panels(2, "support rows k", tall=4.6)
    names = [name for name in ordered(results["auc"]) if name in (*RIVALS, *OURS)]
    ks = by_number(results["auc"][names[0]])
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for name in names:
            _line(axis, range(len(ks)), [pick(results, metric, name, k) for k in ks], name, name_of(name))
        axis.set_xticks(range(len(ks)), ks)
        axis.set_title(f"{title} AUC")
    _legend(figure, axes[0], columns=2)
    return figure


def refresh(results: Results) -> "Figure":
    """On MovieLens: all rows, then returning users, each pooled and per-user."""
    figure, axes = _panels(4, "refreshed", wide=3.2)
    panels = [(group, metric) for group in ("all", "returning") for metric in METRICS]
    for axis, (group, metric) in zip(axes, panels, strict=True):
        found = results[f"refresh_{metric}_by_method"]
        for name in REFRESHED:
            if name in found:
                _line(axis, range(len(CADENCES)), [pick(found, name, c, group) for c in CADENCES], name, name_of(name))
        _cadences(axis, f"{'all rows' if group == 'all' else 'returning users'}, {METRICS[metric]}")
    _legend(figure, axes[0])
    return figure


def drift(results: Results) -> "Figure":
    """Returning synthetic users, pooled, a panel for each half-life."""
    found = results["synthetic_drift"]
    scales = sorted(found, key=lambda scale: -(found[scale]["half_life_days"] or np.inf))
    figure, axes = _panels(len(scales), "refreshed", wide=3.2)
    titles = {
        "limaml": "LiMAML",
        "user_level": "one number per user",
        "none": "not personalised",
        "truth": "true probabilities",
    }
    for axis, scale in zip(axes, scales, strict=True):
        for name, title in titles.items():
            values = [pick(found[scale], "auc", name, cadence, "returning") for cadence in CADENCES]
            _line(axis, range(len(CADENCES)), values, name, title)
        days = found[scale]["half_life_days"]
        _cadences(axis, "no drift" if days is None else f"half-life {days:g} days")
    _legend(figure, axes[0])
    return figure


def sensitivity(results: Results) -> "Figure":
    """A panel for each order, kind of rates and outer rate; a line for each first inner rate."""
    groups: dict[tuple[Any, ...], dict[float, list[Any]]] = {}
    for cell in results["sensitivity"]:
        key = cell["order"], cell["learned"], cell["outer_rate"]
        groups.setdefault(key, {}).setdefault(cell["inner_rate"], []).append(cell)
    figure, axes = _panels(len(groups), "inner steps", wide=2.6, tall=2.2, columns=3)
    for axis, (key, lines) in zip(axes, sorted(groups.items(), reverse=True), strict=True):
        for rate, cells in sorted(lines.items()):
            there = sorted((cell for cell in cells if not cell["diverged"]), key=lambda cell: cell["inner_steps"])
            y = _points([cell["validation_auc"] for cell in there])
            axis.plot([cell["inner_steps"] for cell in there], y, marker="o", label=f"rate x {rate:g}")
        axis.set_ylim(*_limits([cell["validation_auc"] for cell in results["sensitivity"] if not cell["diverged"]]))
        axis.set_xticks(sorted({cell["inner_steps"] for cell in results["sensitivity"]}))
        axis.set_title(f"{key[0]} order, {'learned' if key[1] else 'fixed'},\nouter rate x {key[2]:g}", fontsize="small")
    _legend(figure, axes[0])
    return figure


def recovery(results: Results) -> "Figure":
    figure, axes = _panels(1, "support rows k", wide=6.0)
    found = results["recovery"]
    for taste, title in TASTES.items():
        ks = [k for k in by_number(pick(found, taste) or ()) if k != "0"]
        axes[0].plot([int(k) for k in ks], _points([found[taste][k]["share"] for k in ks]), marker="o", label=title)
    axes[0].axhline(80.0, color="gray", linestyle="--", linewidth=1.0)
    axes[0].set(xscale="log", ylabel="share recovered, %")
    shown = [int(k) for k in by_number({k for by_k in found.values() for k in by_k}) if k != "0"]
    axes[0].set_xticks(shown, [str(k) for k in shown])
    axes[0].minorticks_off()
    axes[0].legend(fontsize="small")
    return figure


def cost(results: Results) -> "Figure":
    """Time by inner steps, bytes by width of the embedding."""
    figure, axes = _panels(3, "inner steps", wide=3.4)
    for (block, title), colour in zip(BLOCKS.items(), ("black", "tab:blue", "tab:orange"), strict=True):
        cells = results["cost"].get(block, ())
        steps = at_base_width(cells)
        for axis, name in zip(axes, ("train_step_ms", "adapt_us"), strict=False):
            axis.plot([c["inner_steps"] for c in steps], [c[name] for c in steps], marker="o", color=colour, label=title)
        widths = [c for c in at_base_steps(cells) if c["hidden"] in (None, *(one["hidden"] for one in steps))]
        for name, style in (("stored_bytes", "-"), ("adapted_bytes", "--")):
            axes[2].plot([c["embedding_dim"] for c in widths], [c[name] for c in widths], style, marker="o", color=colour)
    axes[0].set(title="training step, ms", yscale="log")
    axes[1].set(title="adapting an entity, us", yscale="log")
    axes[2].set(title="bytes: stored -, weights --", yscale="log", xlabel="embedding's floats")
    _legend(figure, axes[0])
    return figure


def _panels(
    count: int, x: str, wide: float = 4.0, tall: float = 3.8, columns: int | None = None
) -> "tuple[Figure, Sequence[Axes]]":
    """In one row, or in as many rows of `columns` as it takes."""
    across = min(count, columns or count)
    size = max(wide * across, 6.0), tall * math.ceil(count / across)
    figure, axes = plt.subplots(math.ceil(count / across), across, figsize=size, squeeze=False, layout="constrained")
    for place, axis in enumerate(axes.flat):
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
        axis.set_visible(place < count)
    return figure, list(axes.flat)[:count]


def _line(axis: "Axes", x: Sequence[int], values: Sequence[float | None], name: str, label: str) -> None:
    width = 2.5 if name in _BOLD else 1.2
    axis.plot(x, _points(values), marker="o", markersize=3, label=label, color=_COLOURS.get(name, "gray"), linewidth=width)


def _points(values: Sequence[float | None]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Hundredths; what is missing is not drawn."""
    return 100 * np.array(values, np.float64)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The same in all panels; the worst fits may fall out, so that the others can be told apart."""
    found = _points(values) if values else np.array([50.0, 100.0])
    low, high = max(found.min(), float(np.quantile(found, 0.05)) - 1.0), found.max()
    return float(low) - 0.2, float(high) + 0.2


def _cadences(axis: "Axes", title: str) -> None:
    axis.set_xticks(range(len(CADENCES)), list(CADENCES.values()), rotation=40, fontsize="small")
    axis.set_title(title)


def _legend(figure: "Figure", axis: "Axes", columns: int = 4) -> None:
    """Below the panels, so that it hides no line."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")
