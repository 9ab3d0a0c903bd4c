"""A judgement of a service whose users come back: split by hash of the id, known users apart by the days they have come."""

import re
from collections import Counter, defaultdict
from datetime import UTC, datetime

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from limaml.evaluation.console_table import console_table
from limaml.evaluation.evaluate import evaluate_candidate
from limaml.evaluation.evaluate_verb import flat_metrics
from limaml.models import bundle as bundles
from limaml.tasks.splits import is_held_out
from limaml.training.prepare import read_history

BY_HASH = {
    "evaluation": {"held_out": "hash", "held_out_users": 0.3, "validate_from": "2026-01-25", "test_from": "2026-01-30"},
    "promotion": {"protocol": "as_served_known"},
}
GROUPS = {"known days 1": (1, 1), "known days 2-4": (2, 4), "known days 5-9": (5, 9), "known days 10+": (10, 10**9)}


def rows_of(cfg, through):
    """Plain rows with what their part follows from: the days before on which the user came."""
    rows = sorted(read_history(cfg, through).to_pylist(), key=lambda row: row["timestamp"])
    days = defaultdict(set)
    for row in rows:
        days[row["user_id"]].add(row["timestamp"].date())
    for row in rows:
        row["earlier_days"] = sum(day < row["timestamp"].date() for day in days[row["user_id"]])
        row["held_out"] = is_held_out(row["user_id"], 0.3)
    return rows


def check_of(result, name="per_user_auc"):
    return next(check for check in result["checks"] if check["name"] == name)


def test_known_users_are_judged_by_the_days_they_have_come_and_held_out_ones_as_new(make_candidate):
    cfg, folder, through = make_candidate("one", **BY_HASH)
    result = evaluate_candidate(cfg, folder)
    rows, served = rows_of(cfg, through), result["as_served"]
    t1, t2 = datetime(2026, 1, 25, tzinfo=UTC), datetime(2026, 1, 30, tzinfo=UTC)
    assert [result["split"][name] for name in ("train_end", "validation_end")] == [t1.isoformat(), t2.isoformat()]
    trained = {row["user_id"] for row in rows if row["timestamp"] < t1 and not row["held_out"]}
    later = [row for row in rows if row["timestamp"] >= t2]
    known = [row for row in later if row["user_id"] in trained]
    held_out = [row for row in later if row["held_out"]]

    def counted(some):
        return len({row["user_id"] for row in some}), len(some)

    def of(name):
        return served[name]["users"], served[name]["rows"]

    assert (of("all"), of("known"), of("held_out")) == (counted(later), counted(known), counted(held_out))
    assert of("new") == counted([row for row in later if row["user_id"] not in trained])
    parts = {name: [row for row in known if low <= row["earlier_days"] <= high] for name, (low, high) in GROUPS.items()}
    assert {name: of(name) for name in served if name.startswith("known days")} == {
        name: counted(part) for name, part in parts.items() if part
    }
    assert sum(map(len, parts.values())) == len(known)
    assert {"known days 2-4", "known days 5-9"} <= set(served)

    # One number by hand: the item's rate on known users who had come on two to four days.
    mine = parts["known days 2-4"]
    rates = np.clip([row["item_positive_rate"] for row in mine], 0.02, 0.98)
    found = served["known days 2-4"]["methods"]["item_mean"]["pooled_auc"]
    assert found == pytest.approx(roc_auc_score([row["label"] for row in mine], rates), abs=1e-9)

    # First-k: all rows of held-out users, also those before T1.
    of_held_out = Counter(row["user_id"] for row in rows if row["held_out"])
    assert 0 < result["first_k"]["5"]["users"] <= len(of_held_out)
    assert sum(of_held_out.values()) - 8 * len(of_held_out) < result["first_k"]["5"]["rows"]
    assert result["first_k"]["5"]["rows"] <= sum(of_held_out.values()) - 5 * len(of_held_out)


def test_the_gate_says_whose_rows_it_has_read(make_candidate):
    cfg, folder, _ = make_candidate("one", **BY_HASH)
    for protocol, table, whose in (
        ("as_served_known", ("as_served", "known"), "known users as served daily from 2026-01-30T00:00:00+00:00 on"),
        ("as_served_held_out", ("as_served", "held_out"), "held-out users as served daily from 2026-01-30T00:00:00+00:00 on"),
        ("first_k", ("first_k", "5"), "held-out users after their first 5 rows"),
    ):
        own = cfg.model_copy(update={"promotion": cfg.promotion.model_copy(update={"protocol": protocol})})
        result = evaluate_candidate(own, folder)
        found = result[table[0]][table[1]]
        gain = found["methods"]["limaml"]["per_user_auc_vs_global_mlp"]
        reason = check_of(result)["reason"]
        assert f"per-user AUC of {found['users']} {whose} ({found['rows']} rows) must be above" in reason
        assert f"got {gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" in reason
        assert (check_of(result)["outcome"] == "passed") == (gain["low"] > 0)
        assert f"of all {result['as_served']['all']['users']} users" in check_of(result, "as_served_auc")["reason"]
        # What the gate has read stands first on the screen.
        first = console_table(result).splitlines()[0]
        assert f"{found['users']} users, {found['rows']} rows" in first or "First 5 rows as support" in first
        assert first.startswith("First") == (protocol == "first_k")


def test_pages_tables_and_metrics_show_the_days(make_candidate):
    cfg, folder, _ = make_candidate("one", **BY_HASH)
    result = evaluate_candidate(cfg, folder)
    values = result["as_served"]["known days 2-4"]["methods"]["limaml"]
    cell = f"{values['pooled_auc']:.4f} / {values['per_user_auc']:.4f}"
    assert cell in console_table(result)
    assert cell in (folder / "report.html").read_text()
    metrics = dict(flat_metrics(result))
    assert metrics["as_served.known days 2-4.limaml.pooled_auc"] == values["pooled_auc"]
    # What MLflow takes as a name.
    assert [name for name in metrics if not re.fullmatch(r"[\w.\- /]+", name)] == []
    lineage = bundles.load(folder / "bundle").lineage
    assert (lineage["held_out"], lineage["validation_end"]) == ("hash", result["split"]["validation_end"])
    assert lineage["users"] == result["split"]["users"]


def test_nobody_to_judge_refuses_with_the_remedy(make_candidate):
    evaluation = BY_HASH["evaluation"] | {"min_query_rows": 1000}
    cfg, folder, _ = make_candidate("one", evaluation=evaluation, promotion={"protocol": "first_k"})
    result = evaluate_candidate(cfg, folder)
    assert result["decision"] == "refused"
    assert "per-user AUC of 0 held-out users after their first 5 rows (0 rows)" in check_of(result)["reason"]
    assert "choose another promotion.protocol" in check_of(result)["reason"]
