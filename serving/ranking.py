"""One request from fetched features to scores in order.

R candidates
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from limaml.config import Config
from limaml.data.encoding import Floats
from limaml.schema import context_hour
from serving.api import RankRequest
from serving.features import Fetched
from serving.freshness import Lookup, judge
from serving.loaded import Loaded


def look_up(loaded: Loaded, fetched: Fetched, cfg: Config, now: datetime) -> dict[str, Lookup]:
    """Judge the stored embedding of every task kind."""
    if not fetched.available:
        return {kind.name: Lookup("store_error") for kind in cfg.task_kinds}
    return {
        kind.name: judge(
            fetched.embeddings[kind.name],
            version=loaded.version,
            dim=loaded.prior[kind.name].size,
            complete_through=loaded.complete_through,
            max_lag_s=kind.max_lag_s,
            use_stale=kind.when_stale == "use",
            now=now,
        )
        for kind in cfg.task_kinds
    }


def hour_of(request: RankRequest, now: datetime) -> int:
    """The context's hour; without one the request's own (UTC)."""
    hour: int | None = request.context.hour  # type: ignore[attr-defined]
    return context_hour(now) if hour is None else hour


def score(loaded: Loaded, numbers: Sequence[int], fetched: Fetched, lookups: Mapping[str, Lookup], hour: int) -> Floats:
    """(R,) estimated probabilities of a positive label of the items with these numbers in the catalogue."""
    embeddings = {kind: loaded.prior[kind] if found.vector is None else found.vector for kind, found in lookups.items()}
    return loaded.scorer.score(numbers, loaded.encoder.encode_user(fetched.user), hour, embeddings)


def respond(version: str, item_ids: Sequence[str], scores: Floats, lookups: Mapping[str, Lookup]) -> dict[str, Any]:
    """`serving.api.RankResponse` as plain values: candidates by descending score, equal ones by item id."""
    order = sorted(zip((-scores).tolist(), item_ids, strict=True))
    return {
        "items": [{"item_id": item, "score": -negative} for negative, item in order],
        "model_version": version,
        "embeddings": {
            kind: {
                "age_s": lookup.age_s,
                "inactivity_s": lookup.inactivity_s,
                "fallback": None if lookup.vector is not None else lookup.status,
                "stale": lookup.status == "stale",
            }
            for kind, lookup in lookups.items()
        },
    }
