"""A picture a question, each with a panel a world."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

from experiments.evidence.answers import SIDES
from experiments.evidence.arms import ARMS, FULL, WITHOUT, retraining
from experiments.evidence.groups import RETURNING
from experiments.evidence.jobs import CADENCES, NEVER
from experiments.evidence.measure import PER_USER, PER_VISIT
from experiments.evidence.titles import cadences, name_of, with_features
from experiments.markdown import Results, pick
from limaml.io import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[["Axes", Results], None]
_DPI, _COLOURS_KEPT, _PANEL, _COLUMNS = 110, 256, (6.5, 3.6), 2
_CADENCES = (*CADENCES, NEVER)
_SHOWN = ("item_mean", "user_residual", "lightgbm", "global_mlp", "wide_deep", "history_mlp")


def write_pictures(results: Mapping[str, Results], folder: Path) -> None:
    for name, (_, panel) in PICTURES.items():
        columns = min(_COLUMNS, len(results))
        rows = -(-len(results) // columns)
        size = (_PANEL[0] * columns, _PANEL[1] * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, found in zip(axes.flat, results.values(), strict=False):
            panel(axis, found)
            axis.set_title(found["title"], fontsize=9)
            axis.tick_params(labelsize=7)
        for axis in axes.flat[len(results) :]:
            axis.remove()
        save(figure, folder / f"{name}.png")


def save(figure: "Figure", path: Path) -> None:
    """With a palette: true colours take three times the bytes, and the file is committed."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    plt.close(figure)
    with atomic.replacing(path) as temporary:
        Image.open(drawn).convert("RGB").quantize(_COLOURS_KEPT).save(temporary, format="png", optimize=True)


def _bars(axis: "Axes", sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Differences with their intervals, one below the other: side of the results -> name -> gain."""
    defined = {side: {name: one for name, one in of.items() if one and one["low"] is not None} for side, of in sides.items()}
    names = list(dict.fromkeys(name for of in defined.values() for name in of))
    for number, of in enumerate(defined.values()):
        for name, gain in of.items():
            colour = "tab:green" if gain["low"] > 0 else "tab:red" if gain["high"] < 0 else "tab:gray"
            at = names.index(name) + 0.3 * number
            axis.plot([gain["low"], gain["high"]], [at, at], color=colour)
            axis.plot(gain["mean"], at, "os"[number], color=colour, markersize=4)
    axis.set_yticks(range(len(names)), names)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_xlabel("points" + ("; squares: without history features" if len(sides) > 1 else ""), fontsize=8)


def _over(*jobs: str) -> Panel:
    """What the chosen arm has over some of ours; without names, over everything else."""

    def wanted(title: str) -> bool:
        name = retraining(title.removesuffix(WITHOUT))[0]
        return name in jobs if jobs else name not in ARMS

    def panel(axis: "Axes", found: Results) -> None:
        sides = {}
        for side in SIDES:
            gains = pick(found, f"gains{side}", RETURNING, PER_VISIT) or {}
            of = {title: gain for title, gain in gains.items() if wanted(title) and gain["mean"] is not None}
            sides[side] = {name_of(title): of[title] for title in sorted(of, key=lambda title: of[title]["mean"])}
        _bars(axis, {side: of for side, of in sides.items() if of})

    return panel


def _groups(axis: "Axes", found: Results) -> None:
    large = {name: group for name, group in found["groups"].items() if group["rows"] >= 100}
    sides = [side for side in SIDES if f"gains{side}" in found]
    _bars(axis, {side: {name: pick(of, f"over_global{side}", PER_VISIT) for name, of in large.items()} for side in sides})


def _first_visits(axis: "Axes", found: Results) -> None:
    suffix = WITHOUT if "gains_without_history" in found else ""
    chosen = found["chosen_without_history" if suffix else "chosen"]
    for title in [*(f"{name}{suffix}" for name in _SHOWN), chosen]:
        if title in found["first_visits"]:
            by_k = found["first_visits"][title]
            ks = sorted(by_k, key=int)
            colour = "black" if title == chosen else None
            axis.plot(ks, [by_k[k]["values"][PER_USER] for k in ks], marker=".", label=name_of(title), color=colour)
    axis.set_xlabel("support rows k", fontsize=8)
    axis.legend(fontsize=6)


def _staleness(axis: "Axes", found: Results) -> None:
    for title, by in cadences(found).items():
        of = [by[cadence][RETURNING]["over_daily"][PER_VISIT] for cadence in _CADENCES]
        axis.plot(_CADENCES, [one["mean"] for one in of], marker=".", label=title)
        axis.fill_between(_CADENCES, [one["low"] for one in of], [one["high"] for one in of], alpha=0.15)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.legend(fontsize=6)


def _cost(axis: "Axes", found: Results) -> None:
    for number, (title, one) in enumerate(found["cost"].items()):
        value = pick(found, "methods", title, RETURNING, PER_VISIT)
        if value is not None and "adapt_us" in one:
            axis.plot(one["adapt_us"], value, "os^Dv"[number % 5], markersize=4, label=with_features(title))
    axis.set_xscale("log")
    axis.set_xlabel("µs a task, one core", fontsize=8)
    axis.legend(fontsize=5)


_OVER_OURS = "What the chosen arm has, per visit of returning users, over"
PICTURES: Mapping[str, tuple[str, Panel]] = {
    "returning": (f"{_OVER_OURS} rivals", _over()),
    "first_visits": ("Per-user AUC of held-out users after their first rows", _first_visits),
    "gradients": (f"{_OVER_OURS} other ways to adapt", _over("newton", "gradient", "hybrid", "set", "sequence")),
    "staleness": ("What an older embedding loses, per visit of returning users", _staleness),
    "cost": ("AUC per visit of returning users by what it costs to adapt a task", _cost),
    "kinds": (f"{_OVER_OURS} items adapted, alone or with users", _over("item", "both")),
    "stored": (f"{_OVER_OURS} the paper's form, stored and kept whole", _over("paper", FULL)),
    "groups": ("Over the global MLP, per visit, by who asks", _groups),
}
"""File -> what it shows, and a world's panel."""
