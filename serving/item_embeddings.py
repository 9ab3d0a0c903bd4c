"""The embeddings of all catalogue items, or of their category, in memory, judged as a user's is (contracts 3, 4 and 6).

I items, R candidates, D embedding width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property

import numpy as np
import numpy.typing as npt

from limaml import telemetry
from limaml.features.columns import Floats, Indices
from serving.freshness import Status, StoredEmbedding, judge

Stored = Mapping[str, StoredEmbedding | None]
"""Item -> its row, None if the store has none; an item that could not be read is not there."""

_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_UNKNOWN_US = np.iinfo(np.int64).min
_CODES: dict[str, int] = {status: code for code, status in enumerate(telemetry.LOOKUP_STATUSES)}


def by_item(catalogue: Sequence[str], entities: Sequence[str | None], rows: Stored) -> Stored:
    """Rows of entities as rows of the items that belong to them; an item that belongs to none has no row."""
    found: dict[str | None, StoredEmbedding | None] = {None: None}
    found.update(rows)
    return {item: found[entity] for item, entity in zip(catalogue, entities, strict=True) if entity in found}


@dataclass(frozen=True)
class CandidateLookups:
    """The outcome for the candidates of one request."""

    status_R: Indices
    """Places in telemetry.LOOKUP_STATUSES."""
    vector_RD: Floats
    """The prior where the stored embedding is not used."""
    num_prior: int
    """Candidates that are scored with the prior."""
    age_s: float | None
    """Freshness lag of the oldest; None where no row counts."""
    inactivity_s: float | None
    """Of the item that has been silent for longest."""

    def withheld(self, prior_D: Floats) -> "CandidateLookups":
        """As `freshness.Lookup.withheld`, of each candidate."""
        status_R = np.where(self.status_R == _CODES["fresh"], _CODES["withheld"], self.status_R)
        vector_RD = np.tile(prior_D, (len(status_R), 1))
        return replace(self, status_R=status_R, vector_RD=vector_RD, num_prior=len(status_R))

    @cached_property
    def counts(self) -> dict[Status, int]:
        """Status -> candidates, those that occur."""
        counted = np.bincount(self.status_R, minlength=len(_CODES)).tolist()
        return {status: number for status, number in zip(telemetry.LOOKUP_STATUSES, counted, strict=True) if number}  # type: ignore[misc]


@dataclass(frozen=True)
class ItemEmbeddings:
    """What was read of a catalogue, for one model version; what depends on the clock is judged when a request comes."""

    catalogue: tuple[str, ...]
    stored: Stored
    complete_through: datetime | None
    """Of the kind, as it was known before the rows were read."""
    prior_D: Floats
    vector_ID: Floats
    """The prior where a row does not count."""
    status_I: Indices
    """Places in telemetry.LOOKUP_STATUSES; `fresh` until the clock says stale."""
    exact_at_us_I: npt.NDArray[np.int64]
    last_event_us_I: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, catalogue: Sequence[str], stored: Stored, *, version: str, complete_through: datetime | None, prior_D: Floats
    ) -> "ItemEmbeddings":
        """Judge everything but the lag, by `freshness.judge` itself."""
        vector_ID = np.tile(prior_D, (len(catalogue), 1))
        status_I = np.full(len(catalogue), _CODES["store_error"])
        exact_at_us_I, last_event_us_I = (np.full(len(catalogue), _UNKNOWN_US) for _ in range(2))
        for at, item in enumerate(catalogue):
            if item not in stored:
                continue
            row = stored[item]
            of_then = {"version": version, "dim": prior_D.size, "complete_through": complete_through}
            found = judge(row, **of_then, max_lag_s=np.inf, now=_EPOCH)  # type: ignore[arg-type]
            status_I[at] = _CODES[found.status]
            if row is not None and found.vector is not None:
                vector_ID[at] = found.vector
                exact_at_us_I[at] = _us(max(row.as_of, complete_through) if complete_through else row.as_of)
                last_event_us_I[at] = _us(row.last_event_at) if row.last_event_at else _UNKNOWN_US
        known = tuple(catalogue), stored, complete_through, prior_D
        return cls(*known, vector_ID, status_I, exact_at_us_I, last_event_us_I)

    def look_up(self, numbers: Sequence[int], *, max_lag_s: float, use_stale: bool, now: datetime) -> CandidateLookups:
        """The items with these numbers in the catalogue, at `now`; as `freshness.judge` of each."""
        at_R, now_us = np.array(numbers, np.int64), _us(now)
        status_R = self.status_I.take(at_R)
        vector_RD = self.vector_ID.take(at_R, axis=0)
        has_row_R = status_R == _CODES["fresh"]
        age_s_R = np.maximum(now_us - self.exact_at_us_I.take(at_R), 0) / 1e6
        stale_R = has_row_R & (age_s_R > max_lag_s)
        status_R[stale_R] = _CODES["stale"]
        used_R = has_row_R if use_stale else has_row_R & ~stale_R
        if not used_R.all():
            vector_RD[~used_R] = self.prior_D
        last_us_R = self.last_event_us_I.take(at_R)[has_row_R]
        last_us_R = last_us_R[last_us_R != _UNKNOWN_US]
        return CandidateLookups(
            status_R=status_R,
            vector_RD=vector_RD,
            num_prior=len(at_R) - int(used_R.sum()),
            age_s=float(age_s_R[has_row_R].max()) if has_row_R.any() else None,
            inactivity_s=float(now_us - last_us_R.min()) / 1e6 if len(last_us_R) else None,
        )


def _us(instant: datetime) -> int:
    return (instant - _EPOCH) // _MICROSECOND
