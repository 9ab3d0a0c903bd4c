"""A map that is carried over is turned and scaled to the second world's items, and what is left is a ridge."""

import numpy as np

from benchmarks.cross_domain import ridge, towards


def test_a_map_is_turned_and_scaled_before_the_ridge():
    draw = np.random.default_rng(0)
    x, carried = draw.normal(size=(20, 8)), draw.normal(size=(8, 3))
    turn, _ = np.linalg.qr(draw.normal(size=(3, 3)))
    wanted = 2.5 * carried @ turn
    assert np.abs(towards(x, x @ wanted, carried, 1e6) - wanted).max() < 1e-12
    y = draw.normal(size=(20, 3))
    assert np.array_equal(towards(x, y, np.zeros_like(carried), 0.1), ridge(x, y, 0.1))
    gram = x.T @ x
    primal = np.linalg.solve(gram + 0.1 * np.trace(gram) / 20 * np.eye(8), x.T @ y)
    assert np.abs(ridge(x, y, 0.1) - primal).max() < 1e-12
