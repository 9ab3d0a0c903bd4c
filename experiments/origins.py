"""Rolling origins: users in the order of their arrival, cut at several points in time.

    train | V0 | Q0 | V1 | Q1 | V2 | Q2        blocks of users by arrival

Origin o trains on all users who arrived before its validation block V_o, on their events before that block's first arrival;
chooses on V_o; and is judged on the rows between the first arrival in its test block Q_o and that in the next: rows of Q_o's
users (first-k and as served) and of its training users who come back (as served). No validation user of any origin is judged
at another, and no row is judged at two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from limaml.errors import DataError

TRAIN_SHARE, VALIDATION_SHARE, TEST_SHARE, NUM_ORIGINS = 0.46, 0.05, 0.13, 3
"""Shares of users; the first origin trains on the first, every origin has one of each of the others."""


@dataclass(frozen=True)
class Origin:
    """Users in order of arrival; instants in microseconds since 1970, UTC."""

    number: int
    train_users: tuple[str, ...]
    validation_users: tuple[str, ...]
    test_users: tuple[str, ...]
    returning_users: tuple[str, ...]
    """Training users who validate at no origin."""
    train_end_us: int
    test_start_us: int
    test_end_us: int

    def train_rows(self, logged: pa.Table) -> pa.Table:
        return logged.filter(_of(logged, self.train_users, self.train_end_us))

    def validation_rows(self, logged: pa.Table) -> pa.Table:
        return logged.filter(_of(logged, self.validation_users, self.test_start_us))

    def judged_rows(self, logged: pa.Table) -> pa.Table:
        """Every row that a judged task may read: those of test and returning users before the test block's end."""
        return logged.filter(_of(logged, (*self.returning_users, *self.test_users), self.test_end_us))


def rolling_origins(logged: pa.Table) -> list[Origin]:
    """Cut the users of `logged` by the instant of their first event, ties by user id. Raises DataError for too few users."""
    first = logged.group_by("user_id").aggregate([("timestamp", "min")])
    first = first.append_column("arrival", first["timestamp_min"].cast(pa.int64()))
    first = first.sort_by([("arrival", "ascending"), ("user_id", "ascending")])
    users, arrivals = first["user_id"].to_pylist(), first["arrival"].to_pylist()
    bounds = [round(len(users) * share) for share in _shares()]
    if len(set(bounds)) < len(bounds):
        raise DataError(f"rolling origins need users in each of {len(bounds)} blocks, got {len(users)} users; give more")
    starts = [*arrivals, arrivals[-1] + 10**15]  # past the last row of anybody
    validating = {user for at in range(NUM_ORIGINS) for user in users[bounds[2 * at] : bounds[2 * at + 1]]}
    origins = []
    for number in range(NUM_ORIGINS):
        train, validation, test = bounds[2 * number], bounds[2 * number + 1], bounds[2 * number + 2]
        next_test = bounds[2 * number + 3] if number + 1 < NUM_ORIGINS else len(users)
        origins.append(
            Origin(
                number,
                tuple(users[:train]),
                tuple(users[train:validation]),
                tuple(users[validation:test]),
                tuple(user for user in users[:train] if user not in validating),
                train_end_us=starts[train],
                test_start_us=starts[validation],
                test_end_us=starts[next_test],
            )
        )
    return origins


def _shares() -> list[float]:
    shares = [TRAIN_SHARE]
    for _ in range(NUM_ORIGINS):
        shares += [shares[-1] + VALIDATION_SHARE, shares[-1] + VALIDATION_SHARE + TEST_SHARE]
    return shares


def _of(logged: pa.Table, users: Sequence[str], before_us: int) -> pa.Array:
    mine = pc.is_in(logged["user_id"], value_set=pa.array(users, pa.string()))
    return pc.and_(mine, pc.less(logged["timestamp"].cast(pa.int64()), before_us))
