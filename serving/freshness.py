"""Which embedding a request is scored with: the stored one, or the prior and why (contracts 3, 4 and 6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Status = Literal["fresh", "stale", "missing", "version_mismatch", "store_error"]


@dataclass(frozen=True)
class StoredEmbedding:
    """One row of an embedding view as the online store gave it; `as_of` is the row's event timestamp."""

    vector: Sequence[float]
    model_version: str
    as_of: datetime
    last_event_at: datetime | None


@dataclass(frozen=True)
class Lookup:
    """The outcome for one task kind: `vector` is set only when the status is fresh; ages are None where no row counts."""

    status: Status
    vector: Sequence[float] | None = None
    age_s: float | None = None
    inactivity_s: float | None = None


def judge(
    row: StoredEmbedding | None,
    *,
    version: str,
    dim: int,
    complete_through: datetime | None,
    max_lag_s: float,
    now: datetime,
) -> Lookup:
    """Decide whether `row` may be used by model `version` at `now`.

    Freshness lag = now - max(row.as_of, complete_through), not below zero: what has been published in full is exact for
    every entity it did not touch, so a silent user's embedding does not age. A row of another version counts as missing;
    a vector that is not `dim` finite numbers is the store's fault.
    """
    if row is None:
        return Lookup("missing")
    if row.model_version != version:
        return Lookup("version_mismatch")
    if len(row.vector) != dim or not all(map(math.isfinite, row.vector)):
        return Lookup("store_error")
    exact_at = max(row.as_of, complete_through) if complete_through else row.as_of
    age_s = max(0.0, (now - exact_at).total_seconds())
    inactivity_s = (now - row.last_event_at).total_seconds() if row.last_event_at else None
    if age_s > max_lag_s:
        return Lookup("stale", None, age_s, inactivity_s)
    return Lookup("fresh", row.vector, age_s, inactivity_s)
