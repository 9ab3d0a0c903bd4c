"""Retraining over origins, small: arms share rows and their first version."""

from dataclasses import replace

import pytest

from experiments import continual
from experiments.continual import Arm

SMALL = {"synthetic_users": 40, "synthetic_items": 20, "synthetic_days": 16, "synthetic_rows_per_user": 30}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    read = continual.read_world(continual.drifting(**SMALL), tmp_path_factory.mktemp("world"), steps=8)
    training = read.cfg.training.model_copy(update={"tasks_per_step": 8})
    return replace(read, cfg=read.cfg.model_copy(update={"training": training}))


def test_chains_begin_alike_and_are_held_against_scratch(world):
    arms = {"scratch": Arm(start="scratch"), "champion": Arm(0.5), "kept": Arm(0.5, rounds=0)}
    found = continual.measure(world, arms)
    assert found["arms"].keys() == arms.keys()
    for name, arm in found["arms"].items():
        assert arm["seconds"] > 0.0
        for days in ("chosen_on", "judged_on"):
            for what in ("new", "old"):
                for values in arm[days][what].values():
                    over = values["over_scratch"]
                    assert over["low"] <= over["mean"] <= over["high"]
                    if name == "scratch":
                        assert over["low"] == over["mean"] == over["high"] == 0.0
    new = {name: arm["judged_on"]["new"]["pooled"]["auc"] for name, arm in found["arms"].items()}
    assert len(set(new.values())) == len(new)
    drift = {name: arm["drift"]["items"] for name, arm in found["arms"].items()}
    assert drift["kept"]["cosine"] == 1.0
    assert drift["champion"]["cosine"] > drift["scratch"]["cosine"]
    assert all(each["rotated_cosine"] >= each["cosine"] - 1e-3 for each in drift.values())


def test_nobody_who_is_held_out_and_no_later_row_trains(world):
    rows = world.train_rows(1)
    assert not set(rows["user_id"].to_pylist()) & world.held_out
    assert rows["timestamp"].cast("int64").to_numpy().max() < world.instants_us[1]
    assert rows.num_rows > world.train_rows(0).num_rows
