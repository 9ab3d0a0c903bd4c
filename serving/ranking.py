"""One request from fetched features to scores in order.

T tasks (here 1), R candidates, D embedding width
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import torch

from limaml.config import Config
from limaml.data.encoding import CONTEXT_OF_HOUR
from limaml.data.rows import Rows
from limaml.models.dense import plain_layers
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
            dim=loaded.prior[kind.name].numel(),
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


def score(loaded: Loaded, numbers: Sequence[int], fetched: Fetched, lookups: Mapping[str, Lookup], hour: int) -> list[float]:
    """(R,) estimated probabilities of a positive label of the items with these numbers in the catalogue."""
    # Plain layers: nothing is differentiated, and a hundred rows are too few for what the others are good for (50 us).
    with torch.inference_mode(), plain_layers():
        at_R = torch.tensor(numbers)
        user_F = torch.from_numpy(loaded.encoder.encode_user(fetched.user))
        context_F = torch.from_numpy(CONTEXT_OF_HOUR[hour])
        mask_TR = torch.ones(1, len(numbers))
        rows = Rows(
            item_index_TR=loaded.items.index_I[at_R][None],
            item_dense_TRF=loaded.items.dense_IF[at_R][None],
            user_dense_TRF=user_F.expand(1, len(numbers), -1),
            context_TRF=context_F.expand(1, len(numbers), -1),
            mask_TR=mask_TR,
            gap_s_TR=torch.zeros_like(mask_TR),
        )
        embeddings = {kind: _vector(loaded, kind, lookup)[None] for kind, lookup in lookups.items()}
        logits_TR = loaded.network.global_block(rows, embeddings)
        scores: list[float] = torch.sigmoid(logits_TR)[0].tolist()
    return scores


def _vector(loaded: Loaded, kind: str, lookup: Lookup) -> torch.Tensor:
    return loaded.prior[kind] if lookup.vector is None else torch.from_numpy(np.asarray(lookup.vector, np.float32))


def respond(version: str, item_ids: Sequence[str], scores: Sequence[float], lookups: Mapping[str, Lookup]) -> dict[str, Any]:
    """`serving.api.RankResponse` as plain values: candidates by descending score, equal ones by item id."""
    order = sorted(zip([-value for value in scores], item_ids, strict=True))
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
