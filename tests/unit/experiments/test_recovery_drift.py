"""Refresh under drift: half-lives, visits of the configured length and pace, and tasks that share their query rows."""

import numpy as np
import pytest

from experiments.cached_jobs import JobOutput
from experiments.origin_data import CADENCES, NEVER
from experiments.tables import drift
from experiments.worlds import KnownRows
from limaml.config import Config, SourceConfig
from limaml.evaluation.scoring_method import MethodInput
from limaml.events.synthetic import SyntheticSource, expected_auc
from limaml.features.encoder import Encoder
from limaml.tasks.sampling import MICROSECONDS_PER_DAY


def source(**values):
    return SyntheticSource(SourceConfig(kind="synthetic", **{f"synthetic_{name}": value for name, value in values.items()}))


@pytest.mark.parametrize("half_life", [2, 10])
def test_half_of_the_correlation_is_left_after_a_half_life(half_life):
    world = source(users=4000, days=half_life + 1, factors=1, level=1.0, drift=drift.drift_of(half_life))
    first, last = world._user_factors[0], world._user_factors[half_life]
    for latent in range(2):
        # 4,000 users: the standard deviation of a correlation of a half is 0.75 / sqrt(4000) = 0.012; four of them.
        assert np.corrcoef(first[:, latent], last[:, latent])[0, 1] == pytest.approx(0.5, abs=0.05)


def test_no_half_life_is_no_drift():
    assert drift.drift_of(None) == 0.0
    assert drift.drift_of(60.0) < drift.drift_of(10.0) < drift.drift_of(2.0) < 1.0


def test_visits_have_the_configured_length_and_pace_and_end_on_their_day():
    world = source(users=20, days=12, rows_per_user=120, session_rows=12, pace_s=900)
    seen = set()
    for day in world.days():
        events = world.read_day(day)
        users, stamps = events["user_id"].to_pylist(), events["timestamp"].to_pylist()
        assert {stamp.date() for stamp in stamps} <= {day}
        for user in set(users):
            times = [stamp.timestamp() for stamp, who in zip(stamps, users, strict=True) if who == user]
            seen.add(len(times))
            assert np.diff(times[::2]) == pytest.approx(900.0)
            assert times[::2] == times[1::2], "rows come in pairs"
    assert seen == {60, 12}


@pytest.fixture
def known(make_planted):
    logged = make_planted(num_users=12, rows_per_user=25, num_days=10)
    cfg = Config(source=SourceConfig(kind="movielens"))
    known = MethodInput.from_logged(logged, Encoder.fit(logged, cfg), cfg)
    probability = np.random.default_rng(0).random(logged.num_rows)
    return KnownRows(known, np.zeros(logged.num_rows, np.int64), probability, np.zeros(1), np.zeros((1, 1)))


def test_all_cadences_score_the_same_rows_in_one_order(known):
    rows = known.inputs.rows
    from_us = int(np.sort(rows.timestamp_us)[len(rows.label) // 2])
    task_sets = dict(drift._task_sets(known, from_us, support_rows=8))
    assert list(task_sets) == [NEVER, *CADENCES]
    queries = {name: np.concatenate([spec.query for spec in specs]) for name, specs in task_sets.items()}
    for query in queries.values():
        assert np.array_equal(query, queries["daily"])
        assert (rows.timestamp_us[query] >= from_us).all()
    for spec in task_sets[NEVER]:
        assert (rows.timestamp_us[spec.support_start : spec.support_stop] < from_us).all()
    fresh = sum(spec.as_of_us % MICROSECONDS_PER_DAY > 0 for spec in task_sets["at_once"])
    assert fresh > 0, "at once is not daily"


def test_returning_users_are_judged_apart(known):
    rows = known.inputs.rows
    specs = dict(drift._task_sets(known, 0, support_rows=8))["daily"]
    back = rows.entities[:4]
    scores = np.random.default_rng(1).random(len(rows.label))
    pooled, per_user = drift._aucs(known, specs, lambda _, given: scores[np.concatenate([s.query for s in given])], back)
    stop = int(rows.offsets[4])
    p = known.probability_R
    assert pooled["returning"] == pytest.approx(expected_auc(p[:stop], scores[:stop]))
    assert pooled["all"] == pytest.approx(expected_auc(p, scores))
    own = [slice(rows.offsets[user], rows.offsets[user + 1]) for user in range(4)]
    assert per_user["returning"] == pytest.approx(np.mean([expected_auc(p[rows], scores[rows]) for rows in own]))


def test_assembled_scales_carry_their_half_lives():
    outputs = {}
    for number, scale in enumerate(reversed(drift.HALF_LIVES)):
        for seed, support_rows in ((1, 16), (2, 64)):
            auc = {"limaml": {"daily": {"all": number / 10 + seed / 100, "returning": 0.5}}}
            outputs[f"{scale}/seed{seed}"] = JobOutput(
                {"scale": scale, "auc": auc, "peruser_auc": auc, "support_rows": support_rows}
            )
    found = drift.assemble(outputs)["synthetic_drift"]
    assert list(found) == list(drift.HALF_LIVES)
    assert found["fast"]["half_life_days"] == 2.0
    assert found["none"]["auc"]["limaml"]["daily"]["all"] == pytest.approx(0.315), "the mean of both seeds"
    assert found["none"]["support_rows"] == [16, 64]


def test_source_of_every_scale_is_another_one():
    sources = [drift._world({**job.params}) for job in drift.jobs(quick=False)]
    assert len({tuple(each) for each in sources}) == len(sources) == len(drift.HALF_LIVES) * len(drift.JUDGED_SEEDS)
