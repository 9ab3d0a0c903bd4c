"""New items, small: none has an early event, arms are judged on the same rows, catalogues have the features of the day."""

from dataclasses import asdict
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import transfer
from experiments import transfer_metrics as metrics
from experiments.cached_jobs import Job
from experiments.transfer_jobs import (
    GROUPS,
    JUDGED_ITEMS,
    VALIDATION_ITEMS,
    Arm,
    Draw,
    as_logged,
    begin,
    candidates,
    deliver,
    fit_and_score,
)
from limaml.config import load
from limaml.events.logged import read_logged
from limaml.io.storage import Storage
from limaml.metrics import auc, mean_per_user_auc
from limaml.schema import tables

ARMS = (Arm(), Arm(text=True), Arm(hidden=0.5), Arm(text=True, hidden=0.5))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One draw of a generated world with films' columns, two steps an arm: its folder, how it is read, what was measured."""
    folder = tmp_path_factory.mktemp("draw")
    steps = ["training.max_steps=2", "training.validate_every=1", "training.num_workers=1", "training.tasks_per_step=4"]
    gates = ["source.max_rows_ratio=1000", "source.min_label_rate=0", "source.max_label_rate=1"]
    cfg = deliver(load("configs/synthetic.toml", [*steps, *gates]), "movielens", 0, folder)
    params = {"world": "movielens", "config": cfg.model_dump(mode="json")}
    outputs = {arm: [fit_and_score(Job("transfer", arm.name, params | {"arm": asdict(arm)}))] for arm in ARMS}
    return folder, cfg, transfer.Measurement([Draw.read(cfg)], outputs)


def test_all_arms_share_rows(world):
    found = transfer.compare(world[2])
    parts = [found["rows"][group] for group in ("unseen", "few", "rare", "warm")]
    for split in (parts, [week["rows"] for week in found["weeks"]], [users["rows"] for users in found["users"].values()]):
        assert found["rows"]["all"] == sum(split)
    assert found["rows"]["unseen"] > 50
    assert found["lists"]["unseen"] > 10
    assert set(found["validation_auc_unseen"]) == set(found["arms"]) == {"none", "text", "hidden 0.5", "hidden 0.5, text"}
    for gains in found["gains"].values():
        assert set(gains) == set(GROUPS)
        for gain in (gains[group][metric] for group in ("unseen", "all") for metric in ("pooled_auc", "ndcg10")):
            assert gain["low"] <= gain["mean"] <= gain["high"]
        assert gains["all"]["pooled_auc"]["low"] < gains["all"]["pooled_auc"]["high"]
    none, hidden = (found["arms"][name]["groups"]["all"]["pooled_auc"] for name in ("none", "hidden 0.5"))
    assert found["gains"]["hiding"]["all"]["pooled_auc"]["mean"] == pytest.approx(hidden - none)


def test_scores_are_those_of_the_events_they_stand_beside(world):
    """Scored in order of users, kept in order of events: an arm's AUC over all is that of its events."""
    measurement, draw = world[2], world[2].draws[0]
    (output,) = measurement.outputs[Arm()]
    events, rows = output.arrays["event_R"], measurement.rows()
    own = auc(draw.label_E[events], output.arrays["score_R"])
    assert auc(rows.label_R, measurement.scores(Arm())) == pytest.approx(own)
    assert (np.diff(events) > 0).all()
    assert ((rows.day_R >= 0) == (draw.day_E[events] >= draw.first_judged)).all()
    assert 0 < (rows.day_R >= 0).mean() < 1


def test_new_items_have_no_event_before_they_begin(world):
    folder, cfg, _ = world
    events = pq.read_table(folder / "delivered" / "events")
    first: dict[str, date] = {}
    for item, at in zip(events["item_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True):
        first[item] = min(first.get(item, date.max), at.date())
    starts = cfg.evaluation.validate_from, cfg.evaluation.test_from
    begins = {item: begin(item, 0, *starts) for item in first}
    assert all(first[item] >= day for item, day in begins.items())
    assert {first[item] for item, day in begins.items() if day == starts[1]} <= {starts[1], starts[1] + timedelta(days=1)}
    many = [begin(f"i{n}", 0, *starts) for n in range(4000)]
    # Four standard deviations of a share of 4,000.
    assert [np.mean([day == start for day in many]) for start in starts] == pytest.approx(
        [VALIDATION_ITEMS, JUDGED_ITEMS], abs=0.026
    )
    assert many != [begin(f"i{n}", 1, *starts) for n in range(4000)], "another draw has other new items"


def test_a_catalogue_has_the_features_of_the_day(world):
    """What ingestion joined with the events that did happen, as each was delivered."""
    folder, cfg, measurement = world
    (draw,) = measurement.draws
    list_C, item_C, context_C = candidates(draw, offered=False)
    assert np.bincount(list_C).tolist() == [draw.items.num_rows] * len(draw.lists)
    taken = {(user, item, day): n for n, (user, item, day) in enumerate(zip(draw.user_E, draw.item_E, draw.day_E, strict=True))}
    keys = [(draw.lists[at].user, item, draw.lists[at].day) for at, item in zip(list_C, item_C, strict=True)]
    at = np.array([n for n, key in enumerate(keys) if key in taken])
    assert len(at) >= sum(len(one.item_P) for one in draw.lists)
    rooted = cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"root": str(folder / "plain")})})
    found = as_logged(draw, rooted, list_C[at], item_C[at], context_C[at])
    logged = read_logged(Storage(rooted.storage.root), tables(cfg.features), through=date.max).sort_by("event_id")
    features = [column.name for column in tables(cfg.features).joined]
    same = logged.take([taken[keys[n]] for n in at])
    assert found.select(features).equals(same.select(features).combine_chunks())


