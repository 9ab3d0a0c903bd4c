"""The generated world: deterministic, and with the optimum it claims."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import SourceConfig
from limaml.events import gates
from limaml.events.synthetic import FIRST_DAY, SyntheticSource, bayes_auc
from limaml.metrics import auc


def settings(**values):
    return SourceConfig(kind="synthetic", **{f"synthetic_{name}": value for name, value in values.items()})


def whole(source):
    return pa.concat_tables([source.read_day(day) for day in source.days()])


def test_same_settings_give_the_same_days_in_any_order():
    first, second = SyntheticSource(settings(seed=3)), SyntheticSource(settings(seed=3))
    days = first.days()
    backwards = {day: second.read_day(day) for day in reversed(days)}
    for day in days:
        assert first.read_day(day).equals(backwards[day])
    assert not first.read_day(days[0]).equals(SyntheticSource(settings(seed=4)).read_day(days[0]))


def test_days_are_well_formed():
    source = SyntheticSource(settings(users=30, days=9))
    users, items = source.catalogue()
    assert source.days() == [FIRST_DAY + timedelta(days=n) for n in range(9)]
    assert source.read_day(FIRST_DAY - timedelta(days=1)) is None
    assert source.read_day(FIRST_DAY + timedelta(days=9)) is None
    results = gates.check_days(
        {day: source.read_day(day) for day in source.days()},
        known_users=users["user_id"].combine_chunks(),
        known_items=items["item_id"].combine_chunks(),
        recent_rows={},
        source=settings(),
        strict_volume=set(source.days()),
    )
    assert [day for day, result in results.items() if not result.success] == []
    seconds = whole(source)["timestamp"].to_pylist()
    assert len(set(seconds)) < len(seconds), "rows share seconds, as in recorded data"


def test_moving_it_changes_dates_only():
    source = SyntheticSource(settings(users=10, days=4))
    moved = source.moved(timedelta(weeks=3)).moved(timedelta(weeks=1))
    assert moved.days()[0] == FIRST_DAY + timedelta(weeks=4)
    names = ["event_id", "user_id", "item_id", "label"]
    for day, later in zip(source.days(), moved.days(), strict=True):
        assert source.read_day(day).select(names).equals(moved.read_day(later).select(names))
    assert np.array_equal(source.true_probability(whole(source)), moved.true_probability(whole(moved)))


def test_bayes_auc_equals_the_sum_over_pairs():
    p = np.random.default_rng(0).random(60)
    p[:20] = np.round(p[:20], 1)  # Ties.
    wins = total = 0.0
    for i in range(p.size):
        for j in range(p.size):
            if i != j:
                weight = p[i] * (1 - p[j])
                wins += weight * (1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0)
                total += weight
    # Sums of 3,600 terms in another order: relative 1e-12 is generous.
    assert bayes_auc(p) == pytest.approx(wins / total, rel=1e-12)


def test_true_probability_reaches_the_optimum_and_nothing_else_does():
    source = SyntheticSource(settings(users=500, days=20))
    events = whole(source)
    probability, label = source.true_probability(events), events["label"].to_numpy()
    best = bayes_auc(probability)
    # 20,000 rows: the standard deviation of an AUC near 0.84 is 0.003; four of them.
    assert auc(label, probability) == pytest.approx(best, abs=0.012)
    blurred = probability + np.random.default_rng(0).normal(0, 0.3, probability.size)
    assert auc(label, blurred) < best - 0.03
    assert 0.8 < best < 0.9


def test_drift_makes_old_knowledge_worse():
    """Factors of day 0 explain the last day's labels with drift 0 as well as ever, with drift 0.5 hardly."""

    def stale_auc(drift):
        source = SyntheticSource(settings(users=400, days=12, drift=drift))
        last = source.read_day(source.days()[-1])
        as_of_first = pa.array([day - timedelta(days=11) for day in last["timestamp"].to_pylist()], schema.TIMESTAMP)
        old = source.true_probability(last.set_column(3, "timestamp", as_of_first))
        return auc(last["label"].to_numpy(), old), bayes_auc(source.true_probability(last))

    steady, best = stale_auc(0.0)
    assert steady == pytest.approx(best, abs=0.05)
    drifted, best = stale_auc(0.5)
    assert drifted < best - 0.1


def test_content_tells_something_about_an_item():
    source = SyntheticSource(settings(items=200))
    _, items = source.catalogue()
    genres = {genre[0] for genre in items["genres"].to_pylist()}
    assert genres == {"sunny", "gloomy"}
