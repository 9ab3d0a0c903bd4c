"""One request from fetched features to scores in order.

R candidates
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
import numpy as np

from limaml.config import Config
from limaml.features.columns import Floats
from serving.features import Fetched
from serving.freshness import Lookup, judge
from serving.loaded import Loaded

_encode = msgspec.json.Encoder().encode


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


def score(
    loaded: Loaded,
    numbers: Sequence[int],
    fetched: Fetched,
    lookups: Mapping[str, Lookup],
    context_F: Floats,
    at: datetime,
    candidate_RF: Floats | None = None,
) -> Floats:
    """(R,) estimated probabilities of a positive label of the items with these numbers in the catalogue."""
    embeddings = {kind: loaded.prior[kind] if found.vector is None else found.vector for kind, found in lookups.items()}
    user_F = loaded.encoder.encode_user(fetched.user, at)
    return loaded.scorer.score(numbers, user_F, context_F, embeddings, candidate_RF)


class _RankedItem(msgspec.Struct):
    """As `serving.api.RankedItem`."""

    item_id: str
    score: float


def respond(version: str, item_ids: Sequence[str], scores: Floats, lookups: Mapping[str, Lookup]) -> bytes:
    """`serving.api.RankResponse` as JSON: candidates by descending score, equal ones by item id."""
    # By numpy, and structs instead of dictionaries: 11 us for a hundred candidates, where sorting pairs takes 20.
    order = np.argsort(-scores)
    ranked = scores[order]
    if (ranked[1:] == ranked[:-1]).any():
        order = np.array(sorted(order.tolist(), key=lambda at: (-scores[at], item_ids[at])))
    embeddings = {
        kind: {
            "age_s": lookup.age_s,
            "inactivity_s": lookup.inactivity_s,
            "fallback": None if lookup.vector is not None else lookup.status,
            "stale": lookup.status == "stale",
        }
        for kind, lookup in lookups.items()
    }
    items = list(map(_RankedItem, [item_ids[at] for at in order.tolist()], ranked.tolist()))
    return _encode({"items": items, "model_version": version, "embeddings": embeddings})
