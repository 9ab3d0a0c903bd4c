"""Features and embeddings of one request from Feast's online store, never failing for want of it (contract 6).

SQLite reads block, so they run in a bounded thread pool; what is waited for is abandoned after `store_timeout_s`, and the
request goes on with an unknown user, the items' features as last read, and the prior.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from limaml import schema, telemetry
from limaml.config import Config
from limaml.errors import StoreError
from serving.freshness import StoredEmbedding

log = telemetry.get_logger(__name__)

_WARM_UP_ITEMS = 200
"""Items a read while warming up: short enough for SQLite's limit of bound values and for a busy store."""


@dataclass(frozen=True)
class Fetched:
    """What the store knew: one value a user feature, one a candidate for item features, one row or None a task kind."""

    user: Mapping[str, Any]
    items: Mapping[str, Sequence[Any]]
    embeddings: Mapping[str, StoredEmbedding | None]
    available: bool = True
    """False when the store did not answer: then `user` and `embeddings` are empty."""


@dataclass
class OnlineFeatures:
    """Reads the feature service of one slot.

    `pool` is shared by all slots of a process: its size bounds the threads that a hanging store can hold.
    """

    cfg: Config
    slot: str
    pool: ThreadPoolExecutor
    last_items: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Item -> features as last read; shared by all slots, as no model version has items of its own."""
    failed: bool = False
    """The last read failed; the poller then opens the store anew."""
    _store: Any = None
    _references: dict[str, list[str]] = field(default_factory=dict)
    """Join key -> `view:feature` of every feature of the service that hangs on it."""

    def open(self) -> None:
        """Open the store and look the feature service up. Raises whatever Feast raises."""
        from limaml.data.feature_store import open_store

        store = open_store(self.cfg)
        for view in store.get_feature_service(schema.ranking_service(self.slot)).feature_view_projections:
            [key] = store.get_feature_view(view.name).join_keys
            self._references.setdefault(key, []).extend(f"{view.name}:{feature.name}" for feature in view.features)
        self._store = store

    def warm_up(self, catalogue: Sequence[str]) -> None:
        """Read every item once, so that its features are known should the store go away. Raises what Feast raises."""
        for start in range(0, len(catalogue), _WARM_UP_ITEMS):
            self.read("", catalogue[start : start + _WARM_UP_ITEMS])

    async def fetch(self, user_id: str, item_ids: Sequence[str]) -> Fetched:
        """Read one request's rows; on a failure or a time-out answer with what is known without the store."""
        loop = asyncio.get_running_loop()
        try:
            reading = loop.run_in_executor(self.pool, self.read, user_id, item_ids)
            fetched = await asyncio.wait_for(reading, self.cfg.serving.store_timeout_s)
        except Exception as error:  # noqa: BLE001 - whatever the store does, a request is answered
            if not self.failed:
                log.warning("online_store_failed", slot=self.slot, error=f"{type(error).__name__}: {error}")
            self.failed = True
            return Fetched({}, self._last_known(item_ids), {}, available=False)
        self.failed = False
        return fetched

    def read(self, user_id: str, item_ids: Sequence[str]) -> Fetched:
        """One blocking read of user, candidates and embeddings. Raises whatever Feast or the store raises."""
        # Two reads: in one, Feast repeats the user's values for every candidate, which costs twice the time at 100.
        user, item = self._online("user_id", [user_id]), self._online("item_id", item_ids)
        items = {name: _values(item, schema.ITEM_FEATURES.name, name) for name in schema.ITEM_FEATURE_NAMES}
        for row, item_id in enumerate(item_ids):
            self.last_items[item_id] = tuple(values[row] for values in items.values())
        return Fetched(
            user={name: _values(user, schema.USER_FEATURES.name, name)[0] for name in schema.USER_FEATURE_NAMES},
            items=items,
            embeddings={
                kind.name: _embedding(user, schema.embedding_view(kind.name, self.slot)) for kind in self.cfg.task_kinds
            },
        )

    def _online(self, key: str, entities: Sequence[str]) -> dict[str, Any]:
        """Feature vectors by `view__feature`: their order in the response is not the order asked for."""
        if self._store is None:
            raise StoreError("the online store must be open before it is read; the poller tries again")
        response = self._store.get_online_features(
            features=self._references[key], entity_rows={key: list(entities)}, full_feature_names=True
        ).proto
        return dict(zip(response.metadata.feature_names.val, response.results, strict=True))

    def _last_known(self, item_ids: Sequence[str]) -> dict[str, list[Any]]:
        unknown = (None,) * len(schema.ITEM_FEATURE_NAMES)
        rows = [self.last_items.get(item, unknown) for item in item_ids]
        return {name: [row[at] for row in rows] for at, name in enumerate(schema.ITEM_FEATURE_NAMES)}


def _values(columns: Mapping[str, Any], view: str, feature: str) -> list[Any]:
    return [_plain(value) for value in columns[f"{view}__{feature}"].values]


def _plain(value: Any) -> Any:
    """A Feast value as Python has it; lists become lists, nothing becomes None."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    plain = getattr(value, kind)
    return list(plain.val) if hasattr(plain, "val") else plain


def _embedding(columns: Mapping[str, Any], view: str) -> StoredEmbedding | None:
    """The user's row of an embedding view, None if there is none.

    SQLite says NOT_FOUND; Redis says PRESENT with nulls and timestamp 0. TTLs are not enforced on reads.
    """
    row = {name: columns[f"{view}__{name}"] for name in schema.EMBEDDING_FEATURE_NAMES}
    values = {name: _plain(vector.values[0]) for name, vector in row.items()}
    as_of_s = row["embedding"].event_timestamps[0].seconds
    if as_of_s == 0 or values["embedding"] is None:
        return None
    return StoredEmbedding(
        vector=values["embedding"],
        model_version=values["model_version"] or "",
        as_of=datetime.fromtimestamp(as_of_s, UTC),
        last_event_at=_instant(values["last_event_at"]),
    )


def _instant(seconds: int | None) -> datetime | None:
    """A Feast timestamp (whole seconds since 1970); its null is the smallest number a timestamp column can hold."""
    if seconds is None or seconds <= 0:
        return None
    return datetime.fromtimestamp(seconds, UTC)
