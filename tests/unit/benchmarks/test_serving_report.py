"""From turns to the figures in serving.json, on numbers made by hand."""

from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.options import BenchmarkError
from benchmarks.serving import report, rounds
from benchmarks.serving.rounds import Turn, percentile, summary
from benchmarks.serving.soak import growth

TURN = Turn(p50_ms=1.0, p99_ms=4.0, rps=900.0, fallback_share=0.0, free_share=1.0)


def test_percentiles_are_by_nearest_rank():
    ordered = [float(number) for number in range(1, 101)]
    assert [percentile(ordered, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_each_figure_is_from_the_turn_where_it_was_best():
    turns = [TURN, replace(TURN, p50_ms=0.5, rps=800.0), replace(TURN, p99_ms=3.0)]
    found = summary({("noop", 1): turns})
    assert (found["p50_ms"], found["p99_ms"], found["rps"]) == (
        {"noop": {"1": 0.5}},
        {"noop": {"1": 3.0}},
        {"noop": {"1": 900.0}},
    )
    assert found["turns"]["noop"]["1"]["rps"] == [900.0, 800.0, 900.0]
    assert found["busy"] == []


def test_a_turn_on_a_busy_machine_does_not_count_while_enough_others_do():
    fast = replace(TURN, p50_ms=0.1, free_share=0.5)
    assert summary({("noop", 1): [TURN, TURN, TURN, fast]})["p50_ms"]["noop"]["1"] == 1.0
    found = summary({("noop", 1): [TURN, TURN, fast]})
    assert (found["p50_ms"]["noop"]["1"], found["busy"]) == (0.1, ["noop.1"])


def test_a_turn_of_answers_from_the_prior_does_not_count():
    quick = replace(TURN, p50_ms=0.1, fallback_share=0.02)
    found = summary({("ours_redis", 8): [TURN, TURN, TURN, quick]})
    assert found["p50_ms"]["ours_redis"]["8"] == 1.0
    assert found["fallback_share"]["ours_redis"]["8"] == 0.005
    with pytest.raises(
        BenchmarkError, match=r"ours_redis at concurrency 8 must answer from the stored embedding.* 2\.0% and more"
    ):
        summary({("ours_redis", 8): [quick]})
    assert summary({("ours_redis", 8): [quick]}, max_fallback_share=1.0)["p50_ms"]["ours_redis"]["8"] == 0.1


@pytest.fixture
def found():
    """Ours on SQLite is slower at once, ours on Redis with eight."""
    by_service = {"noop": (1.0, 1.0), "ours_sqlite": (1.5, 1.4), "ours_redis": (1.2, 2.5), "plain": (0.5, 0.5)}
    turns = {
        (name, concurrency): [
            replace(TURN, p50_ms=0.5 * factor, p99_ms=4.0 * factor**2, rps=900.0 / factor) for _ in range(rounds.MIN_ROUNDS)
        ]
        for name, factors in by_service.items()
        for concurrency, factor in zip(rounds.CONCURRENCIES, factors, strict=True)
    }
    summed = summary(turns)
    return {
        **summed,
        **report.ratios(summed),
        "stage_share": {"ours_redis": {"features": 0.75, "score": 0.25}},
        "stage_mean_ms": {"ours_redis": {"features": 0.3, "score": 0.1}},
        "soak": {"ours_sqlite": {"requests": 200_000, "growth_mb": 12.5, "errors": 0}},
    }


def test_the_ratio_is_of_the_worse_of_ours(found):
    worse = found["ratio_to_noop"]
    assert worse["p50"] == {"1": 1.5, "8": 2.5}
    assert worse["p99"] == {"1": 2.25, "8": 6.25}
    assert worse["rps"] == {"1": pytest.approx(1 / 1.5, abs=1e-3), "8": 0.4}
    assert found["ratio_to_plain"]["p50"] == {"1": 3.0, "8": 5.0}
    assert found["ratio_to_plain"]["rps"] == {"1": pytest.approx(1 / 3, abs=1e-3), "8": 0.2}
    assert found["ratio_to_noop_by_service"]["p50"] == {
        "ours_sqlite": {"1": 1.5, "8": 1.4},
        "ours_redis": {"1": 1.2, "8": 2.5},
        "plain": {"1": 0.5, "8": 0.5},
    }


def test_what_is_wanted_is_compared_with_what_was_found(found):
    missed = {what for what, _, _, met in report.wanted(found) if not met}
    assert missed == {
        "p50 to the no-op's at concurrency 8",
        "p99 to the no-op's at concurrency 8",
        "requests/s to the no-op's at concurrency 8",
        "p99 of ours_redis at concurrency 8, ms",
        "growth of ours_sqlite, MiB",
    }


def test_the_table_shows_speeds_stages_and_what_was_missed(found):
    console = Console(record=True, width=200)
    report.print_tables(found, console)
    text = console.export_text()
    for shown in ("0.75 (1.50x)", "features 75% (0.30 ms)", "missed", "12.50"):
        assert shown in text, shown


def test_stages_are_shares_of_what_the_run_added():
    before = {"features": (1.0, 10.0), "score": (2.0, 10.0)}
    after = {"features": (4.0, 110.0), "score": (3.0, 110.0), "idle": (5.0, 0.0)}
    assert report.stage_shares(before, after) == ({"features": 0.75, "score": 0.25}, {"features": 30.0, "score": 10.0})
    with_total = {"features": (4.0, 110.0), "score": (3.0, 110.0), "total": (8.0, 100.0)}
    shares, _ = report.stage_shares(before, with_total)
    assert shares == {"features": 0.375, "score": 0.125, "total": 1.0}


def test_growth_is_counted_after_the_first_tenth():
    """100 MiB until a fifth of the start is over, then 1 MiB every 10,000 requests."""
    samples = [(at, 50.0 if at < 10_000 else 100.0 + at / 10_000) for at in range(0, 100_001, 1_000)]
    found = growth(samples)
    assert found == {"rss_start_mb": 101.5, "rss_end_mb": 109.8, "growth_mb": 8.2, "mb_per_100k_requests": 10.0}
    assert growth([(0, 50.0), (300, 52.0)])["growth_mb"] == 2.0
