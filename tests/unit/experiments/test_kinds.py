"""One kind or two, small: all arms are judged on the same rows, and the first is what the others are held against."""

import pytest

from experiments import inner_loop, kinds
from limaml.config import load


def test_arms_share_rows_and_are_held_against_users_alone(tmp_path):
    own = inner_loop.RETURNING | {
        "synthetic_users": 60,
        "synthetic_items": 20,
        "synthetic_days": 12,
        "synthetic_rows_per_user": 40,
    }
    training = ["training.max_steps=10", "training.validate_every=5", "training.tasks_per_step=8", "training.num_workers=1"]
    overrides = [*(f"source.{key}={value}" for key, value in own.items()), "evaluation.held_out=hash", *training]
    found = kinds.measure(load("configs/synthetic.toml", overrides), str(tmp_path))
    assert found["rows"] > 100
    assert set(found["arms"]) == {"user", "item", "both"}
    for name, arm in found["arms"].items():
        assert arm["last_day_tasks"] > 0
        for metric in ("pooled", "per_user"):
            gain = arm[metric]["over_user"]
            assert gain["value"] == pytest.approx(arm[metric]["auc"] - found["arms"]["user"][metric]["auc"])
            assert gain["low"] <= gain["value"] <= gain["high"]
            assert (gain["low"] == gain["high"] == 0.0) == (name == "user")
    assert found["arms"]["both"]["last_day_tasks"] > found["arms"]["user"]["last_day_tasks"]
    assert set(found["arms"]["both"]["shrinkage"]) == {"user.factors", "user.level", "item.factors", "item.level"}
