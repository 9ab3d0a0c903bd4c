"""Rolling origins: users in the order of their arrival, cut at several points in time.

    train | V0 | Q0 | V1 | Q1 | V2 | Q2        blocks of users by arrival

Origin o trains on all users who arrived before its validation block V_o, on their events before that block's first arrival;
chooses on V_o; and is judged on the rows between the first arrival in its test block Q_o and that in the next: rows of Q_o's
users (first-k and as served) and of its training users who come back (as served). No validation user of any origin is judged
at another, and no row is judged at two.
"""

from dataclasses import dataclass

import pyarrow as pa

from limaml.errors import DataError
from limaml.tasks.splits import Split, rows_of

TRAIN_SHARE, VALIDATION_SHARE, TEST_SHARE, NUM_ORIGINS = 0.46, 0.05, 0.13, 3
"""Shares of users; the first origin trains on the first, every origin has one of each of the others."""


@dataclass(frozen=True)
class Origin(Split):
    """A split by arrival whose held-out users are those of one test block, judged up to the next one."""

    number: int
    returning_users: tuple[str, ...]
    """Training users who validate at no origin."""
    test_end_us: int

    def test_rows(self, logged: pa.Table) -> pa.Table:
        """Every row that a test task may read: those of held-out and returning users before the test block's end."""
        return rows_of(logged, (*self.returning_users, *self.held_out_users), before_us=self.test_end_us)


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
                held_out="late",
                train_users=tuple(users[:train]),
                validation_users=tuple(users[train:validation]),
                held_out_users=tuple(users[validation:test]),
                train_end_us=starts[train],
                validation_end_us=starts[validation],
                number=number,
                returning_users=tuple(user for user in users[:train] if user not in validating),
                test_end_us=starts[next_test],
            )
        )
    return origins


def _shares() -> list[float]:
    shares = [TRAIN_SHARE]
    for _ in range(NUM_ORIGINS):
        shares += [shares[-1] + VALIDATION_SHARE, shares[-1] + VALIDATION_SHARE + TEST_SHARE]
    return shares
