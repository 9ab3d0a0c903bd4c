"""What the sequence rival may read of each row; its network is trained where its environment is (make test-services)."""

import numpy as np
import pyarrow as pa
import pytest

from experiments import sequence_rival
from limaml import metrics
from limaml.tasks.sampling import MICROSECONDS_PER_DAY
from limaml.tasks.splits import Split

HOUR_US = MICROSECONDS_PER_DAY // 24


def logged_of(rows):
    """(user, item, hour, label) of each row, in whatever order."""
    users, items, hours, labels = zip(*rows, strict=True)
    stamps = pa.array([hour * HOUR_US for hour in hours], pa.timestamp("us", tz="UTC"))
    return pa.table({"user_id": users, "item_id": items, "timestamp": stamps, "label": pa.array(labels, pa.int8())})


def split_of(train, held_out, train_days, validation_days):
    ends = (train_days * MICROSECONDS_PER_DAY, validation_days * MICROSECONDS_PER_DAY)
    return Split("hash", tuple(train), tuple(train), tuple(held_out), *ends)


ROWS = [
    ("b", "x", 30, 1),
    ("a", "y", 1, 1),
    ("a", "x", 0, 1),
    ("a", "y", 2, 0),
    ("h", "x", 3, 1),
    ("a", "x", 26, 1),
    ("b", "y", 29, 0),
    ("a", "z", 51, 1),
    ("a", "x", 51, 1),
    ("a", "y", 53, 0),
    ("h", "y", 54, 1),
]
SPLIT = split_of(["a", "b"], ["h"], 1, 2)
VALIDATION, JUDGED = np.array([0, 5, 6]), np.array([7, 8, 9, 10])


def sequences(found, form):
    """Users' and items' numbers are in the order of their ids."""
    first = np.searchsorted(found["user_P"], found["user_R"])
    both = zip(first, found[f"{form}.seen"], strict=True)
    return ["".join("xyz"[item] for item in found["item_P"][start:stop]) for start, stop in both]


def test_a_daily_sequence_ends_before_the_day_and_a_requests_before_the_request():
    found = sequence_rival.prepared(logged_of(ROWS), SPLIT, JUDGED, VALIDATION)
    assert sequences(found, "sasrec_daily") == ["", "xy", "", "xyx", "xyx", "xyx", "x"]
    assert sequences(found, "sasrec_request") == ["", "xy", "", "xyx", "xyx", "xyxzx", "x"], "not of the same instant either"
    assert found["validation_labels"].tolist() == [1, 1, 0]


def test_only_training_rows_of_training_users_train():
    found = sequence_rival.prepared(logged_of(ROWS), SPLIT, JUDGED, VALIDATION)
    assert found["user_P"][found["trains_P"]].tolist() == [0, 0]
    assert found["item_P"][found["trains_P"]].tolist() == [0, 1], "in the order of time"
    assert found["shown_I"].tolist() == [1, 2, 0]
    assert 2 in found["user_P"], "the sequence of one who is held out is read"


def test_nothing_of_a_day_or_later_changes_what_its_daily_scores_read():
    turned = [(*row[:3], 1 - row[3] if row[2] >= 48 else row[3]) for row in ROWS]
    before, after = (sequence_rival.prepared(logged_of(rows), SPLIT, JUDGED, VALIDATION) for rows in (ROWS, turned))
    assert sequences(before, "sasrec_daily") == sequences(after, "sasrec_daily")
    for name in ("item_rate_R", "item_shown_R", "sasrec_daily.user_rate", "validation_labels"):
        assert np.array_equal(before[name], after[name]), name
    assert np.expm1(before["item_shown_R"][3:]).tolist() == pytest.approx([0, 4, 3, 3])


def test_rows_that_nobody_saw_are_asked_as_of_their_day_and_count_for_nothing():
    logged = logged_of(ROWS)
    before, after = (sequence_rival.prepared(logged, SPLIT, JUDGED, VALIDATION, asked) for asked in (None, logged.take(JUDGED)))
    size = len(JUDGED) + len(VALIDATION)
    for name, values in before.items():
        assert np.array_equal(after[name][: len(values)], values), name
    for name in ("user_R", "item_R", "item_rate_R", "sasrec_daily.seen", "sasrec_request.seen"):
        assert np.array_equal(after[name][size:], before[name][len(VALIDATION) :]), name


def test_without_its_environment_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sequence_rival, "PYTHON", tmp_path / "python")
    with pytest.raises(FileNotFoundError, match=r"run make experiments/\.sequence/installed"):
        sequence_rival.score(logged_of(ROWS), SPLIT, JUDGED, VALIDATION, seed=0)


@pytest.mark.services
@pytest.mark.parametrize("options", [{}, {"layers": "ligr"}])
def test_it_learns_what_follows_what(options):
    """A user takes what is next in a circle of ten, one a day, and is shown two others."""
    draws = np.random.default_rng(0)
    rows = []
    for user in range(60):
        taken = int(draws.integers(10))
        for day in range(20):
            taken = (taken + 1) % 10
            others = (taken + draws.choice(np.arange(1, 10), 2, replace=False)) % 10
            rows += [(f"u{user}", f"i{item}", 24 * day + 12, int(item == taken)) for item in (taken, *others)]
    logged, split = (
        logged_of(rows),
        split_of([f"u{user}" for user in range(50)], [f"u{user}" for user in range(50, 60)], 14, 17),
    )
    day = logged["timestamp"].cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY
    known = np.arange(len(rows)) < 50 * 60
    validation, judged = np.flatnonzero((day >= 14) & (day < 17) & known), np.flatnonzero(day >= 17)
    small = {"epochs": 15, "batch": 8, "factors": 16, "length": 10, "lr": 0.01, **options}
    scores, report = sequence_rival.score(logged, split, judged, validation, seed=0, options=small)
    labels = logged["label"].to_numpy()[judged]
    assert set(scores) == set(sequence_rival.FORMS)
    for score in scores.values():
        assert ((score > 0) & (score < 1)).all()
        # A third is shown what cannot follow; a rate of the item ranks at 0.5.
        assert metrics.auc(labels, score) > 0.9
    assert report["train_seconds"] > 0
    assert 0 < report["best_epoch"] <= 15
