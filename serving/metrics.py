"""The service's Prometheus metrics; names are `limaml.telemetry`'s.

prometheus_client decides at its first import whether it counts per process or over all workers (from
PROMETHEUS_MULTIPROC_DIR, which BentoML sets for its workers), so `Metrics` is built in the worker, not at import.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from limaml import telemetry
from serving.freshness import Lookup

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

HOUR_S, DAY_S = 3600.0, 86400.0
LAG_BUCKETS = (HOUR_S, 6 * HOUR_S, 12 * HOUR_S, DAY_S, 1.5 * DAY_S, 2 * DAY_S, 3 * DAY_S, 7 * DAY_S, 14 * DAY_S, 30 * DAY_S)
SCORE_BUCKETS = tuple(round(0.05 * step, 2) for step in range(1, 21))
STAGE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
CANDIDATE_BUCKETS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """One set a process: prometheus_client refuses a second registration of a name."""

    def __init__(self, registry: "CollectorRegistry | None" = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self._lag = Histogram(
            telemetry.LAG_SECONDS,
            "Freshness lag of the meta embedding found at serve time (fresh and stale ones).",
            ["kind"],
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        self._lookups = Counter(
            telemetry.LOOKUPS_TOTAL, "Look-ups of meta embeddings by outcome.", ["kind", "status"], registry=registry
        )
        # Gauge.remove() does nothing over several processes: a version that no longer serves is set to 0.
        self._model = Gauge(
            telemetry.MODEL_INFO,
            "1 for the model version and slot that serve, 0 for earlier ones.",
            ["version", "slot"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._score = Histogram(telemetry.SCORE, "Scores given.", buckets=SCORE_BUCKETS, registry=registry)
        self._seconds = Histogram(
            telemetry.RANK_SECONDS, "Time of a ranking request by stage.", ["stage"], buckets=STAGE_BUCKETS, registry=registry
        )
        self._candidates = Histogram(
            telemetry.RANK_CANDIDATES, "Candidates of a request.", buckets=CANDIDATE_BUCKETS, registry=registry
        )
        self._serving: tuple[str, str] | None = None

    def start(self, kinds: Sequence[str]) -> None:
        """Give every series its zero, so that rates and alerts see the first count."""
        for kind in kinds:
            self._lag.labels(kind)
            for status in telemetry.LOOKUP_STATUSES:
                self._lookups.labels(kind, status)

    def looked_up(self, kind: str, lookup: Lookup) -> None:
        self._lookups.labels(kind, lookup.status).inc()
        if lookup.age_s is not None:
            self._lag.labels(kind).observe(lookup.age_s)

    def serving(self, version: str, slot: str) -> None:
        if self._serving is not None and self._serving != (version, slot):
            self._model.labels(*self._serving).set(0)
        self._model.labels(version, slot).set(1)
        self._serving = (version, slot)

    def ranked(self, scores: Sequence[float]) -> None:
        self._candidates.observe(len(scores))
        for score in scores:
            self._score.observe(score)

    def stage(self, stage: str, seconds: float) -> None:
        self._seconds.labels(stage).observe(seconds)
