from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import EvaluationConfig
from limaml.errors import DataError
from limaml.tasks.splits import arrival_split

START = datetime(2026, 1, 1, tzinfo=UTC)
CFG = EvaluationConfig(train_share=0.6, validation_share=0.2)


def logged(rows: list[tuple[str, float]]) -> pa.Table:
    """(user, hours since START) rows, sorted as the logged store sorts them."""
    rows = sorted(rows)
    return pa.table(
        {
            "user_id": pa.array([user for user, _ in rows], pa.string()),
            "timestamp": pa.array([START + timedelta(hours=hours) for _, hours in rows], schema.TIMESTAMP),
        }
    )


# Arrivals: e (0), d (1), b (2), a (3), c (5); names are out of order on purpose.
ROWS = [
    ("e", 0),
    ("e", 2.5),
    ("e", 9),
    ("d", 1),
    ("d", 3),
    ("b", 2),
    ("a", 3),
    ("a", 4.9),
    ("a", 5),
    ("a", 8),
    ("c", 5),
    ("c", 6),
]


def hours(table: pa.Table) -> list[tuple[str, float]]:
    pairs = zip(table["user_id"].to_pylist(), table["timestamp"].to_pylist(), strict=True)
    return [(user, (stamp - START).total_seconds() / 3600) for user, stamp in pairs]


def test_users_are_split_by_arrival_and_rows_end_before_the_next_arrive():
    table = logged(ROWS)
    split = arrival_split(table, CFG)
    assert split.train_users == ("e", "d", "b")
    assert split.validation_users == ("a",)
    assert split.test_users == ("c",)
    # a arrives at 3: d's row at exactly 3 is no training row; c arrives at 5: a's row at exactly 5 does not validate.
    assert hours(split.train_rows(table)) == [("b", 2), ("d", 1), ("e", 0), ("e", 2.5)]
    assert hours(split.validation_rows(table)) == [("a", 3), ("a", 4.9)]


def test_equal_arrivals_go_by_user_id_and_row_order_changes_nothing():
    rows = [("b", 0), ("a", 0), ("d", 1), ("c", 1), ("e", 2)]
    table = logged(rows)
    split = arrival_split(table, CFG)
    assert split.train_users + split.validation_users + split.test_users == ("a", "b", "c", "d", "e")
    assert arrival_split(table.take([4, 2, 0, 3, 1]), CFG) == split


def test_too_few_users_is_an_error_with_the_remedy():
    with pytest.raises(DataError, match=r"at least one user to train, validate and test, got 2 users .* give more days"):
        arrival_split(logged([("a", 0), ("b", 1)]), CFG)


def test_users_who_all_arrive_together_are_an_error():
    with pytest.raises(DataError, match="the users arrive together"):
        arrival_split(logged([(user, 0.0) for user in "abcde"]), CFG)
