"""What the generator plants and tells, the expected AUC of any scores, and the share that is recovered."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from experiments.cached_jobs import JobOutput
from experiments.tables import recovery
from limaml.config import SourceConfig
from limaml.events.synthetic import SyntheticSource, expected_auc
from limaml.metrics import auc


def source(**values):
    return SyntheticSource(SourceConfig(kind="synthetic", **{f"synthetic_{name}": value for name, value in values.items()}))


def whole(world):
    return pa.concat_tables([world.read_day(day) for day in world.days()])


def test_settings_of_before_give_the_bytes_of_before():
    """The digest was taken before a level could be planted, and before items had studios."""
    world = source(users=40, items=30, days=8, factors=3, drift=0.2, seed=5)
    catalogued, items = world.catalogue()
    digest = hashlib.sha256()
    for table in [catalogued, items.drop_columns("studio"), *(world.read_day(day) for day in world.days())]:
        digest.update(repr(table.to_pydict()).encode())
    assert digest.hexdigest() == "c4a4fb8a54a61d00a6e3aa4b641157304e76bd676238556a874f97cc82ef2f34"


def test_planting_a_level_changes_no_factor():
    plain, levelled = source(factors=2, drift=0.3), source(factors=2, drift=0.3, level=1.5)
    assert np.array_equal(plain.true_items()[0], levelled.true_items()[0])
    assert np.array_equal(plain.true_items()[1], levelled.true_items()[1][:, :2])
    assert (levelled.true_items()[1][:, 2] == 1.5).all()
    for before, after in zip(plain._user_factors, levelled._user_factors, strict=True):
        assert np.array_equal(before, after[:, :2])


def test_a_level_lifts_all_items_of_a_user_alike():
    world = source(users=300, days=10, factors=0, level=1.5)
    events = whole(world)
    logit = np.log(world.true_probability(events) / (1 - world.true_probability(events)))
    popularity, loading = world.true_items()
    assert loading.shape == (100, 1)
    users = np.array([int(text[1:]) for text in events["user_id"].to_pylist()])
    items = np.array([int(text[1:]) for text in events["item_id"].to_pylist()])
    level = logit - popularity[items]
    mean = np.bincount(users, level) / np.bincount(users)
    assert level == pytest.approx(mean[users], abs=1e-9)
    # 300 draws: the standard deviation of a standard deviation is 1.5 / sqrt(600) = 0.06; four of them.
    assert mean.std() == pytest.approx(1.5, abs=0.25)
    assert abs(mean.mean()) < 0.35


def test_true_items_explain_the_true_probabilities():
    world = source(users=30, days=6, factors=3, level=0.7)
    events = whole(world)
    popularity, loading = world.true_items()
    users = np.array([int(text[1:]) for text in events["user_id"].to_pylist()])
    items = np.array([int(text[1:]) for text in events["item_id"].to_pylist()])
    z = world._user_factors[0][users]
    expected = expit(popularity[items] + (z * loading[items]).sum(axis=1))
    assert world.true_probability(events) == pytest.approx(expected, abs=1e-12)


def test_expected_auc_is_the_mean_over_drawn_labels():
    rng = np.random.default_rng(0)
    probability, score = rng.random(300), np.round(rng.random(300), 1)
    score += 0.5 * probability.round(1)
    drawn = [auc(rng.random(300) < probability, score) for _ in range(400)]
    # The standard error of the mean is printed by the same draws; four of them.
    margin = 4 * np.std(drawn) / np.sqrt(len(drawn))
    assert expected_auc(probability, score) == pytest.approx(np.mean(drawn), abs=margin)
    assert margin < 0.01


def test_expected_auc_of_certain_labels_is_their_auc():
    rng = np.random.default_rng(1)
    label, score = (rng.random(200) < 0.4).astype(float), np.round(rng.random(200), 1)
    assert expected_auc(label, score) == pytest.approx(auc(label, score), abs=1e-12)


def test_share_recovered_by_hand():
    found = recovery.shares({0: 0.61, 5: 0.69, 10: 0.78}, {0: 0.60, 5: 0.70, 10: 0.80})
    assert found["5"]["share"] == pytest.approx(0.9)
    assert found["10"]["share"] == pytest.approx(0.9)
    assert found["0"] == {"limaml": 0.61, "oracle": 0.60, "none": 0.60}, "nothing to recover without rows"
    assert "share" not in recovery.shares({0: 0.6, 5: 0.6}, {0: 0.6, 5: 0.601})["5"], "nor where rows tell next to nothing"


def test_assembled_shares_are_the_worst_of_the_tastes_means():
    def output(taste, share):
        aucs = {str(k): {"limaml": 0.6 + share / 10, "oracle": 0.7, "none": 0.6, "share": share} for k in recovery.KS}
        peruser = {k: {name: value for name, value in cell.items() if name != "share"} for k, cell in aucs.items()}
        return JobOutput({"taste": taste, "aucs": aucs, "peruser_aucs": peruser if taste == "level" else aucs})

    given = {"level": (0.9, 0.8), "one_dimension": (0.95, 0.95), "ten_dimensions": (0.7, 1.0)}
    outputs = {f"{taste}/{n}": output(taste, share) for taste, pair in given.items() for n, share in enumerate(pair)}
    found = recovery.assemble(outputs)
    assert found["recovered_share"] == pytest.approx({str(k): 0.85 for k in recovery.KS if k})
    assert found["recovery"]["one_dimension"]["5"]["share"] == pytest.approx(0.95)
    assert found["recovery_peruser"]["one_dimension"]["5"]["share"] == pytest.approx(0.95)
    assert "share" not in found["recovery_peruser"]["level"]["5"], "a level ranks nothing inside a user"


def test_every_taste_has_a_unit_with_its_own_key():
    for quick in (True, False):
        jobs = recovery.jobs(quick)
        assert len({job.key for job in jobs}) == len(jobs)
        assert {job.params["taste"] for job in jobs} == set(recovery.TASTES)
