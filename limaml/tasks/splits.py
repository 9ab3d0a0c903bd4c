"""Train < T1 <= validate < T2 <= test, by time, with users who are held out of both.

hash    A share of the users, by a hash of the id, is held out. Of the others, rows before T1 train, rows from T1 to T2
        validate, as a daily refresh serves them, and rows from T2 on test. T1 and T2 are starts of days.
late    Users in the order of their arrival: the first ones train, the next validate, the others are held out. T1 and T2 are the
        arrivals of the first validation and of the first held-out user, so every row that trains is older than every arrival
        that it is judged on.

Either way nothing at or after T2, and no row of a held-out user, is ever used to fit or to choose the twin. Rows from T2 on are
what the gate reads, and all rows of held-out users, as those of new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from hashlib import blake2b
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from limaml.config import EvaluationConfig
from limaml.errors import DataError
from limaml.schema import day_start
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, microseconds

_SALT = b"held out"
"""Of this hash alone: who is held out says nothing of the shard that embeds them, nor of whose requests are logged."""


@dataclass(frozen=True)
class Split:
    """Users of each part, and the two instants (microseconds since 1970, UTC, exclusive ends of training and validation)."""

    held_out: Literal["hash", "late"]
    train_users: tuple[str, ...]
    """Known users: they have rows that train."""
    validation_users: tuple[str, ...]
    """hash: among them most of the known users."""
    held_out_users: tuple[str, ...]
    train_end_us: int
    """T1"""
    validation_end_us: int
    """T2"""

    @property
    def validate_from_us(self) -> int | None:
        """From here on validation users are judged, their earlier rows being support; None: as new ones, on all their rows."""
        return self.train_end_us if self.held_out == "hash" else None

    def train_rows(self, logged: pa.Table) -> pa.Table:
        """Rows the twin's weights and encoder are fitted on."""
        return rows_of(logged, self.train_users, before_us=self.train_end_us)

    def validation_rows(self, logged: pa.Table) -> pa.Table:
        """Rows on which steps, rates and shrinkages are chosen: validation users' rows that are judged, and their support."""
        return rows_of(logged, self.validation_users, before_us=self.validation_end_us)

    def known_rows(self, logged: pa.Table) -> pa.Table:
        """`validation_rows`, and all other rows before T2 of users who are not held out: the support of other kinds' tasks."""
        return rows_of(logged, sorted({*self.train_users, *self.validation_users}), before_us=self.validation_end_us)


def split_events(logged: pa.Table, cfg: EvaluationConfig) -> Split:
    """Split the rows and users of `logged` (at least user_id and timestamp, in any order).

    Raises DataError, with the remedy, if a part would hold no row.
    """
    users = _users(logged)
    return _by_hash(users, logged, cfg) if cfg.held_out == "hash" else _by_arrival(users, logged, cfg)


def rows_of(logged: pa.Table, users: Sequence[str], *, before_us: int) -> pa.Table:
    """Rows of the users before an instant (microseconds since 1970, UTC)."""
    mine = pc.is_in(logged["user_id"], value_set=pa.array(users, pa.string()))
    return logged.filter(pc.and_(mine, pc.less(logged["timestamp"].cast(pa.int64()), before_us)))


def is_held_out(user_id: str, share: float) -> bool:
    """Whether a hold-out of `share` of the users holds this one, on every machine; a larger share holds it as well."""
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8, salt=_SALT).digest(), "big") < share * 2**64


def _users(logged: pa.Table) -> pa.Table:
    """`user_id` and the instants of the first and last row (`first`, `last`), in order of arrival, ties by id."""
    stamped = pa.table({"user_id": logged["user_id"], "us": logged["timestamp"].cast(pa.int64())})
    found = stamped.group_by("user_id").aggregate([("us", "min"), ("us", "max")])
    table = pa.table({"user_id": found["user_id"], "first": found["us_min"], "last": found["us_max"]})
    return table.sort_by([("first", "ascending"), ("user_id", "ascending")])


