"""The inner loop on a table, small: what is reported is what was scored."""

from experiments import inner_loop
from limaml.config import TrainingConfig, load


def test_a_returning_worlds_tastes_are_found_with_the_defaults(tmp_path):
    """Planted tastes that the features do not tell: adapted scores order a user's day better than the prior does."""
    own = inner_loop.RETURNING | {"synthetic_users": 120, "synthetic_items": 40, "synthetic_days": 20}
    cfg = load("configs/synthetic.toml", [*(f"source.{key}={value}" for key, value in own.items()), "evaluation.held_out=hash"])
    steps = TrainingConfig(num_workers=1, max_steps=40, validate_every=20, tasks_per_step=16)
    found = inner_loop.measure(cfg, str(tmp_path), steps)
    assert found["finite"]
    assert found["rows"] > 500
    assert set(found["shrinkage"]) == {"user.factors", "user.level"}
    for what in ("pooled", "within_task"):
        points = found["points"][what]
        assert points["gain"] == points["adapted"] - points["prior"]
        assert points["gain"] > 2.0, what


def test_every_world_is_there_and_differs_in_what_its_name_says():
    worlds = inner_loop.worlds("/data/kuairand")
    assert set(worlds) >= {"movielens", "grocery", "kuairand", "synthetic_0.01_0.1", "synthetic_0.5_10"}
    assert worlds["kuairand"].source.path == "/data/kuairand"
    assert worlds["synthetic_0.01_10"].source.synthetic_label_rate == 0.01
    assert worlds["synthetic_0.01_10"].source.synthetic_vector_scale == 10.0
