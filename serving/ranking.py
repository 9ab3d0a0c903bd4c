"""One request from fetched features to scores in order.

T tasks (here 1), R candidates, D embedding width
"""

from collections.abc import Mapping
from datetime import datetime

import torch

from limaml.config import Config
from limaml.data.rows import Rows
from limaml.schema import context_hour
from serving.api import EmbeddingUsed, RankedItem, RankRequest, RankResponse
from serving.champion import Loaded
from serving.features import Fetched
from serving.freshness import Lookup, judge


def look_up(loaded: Loaded, fetched: Fetched, cfg: Config, now: datetime) -> dict[str, Lookup]:
    """Judge the stored embedding of every task kind."""
    if not fetched.available:
        return {kind.name: Lookup("store_error") for kind in cfg.task_kinds}
    return {
        kind.name: judge(
            fetched.embeddings[kind.name],
            version=loaded.version,
            dim=loaded.prior[kind.name].numel(),
            complete_through=loaded.complete_through,
            max_lag_s=kind.max_lag_s,
            now=now,
        )
        for kind in cfg.task_kinds
    }


def score(loaded: Loaded, request: RankRequest, fetched: Fetched, lookups: Mapping[str, Lookup], now: datetime) -> list[float]:
    """(R,) estimated probabilities of a positive label; without a context hour the request's own (UTC) is taken."""
    hour = getattr(request.context, "hour", None)
    columns = {
        **fetched.user,
        **fetched.items,
        "item_id": request.item_ids,
        "hour": context_hour(now) if hour is None else hour,
    }
    rows = Rows.from_encoded(loaded.encoder.encode(columns, len(request.item_ids)))
    embeddings = {
        kind: (loaded.prior[kind] if lookup.vector is None else torch.tensor(lookup.vector))[None]
        for kind, lookup in lookups.items()
    }
    with torch.inference_mode():
        logits_TR = loaded.network.global_block(rows, embeddings)
        scores: list[float] = torch.sigmoid(logits_TR)[0].tolist()
    return scores


def respond(loaded: Loaded, request: RankRequest, scores: list[float], lookups: Mapping[str, Lookup]) -> RankResponse:
    """Candidates by descending score, equal ones by item id."""
    order = sorted(zip(scores, request.item_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return RankResponse(
        items=[RankedItem(item_id=item, score=value) for value, item in order],
        model_version=loaded.version,
        embeddings={
            kind: EmbeddingUsed(
                age_s=lookup.age_s,
                inactivity_s=lookup.inactivity_s,
                fallback=None if lookup.status == "fresh" else lookup.status,
            )
            for kind, lookup in lookups.items()
        },
    )
