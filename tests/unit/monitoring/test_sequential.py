"""The sequential test: fair bets, what it covers and finds, and an interval that is what its evidence says."""

from itertools import pairwise

import numpy as np
import pytest

from limaml.monitoring.sequential import contributions, difference, log_evidence

LEVEL = 0.05


def users(rng, number, *, share=0.5, effect=0.0):
    """Outcomes of users who differ, some with one request and some with many, and who of them is treated."""
    treated = rng.random(number) < share
    rates, requests = rng.beta(2, 5, number) + effect * treated, 1 + rng.poisson(2, number)
    return rng.binomial(requests, np.clip(rates, 0.0, 1.0)) / requests, treated


def test_a_bet_on_equal_arms_is_fair_for_every_user_whatever_came_before():
    """Both assignments of the last user, weighed by their probability, leave the fortune as it was: by hand, in float64."""
    rng = np.random.default_rng(1)
    for share in (0.5, 0.2):
        outcome, treated = users(rng, 50, share=share)
        fortunes = []
        for last in (True, False):
            z = np.append(treated, last)
            fortunes.append(np.exp(log_evidence(contributions(np.append(outcome, 0.8), z, share), 0.0, share)))
        mean = share * fortunes[0] + (1 - share) * fortunes[1]
        # The mean of products, not of the mean fortune's logarithm: equal to rounding.
        assert mean[-1] == pytest.approx(mean[-2], rel=1e-12)
        assert fortunes[0][-1] != pytest.approx(fortunes[1][-1], rel=1e-6)


def test_contributions_have_the_difference_as_their_mean():
    """Over both assignments of each user, whatever the guess is."""
    outcome = {True: np.array([0.2, 1.0, 0.4]), False: np.array([0.1, 0.7, 0.0])}
    share = 0.3
    found = 0.0
    for treated in np.ndindex(2, 2, 2):
        z = np.array(treated, bool)
        y = np.where(z, outcome[True], outcome[False])
        found += np.prod(np.where(z, share, 1 - share)) * contributions(y, z, share)
    assert found == pytest.approx(outcome[True] - outcome[False], abs=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.95])
def test_nobody_can_go_bankrupt(share):
    """The worst that users can do: always the other outcome than before, in the arm where that costs most."""
    outcome = np.tile([1.0, 0.0], 500)
    for treated in (outcome == 1.0, outcome == 0.0, np.ones(1000, bool), np.zeros(1000, bool)):
        x = contributions(outcome, treated, share)
        for m in (-1.0, 0.0, 1.0):
            assert np.isfinite(log_evidence(x, m, share)).all()
            # Half of it a user, at most.
            assert np.diff(log_evidence(x, m, share)).min() >= np.log(0.5)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_interval_ends_where_the_evidence_reaches_its_bound(share):
    rng = np.random.default_rng(2)
    outcome, treated = users(rng, 3000, share=share, effect=0.05)
    found = difference(outcome, treated, share=share, level=LEVEL)
    assert found.low < found.value < found.high
    x = contributions(outcome, treated, share)
    for m in np.linspace(-0.4, 0.4, 33):
        is_out = log_evidence(x, m, share)[-1] >= np.log(1 / LEVEL)
        assert is_out == (m < found.low or m > found.high), m
    # Bisection: 2 / 2^24.
    for end in (found.low, found.high):
        assert log_evidence(x, end, share)[-1] == pytest.approx(np.log(1 / LEVEL), abs=1e-3)


def test_p_only_falls_as_users_come():
    rng = np.random.default_rng(3)
    outcome, treated = users(rng, 2000, effect=0.1)
    looks = [difference(outcome[:n], treated[:n], share=0.5, level=LEVEL).p for n in range(0, 2001, 100)]
    assert looks[0] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(looks))
    assert looks[-1] < 1e-4


def test_the_same_users_the_other_way_round_give_the_mirrored_interval():
    rng = np.random.default_rng(4)
    outcome, treated = users(rng, 1000, share=0.3, effect=0.1)
    found = difference(outcome, treated, share=0.3, level=LEVEL)
    mirrored = difference(outcome, ~treated, share=0.7, level=LEVEL)
    assert (mirrored.low, mirrored.high, mirrored.p) == pytest.approx((-found.high, -found.low, found.p), abs=1e-6)


def test_without_users_or_an_arm_nothing_is_known():
    nothing = difference([], [], share=0.5, level=LEVEL)
    assert (nothing.low, nothing.high, nothing.p) == (-1.0, 1.0, 1.0)
    assert np.isnan(nothing.value)
    assert np.isnan(difference([0.5, 0.5], [True, True], share=0.5, level=LEVEL).value)


def test_an_outcome_that_is_no_share_is_refused():
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"outcomes must lie in \[0, 1\]"):
            difference([0.5, wrong], [True, False], share=0.5, level=LEVEL)
