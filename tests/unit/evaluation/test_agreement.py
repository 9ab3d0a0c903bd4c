"""Agreement of two versions: a rotation is seen through, what is more than one is not, and a version agrees with itself."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from limaml.evaluation.agreement import MAX_ENTITIES, agreement, versions_agree
from limaml.models import bundle as bundles
from limaml.models.network import build_network
from limaml.schema import day_end
from limaml.tasks.sampling import microseconds
from limaml.training.prepare import read_history


def test_a_rotation_is_undone_and_noise_is_not():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(500, 6))
    rotation = ortho_group.rvs(6, random_state=1)
    turned = agreement(before, 3.0 * before @ rotation)
    assert turned["rotated_cosine"] == pytest.approx(1.0, abs=1e-12)
    assert turned["cosine"] < 0.7
    # Noise of the same size as the signal: the cosine is that of two vectors that share half their variance.
    noisy = agreement(before, (before + rng.normal(size=before.shape)) @ rotation)
    assert noisy["rotated_cosine"] == pytest.approx(0.5**0.5, abs=0.05)
    # The best rotation is at least as good as none, and as any other one.
    for seed in range(5):
        other = ortho_group.rvs(6, random_state=seed)
        assert agreement(before, turned_by := before @ other)["rotated_cosine"] >= agreement(before, turned_by)["cosine"]


def test_rows_of_zeros_have_no_direction():
    some = np.eye(4)
    found = agreement(some, np.concatenate([some[:2], np.zeros((2, 4))]))
    assert found == {"number": 2, "cosine": pytest.approx(1.0), "rotated_cosine": pytest.approx(1.0)}
    assert agreement(some[:0], some[:0])["number"] == 0


def test_a_version_agrees_with_itself_and_less_with_one_of_another_seed(make_candidate):
    cfg, one, through = make_candidate("one")
    _, two, _ = make_candidate("two", training={"seed": 3})
    logged, at = read_history(cfg, through), microseconds(day_end(through))
    first, second = (bundles.load(folder / "bundle").refit for folder in (one, two))
    same = versions_agree((cfg, first), (cfg, first), logged, at)
    assert same["embeddings"]["number"] <= min(MAX_ENTITIES, 90)
    for part in same.values():
        assert part["cosine"] == pytest.approx(1.0)
    different = versions_agree((cfg, first), (cfg, second), logged, at)
    assert different["embeddings"]["cosine"] < 0.999
    # Another width: nothing to compare.
    narrow = cfg.model_copy(update={"model": cfg.model.model_copy(update={"embedding_dim": 3})})
    third = bundles.Model(build_network(narrow, first.encoder.dims), first.encoder)
    assert versions_agree((cfg, first), (narrow, third), logged, at) == {"embeddings": None, "items": None}
