"""Generated parts of the pages are what the results and the code say; so are the texts around them."""

import json

import pytest

from benchmarks.work import DIMS, ROWS
from experiments.evidence import report
from experiments.results import RESULTS
from limaml.config import Config
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
    """Use it: where tastes are in no feature, and after 20 rows. Do not: beside a history with the very item."""
    worlds = pages.evidence()
    per_visit = {name: found["gains"]["served_returning"]["per_visit_auc"]["global_mlp"] for name, found in worlds.items()}
    assert per_visit["drifting"]["low"] > 0.0
    assert worlds["movielens"]["gains"]["first_k20"]["per_user_auc"]["global_mlp"]["low"] > 0.0
    assert (
        worlds["grocery"]["gains_without_history"]["served_returning"]["per_visit_auc"]["global_mlp, without history"]["low"]
        > 0.0
    )
    assert per_visit["grocery"]["low"] < 0.0 < per_visit["grocery"]["high"]
    of_videos = worlds["kuairand"]["gains"]["served_returning"]["per_visit_auc"]
    assert 0.0 < of_videos["item_mean"]["mean"] < 2.2, "two points over the item's own rate"
    assert of_videos["global_mlp"]["low"] < 0.0 < of_videos["global_mlp"]["high"]
    assert of_videos["pairwise"]["high"] < 0.0, "more than any personalisation"


def test_the_engine_was_measured_where_it_is_said_to_be():
    assert json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())["device"] == "cpu"


def test_the_rows_that_are_timed_are_configurations_that_ship():
    """As the page says; a work is built of them and of nothing else (tests/unit/benchmarks/test_work.py)."""
    page = (ROOT / "docs" / "performance.md").read_text()
    for path, _ in ROWS.values():
        assert path.parent == ROOT / "configs"
        assert f"`configs/{path.name}`" in page
    assert f"{DIMS.num_features} features, {DIMS.num_items:,} items" in " ".join(page.split())


def test_the_report_is_made_from_the_results_files():
    assert (RESULTS / "REPORT.md").read_text() == report.render(pages.evidence()), "write it again: python -m tools.pages"
