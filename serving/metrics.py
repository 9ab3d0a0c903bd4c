"""The service's Prometheus metrics; names are `limaml.telemetry`'s.

prometheus_client decides at its first import whether it counts per process or over all workers (from
PROMETHEUS_MULTIPROC_DIR, which BentoML sets for its workers), so `Metrics` is built in the worker, not at import.

What requests count is kept in the process and added up by `flush`, a few times a second: 25 samples a request, each written
into a memory-mapped file under a lock, took a tenth of its time.

Gauges over several workers: `livemax` where one worker in trouble must show (load failed, breaker open) or where an old
series is set to 0 (Gauge.remove() does nothing over several processes); `livemin` for the last poll, of which the worker
that is furthest behind must show.
"""

import os
import time
from collections import Counter as CountOf
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limaml import telemetry
from limaml.features.columns import Floats
from serving.freshness import Lookup
from serving.held_embeddings import CandidateLookups

if TYPE_CHECKING:
    import numpy.typing as npt
    from prometheus_client import CollectorRegistry, Histogram

HOUR_S, DAY_S = 3600.0, 86400.0
LAG_BUCKETS = (HOUR_S, 6 * HOUR_S, 12 * HOUR_S, DAY_S, 1.5 * DAY_S, 2 * DAY_S, 3 * DAY_S, 7 * DAY_S, 14 * DAY_S, 30 * DAY_S)
INACTIVITY_BUCKETS = tuple(days * DAY_S for days in (0.25, 1, 3, 7, 14, 30, 60, 90, 180, 365))
SCORE_BUCKETS = tuple(round(0.05 * step, 2) for step in range(1, 21))
STAGE_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
CANDIDATE_BUCKETS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
REQUEST_CODES = (200, 400, 401, 415, 500, 503, 504)


@dataclass
class _Pending:
    """What requests counted since the last flush; histograms by their label, or without one."""

    codes: CountOf[int] = field(default_factory=CountOf)
    lookups: CountOf[tuple[str, str]] = field(default_factory=CountOf)
    lag: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    inactivity: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    arms: CountOf[tuple[str, str]] = field(default_factory=CountOf)
    arm_seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    unknown: CountOf[str] = field(default_factory=CountOf)
    scores: list[Floats] = field(default_factory=list)
    """(R,) of every request."""


