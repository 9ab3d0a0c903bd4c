"""The README's figures, and the report's, are those of the committed results."""

import json

import pytest

from benchmarks.options import ROOT
from benchmarks.readme import BLOCKS
from benchmarks.work import limaml_network, make_work
from experiments import readme, report
from experiments.results import RESULTS, read
from limaml.config import load


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.results)
def test_the_readme_holds_the_figures_of_the_results_file(block):
    assert block.shown((ROOT / "README.md").read_text()) == block.text(), "write them again: python -m benchmarks.readme"


def test_the_engine_was_measured_where_it_is_said_to_be():
    assert json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())["device"] == "cpu"


def test_the_readme_says_how_what_ships_differs_from_the_task_vector_that_is_timed():
    shipped, readme = load(ROOT / "configs" / "movielens.toml"), " ".join((ROOT / "README.md").read_text().split())
    timed = [layer.out_features for layer in limaml_network(make_work("task_vector", num_tasks=1)).global_block.layers]
    assert f"here with hidden layers of {timed[0]} and {timed[1]} and fixed rates" in readme
    widths = " and ".join(str(width) for width in shipped.model.global_hidden)
    assert f"ships it with {widths}, learned rates and damping, and a start at the support's items" in readme
    assert (shipped.model.meta_block, shipped.model.interaction, shipped.model.start) == ("task_vector", "product", "items")
    assert (shipped.meta.learn_inner_lr, shipped.meta.learn_damping) == (True, True)


def test_the_readme_says_what_the_experiments_found():
    assert (RESULTS / "results.json").exists(), readme.MISSING
    shown = (ROOT / "README.md").read_text().split(readme.BEGIN)[1].split(readme.END)[0]
    assert shown == readme.block(read()), "write it again: python -m experiments.readme"


def test_the_report_is_made_from_the_results_file_of_a_whole_run():
    assert (RESULTS / "results.json").exists(), readme.MISSING
    results = read()
    assert not results["quick"]
    assert (RESULTS / "REPORT.md").read_text() == report.render(results), "write it again: experiments.report.write"