def _by_hash(users: pa.Table, logged: pa.Table, cfg: EvaluationConfig) -> Split:
    train_end_us, validation_end_us, between = _instants(users, cfg)
    ids = users["user_id"].to_pylist()
    held = {user for user in ids if is_held_out(user, cfg.held_out_users)}
    stamps = logged["timestamp"].cast(pa.int64())
    validating = pc.and_(pc.greater_equal(stamps, train_end_us), pc.less(stamps, validation_end_us))
    came = set(pc.unique(logged["user_id"].filter(validating)).to_pylist())
    first, last = users["first"].to_pylist(), users["last"].to_pylist()
    split = Split(
        held_out="hash",
        train_users=tuple(user for user, at in zip(ids, first, strict=True) if at < train_end_us and user not in held),
        validation_users=tuple(user for user in ids if user in came and user not in held),
        held_out_users=tuple(user for user in ids if user in held),
        train_end_us=train_end_us,
        validation_end_us=validation_end_us,
    )
    if not held or len(held) == len(ids):
        raise DataError(
            f"a split by hash needs users who are held out and users who are not, got {len(held)} of {len(ids)} users at "
            f"evaluation.held_out_users = {cfg.held_out_users:g}; set another share, or give more users"
        )
    testing = any(at >= validation_end_us and user not in held for user, at in zip(ids, last, strict=True))
    parts = {"train": split.train_users, "validation": split.validation_users, "test": testing}
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"a split by hash needs rows of users who are not held out in training, validation and test, got none in "
            f"{' and '.join(empty)} ({between}); give more days, or other dates or shares in [evaluation]"
        )
    return split


def _instants(users: pa.Table, cfg: EvaluationConfig) -> tuple[int, int, str]:
    """T1, T2, and where they lie in words."""
    if not users.num_rows:
        raise DataError("a split needs rows of at least three days, got none; ingest more days")
    first, last = (_day(extreme) for extreme in (pc.min(users["first"]).as_py(), pc.max(users["last"]).as_py()))
    days = f"the rows' days are {first} to {last}"
    if cfg.validate_from is not None and cfg.test_from is not None:
        validate_from, test_from = cfg.validate_from, cfg.test_from
    else:
        num_days = (last - first).days + 1
        ends = (cfg.train_share_of_days, cfg.train_share_of_days + cfg.validation_share_of_days)
        validate_from, test_from = (first + timedelta(days=round(num_days * share)) for share in ends)
    between = f"validation is from {validate_from} and test from {test_from}, {days}"
    if not first < validate_from < test_from <= last:
        raise DataError(
            f"a split by hash needs at least one day to train, one to validate and one to test, got: {between}; give more "
            "days, or other dates or shares in [evaluation]"
        )
    return microseconds(day_start(validate_from)), microseconds(day_start(test_from)), between


def _by_arrival(users: pa.Table, logged: pa.Table, cfg: EvaluationConfig) -> Split:
    ids, arrivals = users["user_id"].to_pylist(), users["first"].to_pylist()
    num_train = int(len(ids) * cfg.train_share_of_users)
    num_validation = int(len(ids) * cfg.validation_share_of_users)
    if not num_train or not num_validation or num_train + num_validation >= len(ids):
        raise DataError(
            f"a split by arrival needs at least one user to train, to validate and to hold out, got {len(ids)} users at shares "
            f"{cfg.train_share_of_users:g}, {cfg.validation_share_of_users:g}; give more days, or other shares in [evaluation]"
        )
    split = Split(
        held_out="late",
        train_users=tuple(ids[:num_train]),
        validation_users=tuple(ids[num_train : num_train + num_validation]),
        held_out_users=tuple(ids[num_train + num_validation :]),
        train_end_us=arrivals[num_train],
        validation_end_us=arrivals[num_train + num_validation],
    )
    if not split.train_rows(logged).num_rows or not split.validation_rows(logged).num_rows:
        raise DataError(
            f"a split by arrival needs rows of the {num_train} training users before the first validation user arrives, and of "
            f"the {num_validation} validation users before the first held-out user does, got none; the users arrive together: "
            'give more days, or set evaluation.held_out = "hash"'
        )
    return split


def _day(instant_us: int) -> date:
    return date(1970, 1, 1) + timedelta(days=instant_us // MICROSECONDS_PER_DAY)
