"""Two engines timed in turns, so that a busy moment hits both: the best of the rounds in which the machine was free."""

import time
from collections.abc import Callable
from dataclasses import dataclass

FREE_SHARE = 0.8
"""A round counts if the matrix product before and after it reached this share of its best; contended ones reach a half."""
MIN_ROUNDS = 3
# One turn of a fast engine holds many calls, so that it runs with its own threads awake and its own data in the cache.
_TURN_S = 0.03


@dataclass(frozen=True)
class Pair:
    """Best seconds of one call of each engine."""

    ours_s: float
    peer_s: float
    rounds: int
    """Rounds that counted."""
    busy: bool
    """The machine was never free for MIN_ROUNDS rounds: the best of all rounds was taken."""


def best_of_interleaved(
    ours: Callable[[], float],
    peer: Callable[[], float],
    probe: Callable[[], float],
    *,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Pair:
    """Time A B A B ... until `budget_s` has passed and MIN_ROUNDS rounds counted, or twice that time has passed.

    `ours` and `peer` run once and return the seconds that count; `probe` gives the machine's speed as a share of its best.
    """
    start, rounds, before = clock(), [], probe()
    while True:
        times = _turn(ours, clock), _turn(peer, clock)
        after = probe()
        rounds.append((*times, min(before, after)))
        before = after
        elapsed, free = clock() - start, [found for found in rounds if found[2] >= FREE_SHARE]
        if len(rounds) >= MIN_ROUNDS and (elapsed >= 2 * budget_s or (elapsed >= budget_s and len(free) >= MIN_ROUNDS)):
            break
    busy = len(free) < MIN_ROUNDS
    counted = rounds if busy else free
    return Pair(min(ours_s for ours_s, _, _ in counted), min(peer_s for _, peer_s, _ in counted), len(counted), busy)


def _turn(call: Callable[[], float], clock: Callable[[], float]) -> float:
    end, best = clock() + _TURN_S, call()
    while clock() < end:
        best = min(best, call())
    return best
