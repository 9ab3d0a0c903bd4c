"""Pictures of films: neighbours by angle, and films that the fit has not seen placed by their content alone."""

import numpy as np
import pytest

from experiments import transfer_pictures as pictures
from limaml.config import load


def test_neighbours_are_the_nearest_by_angle_from_the_mean_and_never_the_item_itself():
    x = np.array([[1, 0], [5, 0.1], [0, 1], [0.2, 4], [-6.2, -5.1]], np.float32)
    assert x.mean(axis=0) == pytest.approx([0, 0], abs=1e-6)
    assert pictures.neighbours(x, np.array([0, 2, 1]), 2).tolist() == [[1, 3], [3, 1], [0, 3]]


def test_films_left_out_of_the_fit_have_vectors_by_content(tmp_path):
    found = pictures.films(load("configs/movielens.toml", [f"storage.root={tmp_path}"]))
    assert len(found.titles) == len(found.sets) == len(found.text_IW) == len(found.content_IK) == 1682
    assert found.num_rows_I.sum() == 100_000
    assert 0.15 < found.left_out_I.mean() < 0.25
    assert np.isfinite(found.content_IK).all()
    assert found.content_IK[found.left_out_I].std(axis=0).min() > 0.0
    random = np.mean([bool(a & b) for a, b in zip(found.sets, found.sets[::-1], strict=True)])
    for x_IW in (found.text_IW, found.content_IK):
        assert pictures.genre_share(found, x_IW) > random + 0.1
