"""Metrics over origins and seeds, against plain loops."""

import numpy as np
import pytest

from experiments.intervals import AUC, PERUSER_AUC, TaskSetRows, difference, mean_difference, measure
from limaml import metrics


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def world():
    """Two origins of 12 and 9 users among 21, three seeds of two methods, one better than the other."""
    rng = np.random.default_rng(0)
    rows, good, bad = [], [], []
    for users in (np.arange(12), np.arange(12, 21)):
        owner = np.repeat(users, 15)
        labels = rng.integers(0, 2, len(owner)).astype(float)
        rows.append(TaskSetRows(labels, owner))
        good.append([sigmoid(labels + rng.normal(0, 1.0, len(labels))) for _ in range(3)])
        bad.append([sigmoid(labels + rng.normal(0, 3.0, len(labels))) for _ in range(3)])
    return rows, good, bad, metrics.draw_users(21, draws=40, seed=1)


def test_a_value_is_the_mean_over_seeds_then_origins(world):
    rows, good, _, weights = world
    found = measure(rows, good, weights)
    by_hand = [
        np.mean([metrics.auc(task_set.labels, part) for part in seeds]) for task_set, seeds in zip(rows, good, strict=True)
    ]
    assert found.values[AUC] == pytest.approx(by_hand)
    assert found.mean(AUC) == pytest.approx(np.mean(by_hand))


def test_a_draw_weighs_a_user_alike_in_every_origin_and_method(world):
    rows, good, bad, weights = world
    draw = 7
    expected = []
    for task_set, ours, theirs in zip(rows, good, bad, strict=True):
        times = weights[draw].astype(int)[task_set.users]
        labels = np.repeat(task_set.labels, times)
        pairs = [
            metrics.auc(labels, np.repeat(a, times)) - metrics.auc(labels, np.repeat(b, times))
            for a, b in zip(ours, theirs, strict=True)
        ]
        expected.append(np.mean(pairs))
    ours, rival = measure(rows, good, weights), measure(rows, bad, weights)
    found = np.mean([a[draw] - b[draw] for a, b in zip(ours.draws[AUC], rival.draws[AUC], strict=True)])
    assert found == pytest.approx(np.mean(expected))


def test_a_difference_is_paired_and_its_interval_is_of_the_draws(world):
    rows, good, bad, weights = world
    ours, rival = measure(rows, good, weights), measure(rows, bad, weights)
    found = difference(ours, rival, PERUSER_AUC)
    assert found.low < found.mean < found.high
    assert found.low > 0
    same = difference(ours, ours, PERUSER_AUC)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert difference(rival, ours, AUC).mean == pytest.approx(-difference(ours, rival, AUC).mean)
    one = difference(ours, rival, AUC, [1])
    assert one.mean == pytest.approx(ours.values[AUC][1] - rival.values[AUC][1])


def test_several_cases_are_averaged(world):
    rows, good, bad, weights = world
    ours, rival, zero = (measure(rows, scores, weights) for scores in (good, bad, good))
    both = mean_difference([(ours, rival), (zero, zero)], AUC)
    assert both.mean == pytest.approx(difference(ours, rival, AUC).mean / 2)
    assert both.low == pytest.approx(difference(ours, rival, AUC).low / 2)
