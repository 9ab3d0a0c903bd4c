"""Drift of vectors: a statistic of two samples, held to its definition."""

import math

import numpy as np
import pyarrow as pa
import pytest

from limaml.monitoring.vector_drift import MAX_VECTORS, energy_coefficient, sampled, vector_drift

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d", "none"],
        "text": pa.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0], None], pa.list_(pa.float32(), 2)),
    }
)


def by_hand(x, y):
    def mean(a, b):
        return sum(math.dist(p, q) for p in a for q in b) / (len(a) * len(b))

    return 1 - (mean(x, x) + mean(y, y)) / (2 * mean(x, y))


def test_the_coefficient_is_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32) + 1.0
    assert energy_coefficient(x, y) == pytest.approx(by_hand(x, y), abs=1e-6)
    assert energy_coefficient(x, x) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(energy_coefficient(x[:0], y))
    assert energy_coefficient(x[:1], x[:1]) == 0.0


def test_chance_stays_far_below_the_alarm_and_a_shift_of_one_standard_deviation_above_it():
    rng = np.random.default_rng(1)
    x, same, moved = (rng.normal(size=(MAX_VECTORS, 16)).astype(np.float32) for _ in range(3))
    assert energy_coefficient(x, same) < 0.005
    assert energy_coefficient(x, moved + 1.0) > 0.1


def test_items_without_a_vector_say_nothing_and_scale_does_not_count():
    assert vector_drift("text", ITEMS, ["a", "b", "c"], ["c", "a", "b", "none", "never delivered"]) == pytest.approx(0.0)
    assert math.isnan(vector_drift("text", ITEMS, ["a"], ["none"]))
    far = vector_drift("text", ITEMS, ["a", "b"], ["d"])
    assert far == pytest.approx(by_hand([(0, 0), (1, 0)], [(9, 9)]), abs=1e-5)


def test_a_sample_holds_an_item_as_often_as_it_is_shown():
    shown = pa.chunked_array([["often"] * 9000 + ["seldom"] * 1000 + [None] * 5])
    found = sampled(shown)
    assert len(found) == MAX_VECTORS
    assert found.count("seldom") == pytest.approx(100, abs=1)
    assert sampled(pa.array(["b", "a"])) == ["a", "b"]
    assert sampled(pa.array([], pa.string())) == []
