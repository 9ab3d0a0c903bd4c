"""The generated parts of the pages, each between two comments, and the evidence's report; tests hold that they are current.

.venv/bin/python -m tools.pages
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.evidence import report
from experiments.evidence.worlds import ABOUT
from limaml.io import atomic
from tools import chart, configuration, faults, figures, scale

ROOT = Path(__file__).parents[1]


def results(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / path).read_text())
    return found


def evidence() -> dict[str, Any]:
    """World -> its answers."""
    return {name: results(f"experiments/results/{name}.json") for name in ABOUT}


def _world(name: str) -> list[str]:
    return figures.world(evidence()[name])


PARTS: dict[str, dict[str, Callable[[], list[str]]]] = {
    "README.md": {
        "result": lambda: figures.result(evidence()),
    },
    "docs/results.md": {name: partial(_world, name) for name in ABOUT},
    "docs/performance.md": {
        "engine": lambda: figures.engine(results("benchmarks/results/engine.json")),
        "service": lambda: figures.service(results("benchmarks/results/serving.json")),
        "data": lambda: figures.data(results("benchmarks/results/data.json")),
    },
    "docs/scale.md": {
        "measured": lambda: scale.measured(results("benchmarks/results/scale.json")),
        "parts": lambda: scale.parts(results("benchmarks/results/scale.json")),
        "carried": lambda: scale.carried(results("benchmarks/results/scale.json")),
        "ray": lambda: scale.ray(results("benchmarks/results/scale.json")),
    },
    "docs/transfer.md": {
        "gains": lambda: figures.transfer(results("experiments/results/transfer.json")),
        "encoders": lambda: figures.encoders(results("experiments/results/encoders.json")),
    },
    "docs/ab.md": {"arms": lambda: figures.arms(results("experiments/results/arms.json"))},
    "docs/retraining.md": {"continual": lambda: figures.continual(results("experiments/results/continual.json"))},
    "docs/configuration.md": {"settings": configuration.settings},
    "helm/limaml/README.md": {"values": lambda: chart.values(ROOT / "helm" / "limaml" / "values.yaml")},
    "docs/faults.md": {"faults": faults.rows},
}
"""Page -> name -> its markdown."""


def written(page: str) -> str:
    """The page with its generated parts as they must be."""
    text = (ROOT / page).read_text()
    for name, markdown in PARTS[page].items():
        begin, end = f"<!-- {name}: written by python -m tools.pages -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + "\n".join(markdown()).strip() + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    for page in PARTS:
        atomic.write(ROOT / page, written(page))
    atomic.write(ROOT / "experiments" / "results" / "REPORT.md", report.render(evidence()))


if __name__ == "__main__":
    main()
