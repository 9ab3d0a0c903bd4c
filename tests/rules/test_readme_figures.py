"""The README's figures, and the report's, are those of the committed results."""

import json

import pytest

from benchmarks.options import ROOT
from benchmarks.readme import BLOCKS
from experiments import readme, report
from experiments.results import RESULTS, read


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.results)
def test_the_readme_holds_the_figures_of_the_results_file(block):
    assert block.shown((ROOT / "README.md").read_text()) == block.text(), "write them again: python -m benchmarks.readme"


def test_the_engine_was_measured_where_it_is_said_to_be():
    assert json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())["device"] == "cpu"


def test_the_readme_says_what_the_experiments_found():
    assert (RESULTS / "results.json").exists(), readme.MISSING
    shown = (ROOT / "README.md").read_text().split(readme.BEGIN)[1].split(readme.END)[0]
    assert shown == readme.block(read()), "write it again: python -m experiments.readme"


def test_the_report_is_made_from_the_results_file_of_a_whole_run():
    assert (RESULTS / "results.json").exists(), readme.MISSING
    results = read()
    assert not results["quick"]
    assert (RESULTS / "REPORT.md").read_text() == report.render(results), "write it again: experiments.report.write"
