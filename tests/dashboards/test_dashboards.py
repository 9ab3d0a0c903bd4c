"""The dashboards checked in are those of the code, show every metric, and name nothing that does not exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from limaml import telemetry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "helm" / "limaml" / "files" / "dashboards"
BOARDS = ("freshness", "serving", "pipeline")
NAMES = {value for value in vars(telemetry).values() if isinstance(value, str) and value.startswith("limaml_")}


@pytest.fixture(params=BOARDS)
def board(request):
    return json.loads((FOLDER / f"{request.param}.json").read_text())


def queries(board):
    return [(panel["title"], target) for panel in board["panels"] for target in panel["targets"]]


def metrics_of(board):
    found = {name for _, target in queries(board) for name in re.findall(r"\blimaml_\w+", target["expr"])}
    return {name.removesuffix("_bucket") for name in found}


def test_the_code_writes_the_bytes_that_are_checked_in(tmp_path):
    subprocess.run([sys.executable, "-m", "helm.dashboards", str(tmp_path)], cwd=ROOT, check=True)
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.json" for name in BOARDS}
    for name in BOARDS:
        written, checked_in = ((folder / f"{name}.json").read_bytes() for folder in (tmp_path, FOLDER))
        assert written == checked_in, "write them again: make dashboards"


def test_every_metric_has_a_panel_and_every_panel_metrics_that_exist():
    used = {name: metrics_of(json.loads((FOLDER / f"{name}.json").read_text())) for name in BOARDS}
    assert set().union(*used.values()) == NAMES


def test_panels_are_explained_and_ask_the_chosen_prometheus(board):
    assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in board["panels"]:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen and target["legendFormat"] for target in panel["targets"])
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles)


def test_a_legend_names_only_labels_that_its_query_keeps(board):
    for title, target in queries(board):
        kept = {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, title


def test_panels_do_not_overlap(board):
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
