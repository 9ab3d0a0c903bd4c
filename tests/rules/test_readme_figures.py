"""The README's figures are those of the committed results."""

import json

from benchmarks.options import ROOT
from benchmarks.readme import BEGIN, END, block


def test_the_readme_holds_the_figures_of_the_results_file():
    results = json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())
    shown = (ROOT / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    assert shown == block(results), "write them again: python -m benchmarks.readme"
    assert results["device"] == "cpu"
