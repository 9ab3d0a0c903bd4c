"""Embeddings of a kind's entities in memory, of all but users, judged as a user's is (contracts 3, 4 and 6).

Which of them a request needs, its candidates say (an item, or its category) or itself does (a category of the context).

    E entities, I items, R candidates, D embedding width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from limaml import telemetry
from limaml.features.columns import Floats, Indices
from serving.freshness import Lookup, Status, StoredEmbedding, judge

Stored = Mapping[str, StoredEmbedding | None]
"""Entity -> its row, None if the store has none; one that could not be read is not there."""

_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_UNKNOWN_US = np.iinfo(np.int64).min
_CODES: dict[str, int] = {status: code for code, status in enumerate(telemetry.LOOKUP_STATUSES)}


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
    """Of the entity that has been silent for longest."""

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
class HeldEmbeddings:
    """What was read of a kind, for one model version; what depends on the clock is judged when a request comes."""

    stored: Stored | None
    """None until the store has answered once."""
    version: str
    complete_through: datetime | None
    """Of the kind, as it was known before the rows were read."""
    prior_D: Floats
    entities: tuple[str, ...]
    at_I: Indices | None
    """Place of each catalogue item's entity; None where the request names entities."""
    at: Mapping[str | None, int]
    """Entity -> its place, where the request names them."""
    vector_ED: Floats
    """The prior where a row does not count, and last, for an entity that is not here."""
    status_E: Indices
    """Places in telemetry.LOOKUP_STATUSES; `fresh` until the clock says stale."""
    exact_at_us_E: npt.NDArray[np.int64]
    last_event_us_E: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        entities: Sequence[str],
        stored: Stored | None,
        *,
        of_items: Sequence[str | None] | None = None,
        version: str,
        complete_through: datetime | None,
        prior_D: Floats,
    ) -> "HeldEmbeddings":
        """Judge everything but the lag, by `freshness.judge` itself; `of_items`: each catalogue item's entity, or None."""
        num_places, nobody = len(entities) + 1, len(entities)
        vector_ED = np.tile(prior_D, (num_places, 1))
        status_E = np.full(num_places, _CODES["store_error"])
        exact_at_us_E, last_event_us_E = (np.full(num_places, _UNKNOWN_US) for _ in range(2))
        for place, entity in enumerate(entities):
            if stored is None or entity not in stored:
                continue
            row = stored[entity]
            of_then = {"version": version, "dim": prior_D.size, "complete_through": complete_through}
            found = judge(row, **of_then, max_lag_s=np.inf, now=_EPOCH)  # type: ignore[arg-type]
            status_E[place] = _CODES[found.status]
            if row is not None and found.vector is not None:
                vector_ED[place] = found.vector
                exact_at_us_E[place] = _us(max(row.as_of, complete_through) if complete_through else row.as_of)
                last_event_us_E[place] = _us(row.last_event_at) if row.last_event_at else _UNKNOWN_US
        status_E[nobody] = _CODES["store_error" if stored is None else "missing"]
        at: dict[str | None, int] = {entity: place for place, entity in enumerate(entities)}
        at_I = None if of_items is None else np.array([at.get(entity, nobody) for entity in of_items], np.int64)
        known = stored, version, complete_through, prior_D, tuple(entities), at_I, at if at_I is None else {}
        return cls(*known, vector_ED, status_E, exact_at_us_E, last_event_us_E)

    def row(self, entity: str | None) -> StoredEmbedding | None:
        """What was read of an entity, used or not; None where there is none."""
        return None if self.stored is None or entity is None else self.stored.get(entity)

    def look_up(
        self, numbers: Sequence[int], said: Any = None, *, max_lag_s: float, use_stale: bool, now: datetime
    ) -> Lookup | CandidateLookups:
        """The embeddings of candidates at `now`; as `freshness.judge` of each.

        `numbers`: the items' places in the catalogue. `said`: what the request has in the kind's column, where it names the
        entities: a list, one a candidate, or one for all, which is one look-up.
        """
        if self.at_I is not None:
            at_R = self.at_I.take(numbers)
        elif isinstance(said, list):
            at_R = np.array([self.at.get(entity, len(self.entities)) for entity in said], np.int64)
        else:
            return self._one(said, max_lag_s=max_lag_s, use_stale=use_stale, now=now)
        now_us = _us(now)
        status_R = self.status_E.take(at_R)
        vector_RD = self.vector_ED.take(at_R, axis=0)
        has_row_R = status_R == _CODES["fresh"]
        age_s_R = np.maximum(now_us - self.exact_at_us_E.take(at_R), 0) / 1e6
        stale_R = has_row_R & (age_s_R > max_lag_s)
        status_R[stale_R] = _CODES["stale"]
        used_R = has_row_R if use_stale else has_row_R & ~stale_R
        if not used_R.all():
            vector_RD[~used_R] = self.prior_D
        last_us_R = self.last_event_us_E.take(at_R)[has_row_R]
        last_us_R = last_us_R[last_us_R != _UNKNOWN_US]
        return CandidateLookups(
            status_R=status_R,
            vector_RD=vector_RD,
            num_prior=len(at_R) - int(used_R.sum()),
            age_s=float(age_s_R[has_row_R].max()) if has_row_R.any() else None,
            inactivity_s=float(now_us - last_us_R.min()) / 1e6 if len(last_us_R) else None,
        )

    def _one(self, entity: str | None, *, max_lag_s: float, use_stale: bool, now: datetime) -> Lookup:
        if self.stored is None or (entity in self.at and entity not in self.stored):
            return Lookup("store_error")
        of_then = {"version": self.version, "dim": self.prior_D.size, "complete_through": self.complete_through}
        return judge(self.row(entity), **of_then, max_lag_s=max_lag_s, use_stale=use_stale, now=now)  # type: ignore[arg-type]


def _us(instant: datetime) -> int:
    return (instant - _EPOCH) // _MICROSECOND
