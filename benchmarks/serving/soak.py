"""Many requests at one service, its memory read every second: what is kept a request shows as growth."""

import time
from collections.abc import Callable, Sequence
from statistics import linear_regression, median

from benchmarks.results import Results
from benchmarks.serving.client import load
from benchmarks.serving.processes import Service

CONCURRENCY = 8
FLAT_MB = 10.0
"""Below 60 bytes a request of 180,000: less than the smallest object that could be kept for each."""
# Growth counts from here on: caches, pools and the allocator's arenas have found their size.
_SETTLED, _SETTLED_END, _LAST = 0.10, 0.20, 0.95

Sample = tuple[int, float]
"""Answers so far, resident MiB."""


def soak(service: Service, requests: Sequence[bytes], count: int, say: Callable[[str], None]) -> Results:
    """`count` requests at concurrency 8. Errors are counted here, not raised."""
    samples: list[Sample] = [(0, service.rss_mib())]
    start = time.perf_counter()
    tally = load(
        service.port,
        requests,
        service.check,
        concurrency=CONCURRENCY,
        count=count,
        every_second=lambda answers: samples.append((answers, service.rss_mib())),
    )
    found = growth(samples) | {
        "requests": len(tally.latencies_s),
        "seconds": round(time.perf_counter() - start, 1),
        "rps": round(len(tally.latencies_s) / tally.seconds, 1),
        "errors": tally.errors,
        "fallbacks": tally.fallbacks,
    }
    say(f"soak of {service.name}: {found['requests']:,} requests, {found['growth_mb']:+.1f} MiB, {tally.errors} errors")
    return found | ({"first_error": tally.first_error} if tally.errors else {})


def growth(samples: Sequence[Sample]) -> Results:
    """Medians of the memory after the first tenth and in the end (MiB), their difference, and the slope between.

    A soak too short to have samples there takes the nearest one.
    """
    answers = samples[-1][0]
    start = _median_between(samples, _SETTLED * answers, _SETTLED_END * answers)
    end = _median_between(samples, _LAST * answers, answers)
    settled = [(at, rss) for at, rss in samples if at >= _SETTLED * answers]
    counts = [at for at, _ in settled]
    slope = linear_regression(counts, [rss for _, rss in settled]).slope if len(set(counts)) > 1 else 0.0
    return {
        "rss_start_mb": round(start, 1),
        "rss_end_mb": round(end, 1),
        "growth_mb": round(end - start, 1),
        "mb_per_100k_requests": round(slope * 1e5, 2),
    }


def _median_between(samples: Sequence[Sample], low: float, high: float) -> float:
    inside = [rss for at, rss in samples if low <= at <= high]
    return median(inside) if inside else min(samples, key=lambda sample: abs(sample[0] - low))[1]
