"""Generated parts of the pages are what the results and the code say; so are the texts around them."""

import json

import pytest

from benchmarks.work import limaml_network, make_work
from experiments import report
from experiments.results import RESULTS, read
from limaml.config import Config, load
from tests.rules.test_repository import ROOT
from tools import pages
from tools.configuration import explanations, sections


@pytest.mark.parametrize("page", pages.PARTS)
def test_a_page_holds_what_its_sources_say(page):
    assert (ROOT / page).read_text() == pages.written(page), "write it again: python -m tools.pages"


def test_every_setting_is_explained():
    found = {name: section for name, section, _ in sections(Config)}
    keys = {f"{name}.{key}" for name, section in found.items() for key in section.model_fields}
    told = {f"{name}.{key}" for name, section in found.items() for key in explanations(section)}
    assert not keys - told - set(found), "write below it in limaml/config/ what it is"
    assert len(keys) > 100


def test_the_readme_advises_what_the_results_show():
    """Use it: it gains over one network for everybody. Do not: as served, or beside history features, nothing is shown."""
    delta = read()["delta_peruser_auc"]["stored"]
    served = read()["as_served_delta_peruser_auc"]["stored"]["global_mlp"]["all"]
    assert delta["global_mlp"]["20+"]["low"] > 0.0
    assert served["low"] < 0.0
    assert delta["history_mlp"]["20+"]["low"] < 0.0 < delta["history_mlp"]["20+"]["high"]


def test_the_engine_was_measured_where_it_is_said_to_be():
    assert json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())["device"] == "cpu"


def test_the_page_says_how_what_ships_differs_from_the_task_vector_that_is_timed():
    shipped, page = load(ROOT / "configs" / "movielens.toml"), " ".join((ROOT / "docs" / "performance.md").read_text().split())
    timed = [layer.out_features for layer in limaml_network(make_work("task_vector", num_tasks=1)).global_block.layers]
    assert f"here with hidden layers of {timed[0]} and {timed[1]} and fixed rates" in page
    widths = " and ".join(str(width) for width in shipped.model.global_hidden)
    assert f"ships it with {widths}, learned rates and damping, and a start at the support's items" in page
    assert (shipped.model.meta_block, shipped.model.interaction, shipped.model.start) == ("task_vector", "product", "items")
    assert (shipped.meta.learn_inner_lr, shipped.meta.learn_damping) == (True, True)


def test_the_report_is_made_from_the_results_file_of_a_whole_run():
    results = read()
    assert not results["quick"]
    assert (RESULTS / "REPORT.md").read_text() == report.render(results), "write it again: experiments.report.write"
