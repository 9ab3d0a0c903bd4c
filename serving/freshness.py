"""Which embedding a request is scored with: the stored one, or the prior and why (contracts 3, 4 and 6)."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np

Status = Literal["fresh", "stale", "missing", "version_mismatch", "store_error", "withheld"]


@dataclass(frozen=True)
class StoredEmbedding:
    """One row of an embedding view as the online store gave it; `as_of` is the row's event timestamp."""

    vector: Any
    """(D,) float32 numbers."""
    model_version: str
    as_of: datetime
    last_event_at: datetime | None


@dataclass(frozen=True)
class Lookup:
    """The outcome for one task kind: `vector` is set where the stored embedding is used; ages are None where no row counts."""

    status: Status
    vector: Any = None
    age_s: float | None = None
    inactivity_s: float | None = None

    def withheld(self) -> "Lookup":
        """The same for a request that is not personalised; what is not fresh keeps its own reason."""
        return replace(self, status="withheld" if self.status == "fresh" else self.status, vector=None)


def judge(
    row: StoredEmbedding | None,
    *,
    version: str,
    dim: int,
    complete_through: datetime | None,
    max_lag_s: float,
    use_stale: bool = False,
    now: datetime,
) -> Lookup:
    """Decide whether `row` may be used by model `version` at `now`.

    Freshness lag = now - max(row.as_of, complete_through), not below zero: what has been published in full is exact for
    every entity it did not touch, so a silent user's embedding does not age. A row of another version counts as missing;
    a vector that is not `dim` finite numbers is the store's fault. A stale vector is used only where `use_stale` says so.
    """
    if row is None:
        return Lookup("missing")
    if row.model_version != version:
        return Lookup("version_mismatch")
    if len(row.vector) != dim or not np.isfinite(row.vector).all():
        return Lookup("store_error")
    exact_at = max(row.as_of, complete_through) if complete_through else row.as_of
    age_s = max(0.0, (now - exact_at).total_seconds())
    inactivity_s = (now - row.last_event_at).total_seconds() if row.last_event_at else None
    if age_s > max_lag_s:
        return Lookup("stale", row.vector if use_stale else None, age_s, inactivity_s)
    return Lookup("fresh", row.vector, age_s, inactivity_s)
