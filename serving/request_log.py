"""A share of the requests with everything they were scored from, as Parquet day partitions, for `limaml consistency`
and `limaml compare-arms`.

Sampled by a hash of the user id, so that a user is logged always or never, by every worker alike. A request only puts its
values into a bounded queue; a thread turns them into rows and writes `log_path/dt=D/part-….parquet`. What does not fit, or
cannot be written, is dropped, counted and logged: the log never holds a request up.
"""

import os
import queue
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from limaml import schema, telemetry
from limaml.config import Config
from limaml.events.day_store import partition
from limaml.io.storage import Storage
from serving.freshness import StoredEmbedding

log = telemetry.get_logger(__name__)

MAX_QUEUED = 512
"""Requests that wait for the writer; one of 100 candidates is about 50 kB."""
FLUSH_ROWS = 256
FLUSH_INTERVAL_S = 30.0
CLOSE_TIMEOUT_S = 5.0
"""What a storage that hangs may hold up the end of a worker."""


@dataclass(frozen=True)
class LoggedEmbedding:
    """The stored embedding of one task kind, whether it was used or not; no vector where the store had no row."""

    kind: str
    status: str
    """One of telemetry.LOOKUP_STATUSES."""
    model_version: str | None = None
    as_of: datetime | None = None
    vector: Sequence[float] | None = None

    @classmethod
    def of(cls, kind: str, status: str, row: StoredEmbedding | None) -> "LoggedEmbedding":
        return cls(kind, status, *((row.model_version, row.as_of, row.vector) if row else ()))


@dataclass(frozen=True)
class LoggedRequest:
    """One answered request; nothing in it may change once it is recorded."""

    at: datetime
    """UTC."""
    user_id: str
    model_version: str
    slot: str
    complete_through: datetime | None
    """As the server knew it, beside the version."""
    context: Mapping[str, Any]
    """Context feature -> the value that was scored with."""
    user: Mapping[str, Any] | None
    """User feature -> value; None if the store did not answer."""
    user_at: datetime | None
    """Event timestamp of the user's row; None if there is none or it is not known."""
    item_ids: Sequence[str]
    items: Mapping[str, Sequence[Any]]
    """Item feature -> one value a candidate."""
    items_at: Sequence[datetime | None] | None
    """Event timestamp of each candidate's row; None if they are not known."""
    embeddings: Sequence[LoggedEmbedding]
    """One of a kind; where candidates differ in its entity one a candidate, in their order."""
    scores: Sequence[float]
    """In the order of `item_ids`."""
    affinities_at: datetime | None = None
    """Event timestamp of the user's entries by items' attributes; None if there are none."""
    candidates: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Column of `schema.Tables.of_candidates` -> one value a candidate."""
    arm: str | None = None
    """Arm of the experiment that the user is in; None where none is configured."""


class RequestLog:
    """Takes requests from any thread; nothing is logged, and no thread runs, while `serving.log_share` is 0."""

    def __init__(
        self,
        cfg: Config,
        *,
        flush_rows: int = FLUSH_ROWS,
        flush_interval_s: float = FLUSH_INTERVAL_S,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self._columns = schema.tables(cfg.features).request_log.arrow
        self._limit = int(cfg.serving.log_share * 2**64)
        self._storage = Storage(cfg.serving.log_path)
        self._flush_rows, self._flush_interval_s = flush_rows, flush_interval_s
        self._queue: queue.Queue[LoggedRequest | None] = queue.Queue(max_queued)
        self._closing = threading.Event()
        self._num_files = 0
        # One count a thread: an addition is not atomic.
        self._num_refused = self._num_lost = self._num_dropped_said = 0
        # A container's host and process id can be those of the one before it; the time it started cannot.
        host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
        self._stem = f"part-{host}-{os.getpid()}-{time.time_ns() // 1_000_000}"
        self._thread = threading.Thread(target=self._write_until_closed, name="request-log", daemon=True)
        if self._limit:
            self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Requests that were refused because the writer was behind, or lost because they could not be written."""
        return self._num_refused + self._num_lost

    def wants(self, user_id: str) -> bool:
        """Whether this user's requests are logged; the same in every process and at every start."""
        if not self._limit:
            return False
        return int.from_bytes(blake2b(user_id.encode(errors="replace"), digest_size=8).digest()) < self._limit

    def record(self, request: LoggedRequest) -> None:
        """Take one request of a user that is wanted; it is dropped if the writer is behind."""
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            self._num_refused += 1

    def close(self) -> None:
        """Write what is left and end the thread."""
        if self._thread.is_alive():
            self._closing.set()
            with suppress(queue.Full):  # then the writer is awake already
                self._queue.put_nowait(None)
            self._thread.join(CLOSE_TIMEOUT_S)

    def _write_until_closed(self) -> None:
        waiting: list[LoggedRequest] = []
        flush_at = time.monotonic() + self._flush_interval_s
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                request = self._queue.get(timeout=max(0.0, flush_at - time.monotonic()))
                if request is not None:
                    waiting.append(request)
            except queue.Empty:
                pass
            if len(waiting) >= self._flush_rows or time.monotonic() >= flush_at:
                self._flush(waiting)
                waiting, flush_at = [], time.monotonic() + self._flush_interval_s
        self._flush(waiting)

    def _flush(self, requests: Sequence[LoggedRequest]) -> None:
        days: dict[date, list[LoggedRequest]] = defaultdict(list)
        for request in requests:
            days[request.at.date()].append(request)
        for day, rows in days.items():
            try:
                table = pa.Table.from_pylist([_row(request) for request in rows], self._columns)
                self._storage.write_table(f"{partition(day)}/{self._stem}-{self._num_files:06d}.parquet", table)
                self._num_files += 1
            except Exception as error:  # noqa: BLE001 - a log that cannot be written is no reason to stop logging, or serving
                self._num_lost += len(rows)
                log.error("request_log_not_written", rows=len(rows), error=f"{type(error).__name__}: {error}")
        dropped = self.num_dropped
        if dropped != self._num_dropped_said:
            self._num_dropped_said = dropped
            log.warning("request_log_dropped", requests=dropped)


def _row(request: LoggedRequest) -> dict[str, Any]:
    """The request in the columns of `schema.Tables.request_log`."""
    stamps = request.items_at or [None] * len(request.item_ids)
    user = None if request.user is None else {"event_timestamp": request.user_at, **request.user}
    return {
        "logged_at": request.at,
        "user_id": request.user_id,
        "model_version": request.model_version,
        "slot": request.slot,
        "arm": request.arm,
        "complete_through": request.complete_through,
        "context": dict(request.context),
        "user": user,
        "item_ids": list(request.item_ids),
        "items": [
            {"event_timestamp": stamp, **{name: values[at] for name, values in request.items.items()}}
            for at, stamp in enumerate(stamps)
        ],
        "affinities_at": request.affinities_at,
        "candidates": [
            {name: values[at] for name, values in request.candidates.items()} for at in range(len(request.item_ids))
        ],
        "embeddings": [
            {
                "kind": one.kind,
                "status": one.status,
                "model_version": one.model_version,
                "as_of": one.as_of,
                "embedding": None if one.vector is None else list(one.vector),
            }
            for one in request.embeddings
        ],
        "scores": list(request.scores),
    }
