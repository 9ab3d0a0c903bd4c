"""Whole lists hold what was on offer that day, with the features that the rows would have been logged with."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from experiments.data import TODAY
from experiments.evidence import catalogue
from experiments.evidence.worlds import Origin, ingested
from limaml.config import Config, load
from limaml.features.encoder import Encoder
from limaml.schema import tables
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows

FEATURES = [
    {"entity": "user", "name": "same", "type": "number", "aggregate": "rate", "by": "item_id"},
    {"entity": "user", "name": "genre", "type": "number", "aggregate": "count", "by": "item_id"},
]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    source = {"synthetic_users": 40, "synthetic_items": 12, "synthetic_days": 16, "synthetic_rows_per_user": 50}
    shares = ["evaluation.held_out=hash", "evaluation.train_share_of_days=0.6", "evaluation.validation_share_of_days=0.15"]
    ratios = ["source.synthetic_session_rows=5", "source.min_rows_ratio=0.01", "source.max_rows_ratio=100"]
    cfg = load("configs/synthetic.toml", [*(f"source.{key}={value}" for key, value in source.items()), *shares, *ratios])
    values = cfg.model_dump(mode="json")
    cfg = Config.model_validate(values | {"features": [*values["features"], *FEATURES]})
    return Origin.read(ingested(cfg, tmp_path_factory.mktemp("lists")), TODAY - timedelta(days=1))


def day_of(rows: pa.Table) -> np.ndarray:
    return rows["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY


def test_a_list_is_all_that_anybody_had_that_day(origin):
    found, logged = origin.lists.candidates.to_pandas(), origin.logged.to_pandas()
    found["day"], logged["day"] = day_of(origin.lists.candidates), day_of(origin.logged)
    offered = logged.groupby("day")["item_id"].agg(set)
    assert 20 < len(found.groupby(["user_id", "day"])) <= catalogue.VISITS
    for (user, day), rows in found.groupby(["user_id", "day"]):
        assert sorted(rows["item_id"]) == sorted(offered[day]), "each item once"
        own = logged[(logged["user_id"] == user) & (logged["day"] == day)].groupby("item_id")["label"].max()
        assert dict(zip(rows["item_id"], rows["label"], strict=True)) == dict.fromkeys(offered[day], 0) | own.to_dict()
        assert rows["label"].any()
        assert user in origin.split.train_users
        assert day * MICROSECONDS_PER_DAY >= origin.split.validation_end_us
        assert (logged["day"][logged["user_id"] == user] < day).any()


def test_a_users_own_row_has_the_features_that_it_was_logged_with(origin):
    """And those of other candidates are this user's."""
    found, logged = origin.lists.candidates.to_pandas(), origin.logged.to_pandas()
    found["day"], logged["day"] = day_of(origin.lists.candidates), day_of(origin.logged)
    keys = ["user_id", "item_id", "day"]
    names = [name for name in logged.columns if name not in (*keys, "event_id", "label", "timestamp")]
    both = found.merge(logged, on=keys, suffixes=("", "_logged")).drop_duplicates(keys)
    assert len(both) > 20
    for name in names:
        assert both[name].map(str).equals(both[f"{name}_logged"].map(str)), name
    per_visit = found.groupby(["user_id", "day"])
    assert (per_visit["user_events"].nunique() == 1).all()
    assert per_visit["by_item_id_events"].nunique().max() > 1


def test_a_list_is_one_request_at_its_users_first_row_of_the_day(origin):
    """What was delivered about the request is the user's own; what was delivered about a candidate goes with the candidate."""
    feed = {"entity": "context", "name": "feed", "type": "category"}
    place = {"entity": "context", "name": "place", "type": "category", "per_candidate": True}
    values, logged = origin.cfg.model_dump(mode="json"), origin.logged
    cfg = Config.model_validate(values | {"features": [*values["features"], feed, place]})
    number = [f"{at:06}" for at in range(logged.num_rows)]
    logged = logged.append_column("feed", pa.array(number)).append_column("place", logged["item_id"])
    logged = logged.select(tables(cfg.features).logged_events.names)
    lists = catalogue.sampled(cfg, logged, origin.split)
    found, rows = lists.candidates.to_pandas(), logged.to_pandas().assign(day=day_of(logged))
    for (user, day), listed in found.groupby(["user_id", day_of(lists.candidates)]):
        first = rows[(rows["user_id"] == user) & (rows["day"] == day)].sort_values("timestamp", kind="stable").iloc[0]
        assert set(listed["feed"]) == {first["feed"]}
        assert set(listed["timestamp"]) == {first["timestamp"]}
        assert len(listed) > 1
        assert listed["place"].equals(listed["item_id"])


def test_a_visits_task_has_its_users_earlier_rows_and_place(origin):
    cfg = origin.cfg
    encoder = Encoder.fit(origin.split.train_rows(origin.logged), cfg)
    inputs, specs = origin.lists.tasks(encoder, cfg)
    rows, plain = inputs.rows, TaskRows.of(origin.logged, encoder, cfg)
    place = catalogue.place(origin.lists, inputs, specs)
    assert sorted(place) == list(range(origin.lists.num_candidates))
    candidates = origin.lists.candidates
    for spec in specs:
        user = rows.entities[spec.entity].rpartition("@")[0]
        at = plain.position(user)
        assert rows.entity_index[spec.entity] == plain.entity_index[at]
        stop = plain.first_row_at(at, spec.as_of_us)
        size = min(stop - plain.offsets[at], cfg.support_rows_of("user"))
        assert spec.support_size == size > 0
        supports = rows.timestamp_us[spec.support_start : spec.support_stop], plain.timestamp_us[stop - size : stop]
        assert np.array_equal(*supports)
        mine = rows.source_row[spec.query] - (origin.lists.logged.num_rows - origin.lists.num_candidates)
        assert set(candidates["user_id"].take(pa.array(mine)).to_pylist()) == {user}
        assert (day_of(candidates)[mine] * MICROSECONDS_PER_DAY == spec.as_of_us).all()


def test_without_anybody_who_came_back_there_are_none(origin):
    later = origin.logged.filter(pa.array(day_of(origin.logged) == day_of(origin.logged).max()))
    assert catalogue.sampled(origin.cfg, later, origin.split) is None
