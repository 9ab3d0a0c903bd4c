"""Splits by time: who trains, who validates, who is held out, and that no row is in a part that it must not be in."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limaml import config, schema
from limaml.config import EvaluationConfig
from limaml.errors import DataError
from limaml.events.movielens import MovieLensSource
from limaml.events.recent import shard_of
from limaml.tasks.splits import Split, is_held_out, split_events

START = datetime(2026, 1, 1, tzinfo=UTC)
CONFIGS = Path(__file__).parents[3] / "configs"
LATE = EvaluationConfig(held_out="late", train_share_of_users=0.6, validation_share_of_users=0.2)


def logged(rows: list[tuple[str, float]]) -> pa.Table:
    """(user, hours since START) rows, sorted as the logged store sorts them; `event` numbers them."""
    rows = sorted(rows)
    return pa.table(
        {
            "event": pa.array(range(len(rows)), pa.int64()),
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


def test_users_are_split_by_arrival_and_rows_end_before_the_next_arrive() -> None:
    table = logged(ROWS)
    split = split_events(table, LATE)
    assert split.train_users == ("e", "d", "b")
    assert split.validation_users == ("a",)
    assert split.held_out_users == ("c",)
    # a arrives at 3: d's row at exactly 3 is no training row; c arrives at 5: a's row at exactly 5 does not validate.
    assert hours(split.train_rows(table)) == [("b", 2), ("d", 1), ("e", 0), ("e", 2.5)]
    assert hours(split.validation_rows(table)) == [("a", 3), ("a", 4.9)]
    assert split.validate_from_us is None


def test_equal_arrivals_go_by_user_id_and_row_order_changes_nothing() -> None:
    rows = [("b", 0.0), ("a", 0.0), ("d", 1.0), ("c", 1.0), ("e", 2.0)]
    table = logged(rows)
    split = split_events(table, LATE)
    assert split.train_users + split.validation_users + split.held_out_users == ("a", "b", "c", "d", "e")
    assert split_events(table.take([4, 2, 0, 3, 1]), LATE) == split


def test_movielens_is_split_as_by_hand() -> None:
    """By the shipped configuration: 660 users train, 94 validate, 189 are held out; rows one by one in plain Python."""
    source = MovieLensSource()
    days = [table for day in source.days() if (table := source.read_day(day)) is not None]
    table = pa.concat_tables(days).select(["event_id", "user_id", "timestamp"]).combine_chunks()
    rows = table.to_pylist()
    arrival: dict[str, datetime] = {}
    for row in rows:
        arrival[row["user_id"]] = min(row["timestamp"], arrival.get(row["user_id"], row["timestamp"]))
    ordered = sorted(arrival, key=lambda user: (arrival[user], user))
    train, validation, held_out = ordered[:660], ordered[660:754], ordered[754:]
    ends = [arrival[part[0]] for part in (validation, held_out)]

    def ids(users: list[str], before: datetime) -> set[str]:
        mine = set(users)
        return {row["event_id"] for row in rows if row["user_id"] in mine and row["timestamp"] < before}

    split = split_events(table, config.load(CONFIGS / "movielens.toml").evaluation)
    parts = (split.train_users, split.validation_users, split.held_out_users)
    assert parts == (tuple(train), tuple(validation), tuple(held_out))
    assert [split.train_end_us, split.validation_end_us] == [int(end.timestamp()) * 1_000_000 for end in ends]
    assert set(split.train_rows(table)["event_id"].to_pylist()) == ids(train, ends[0])
    assert set(split.validation_rows(table)["event_id"].to_pylist()) == ids(validation, ends[1])


def test_too_few_users_to_split_by_arrival_is_an_error_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"at least one user to train, to validate and to hold out, got 2 users .* give more"):
        split_events(logged([("a", 0), ("b", 1)]), LATE)


def test_users_who_all_arrive_together_are_an_error_that_names_the_other_split() -> None:
    with pytest.raises(DataError, match=r'the users arrive together: .* evaluation.held_out = "hash"'):
        split_events(logged([(user, 0.0) for user in "abcde"]), LATE)


HELD_OUT, KNOWN = "user 3", ("user 0", "user 1", "user 4")
TEN_DAYS = [(user, 24.0 * day) for user in (HELD_OUT, *KNOWN) for day in range(10)]


def days_of(table: pa.Table) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for user, at in hours(table):
        found.setdefault(user, []).append(at / 24)
    return found


def test_by_hash_rows_go_by_their_day_and_held_out_users_by_their_id() -> None:
    table = logged([*TEN_DAYS, ("user 5", 24.0 * 8 + 1), ("user 6", 24.0 * 9)])
    split = split_events(table, EvaluationConfig(held_out_users=0.3))
    assert split.train_users == KNOWN
    assert split.validation_users == (*KNOWN, "user 5")
    assert split.held_out_users == (HELD_OUT,)
    assert days_of(split.train_rows(table)) == {user: [float(day) for day in range(8)] for user in KNOWN}
    # What validates has its support beside it, also from before T1.
    assert split.validate_from_us == split.train_end_us == at_day(8)
    assert days_of(split.validation_rows(table)) == {
        **{user: [float(day) for day in range(9)] for user in KNOWN},
        "user 5": [8 + 1 / 24],
    }
    assert split.validation_end_us == at_day(9)


def at_day(number: int) -> int:
    return int((START + timedelta(days=number)).timestamp()) * 1_000_000


def test_dates_take_the_place_of_shares() -> None:
    cfg = EvaluationConfig(held_out_users=0.3, validate_from=date(2026, 1, 4), test_from=date(2026, 1, 9))
    split = split_events(logged(TEN_DAYS), cfg)
    assert (split.train_end_us, split.validation_end_us) == (at_day(3), at_day(8))
    assert split_events(logged(TEN_DAYS), EvaluationConfig.model_validate(cfg.model_dump(mode="json"))) == split


def test_the_hash_is_the_same_everywhere_and_no_other_hash() -> None:
    """First of ten thousand who are held out, as another process found them; shares hold; shards say nothing about it."""
    users = [str(number) for number in range(10_000)]
    held = [user for user in users if is_held_out(user, 0.1)]
    assert held[:8] == FIRST_HELD_OUT
    # Four standard deviations of a share of 10,000 draws, here and below.
    assert len(held) / len(users) == pytest.approx(0.1, abs=4 * (0.09 / 10_000) ** 0.5)
    assert set(held) < {user for user in users if is_held_out(user, 0.2)}
    shards = np.bincount([shard_of(user, 4) for user in held], minlength=4) / len(held)
    np.testing.assert_allclose(shards, 0.25, atol=4 * (0.19 / len(held)) ** 0.5)


FIRST_HELD_OUT = ["1", "4", "10", "15", "23", "24", "49", "53"]


@st.composite
def tables(draw: Callable[..., Any]) -> tuple[pa.Table, EvaluationConfig]:
    """Rows of up to eight users within up to twelve days, many at midnight, and any split by hash of them."""
    num_days = draw(st.integers(3, 12))
    hour = st.one_of(st.integers(0, num_days - 1).map(lambda day: 24.0 * day), st.integers(0, 24 * num_days - 1).map(float))
    rows = draw(st.lists(st.tuples(st.sampled_from([f"u{n}" for n in range(8)]), hour), min_size=10, max_size=80))
    values: dict[str, Any] = {"held_out_users": draw(st.sampled_from([0.1, 0.3, 0.5]))}
    if draw(st.booleans()):
        first, second = sorted(draw(st.lists(st.integers(1, num_days), min_size=2, max_size=2, unique=True)))
        values |= {"validate_from": START.date() + timedelta(days=first), "test_from": START.date() + timedelta(days=second)}
    else:
        values |= {"train_share_of_days": draw(st.sampled_from([0.3, 0.5, 0.7]))}
        values |= {"validation_share_of_days": draw(st.sampled_from([0.1, 0.25]))}
    return logged(rows), EvaluationConfig(**values)


@settings(deadline=None)
@given(tables())
def test_no_row_leaks_and_every_row_has_one_part(made: tuple[pa.Table, EvaluationConfig]) -> None:
    table, cfg = made
    try:
        split = split_events(table, cfg)
    except DataError:
        assume(False)
        raise
    assert split.train_end_us < split.validation_end_us
    train, validation = split.train_rows(table), judged_in_validation(split, table)
    held_out = set(split.held_out_users)
    assert held_out == {user for user in set(table["user_id"].to_pylist()) if is_held_out(user, cfg.held_out_users)}
    for part, end in ((train, split.train_end_us), (split.validation_rows(table), split.validation_end_us)):
        assert part.num_rows
        assert max(stamps(part)) < end
        assert not set(part["user_id"].to_pylist()) & held_out
    assert min(stamps(validation)) >= split.train_end_us
    assert set(validation["user_id"].to_pylist()) == set(split.validation_users)
    assert set(train["user_id"].to_pylist()) == set(split.train_users)
    users = table["user_id"].to_pylist()
    test = [n for n, at in enumerate(stamps(table)) if at >= split.validation_end_us or users[n] in held_out]
    assert sorted([*train["event"].to_pylist(), *validation["event"].to_pylist(), *test]) == list(range(table.num_rows))


@settings(deadline=None)
@given(tables(), st.sampled_from([0.3, 0.5]))
def test_nothing_leaks_by_arrival_either(made: tuple[pa.Table, EvaluationConfig], share: float) -> None:
    """Every row has one part at most: rows of training users between T1 and T2 have none, they are support only."""
    table, _ = made
    try:
        cfg = EvaluationConfig(held_out="late", train_share_of_users=share, validation_share_of_users=0.3)
        split = split_events(table, cfg)
    except DataError:
        assume(False)
        raise
    everybody = (*split.train_users, *split.validation_users, *split.held_out_users)
    assert sorted(everybody) == sorted(set(table["user_id"].to_pylist()))
    assert max(stamps(split.train_rows(table))) < split.train_end_us
    assert max(stamps(split.validation_rows(table))) < split.validation_end_us
    assert min(stamps(split.validation_rows(table))) >= split.train_end_us
    users, at = table["user_id"].to_pylist(), stamps(table)
    held_out = [at[n] for n in range(len(at)) if users[n] in set(split.held_out_users)]
    assert min(held_out) >= split.validation_end_us


def judged_in_validation(split: Split, table: pa.Table) -> pa.Table:
    rows = split.validation_rows(table)
    return rows.filter(pa.array([at >= (split.validate_from_us or 0) for at in stamps(rows)]))


def stamps(table: pa.Table) -> list[int]:
    return table["timestamp"].cast(pa.int64()).to_pylist()


REFUSED: list[tuple[str, list[tuple[str, float]], dict[str, Any], str]] = [
    ("no rows", [], {}, "a split needs rows of at least three days, got none; ingest more days"),
    (
        "two days",
        [(user, 24.0 * day) for user in "abcd" for day in range(2)],
        {},
        "needs at least one day to train, one to validate and one to test, got: validation is from 2026-01-03 and test from "
        "2026-01-03, the rows' days are 2026-01-01 to 2026-01-02; give more days, or other dates or shares in [evaluation]",
    ),
    (
        "dates behind the rows",
        TEN_DAYS,
        {"validate_from": date(2026, 1, 10), "test_from": date(2026, 1, 11)},
        "validation is from 2026-01-10 and test from 2026-01-11, the rows' days are 2026-01-01 to 2026-01-10",
    ),
    (
        "dates before the rows",
        TEN_DAYS,
        {"validate_from": date(2026, 1, 1), "test_from": date(2026, 1, 5)},
        "needs at least one day to train",
    ),
    (
        "nobody held out",
        [(user, at) for user, at in TEN_DAYS if user != HELD_OUT],
        {},
        "needs users who are held out and users who are not, got 0 of 3 users at evaluation.held_out_users = 0.3; set another",
    ),
    (
        "everybody held out",
        [(user, at) for user, at in TEN_DAYS if user == HELD_OUT],
        {},
        "got 1 of 1 users at evaluation.held_out_users = 0.3",
    ),
    (
        "a part without rows",
        [(user, at) for user, at in TEN_DAYS if user == HELD_OUT or at < 24 * 8],
        {},
        "needs rows of users who are not held out in training, validation and test, got none in validation and test "
        "(validation is from 2026-01-09 and test from 2026-01-10, the rows' days are 2026-01-01 to 2026-01-10); give more days",
    ),
]


@pytest.mark.parametrize(("rows", "values", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_split_by_hash_says_why(rows: list[tuple[str, float]], values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        split_events(logged(rows), EvaluationConfig(**{"held_out_users": 0.3} | values))
    assert message in str(caught.value)
