"""Users in the order of their arrival: the first ones train, the next validate, the rest test.

    train       the first `train_share` of users, their events before the first validation user arrives (`train_end`)
    validation  the next `validation_share`, their events before the first test user arrives (`validation_end`)
    test        the other users, all their events

So every row that trains is older than every arrival it is judged on, and nothing at or after `validation_end` is ever used to
fit or to choose: rows from there on are what the gate reads.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from limaml.config import EvaluationConfig
from limaml.errors import DataError


@dataclass(frozen=True)
class Split:
    """Users in order of arrival, and the two instants (microseconds since the epoch, UTC, exclusive ends)."""

    train_users: tuple[str, ...]
    validation_users: tuple[str, ...]
    test_users: tuple[str, ...]
    train_end_us: int
    validation_end_us: int

    def train_rows(self, logged: pa.Table) -> pa.Table:
        """Rows the twin's weights and encoder are fitted on."""
        return logged.filter(_of(logged, self.train_users, before_us=self.train_end_us))

    def validation_rows(self, logged: pa.Table) -> pa.Table:
        """Rows on which steps, rates and shrinkages are chosen."""
        return logged.filter(_of(logged, self.validation_users, before_us=self.validation_end_us))


def arrival_split(logged: pa.Table, cfg: EvaluationConfig) -> Split:
    """Split the users of `logged` (at least user_id and timestamp) by the instant of their first event, ties by user id.

    Raises DataError if a part would hold no user, or training no row.
    """
    first = logged.group_by("user_id").aggregate([("timestamp", "min")])
    first = first.append_column("arrival", first["timestamp_min"].cast(pa.int64()))
    first = first.sort_by([("arrival", "ascending"), ("user_id", "ascending")])
    users, arrivals = first["user_id"].to_pylist(), first["arrival"].to_numpy()
    num_train = int(len(users) * cfg.train_share)
    num_validation = int(len(users) * cfg.validation_share)
    if not num_train or not num_validation or num_train + num_validation >= len(users):
        raise DataError(
            f"an arrival split needs at least one user to train, validate and test, got {len(users)} users at shares "
            f"{cfg.train_share:g}, {cfg.validation_share:g}; give more days, or other shares in [evaluation]"
        )
    split = Split(
        train_users=tuple(users[:num_train]),
        validation_users=tuple(users[num_train : num_train + num_validation]),
        test_users=tuple(users[num_train + num_validation :]),
        train_end_us=int(arrivals[num_train]),
        validation_end_us=int(arrivals[num_train + num_validation]),
    )
    if not split.train_rows(logged).num_rows or not split.validation_rows(logged).num_rows:
        raise DataError(
            f"an arrival split needs rows of the {num_train} training users before the first validation user arrives, and of "
            f"the {num_validation} validation users before the first test user does, got none; the users arrive together: give "
            "more days, or other shares in [evaluation]"
        )
    return split


def _of(logged: pa.Table, users: tuple[str, ...], *, before_us: int) -> pa.Array:
    mine = pc.is_in(logged["user_id"], value_set=pa.array(users, pa.string()))
    return pc.and_(mine, pc.less(logged["timestamp"].cast(pa.int64()), before_us))
