"""The best of the rounds in which the machine was free, on a clock that moves by hand."""

from itertools import chain, repeat

from benchmarks.gemm import GemmPeak
from benchmarks.timing import MIN_ROUNDS, best_of_interleaved


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s

    def takes(self, seconds):
        """A call whose time is the next of `seconds`."""
        times = iter(seconds)

        def call():
            found = next(times)
            self.now_s += found
            return found

        return call


def test_the_best_free_round_counts():
    clock = Clock()
    pair = best_of_interleaved(
        clock.takes(repeat(1.0)), clock.takes(chain([5.0, 4.0, 6.0], repeat(5.0))), lambda: 1.0, budget_s=15.0, clock=clock
    )
    assert (pair.ours_s, pair.peer_s, pair.rounds, pair.busy) == (1.0, 4.0, 3, False)


def test_a_round_beside_a_slow_matrix_product_is_dropped():
    """The second probe is slow: it spoils the rounds before and after it, whose times would have been the best."""
    clock = Clock()
    probes = iter(chain([1.0, 0.5], repeat(0.9)))
    pair = best_of_interleaved(
        clock.takes(chain([0.5, 0.5], repeat(1.0))), clock.takes(repeat(1.0)), lambda: next(probes), budget_s=4.0, clock=clock
    )
    assert (pair.ours_s, pair.rounds, pair.busy) == (1.0, MIN_ROUNDS, False)
    assert clock.now_s == 2 * 1.5 + 3 * 2.0


def test_a_machine_that_is_never_free_is_said_to_be_busy_after_twice_the_time():
    clock = Clock()
    probes = iter(chain([1.0], repeat(0.5)))
    pair = best_of_interleaved(
        clock.takes(repeat(1.0)), clock.takes(repeat(2.0)), lambda: next(probes), budget_s=6.0, clock=clock
    )
    assert (pair.ours_s, pair.peer_s, pair.rounds, pair.busy) == (1.0, 2.0, 4, True)


def test_a_slow_engine_still_gets_its_rounds():
    clock = Clock()
    pair = best_of_interleaved(clock.takes(repeat(1.0)), clock.takes(repeat(100.0)), lambda: 1.0, budget_s=0.0, clock=clock)
    assert pair.rounds == MIN_ROUNDS


def test_the_peak_is_of_both_libraries_and_an_earlier_process_sets_the_mark():
    peak = GemmPeak()
    peak.measure(repeats=1)
    assert set(peak.best_gflops) == {"mkl", "onednn"}
    assert min(peak.best_gflops.values()) > 0.0
    assert 0.0 < GemmPeak(known_gflops=1e9).probe() < 1e-3
