"""A checked request in, an answer out: one read of the store, one pass of the network, with every stage's time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from limaml import schema, telemetry
from limaml.arms import Arms
from limaml.config import ArmConfig, Config
from limaml.features.columns import Floats
from serving import candidates, ranking
from serving.api import RankRequest, RequestError
from serving.champion import Champion
from serving.features import UNAVAILABLE, Fetched
from serving.freshness import Lookup
from serving.held_embeddings import CandidateLookups
from serving.loaded import Loaded
from serving.metrics import Metrics
from serving.request_log import LoggedEmbedding, LoggedRequest, RequestLog
from serving.store_calls import StoreCalls


@dataclass(frozen=True)
class Served:
    """Everything one answer came from."""

    request: RankRequest
    now: datetime
    arm: ArmConfig | None
    """Of the experiment, where one is configured."""
    is_arms_version: bool
    """False where the version that the arm asks for is not there, and the champion answers."""
    loaded: Loaded
    fetched: Fetched
    lookups: dict[str, Lookup | CandidateLookups]
    context: dict[str, Any]
    """Context feature -> the value that was scored with; `at` is the moment."""
    candidates: dict[str, Sequence[Any]]
    """`candidates.columns`."""
    scores: Floats
    """In the order of the request's candidates."""


class Ranker:
    """Answers requests from whatever champion serves when they come."""

    def __init__(self, cfg: Config, metrics: Metrics, champion: Champion, calls: StoreCalls, log: RequestLog) -> None:
        self._cfg = cfg
        self._arms = Arms(cfg.experiment)
        self._tables = schema.tables(cfg.features)
        self._metrics = metrics
        self._champion = champion
        self._calls = calls
        self._log = log

    async def rank(self, request: RankRequest) -> bytes:
        """The answer (`serving.api.RankResponse`) as JSON. Raises RequestError (400, 503)."""
        began = time.perf_counter()
        served = await self._serve(request, datetime.now(UTC))
        started = time.perf_counter()
        arm = served.arm.name if served.arm else None
        body = ranking.respond(served.loaded.version, request.item_ids, served.scores, served.lookups, arm)
        ended = time.perf_counter()
        self._metrics.stage("serialise", ended - started)
        if arm is not None:
            self._metrics.of_arm(arm, self._answer(served), ended - began)
        self._after(served)
        return body

    async def _serve(self, request: RankRequest, now: datetime) -> Served:
        arm = self._arms.of(request.user_id)
        previous = self._champion.previous if arm is not None and arm.version == "previous" else None
        loaded = previous or self._champion.loaded
        if loaded is None:
            raise RequestError(
                503,
                field="(service)",
                rule="must have loaded a champion",
                value=None,
                remedy="promote a model with `limaml cut-over` (the DAG limaml_train does); /readyz says when it is loaded",
            )
        numbers = loaded.items.find(request.item_ids)
        started = time.perf_counter()
        fetched = await self._fetch(loaded, request.user_id)
        read = time.perf_counter()
        given = dict(request.context)
        lookups = ranking.look_up(loaded, fetched, self._cfg, now, numbers, arm, given)
        judged = time.perf_counter()
        at = request.context.at or now
        context, context_F = loaded.encoder.encode_context(given, at)
        of_candidates = candidates.columns(self._tables, loaded, request, fetched)
        candidate_RF = candidates.encode(loaded, of_candidates, request, at)
        scores = ranking.score(loaded, numbers, fetched, lookups, context_F, at, candidate_RF)
        self._metrics.stage("features", read - started)
        self._metrics.stage("embedding", judged - read)
        self._metrics.stage("score", time.perf_counter() - judged)
        is_arms_version = arm is None or arm.version == "champion" or previous is not None
        of_request = {"at": at, **context}
        return Served(request, now, arm, is_arms_version, loaded, fetched, lookups, of_request, of_candidates, scores)

    async def _fetch(self, loaded: Loaded, user_id: str) -> Fetched:
        """One read of the store; on a failure or a time-out the request goes on without the user (contract 6)."""
        try:
            return await loaded.features.read_user(user_id, self._calls)
        except Exception:  # noqa: BLE001 - whatever the store does, a request is answered; it has been logged
            return UNAVAILABLE

    def _answer(self, served: Served) -> str:
        """One of telemetry.ARM_ANSWERS; of the user's embedding, whatever is known of the candidates."""
        if not served.is_arms_version:
            return "other_version"
        user = served.lookups[self._cfg.task_kind.name]
        assert isinstance(user, Lookup)
        return "prior" if user.vector is None else "personalised"

    def _after(self, served: Served) -> None:
        """What is kept of an answer."""
        self._metrics.ranked(served.scores)
        for kind, lookup in served.lookups.items():
            self._metrics.looked_up(kind, lookup)
        for feature, number in served.loaded.encoder.unknown({**served.fetched.user, **served.context, **served.candidates}):
            self._metrics.unknown_categories(feature, number)
        if self._log.wants(served.request.user_id):
            self._log.record(_logged(served, self._tables, self._cfg))


def _logged(served: Served, tables: schema.Tables, cfg: Config) -> LoggedRequest:
    """The answer with the features it was scored from, which `limaml consistency` compares with the offline join."""
    loaded, fetched = served.loaded, served.fetched
    item_ids = served.request.item_ids
    items = loaded.items.values(item_ids)
    return LoggedRequest(
        at=served.now,
        user_id=served.request.user_id,
        model_version=loaded.version,
        slot=loaded.slot,
        arm=served.arm.name if served.arm else None,
        complete_through=loaded.complete_through,
        context=served.context,
        user=fetched.user if fetched.available else None,
        user_at=fetched.user_at,
        item_ids=item_ids,
        items=items,
        items_at=loaded.items.event_timestamps(item_ids),
        affinities_at=fetched.affinities_at,
        candidates={name: served.candidates[name] for name in tables.of_candidates.names},
        embeddings=_logged_embeddings(served, items, cfg),
        scores=served.scores.tolist(),
    )


def _logged_embeddings(served: Served, items: Mapping[str, Sequence[Any]], cfg: Config) -> list[LoggedEmbedding]:
    """Of each kind what was found, in the order of the candidates where they differ in its entity."""
    said = {"item_id": served.request.item_ids, **items, **served.candidates, **served.context}
    logged = []
    for kind in cfg.task_kinds:
        lookup, held = served.lookups[kind.name], served.loaded.held.get(kind.name)
        if isinstance(lookup, CandidateLookups):
            assert held is not None
            statuses = [telemetry.LOOKUP_STATUSES[code] for code in lookup.status_R.tolist()]
            found = [(status, held.row(entity)) for status, entity in zip(statuses, said[kind.entity_column], strict=True)]
        else:
            row = served.fetched.embeddings.get(kind.name) if held is None else held.row(said[kind.entity_column])
            found = [(lookup.status, row)]
        logged += [LoggedEmbedding.of(kind.name, status, row) for status, row in found]
    return logged
