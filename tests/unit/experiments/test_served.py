"""What the embedding adds as served, small: every method is judged on the same rows, divided by who asks."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from experiments import inner_loop, served
from limaml.config import Config, load
from limaml.metrics import draw_users

SOURCE = inner_loop.RETURNING | {
    "synthetic_users": 60,
    "synthetic_items": 20,
    "synthetic_days": 24,
    "synthetic_rows_per_user": 60,
    "synthetic_label_rate": 0.4,
}
BY_ITEM = {"entity": "user", "name": "same", "type": "number", "aggregate": "rate", "by": "item_id"}


@pytest.fixture(scope="module")
def world():
    training = ["training.max_steps=6", "training.validate_every=3", "training.tasks_per_step=8", "evaluation.baseline_steps=3"]
    shares = ["evaluation.held_out=hash", "evaluation.train_share_of_days=0.7", "evaluation.validation_share_of_days=0.15"]
    cfg = load("configs/synthetic.toml", [*(f"source.{key}={value}" for key, value in SOURCE.items()), *training, *shares])
    values = cfg.model_dump(mode="json")
    return Config.model_validate(values | {"features": [*values["features"], BY_ITEM]})


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    options = {"arms": ("shipped", "set"), "num_origins": 2, "seeds": 1, "workers": 1, "console": Console(quiet=True)}
    return served.measure(world, "small", root, **options)


def test_every_method_is_there_with_and_without_history(measured):
    methods = set(measured["groups"]["served_all"]["methods"])
    assert methods >= {"shipped", "set", "global_mlp", "user_residual", "own_rate", "global_mlp, without history"}
    assert "own_rate, without history" not in methods, "it is made of what is left out"
    assert measured["chosen"] in ("shipped", "set")
    assert set(measured["seconds"]) >= {"rivals", "shipped", "set, without history"}


def test_gains_are_the_chosen_arm_less_the_others(measured):
    group = measured["groups"]["served_returning"]
    for metric in served.METRICS:
        ours = group["methods"][measured["chosen"]][metric]
        for rival, gain in group["gains"][metric].items():
            assert gain["mean"] == pytest.approx(ours - group["methods"][rival][metric])
            assert gain["low"] <= gain["mean"] <= gain["high"]
            assert ("by_day" in gain) == (metric != "per_user_auc")


def test_without_history_the_arm_is_held_against_what_has_none_either(measured):
    group = measured["groups"]["served_returning"]
    ours = group["methods"][f"{measured['chosen']}, without history"]["pooled_auc"]
    gains = group["gains_without_history"]["pooled_auc"]
    assert {rival.rpartition(", ")[2] for rival in gains} == {"without history"}
    assert gains["global_mlp, without history"]["mean"] == pytest.approx(
        ours - group["methods"]["global_mlp, without history"]["pooled_auc"]
    )


def test_groups_are_those_of_who_asks(measured):
    rows = {name: group["rows"] for name, group in measured["groups"].items()}
    returning = rows["served_returning"]
    assert 0 < returning < rows["served_all"]
    assert sum(number for name, number in rows.items() if name.startswith("visits before")) == returning
    assert sum(number for name, number in rows.items() if name.startswith("days away")) == returning


def test_visits_and_days_away_are_counted_of_all_earlier_days():
    logged = pa.table(
        {
            "user_id": ["a", "b", "a", "a", "a", "b"],
            "timestamp": pa.array([0, 0, 3, 3, 5, 40], pa.timestamp("s", tz="UTC")),
            "label": pa.array([0, 1, 0, 1, 1, 0], pa.int8()),
        }
    )
    stamps = pc.multiply(logged["timestamp"].cast(pa.int64()), 86_400_000_000)
    logged = logged.set_column(1, "timestamp", stamps.cast(pa.timestamp("us", tz="UTC")))
    before, away = served.visits(logged, pa.array(["b", "a"]))
    assert before.tolist() == [0, 0, 1, 1, 2, 1]
    assert away.tolist() == [0, 0, 3, 3, 2, 40]


def test_the_mean_of_visits_is_drawn_by_user_and_by_day():
    labels, scores = np.array([0.0, 1, 0, 1, 0, 1]), np.array([0.1, 0.9, 0.9, 0.1, 0.2, 0.8])
    users, days = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    judged = served.Judged(labels, users, days, {"all": np.ones(6, bool)})
    weights = draw_users(2, draws=50, seed=0)
    by_user, by_day = (served.measured(judged, scores, judged.groups["all"], weights, by_day=each) for each in (False, True))
    assert by_user["per_visit_auc"][0] == by_day["per_visit_auc"][0] == pytest.approx(2 / 3), "1, 0 and 1"
    a, b = weights.T
    assert by_user["per_visit_auc"][1] == pytest.approx((a + b) / (2 * a + b))
    assert by_day["per_visit_auc"][1] == pytest.approx((a + b) / (a + 2 * b))
    assert "per_user_auc" not in by_day
