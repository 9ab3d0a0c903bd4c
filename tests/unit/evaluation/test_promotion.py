"""The gate's rules, one table: what was measured, what is decided, and what the reason says."""

from dataclasses import replace

import pytest

from limaml.config import PromotionConfig
from limaml.evaluation.promotion import ChampionEvidence, Evidence, PerUserEvidence, decide
from limaml.metrics import Interval

NAN = float("nan")
CHAMPION = ChampionEvidence(
    version="3",
    num_users=800,
    num_rows=5000,
    candidate_auc=0.740,
    champion_auc=0.742,
    rows_from="2026-05-01T10:00:00+00:00",
)
GOOD = Evidence(
    per_user=PerUserEvidence("known users as served daily", 700, 4000, Interval(0.005, 0.002, 0.008)),
    as_served_users=900,
    as_served_auc=0.74,
    as_served_global_auc=0.71,
    refit_psi=0.02,
    champion=CHAMPION,
)
CFG = PromotionConfig()


def gain(value, low, high):
    return {"per_user": replace(GOOD.per_user, gain=Interval(value, low, high))}


REFUSALS = [
    ("gain not significant", gain(0.005, -0.001, 0.01), "per_user_auc", "+0.0050 [-0.0010, +0.0100]"),
    ("significantly worse", gain(-0.005, -0.008, -0.002), "per_user_auc", "got -0.0050"),
    ("gain unknown", gain(NAN, NAN, NAN), "per_user_auc", "got +nan"),
    ("whose", gain(0.0, 0.0, 0.0), "per_user_auc", "per-user AUC of 700 known users as served daily (4000 rows) must be above"),
    (
        "nobody to judge",
        {"per_user": PerUserEvidence("known users", 0, 0, Interval(NAN, NAN, NAN))},
        "per_user_auc",
        "of 0 known users (0 rows) must be above the global MLP's with an interval that excludes zero, got +nan [+nan, +nan]; "
        "there are none: train on more days or choose another promotion.protocol",
    ),
    ("gain's interval begins at zero", gain(0.005, 0.0, 0.01), "per_user_auc", "[+0.0000, +0.0100]"),
    ("as served beyond the margin", {"as_served_auc": 0.699}, "as_served_auc", "at most 0.01 below the global MLP's (0.7100)"),
    ("as served, of whom", {"as_served_auc": 0.699}, "as_served_auc", "pooled AUC of all 900 users as served daily must be"),
    ("as served unknown", {"as_served_auc": NAN}, "as_served_auc", "got nan"),
    ("refit differs", {"refit_psi": 0.26}, "refit_psi", "at most 0.25, got 0.2600"),
    ("refit unknown", {"refit_psi": NAN}, "refit_psi", "got nan"),
    (
        "worse than the champion",
        {"champion": replace(CHAMPION, candidate_auc=0.731)},
        "champion",
        "at most 0.01 below champion 3's twin (0.7420) on the 5000 rows of all 800 users from "
        "2026-05-01T10:00:00+00:00, got 0.7310 (-0.0110)",
    ),
    ("champion's score unknown", {"champion": replace(CHAMPION, champion_auc=NAN)}, "champion", "nan"),
]


def test_a_good_candidate_passes_every_rule():
    decision = decide(GOOD, CFG)
    assert decision.passed
    assert decision.reasons == ()
    assert [check.outcome for check in decision.checks] == ["passed"] * 4
    assert decision.as_dict()["decision"] == "passed"


@pytest.mark.parametrize(("change", "rule", "text"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_one_broken_rule_refuses_and_is_named(change, rule, text):
    decision = decide(replace(GOOD, **change), CFG)
    assert not decision.passed
    assert len(decision.reasons) == 1
    assert decision.reasons[0].startswith(f"{rule}: ")
    assert text in decision.reasons[0]
    assert decision.as_dict()["decision"] == "refused"


def test_two_broken_rules_give_two_reasons():
    assert len(decide(replace(GOOD, refit_psi=0.5, as_served_auc=0.5), CFG).reasons) == 2


def test_without_a_champion_the_comparison_is_skipped_with_the_reason():
    check = next(c for c in decide(replace(GOOD, champion=None), CFG).checks if c.name == "champion")
    assert (check.outcome, check.reason) == ("skipped", "there is no champion yet")


def test_too_few_later_rows_skip_the_comparison_even_if_it_would_fail():
    few = replace(CHAMPION, num_rows=1999, candidate_auc=0.5)
    decision = decide(replace(GOOD, champion=few), CFG)
    check = next(c for c in decision.checks if c.name == "champion")
    assert decision.passed
    assert check.outcome == "skipped"
    assert "at least 2000 rows" in check.reason
    assert "there are 1999" in check.reason


def test_as_many_later_rows_as_are_asked_for_are_enough_to_be_refused():
    enough = replace(CHAMPION, num_rows=CFG.min_champion_rows, candidate_auc=0.5)
    assert decide(replace(GOOD, champion=enough), CFG).reasons[0].startswith("champion: ")


def test_each_rule_has_its_own_margin():
    lower = replace(GOOD, as_served_auc=0.69, champion=replace(CHAMPION, candidate_auc=0.722))
    for margins, refused in (
        ({"as_served_margin": 0.05, "champion_margin": 0.001}, "champion"),
        ({"as_served_margin": 0.001, "champion_margin": 0.05}, "as_served_auc"),
    ):
        assert [reason.partition(":")[0] for reason in decide(lower, PromotionConfig(**margins)).reasons] == [refused]


def test_equal_to_the_margin_is_good_enough():
    assert decide(replace(GOOD, champion=replace(CHAMPION, candidate_auc=0.732)), CFG).passed
    assert decide(replace(GOOD, as_served_auc=0.70), CFG).passed
    assert decide(replace(GOOD, refit_psi=0.25), CFG).passed


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((-0.002, -0.005, 0.001), "passed"),
        ((0.01, -0.0051, 0.02), "failed"),
        ((NAN, NAN, NAN), "failed"),
        ((0.2, 0.1, 0.3), "passed"),
    ],
)
def test_with_a_margin_the_interval_may_reach_so_far_below(interval, outcome):
    cfg = CFG.model_copy(update={"per_user_margin": 0.005})
    check = decide(replace(GOOD, **gain(*interval)), cfg).checks[0]
    assert check.outcome == outcome
    assert "must be at most 0.005 below the global MLP's with its whole interval, got" in check.reason
