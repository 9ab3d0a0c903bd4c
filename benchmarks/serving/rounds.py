"""The timed part: services in turns, round after round, and the best of the turns that count.

A busy moment of the machine hits all services alike when they take turns of seconds, and the best turn is the one that was
disturbed least; medians of contended runs were off by a factor of ten.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gemm import GemmPeak
from benchmarks.options import BenchmarkError
from benchmarks.results import Results
from benchmarks.serving.client import Tally, load
from benchmarks.serving.processes import Service
from benchmarks.timing import FREE_SHARE, MIN_ROUNDS

CONCURRENCIES = (1, 8)
MAX_FALLBACK_SHARE = 0.01
"""An answer from the prior may cost less than one from the store: a turn with more of them is not what is to be measured."""
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True)
class Plan:
    rounds: int = 10
    seconds: float = 5.0
    """Of a turn; its warm-up comes on top. At 1,000 requests/s a p99 has fifty requests above it."""
    max_fallback_share: float = MAX_FALLBACK_SHARE


@dataclass(frozen=True)
class Turn:
    """One service at one concurrency for some seconds."""

    p50_ms: float
    p99_ms: float
    rps: float
    fallback_share: float
    free_share: float
    """Speed of a matrix product before and after, the lower one, as a share of the best seen."""


Turns = dict[tuple[str, int], list[Turn]]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the sorted values do not exceed (nearest rank)."""
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]


def take_turns(services: Mapping[str, Service], requests: Sequence[bytes], plan: Plan, say: Callable[[str], None]) -> Turns:
    """Every service at every concurrency once a round, a different service first each time. Raises BenchmarkError."""
    peak, names = GemmPeak(), list(services)
    peak.measure()
    turns: Turns = {(name, concurrency): [] for name in names for concurrency in CONCURRENCIES}
    before = peak.probe()
    for number in range(plan.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for concurrency in CONCURRENCIES:
                tally = _loaded(services[name], requests, concurrency, plan.seconds)
                after = peak.probe()
                turns[name, concurrency].append(_turn(tally, min(before, after)))
                before = after
        say(f"round {number + 1} of {plan.rounds}: " + ", ".join(f"{n} {turns[n, 1][-1].p50_ms:.2f} ms" for n in names))
    return turns


def _loaded(service: Service, requests: Sequence[bytes], concurrency: int, seconds: float) -> Tally:
    for duration in (_WARM_UP_SHARE * seconds, seconds):
        tally = load(service.port, requests, service.check, concurrency=concurrency, seconds=duration)
        if tally.errors:
            raise BenchmarkError(
                f"{service.name} must answer every request, got {tally.errors} errors of {len(tally.latencies_s)} answers at "
                f"concurrency {concurrency}: {tally.first_error}"
            )
    return tally


def _turn(tally: Tally, free_share: float) -> Turn:
    ordered, count = sorted(tally.latencies_s), len(tally.latencies_s)
    return Turn(
        p50_ms=1e3 * percentile(ordered, 0.50),
        p99_ms=1e3 * percentile(ordered, 0.99),
        rps=count / tally.seconds,
        fallback_share=tally.fallbacks / count,
        free_share=free_share,
    )


def summary(turns: Turns, max_fallback_share: float = MAX_FALLBACK_SHARE) -> Results:
    """`p50_ms|p99_ms|rps|fallback_share.<service>.<concurrency>`, every turn under `turns`, and where the machine was `busy`.

    Raises BenchmarkError where no turn of a service was personalised.
    """
    found: Results = {"p50_ms": {}, "p99_ms": {}, "rps": {}, "fallback_share": {}, "turns": {}, "busy": []}
    for (name, concurrency), taken in turns.items():
        personalised = [turn for turn in taken if turn.fallback_share <= max_fallback_share]
        if not personalised:
            least = min(turn.fallback_share for turn in taken)
            raise BenchmarkError(
                f"{name} at concurrency {concurrency} must answer from the stored embedding, but in every turn {least:.1%} and "
                f"more of the answers fell back (at most {max_fallback_share:.0%} may); free the machine, or see what its "
                "limaml_meta_embedding_lookups_total says"
            )
        free = [turn for turn in personalised if turn.free_share >= FREE_SHARE]
        busy = len(free) < MIN_ROUNDS
        if busy:
            found["busy"].append(f"{name}.{concurrency}")
        best = _best(personalised if busy else free) | {"fallback_share": sum(t.fallback_share for t in taken) / len(taken)}
        for metric, value in best.items():
            found[metric].setdefault(name, {})[str(concurrency)] = round(value, 4)
        found["turns"].setdefault(name, {})[str(concurrency)] = {
            metric: [round(getattr(turn, metric), 4) for turn in taken] for metric in Turn.__dataclass_fields__
        }
    return found


def _best(turns: Iterable[Turn]) -> dict[str, float]:
    """Each figure from the turn where it was best."""
    taken = list(turns)
    return {
        "p50_ms": min(turn.p50_ms for turn in taken),
        "p99_ms": min(turn.p99_ms for turn in taken),
        "rps": max(turn.rps for turn in taken),
    }
