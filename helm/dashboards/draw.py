"""Pictures of the dashboards as a live Prometheus answers them, drawn by matplotlib: no Grafana is asked.

    python -m helm.dashboards.draw http://127.0.0.1:9090 docs/images/dashboards --minutes 10 --window 30s

Title, queries, legends, units and places of the panels are read from the JSON that is checked in; only the painting is not
Grafana's.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import httpx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from helm.dashboards.__main__ import FOLDER

Series = tuple[dict[str, str], list[tuple[float, float]]]
"""Labels, and (instant, value) of every finite sample."""
POINTS = 240
COLUMNS, CELL_INCHES = 24, 0.55
UNITS = {"percentunit": "{:.0%}", "reqps": "{:g}/s", "short": "{:g}"}


class Asked:
    """One Prometheus, one span of time."""

    def __init__(self, url: str, start_s: float, end_s: float, window: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30.0, trust_env=False)
        self.start_s, self.end_s, self._window = start_s, end_s, window

    def close(self) -> None:
        self._client.close()

    def series(self, target: dict[str, Any]) -> list[Series]:
        step = max(1.0, (self.end_s - self.start_s) / POINTS)
        expr = target["expr"].replace("$__rate_interval", self._window)
        asked = {"query": expr, "start": str(self.start_s), "end": str(self.end_s), "step": str(step)}
        answer = self._client.get("/api/v1/query_range", params=asked).raise_for_status().json()
        found = [
            (one["metric"], [(float(at), float(value)) for at, value in one["values"] if math.isfinite(float(value))])
            for one in answer["data"]["result"]
        ]
        return [(labels, values) for labels, values in found if values]


def draw(asked: Asked, board: dict[str, Any], path: Path) -> None:
    """Write one picture of a whole dashboard."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(COLUMNS * CELL_INCHES, bottom * CELL_INCHES * 0.7), dpi=80, layout="constrained")
    grid = figure.add_gridspec(bottom, COLUMNS)
    figure.suptitle(board["title"])
    for panel in board["panels"]:
        place = panel["gridPos"]
        axes = figure.add_subplot(
            grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]],
        )
        axes.set_title(panel["title"], fontsize=10, loc="left")
        {"table": _table, "heatmap": _heatmap}.get(panel["type"], _lines)(asked, panel, axes)
    figure.savefig(path, metadata={"Software": None})


def _lines(asked: Asked, panel: dict[str, Any], axes: Axes) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    for target in panel["targets"]:
        for labels, values in asked.series(target):
            legend = target["legendFormat"]
            for label in re.findall(r"\{\{(\w+)\}\}", legend):
                legend = legend.replace(f"{{{{{label}}}}}", labels[label])
            axes.plot([at - asked.start_s for at, _ in values], [value for _, value in values], label=legend, linewidth=1.2)
    if not axes.lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
        return
    axes.set_xlim(0, asked.end_s - asked.start_s)
    axes.set_ylim(0, 1.05 * defaults["max"] if "max" in defaults else 1.1 * max(axes.get_ylim()[1], 1e-9))
    unit = defaults["unit"]
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: _seconds(value) if unit == "s" else UNITS[unit].format(value))
    )
    axes.tick_params(labelsize=7)
    axes.set_xlabel("s", fontsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=3, loc="upper left")


def _heatmap(asked: Asked, panel: dict[str, Any], axes: Axes) -> None:
    """Counts of a bucket are what it holds more than the next lower one."""
    found = {labels["le"]: dict(values) for labels, values in asked.series(panel["targets"][0])}
    uppers = sorted((upper for upper in found if upper != "+Inf"), key=float)
    instants = sorted({at for values in found.values() for at in values})
    below, counts = dict.fromkeys(instants, 0.0), []
    for upper in uppers:
        counts.append([found[upper].get(at, 0.0) - below[at] for at in instants])
        below = {at: found[upper].get(at, 0.0) for at in instants}
    xs, ys = [at - asked.start_s for at in instants], [float(upper) for upper in uppers]
    if not counts:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
        return
    axes.pcolormesh(xs, ys, counts, shading="nearest", cmap="Oranges")
    axes.tick_params(labelsize=7)
    axes.set_xlabel("s", fontsize=7)


def _table(asked: Asked, panel: dict[str, Any], axes: Axes) -> None:
    rows = [{**labels, "Value": f"{values[-1][1]:g}"} for labels, values in asked.series(panel["targets"][0])]
    axes.axis("off")
    if rows:
        columns = sorted(rows[0], key=lambda name: (name == "Value", name))
        axes.table([[row[name] for name in columns] for row in rows], colLabels=columns, loc="upper center", cellLoc="left")


def _seconds(value: float) -> str:
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value * 1000:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m helm.dashboards.draw", description="Draw the dashboards.")
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back")
    parser.add_argument("--window", default="5m", help="of rates: four scrapes or more")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    now_s = time.time()
    asked = Asked(arguments.url, now_s - 60 * arguments.minutes, now_s, arguments.window)
    for path in sorted(FOLDER.glob("*.json")):
        draw(asked, json.loads(path.read_text()), arguments.folder / f"{path.stem}.png")
    asked.close()


if __name__ == "__main__":
    main()
