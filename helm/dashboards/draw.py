"""Pictures of the dashboards as a live Prometheus answers them, drawn by matplotlib: no Grafana is asked.

    python -m helm.dashboards.draw http://127.0.0.1:9090 docs/images/dashboards --minutes 10 --window 30s

With `--page` it writes one page with all of them instead, again every minute until it is ended.

Title, queries, legends, units and places of the panels are read from the JSON that is checked in; only the painting is not
Grafana's.
"""

import argparse
import base64
import html
import json
import math
import re
import time
from contextlib import closing, suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helm.dashboards.__main__ import FOLDER
from helm.dashboards.panels import HALF, HEIGHT, WHOLE
from limaml.io import atomic

Series = tuple[dict[str, str], list[tuple[float, float]]]
"""Labels, and (instant, value) of every finite sample."""
POINTS = 240
PAGE_EVERY_S = 60
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{every_s}"><title>LiMAML dashboards</title>
<style>body {{ font: 14px system-ui, sans-serif; margin: 1rem }} img {{ max-width: 100% }}</style></head><body>
<p>Drawn {drawn_at} from a live Prometheus, anew every {every_s} s. The panels are those of the Grafana dashboards in
helm/limaml/files/dashboards; Grafana itself does not run here. <a href="/classic/alerts">Alerts</a></p>
{pictures}
</body></html>
"""
CELL_INCHES = (6.6, 3.2)
MARGIN_INCHES = 0.4
TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s"), (0.001, "ms"))
UNITS = {"percentunit": (0.01, "%"), "reqps": (1.0, "a second"), "short": (1.0, "")}
"""Grafana's name -> size of the unit drawn, and its name."""


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


def draw(asked: Asked, board: dict[str, Any], target: Path | BytesIO) -> None:
    """Write one picture of a whole dashboard."""
    columns, rows = WHOLE // HALF, max(panel["gridPos"]["y"] for panel in board["panels"]) // HEIGHT + 1
    size = (columns * CELL_INCHES[0], rows * CELL_INCHES[1] + MARGIN_INCHES)
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    seconds = asked.end_s - asked.start_s
    figure.suptitle(f"{board['title']}: {seconds:.0f} s, drawn by matplotlib from a live Prometheus", fontsize=11)
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, width = place["x"] // HALF, place["w"] // HALF
        axes = figure.add_subplot(grid[place["y"] // HEIGHT, left : left + width])
        axes.set_title(panel["title"], fontsize=10, loc="left")
        {"table": _table, "heatmap": _heatmap}.get(panel["type"], _lines)(asked, panel, axes)
    figure.savefig(target, format="png", metadata={"Software": None})


def _lines(asked: Asked, panel: dict[str, Any], axes: Axes) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    drawn = [(target["legendFormat"], one) for target in panel["targets"] for one in asked.series(target)]
    if not drawn:
        _no_data(axes)
        return
    top = defaults.get("max", 1.1 * max(value for _, (_, values) in drawn for _, value in values)) or 1.0
    size, unit = next(((size, name) for size, name in TIMES if top >= size), TIMES[-1])
    if defaults["unit"] != "s":
        size, unit = UNITS[defaults["unit"]]
    for legend, (labels, values) in drawn:
        name = legend
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            name = name.replace(f"{{{{{label}}}}}", labels[label])
        axes.plot([at - asked.start_s for at, _ in values], [value / size for _, value in values], label=name, linewidth=1.2)
    axes.set_xlim(0, asked.end_s - asked.start_s)
    # A little below zero, so that a line at zero is seen.
    axes.set_ylim(-0.02 * top / size, 1.02 * top / size)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


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
        _no_data(axes)
        return
    axes.pcolormesh(xs, ys, counts, shading="nearest", cmap="Oranges")
    axes.tick_params(labelsize=7)


def _table(asked: Asked, panel: dict[str, Any], axes: Axes) -> None:
    """What held at the end."""
    found = asked.series(panel["targets"][0])
    last = max((values[-1][0] for _, values in found), default=0.0)
    rows = [{**labels, "Value": f"{values[-1][1]:g}"} for labels, values in found if values[-1][0] == last]
    axes.axis("off")
    if rows:
        columns = sorted(rows[0], key=lambda name: (name == "Value", name))
        axes.table([[row[name] for name in columns] for row in rows], colLabels=columns, loc="upper center", cellLoc="left")


def _no_data(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
    axes.set_xticks([])
    axes.set_yticks([])


def write_page(asked: Asked, folder: Path) -> None:
    """All dashboards as one page that needs no other file and asks for itself again every minute."""
    pictures = []
    for board in _boards():
        picture = BytesIO()
        draw(asked, board, picture)
        image = base64.b64encode(picture.getvalue()).decode()
        pictures.append(f'<p><img alt="{html.escape(board["title"])}" src="data:image/png;base64,{image}"></p>')
    drawn_at = datetime.fromtimestamp(asked.end_s, UTC)
    page = PAGE.format(every_s=PAGE_EVERY_S, drawn_at=f"{drawn_at:%Y-%m-%d %H:%M:%S} UTC", pictures="\n".join(pictures))
    atomic.write(folder / "index.html", page)


def _boards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m helm.dashboards.draw", description="Draw the dashboards.")
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back")
    parser.add_argument("--window", default="5m", help="of rates: four scrapes or more")
    parser.add_argument("--page", action="store_true", help="write index.html, again every minute")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    def asked() -> Asked:
        now_s = time.time()
        return Asked(arguments.url, now_s - 60 * arguments.minutes, now_s, arguments.window)

    if not arguments.page:
        with closing(asked()) as span:
            for board, path in zip(_boards(), sorted(FOLDER.glob("*.json")), strict=True):
                draw(span, board, arguments.folder / f"{path.stem}.png")
        return
    while True:
        # Prometheus may still be starting (503), or be gone for a while.
        with closing(asked()) as span, suppress(httpx.HTTPError):
            write_page(span, arguments.folder)
            time.sleep(PAGE_EVERY_S)
            continue
        time.sleep(1.0)


if __name__ == "__main__":
    main()
