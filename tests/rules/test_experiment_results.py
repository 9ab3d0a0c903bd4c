"""The committed results hold what readers of results.json rely on, and what ships is what they say won."""

import json

import pytest

from experiments.continual import ARMS, known_worlds
from experiments.designs import read_designs
from experiments.inner_loop import worlds
from experiments.origin_data import CADENCES, CONFIG, KS, NEVER
from experiments.results import RESULTS, plain, read
from experiments.search import drawn
from limaml.config import load

OURS, RIVALS = ("stored", "full"), ("global_mlp", "user_level", "user_id", "history_mlp")


@pytest.fixture(scope="module")
def results():
    return read()


def test_differences_have_a_mean_and_an_interval(results):
    for ours in OURS:
        for rival in RIVALS:
            for name in ("delta_auc", "delta_peruser_auc"):
                by_k = results[name][ours][rival]
                assert {str(k) for k in KS} | {"20+"} == set(by_k)
                assert all(found["low"] <= found["mean"] <= found["high"] for found in by_k.values())
            served = results["as_served_delta"][ours][rival]
            assert served["low"] <= served["mean"] <= served["high"]
            assert served["returning"]["low"] <= served["returning"]["high"]


def test_values_are_there_at_every_k_cadence_and_number_of_rows(results):
    assert not results["quick"]
    for method in {*OURS, *RIVALS, "item_mean", "logistic", "lightgbm", "history"}:
        assert {str(k) for k in KS} == set(results["auc"][method])
        assert all(0.5 < value < 1.0 for value in results["auc"][method].values())
    assert set(results["refresh_auc"]) == {*CADENCES, NEVER}
    assert all({"all", "returning"} == set(found) for found in results["refresh_auc"].values())
    assert {"5", "10", "20", "50", "100", "200"} <= set(results["recovered_share"])


def test_every_method_with_settings_got_as_many_configurations(results):
    counts = {name: count for name, count in results["configurations"].items() if name not in ("item_mean", "user_level")}
    assert len(set(counts.values())) == 1, counts
    assert results["designs"] == plain(read_designs()), "designs were changed after the run: python -m experiments.run"


def test_every_frozen_design_is_among_its_methods_draws():
    for method, frozen in read_designs().items():
        assert frozen["design"] in drawn(method, frozen["configurations"]), method
        assert len(frozen["validation_of_all"]) == frozen["configurations"]


def test_what_ships_is_the_winner_on_validation_users():
    shipped = load("configs/movielens.toml")
    won = load(CONFIG, read_designs()["stored"]["design"]["overrides"])
    assert (shipped.model, shipped.meta, shipped.training) == (won.model, won.meta, won.training)


def test_one_set_of_defaults_adapts_on_every_table():
    """Never worse than the prior by more than 0.3 points, finite, and the same to 0.1 whatever the scale of vectors."""
    found = json.loads((RESULTS / "inner_loop.json").read_text())
    assert set(found) == set(worlds("/data/kuairand"))
    for name, world in found.items():
        assert world["finite"], name
        assert all(points["gain"] > -0.3 for points in world["points"].values()), name
    for rate in ("0.01", "0.1", "0.5"):
        for what in ("pooled", "within_task"):
            values = [found[f"synthetic_{rate}_{scale}"]["points"][what]["adapted"] for scale in ("0.1", "1", "10")]
            assert max(values) - min(values) < 0.1


def test_arms_that_are_alike_are_called_different_at_most_as_often_as_the_level_says():
    """And a t-test that is looked at every day more often: what the sequential test is for."""
    found = json.loads((RESULTS / "arms.json").read_text())
    wrong = found["false_positives"]
    for split in found["splits"]:
        assert wrong[split]["of"] == 1000
        assert wrong[split]["count"] <= 1000 * found["level"], split
    assert wrong["t_test_of_users_daily"]["low"] > 2 * found["level"]
    for effects in found["power"].values():
        shares = [effects[effect]["sequential"]["share"] for effect in sorted(effects, key=float)]
        assert shares == sorted(shares)
        assert shares[-1] > 0.9


def test_a_start_from_the_champion_is_as_the_page_says():
    """As good on new days as from scratch, in a third of the seconds at most, in the champion's space; a pull adds nothing."""
    found = json.loads((RESULTS / "continual.json").read_text())
    assert set(found) == set(known_worlds(""))
    for name, world in found.items():
        assert world["arms"].keys() == ARMS.keys(), name
        scratch, champion = world["arms"]["scratch"], world["arms"]["champion_quarter"]
        assert champion["seconds"] < scratch["seconds"] / 3
        assert all(part["over_scratch"]["high"] > 0.0 for part in champion["judged_on"]["new"].values())
        assert any(part["over_scratch"]["high"] < 0.0 for part in world["arms"]["scratch_quarter"]["judged_on"]["new"].values())
        for what in ("embeddings", "items"):
            assert champion["drift"][what]["cosine"] > scratch["drift"][what]["rotated_cosine"]
        for rival in ("pull_1", "pull_10", "ewc_1", "ewc_10"):
            other = world["arms"][f"champion_quarter_{rival}"]["judged_on"]["new"]
            for metric, part in champion["judged_on"]["new"].items():
                assert abs(other[metric]["auc"] - part["auc"]) < 0.2, (name, rival)
