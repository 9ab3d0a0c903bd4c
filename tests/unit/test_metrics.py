"""Every metric against a second, plain implementation: scikit-learn where it has one, loops otherwise."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from limaml import metrics

NUM_USERS = 25


@pytest.fixture(params=["continuous", "with_ties"])
def rows(request):
    rng = np.random.default_rng(7)
    users = rng.integers(0, NUM_USERS - 1, 600)  # the last user has no row
    labels = rng.integers(0, 2, 600)
    labels[users == 3] = 1  # one class only
    scores = 1 / (1 + np.exp(-(rng.normal(size=600) + labels)))
    if request.param == "with_ties":
        scores = np.round(scores, 1)
    return labels, scores, users


def test_auc_equals_sklearn(rows):
    labels, scores, _ = rows
    assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_of_one_class_is_nan():
    assert np.isnan(metrics.auc([1, 1], [0.2, 0.3]))
    assert np.isnan(metrics.auc([], []))


def test_per_user_auc_equals_sklearn_user_by_user(rows):
    labels, scores, users = rows
    ours = metrics.per_user_aucs(labels, scores, users, NUM_USERS)
    expected = np.full(NUM_USERS, np.nan)
    for user in range(NUM_USERS):
        mine = users == user
        if len(set(labels[mine])) == 2:
            expected[user] = roc_auc_score(labels[mine], scores[mine])
    assert np.isnan(expected[3])
    assert np.isnan(expected[NUM_USERS - 1])
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert metrics.mean_per_user_auc(labels, scores, users, NUM_USERS) == pytest.approx(np.nanmean(expected), abs=1e-12)


def test_per_user_auc_does_not_see_a_users_level(rows):
    labels, scores, users = rows
    shifted = scores + np.random.default_rng(0).normal(size=NUM_USERS).round(3)[users] * 4
    before = metrics.mean_per_user_auc(labels, scores, users, NUM_USERS)
    # Adding floats can split a tie by one rounding, so ties are restored by rounding.
    assert metrics.mean_per_user_auc(labels, shifted.round(9), users, NUM_USERS) == pytest.approx(before, abs=1e-3)
    assert abs(metrics.auc(labels, shifted) - metrics.auc(labels, scores)) > 0.05


def test_log_loss_equals_sklearn(rows):
    labels, scores, _ = rows
    inside = np.clip(scores, 0.01, 0.99)
    assert metrics.log_loss(labels, inside) == pytest.approx(sklearn_log_loss(labels, inside), abs=1e-12)
    assert np.isfinite(metrics.log_loss([0, 1], [1.0, 0.0]))


def test_calibration_error_equals_a_loop(rows):
    labels, scores, _ = rows
    total = 0.0
    for index in range(15):
        low, high = index / 15, (index + 1) / 15
        inside = [(p, y) for p, y in zip(scores, labels, strict=True) if low <= p < high or (index == 14 and p == 1.0)]
        if inside:
            total += abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / len(scores)
    assert metrics.expected_calibration_error(labels, scores) == pytest.approx(total, abs=1e-12)


def test_a_probability_of_one_belongs_to_the_last_bin():
    bins = metrics.calibration_bins([1, 0, 0], [1.0, 0.95, 0.0])
    assert bins.weight.tolist() == pytest.approx([1 / 3, *[0.0] * 13, 2 / 3])
    assert bins.mean_label[-1] == 0.5


def test_calibration_error_of_a_calibrated_and_of_a_wrong_score():
    labels = np.array([0, 1, 1, 1])
    assert metrics.expected_calibration_error(labels, np.full(4, 0.75)) == pytest.approx(0.0)
    assert metrics.expected_calibration_error(labels, np.full(4, 0.25)) == pytest.approx(0.5)


def test_psi_equals_a_loop_and_rises_with_a_shift():
    rng = np.random.default_rng(1)
    expected, actual = rng.normal(size=5000), rng.normal(0.3, 1.0, size=4000)
    edges = [-np.inf, *np.quantile(expected, np.linspace(0.1, 0.9, 9)), np.inf]
    psi = 0.0
    for low, high in itertools.pairwise(edges):
        e = sum(low <= x < high for x in expected) / 5000
        a = sum(low <= x < high for x in actual) / 4000
        psi += (a - e) * np.log(a / e)
    assert metrics.population_stability_index(expected, actual) == pytest.approx(psi, abs=1e-9)
    assert metrics.population_stability_index(expected, expected) == pytest.approx(0.0)
    assert metrics.population_stability_index(expected, expected + 1.0) > 0.25
    assert np.isfinite(metrics.population_stability_index(expected, np.full(10, 99.0)))


def test_bootstrap_draws_equal_rows_really_repeated(rows):
    labels, scores, users = rows
    bootstrap = metrics.Bootstrap(users, metrics.draw_users(NUM_USERS, draws=5, seed=3))
    pooled, per_user = bootstrap.pooled_auc(labels, scores), bootstrap.per_user_auc(labels, scores)
    for draw in range(5):
        weights = bootstrap.weights_BU[draw].astype(int)
        assert weights.sum() == NUM_USERS
        repeated = np.repeat(np.arange(len(users)), weights[users])
        assert pooled[draw] == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]), abs=1e-12)
        values = []
        for user in range(NUM_USERS):
            mine = users == user
            if len(set(labels[mine])) == 2:
                values += [roc_auc_score(labels[mine], scores[mine])] * weights[user]
        assert per_user[draw] == pytest.approx(np.mean(values), abs=1e-12)


def test_bootstrap_interval_covers_the_mean_of_users_as_theory_says():
    """Mean per-user AUC is a mean over users: its bootstrap spread must be the standard error of that mean."""
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(400), 20)
    labels = rng.integers(0, 2, len(users))
    scores = rng.normal(size=len(users)) + 0.5 * labels
    values = metrics.per_user_aucs(labels, scores, users, 400)
    values = values[~np.isnan(values)]
    draws = metrics.Bootstrap(users, metrics.draw_users(400, draws=2000, seed=0)).per_user_auc(labels, scores)
    standard_error = values.std() / np.sqrt(len(values))
    # A standard deviation over 2,000 draws is itself known to 1 / sqrt(4,000) = 1.6 %; 6 % is four of those.
    assert draws.std() == pytest.approx(standard_error, rel=0.06)
    found = metrics.interval(float(values.mean()), draws)
    assert found.low < values.mean() < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_bootstrap_is_paired_and_repeats_with_its_seed(rows):
    labels, scores, users = rows
    one, two = (metrics.Bootstrap(users, metrics.draw_users(NUM_USERS, draws=50, seed=9)) for _ in range(2))
    np.testing.assert_array_equal(one.pooled_auc(labels, scores), two.pooled_auc(labels, scores))
    # The same ranking by another scale of score: the paired difference is exactly zero in every draw.
    np.testing.assert_array_equal(one.pooled_auc(labels, scores), one.pooled_auc(labels, 2 * scores))


def test_pairs_are_counted_across_blocks_of_users():
    """More users than one block of columns holds, many of them without a positive or without a negative."""
    rng = np.random.default_rng(4)
    users = rng.integers(0, 150, 400)
    labels, scores = rng.integers(0, 2, 400), rng.integers(0, 30, 400) / 30
    bootstrap = metrics.Bootstrap(users, metrics.draw_users(150, draws=3, seed=1))
    for draw, value in enumerate(bootstrap.pooled_auc(labels, scores)):
        repeated = np.repeat(np.arange(400), bootstrap.weights_BU[draw].astype(int)[users])
        assert value == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]), abs=1e-12)
    assert np.isnan(bootstrap.pooled_auc(np.ones(400), scores)).all()


@pytest.mark.parametrize("num_users", [1, 40])
def test_the_two_ways_to_draw_many_and_few_users_give_the_same_bits(monkeypatch, num_users):
    rng = np.random.default_rng(4)
    users, labels = rng.integers(0, num_users, 500), (rng.random(500) < 0.3).astype(float)
    bootstrap = metrics.Bootstrap(users, metrics.draw_users(num_users, draws=20, seed=1))
    for scores in (rng.random(500), np.round(rng.random(500), 1), np.zeros(500)):
        found = []
        for most in (0, 2000):
            monkeypatch.setattr(metrics, "_PAIR_USERS", most)
            found.append(bootstrap.pooled_auc(labels, scores))
        assert np.array_equal(found[0], found[1])
        assert not np.isnan(found[0]).any()


@pytest.mark.parametrize("pair_users", [-1, 2000])
def test_a_bootstrap_of_nobody_has_no_value(monkeypatch, pair_users):
    monkeypatch.setattr(metrics, "_PAIR_USERS", pair_users)
    nobody = metrics.Bootstrap([], metrics.draw_users(0, draws=3, seed=0))
    for draws in (nobody.pooled_auc([], []), nobody.per_user_auc([], [])):
        assert draws.shape == (3,)
        assert np.isnan(draws).all()
    assert np.isnan(metrics.interval(float("nan"), draws).low)


def test_interval_excludes_zero_on_either_side_only():
    assert metrics.Interval(0.02, 0.01, 0.03).excludes_zero()
    assert metrics.Interval(-0.02, -0.03, -0.01).excludes_zero()
    assert not metrics.Interval(0.01, -0.01, 0.03).excludes_zero()
    # A bound that is zero is no bound away from it.
    assert not metrics.Interval(0.01, 0.0, 0.03).excludes_zero()
    assert not metrics.Interval(-0.01, -0.03, 0.0).excludes_zero()
    assert not metrics.Interval(0.01, float("nan"), float("nan")).excludes_zero()
