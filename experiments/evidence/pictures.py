"""A picture a question, each with a panel a world."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

from experiments.evidence.arms import WITHOUT
from experiments.evidence.groups import RETURNING
from experiments.evidence.measure import PER_USER, PER_VISIT
from experiments.markdown import Results, pick
from limaml.io import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = {
    "returning": "What the chosen arm has over each other method, per visit of returning users",
    "first_visits": "Per-user AUC of held-out users after their first rows",
    "staleness": "What an older embedding loses, per visit of returning users",
    "cost": "AUC per visit of returning users by what it costs to adapt a task",
    "groups": "Over the global MLP, per visit, by who asks",
}
"""File -> what it shows."""
_DPI, _COLOURS_KEPT, _PANEL = 110, 64, (4.4, 3.8)
_CADENCES = ("at_once", "hourly", "daily", "weekly", "monthly", "never")
_SHOWN = ("item_mean", "user_residual", "lightgbm", "global_mlp", "wide_deep", "history_mlp")


def write_pictures(results: Mapping[str, Results], folder: Path) -> None:
    panels: dict[str, Callable[[Axes, Results], None]] = {
        "returning": _returning,
        "first_visits": _first_visits,
        "staleness": _staleness,
        "cost": _cost,
        "groups": _groups,
    }
    for name, panel in panels.items():
        width, height = _PANEL
        figure, axes = plt.subplots(
            1, len(results), figsize=(width * len(results), height), squeeze=False, layout="constrained"
        )
        for axis, found in zip(axes[0], results.values(), strict=True):
            panel(axis, found)
            axis.set_title(found["title"], fontsize=9)
            axis.tick_params(labelsize=7)
        save(figure, folder / f"{name}.png")


def save(figure: "Figure", path: Path) -> None:
    """With a palette: true colours take three times the bytes, and the file is committed."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    plt.close(figure)
    with atomic.replacing(path) as temporary:
        Image.open(drawn).convert("RGB").quantize(_COLOURS_KEPT).save(temporary, format="png", optimize=True)


def _bars(axis: "Axes", gains: Mapping[str, Any]) -> None:
    """Differences with their intervals, one below the other."""
    shown = {name: gain for name, gain in gains.items() if gain and gain["low"] is not None}
    for at, gain in enumerate(shown.values()):
        colour = "tab:green" if gain["low"] > 0 else "tab:red" if gain["high"] < 0 else "tab:gray"
        axis.plot([gain["low"], gain["high"]], [at, at], color=colour)
        axis.plot(gain["mean"], at, "o", color=colour, markersize=4)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_xlabel("points", fontsize=8)


def _returning(axis: "Axes", found: Results) -> None:
    gains = dict(found["gains"][RETURNING][PER_VISIT])
    gains |= pick(found, "gains_without_history", RETURNING, PER_VISIT) or {}
    defined = {name: gain for name, gain in gains.items() if gain["mean"] is not None}
    _bars(axis, dict(sorted(defined.items(), key=lambda one: one[1]["mean"])))


def _groups(axis: "Axes", found: Results) -> None:
    key = "over_global_without_history" if "gains_without_history" in found else "over_global"
    _bars(axis, {name: pick(group, key, PER_VISIT) for name, group in found["groups"].items() if group["rows"] >= 100})
    axis.set_xlabel("points" + (WITHOUT if key != "over_global" else ""), fontsize=8)


def _first_visits(axis: "Axes", found: Results) -> None:
    suffix = WITHOUT if "gains_without_history" in found else ""
    for title in [*(f"{name}{suffix}" for name in _SHOWN), found["chosen"] + suffix]:
        if title in found["first_visits"]:
            by_k = found["first_visits"][title]
            ks = sorted(by_k, key=int)
            ours = title == found["chosen"] + suffix
            axis.plot(ks, [by_k[k]["values"][PER_USER] for k in ks], marker=".", label=title, color="black" if ours else None)
    axis.set_xlabel("support rows k", fontsize=8)
    axis.legend(fontsize=6)


def _staleness(axis: "Axes", found: Results) -> None:
    for title, by in found["staleness"].items():
        of = [by[cadence][RETURNING]["over_daily"][PER_VISIT] for cadence in _CADENCES]
        axis.plot(_CADENCES, [one["mean"] for one in of], marker=".", label=title)
        axis.fill_between(_CADENCES, [one["low"] for one in of], [one["high"] for one in of], alpha=0.15)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.legend(fontsize=6)


def _cost(axis: "Axes", found: Results) -> None:
    for title, one in found["cost"].items():
        value = pick(found, "methods", title, RETURNING, PER_VISIT)
        if value is not None:
            axis.plot(one["adapt_us"], value, "o", markersize=4)
            axis.annotate(title, (one["adapt_us"], value), fontsize=6)
    axis.set_xscale("log")
    axis.set_xlabel("µs a task, one core", fontsize=8)
