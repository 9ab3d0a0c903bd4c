"""The committed results hold what their readers rely on."""

import json

import pytest

from experiments.continual import ARMS, WORLDS
from experiments.evidence.answers import SIDES
from experiments.evidence.arms import NEARLY, SHIPPABLE
from experiments.evidence.jobs import CADENCES, KS, NEVER
from experiments.evidence.measure import METRICS
from experiments.evidence.worlds import ABOUT
from experiments.results import RESULTS

GROUPS, RIVALS = (
    ("served_returning", "served_new", "first_k20"),
    ("item_mean", "global_mlp", "wide_deep", "lightgbm", "bought_before"),
)


@pytest.fixture(scope="module", params=ABOUT)
def world(request):
    return json.loads((RESULTS / f"{request.param}.json").read_text())


def test_gains_have_a_mean_and_an_interval(world):
    """As `gains.<group>.<metric>.<rival>`; the values behind them as `methods.<name>`."""
    for group in GROUPS:
        for metric in METRICS:
            for rival in RIVALS:
                found = world["gains"][group][metric][rival]
                assert found["low"] <= found["mean"] <= found["high"]
                values = [world["methods"][name][group][metric] for name in (world["chosen"], rival)]
                assert found["mean"] == pytest.approx(values[0] - values[1], abs=2e-3)


def test_several_origins_choose_by_what_validates(world):
    assert len(set(world["origins"])) > 1
    for side, suffix in SIDES.items():
        titles = [f"{arm}{suffix}" for arm in SHIPPABLE]
        values = {title: world["validation"][title] for title in titles if title in world["validation"]}
        assert bool(values) == (f"chosen{side}" in world)
        if values:
            chosen = world[f"chosen{side}"]
            assert values[chosen] >= max(values.values()) - NEARLY
            assert all(values[title] < max(values.values()) - NEARLY for title in list(values)[: list(values).index(chosen)])


def test_values_are_there_at_every_k_and_cadence(world):
    assert all(set(by_k) == {str(k) for k in KS} for by_k in world["first_visits"].values())
    assert all(set(by) == {*CADENCES, NEVER} for by in world["staleness"].values())
    assert world["staleness"]


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
    assert set(found) == set(WORLDS)
    for name, world in found.items():
        assert world["arms"].keys() >= ARMS.keys(), name
        scratch, champion = world["arms"]["scratch"], world["arms"]["champion_quarter"]
        assert champion["seconds"] < scratch["seconds"] / 3
        assert all(part["over_scratch"]["high"] > 0.0 for part in champion["judged_on"]["new"].values())
        assert any(part["over_scratch"]["high"] < 0.0 for part in world["arms"]["scratch_quarter"]["judged_on"]["new"].values())
        for what in ("embeddings", "items"):
            assert champion["drift"][what]["cosine"] > scratch["drift"][what]["rotated_cosine"]
        for rival in ("pull_1", "pull_10"):
            other = world["arms"][f"champion_quarter_{rival}"]["judged_on"]["new"]
            for metric, part in champion["judged_on"]["new"].items():
                assert abs(other[metric]["auc"] - part["auc"]) < 0.2, (name, rival)
