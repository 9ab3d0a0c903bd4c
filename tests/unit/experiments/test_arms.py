"""Simulated traffic: what is planted is there, users are counted when their days are over, and a small run holds the level."""

import numpy as np
import pytest

from experiments.arms import LEVEL, NUM_DAYS, OUTCOME_DAYS, SPLITS, _share, first_rejection, power, simulate, t_tests
from limaml.monitoring.sequential import difference

HALVES = SPLITS["two"]


def test_what_is_planted_is_there():
    run = simulate(1, 200_000, HALVES, 0.05)
    treated = run.arm_U == 1
    gap = run.outcomes[treated].mean() - run.outcomes[~treated].mean()
    # Five standard errors, of an outcome with a deviation of about 0.3.
    assert gap == pytest.approx(0.05, abs=5 * 0.3 * np.sqrt(4 / 200_000))
    assert run.looked_at[OUTCOME_DAYS - 1] == 0
    assert run.looked_at[-1] == 200_000
    assert len(run.looked_at) == NUM_DAYS


def test_the_day_of_a_rejection_is_the_first_at_which_a_look_rejects():
    run = simulate(3, 4000, HALVES, 0.06)
    looks = [difference(run.outcomes[:n], run.arm_U[:n] == 1, share=0.5, level=LEVEL).p <= LEVEL for n in run.looked_at]
    assert first_rejection(run, HALVES) == looks.index(True) + 1


def test_the_t_test_is_the_one_of_the_books():
    """Welch's statistic beside a normal quantile, of users and of requests at the last look."""
    for number in range(20):
        run = simulate(number, 3000, HALVES, 0.02)
        requests = [np.repeat([1.0, 0.0], [s, n - s]) for s, n in zip(run.successes_U, run.requests_U, strict=True)]
        for name, values in (("users", [[value] for value in run.outcomes]), ("requests", requests)):
            sides = [np.concatenate([v for v, arm in zip(values, run.arm_U, strict=True) if arm == of]) for of in (0, 1)]
            error = np.sqrt(sum(side.var() / len(side) for side in sides))
            assert t_tests(run)[f"t_test_of_{name}_once"] == (abs(sides[0].mean() - sides[1].mean()) / error > 1.959964)


def test_false_positives_stay_below_the_level_and_a_planted_effect_is_found():
    """Smaller than the committed run: 100 tests of each split, of 2,000 users."""
    for name, shares in SPLITS.items():
        wrong = sum(first_rejection(simulate(number, 2000, shares, 0.0), shares) is not None for number in range(100))
        assert wrong <= 100 * LEVEL, name
    found = sum(first_rejection(simulate(number, 2000, HALVES, 0.1), HALVES) is not None for number in range(20))
    assert found >= 18


def test_a_share_has_its_exact_interval():
    assert _share(0, 20) == {"count": 0, "of": 20, "share": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 20))}
    assert _share(20, 20)["low"] == pytest.approx(0.025 ** (1 / 20))


def test_power_says_how_many_users_and_which_effect():
    found = power(num_runs=1)
    assert {float(effect) for effects in found.values() for effect in effects} == {0.01, 0.02, 0.04, 0.06}