class Metrics:
    """One set a process: prometheus_client refuses a second registration of a name.

    `answered`, `looked_up`, `ranked`, `of_arm` and `stage` are for one thread, the event loop's, and are seen after `flush`.
    """

    def __init__(self, registry: "CollectorRegistry | None" = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY

        def gauge(name: str, text: str, mode: Any, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(name, text, labels, multiprocess_mode=mode, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self._lag = histogram(
            telemetry.LAG_SECONDS,
            "Freshness lag of the meta embedding found at serve time (fresh and stale ones).",
            LAG_BUCKETS,
            ["kind"],
        )
        self._inactivity = histogram(
            telemetry.INACTIVITY_SECONDS,
            "Time since the last event of the entity whose embedding was found at serve time; reported only.",
            INACTIVITY_BUCKETS,
            ["kind"],
        )
        self._lookups = Counter(
            telemetry.LOOKUPS_TOTAL, "Look-ups of meta embeddings by outcome.", ["kind", "status"], registry=registry
        )
        self._unknown = Counter(
            telemetry.UNKNOWN_CATEGORIES_TOTAL,
            "Categories of requests that the model which serves never saw in training, by feature.",
            ["feature"],
            registry=registry,
        )
        self._requests = Counter(telemetry.REQUESTS_TOTAL, "Ranking requests by status code.", ["code"], registry=registry)
        self._model = gauge(
            telemetry.MODEL_INFO,
            "1 for the model version and slot that serve, 0 for earlier ones.",
            "livemax",
            ["version", "slot"],
        )
        self._complete_through = gauge(
            telemetry.COMPLETE_THROUGH_SECONDS,
            "End of the last day published whole into the slot that serves; 0 for a slot that does not.",
            "livemax",
            ["slot"],
        )
        self._load_failed = gauge(
            telemetry.CHAMPION_LOAD_FAILED,
            "1 while the registry's champion cannot be loaded and an older one serves.",
            "livemax",
        )
        self._poll = gauge(
            telemetry.REGISTRY_POLL_SECONDS, "When the registry last answered a poll for its champion.", "livemin"
        )
        self._breaker = gauge(telemetry.STORE_BREAKER_OPEN, "1 while the online store is left alone after failures.", "livemax")
        self._score = histogram(telemetry.SCORE, "Scores given.", SCORE_BUCKETS)
        self._seconds = histogram(telemetry.RANK_SECONDS, "Time of a ranking request by stage.", STAGE_BUCKETS, ["stage"])
        self._candidates = histogram(telemetry.RANK_CANDIDATES, "Candidates of a request.", CANDIDATE_BUCKETS)
        self._arms = Counter(
            telemetry.ARM_REQUESTS_TOTAL,
            "Ranked requests by arm of the experiment, and by what answered: stored embedding, prior, or another version.",
            ["arm", "answer"],
            registry=registry,
        )
        self._arm_seconds = histogram(
            telemetry.ARM_SECONDS,
            "Time from a checked request to its answer, by arm of the experiment.",
            STAGE_BUCKETS,
            ["arm"],
        )
        self._serving: tuple[str, str] | None = None
        self._pending = _Pending()

    def start(self, kinds: Sequence[str], categories: Sequence[str] = (), arms: Sequence[str] = ()) -> None:
        """Give every series its zero, so that rates and alerts see the first count; `categories` are features of them."""
        for arm in arms:
            self._arm_seconds.labels(arm)
            for answer in telemetry.ARM_ANSWERS:
                self._arms.labels(arm, answer)
        for feature in categories:
            self._unknown.labels(feature)
        for kind in kinds:
            self._lag.labels(kind)
            self._inactivity.labels(kind)
            for status in telemetry.LOOKUP_STATUSES:
                self._lookups.labels(kind, status)
        for code in REQUEST_CODES:
            self._requests.labels(str(code))
        for stage in telemetry.RANK_STAGES:
            self._seconds.labels(stage)
        _forget_dead_workers()

    def answered(self, code: int) -> None:
        self._pending.codes[code] += 1

    def looked_up(self, kind: str, lookup: Lookup | CandidateLookups) -> None:
        """The user's look-up, or every candidate's; of these the oldest one's ages are observed."""
        for status, number in lookup.counts.items() if isinstance(lookup, CandidateLookups) else [(lookup.status, 1)]:
            self._pending.lookups[kind, status] += number
        if lookup.age_s is not None:
            self._pending.lag[kind].append(lookup.age_s)
        if lookup.inactivity_s is not None:
            self._pending.inactivity[kind].append(lookup.inactivity_s)

    def ranked(self, scores: Floats) -> None:
        """(R,) scores given to the candidates of one request."""
        self._pending.scores.append(scores)

    def of_arm(self, arm: str, answer: str, seconds: float) -> None:
        """One ranked request of an arm; `answer` is one of telemetry.ARM_ANSWERS."""
        self._pending.arms[arm, answer] += 1
        self._pending.arm_seconds[arm].append(seconds)

    def unknown_categories(self, feature: str, number: int) -> None:
        """Values of a request that the serving model never saw in training."""
        self._pending.unknown[feature] += number

    def stage(self, stage: str, seconds: float) -> None:
        self._pending.stages[stage].append(seconds)

    def flush(self) -> None:
        """Add up what was counted, so that a scrape of any worker sees it."""
        pending, self._pending = self._pending, _Pending()
        for code, count in pending.codes.items():
            self._requests.labels(str(code)).inc(count)
        for feature, count in pending.unknown.items():
            self._unknown.labels(feature).inc(count)
        for labels, count in pending.lookups.items():
            self._lookups.labels(*labels).inc(count)
        for labels, count in pending.arms.items():
            self._arms.labels(*labels).inc(count)
        for histogram, values in (
            (self._lag, pending.lag),
            (self._inactivity, pending.inactivity),
            (self._seconds, pending.stages),
            (self._arm_seconds, pending.arm_seconds),
        ):
            for label, observed in values.items():
                _observe(histogram.labels(label), np.array(observed))
        if pending.scores:
            _observe(self._candidates, np.array([len(scores) for scores in pending.scores]))
            _observe(self._score, np.concatenate(pending.scores))

    def serving(self, version: str, slot: str, complete_through: datetime | None) -> None:
        """This version serves from this slot; called again when a day has been published."""
        if self._serving is not None and self._serving != (version, slot):
            self._model.labels(*self._serving).set(0)
            self._complete_through.labels(self._serving[1]).set(0)
        self._model.labels(version, slot).set(1)
        self._complete_through.labels(slot).set(complete_through.timestamp() if complete_through else 0)
        self._serving = (version, slot)

    def polled(self) -> None:
        self._poll.set(time.time())

    def load_failed(self, failed: bool) -> None:
        self._load_failed.set(failed)

    def breaker_open(self, is_open: bool) -> None:
        self._breaker.set(is_open)


def _observe(series: "Histogram", values: "npt.NDArray[Any]") -> None:
    """As `observe` of each value, but one step a bucket instead of one a value: 4 us each, and a request has 100 scores."""
    counts = np.bincount(np.searchsorted(series._upper_bounds, values))
    series._sum.inc(float(values.sum(dtype=np.float64)))
    for bucket, count in zip(series._buckets, counts.tolist(), strict=False):  # a NaN is in none, there as here
        if count:
            bucket.inc(count)


def _forget_dead_workers() -> None:
    """A worker that was killed leaves its `live` gauges behind, which its successor, this process, takes away."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return
    from prometheus_client.multiprocess import mark_process_dead

    for path in Path(folder).glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            mark_process_dead(int(pid))  # type: ignore[no-untyped-call]
