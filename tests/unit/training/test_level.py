"""The level that pairs alone leave open."""

import numpy as np
import pytest
from scipy.special import expit

from limaml.training.validation import level_of


def test_the_mean_score_becomes_the_share_of_positive_rows():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(3.0, 2.0, 400), (generator.random(400) < 0.1).astype(float)
    level = level_of(expit(logits), labels)
    assert expit(logits + level).mean() == pytest.approx(labels.mean(), abs=1e-6)
    assert level < -3.0


@pytest.mark.parametrize("labels", [[], [1.0, 1.0], [0.0, 0.0]])
def test_without_both_labels_the_level_stays(labels):
    assert level_of(np.full(len(labels), 0.6), np.array(labels)) == 0.0