def _draw(user, item, day, label, num_items=4):
    instants = pa.array([date(1970, 1, 1) + timedelta(days=int(one)) for one in day]).cast(pa.timestamp("us", tz="UTC"))
    ids = {
        "event_id": [f"e{n}" for n in range(len(user))],
        "user_id": [f"u{n}" for n in user],
        "item_id": [f"i{n}" for n in item],
    }
    events = pa.table(ids | {"timestamp": instants, "label": label})
    return Draw(
        events, pa.array([f"u{n}" for n in range(max(user) + 1)]), pa.table({"item_id": [f"i{n}" for n in range(num_items)]}), 2
    )


def test_rows_before_the_day_are_counted_and_what_is_on_offer_is_the_day_s():
    draw = _draw([1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 1], [1, 1, 2, 2, 3, 2], [1, 0, 1, 1, 1, 0])
    assert draw.before(draw.item_E, np.array([0, 0, 1, 0]), np.array([1, 2, 2, 4])).tolist() == [0, 2, 0, 4]
    assert draw.before(draw.user_E, np.array([0, 1]), np.array([3, 2])).tolist() == [2, 1]
    assert [(one.user, one.day) for one in draw.lists] == [(0, 2), (0, 3), (1, 2)]
    assert ["unseen" in one.sampled for one in draw.lists] == [True, False, False]
    lists, items, context = candidates(draw, offered=True)
    # A user's own row says the context, where there is one.
    assert list(zip(lists, items, context, strict=True)) == [(0, 0, 3), (0, 1, 2), (1, 0, 4), (2, 0, 3), (2, 1, 5)]
    assert len(candidates(draw, offered=False)[0]) == 3 * 4, "the whole catalogue, as items are had twice"
    once = _draw([0, 0, 1], [0, 1, 2], [1, 2, 2], [1, 1, 1])
    assert candidates(once, offered=False)[1].tolist() == [1, 2, 3, 0, 1, 2, 3], "without what the user had before"


def test_aucs_are_those_of_rows_repeated_as_often_as_they_weigh():
    rng = np.random.default_rng(0)
    draw, user, item = rng.integers(0, 2, 300), rng.integers(0, 12, 300), rng.integers(0, 30, 300)
    label, score = (rng.random(300) < 0.4).astype(float), rng.integers(0, 20, 300) / 20
    rows = metrics.Rows(draw, user, item, draw, label, draw, draw)
    resamples = metrics.Resamples.draw(12, 30, 40)
    found = metrics.measured(rows, score, np.ones(300, bool), resamples)
    for at in (0, 1, 40):
        times = (resamples.user_BU[at][user] * resamples.item_BI[at][item]).astype(int)
        again = np.repeat(np.arange(300), times)
        pairs = [label[again][draw[again] == d].sum() * (1 - label[again][draw[again] == d]).sum() for d in (0, 1)]
        aucs = [auc(label[again][draw[again] == d], score[again][draw[again] == d]) for d in (0, 1)]
        assert found["pooled_auc"][at] == pytest.approx(100 * np.average(aucs, weights=pairs))
    plain = mean_per_user_auc(label, score, draw * 12 + user, 24)
    assert found["per_user_auc"][0] == pytest.approx(100 * plain)
    assert found["pooled_auc"].std() > 0


def test_ndcg_is_that_of_scikit_learn():
    from sklearn.metrics import ndcg_score

    rng, days = np.random.default_rng(0), np.repeat(np.arange(2, 8), 20)
    label = (rng.random(120) < 0.3).astype(int)
    draw = _draw(np.zeros(120, int), np.tile(np.arange(20), 6), days, label, num_items=20)
    score = rng.random(120)
    lists, items, _ = candidates(draw, offered=True)
    above = [
        sum(score[(days == one.day) & (label == 0)] > score[days == one.day][item]) for one in draw.lists for item in one.item_P
    ]
    found = metrics.ndcg([draw], [{"above": np.array(above)}], "all", metrics.Resamples.draw(1, 20, 3))
    expected = np.mean([ndcg_score([label[days == day]], [score[days == day]], k=10) for day in range(2, 8)])
    assert found[0] == pytest.approx(100 * expected)
    assert len(lists) == len(items) == 120
