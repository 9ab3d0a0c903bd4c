"""The generated world: deterministic, and with the optimum it claims."""

import hashlib
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import FeatureConfig, SourceConfig
from limaml.events import gates
from limaml.events.casting import with_types
from limaml.events.synthetic import FIRST_DAY, VECTOR_NOISE, SyntheticSource, bayes_auc
from limaml.features.columns import vector_values
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


@pytest.mark.parametrize(
    ("values", "digest"),
    [
        ({}, "fbc12e8b14ec3d474ee26e6ef75926937bfe2da285d8a5aa4e49afca36c4bab7"),
        (
            {"users": 30, "items": 20, "days": 9, "rows_per_user": 33, "factors": 2, "level": 0.7, "drift": 0.3, "seed": 5},
            "ac72144779cca02a4cb7def78c76bab23b59dd30bfd9ded6f78ba08d0eddf6af",
        ),
        ({"factors": 0, "users": 30, "days": 6}, "577fe9ab1efdb5292f83289a533d51a942aff3d64185a49f19cb9bd0897adf9c"),
    ],
)
def test_a_world_is_the_one_it_was(values, digest):
    """Digests from before rates, vectors and shares were settings, and items had studios: results and bundles of these worlds
    stay comparable.
    """
    source = SyntheticSource(settings(**values))
    users, items = source.catalogue()
    found = hashlib.sha256()
    for table in (users, items.drop_columns("studio"), *map(source.read_day, source.days())):
        found.update(repr(table.to_pydict()).encode())
    assert found.hexdigest() == digest


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


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("more", [{}, {"factors": 3, "level": 0.7, "drift": 0.2}])
def test_labels_have_the_rate_that_is_set(rate, more):
    source = SyntheticSource(settings(users=1000, items=100, days=10, label_rate=rate, **more))
    events = whole(source)
    # c holds for users without number. With 1,000, each with a mean probability of its own, the mean over all rows deviates
    # by 2 to 3 % of a rate of a tenth; and 40,000 labels with 1 % positive ones by 5 % of it. For a half c is 0, and 100 items
    # with a popularity of their own move the rate by 0.02 (one standard deviation, as are all of these).
    wanted = pytest.approx(rate, abs=0.06) if rate == 0.5 else pytest.approx(rate, rel=0.2)
    assert events["label"].to_numpy().mean() == wanted
    assert source.true_probability(events).mean() == wanted


def test_what_is_known_of_items_includes_the_rate():
    source = SyntheticSource(settings(users=20, days=3, label_rate=0.1, factors=2))
    popularity, loadings = source.true_items()
    z = np.random.default_rng(0).standard_normal((100_000, loadings.shape[1]))
    # The standard deviation of a mean of 100,000 probabilities is below 0.001 for each of the 100 items.
    assert (1 / (1 + np.exp(-(popularity + z @ loadings.T)))).mean() == pytest.approx(0.1, abs=0.002)


def visits(source):
    """Rows of each user on each day, (user, day) -> rows."""
    events = whole(source)
    days = events["timestamp"].cast(pa.int64()).to_numpy() // 86_400_000_000
    seen, rows = np.unique(np.stack([[int(u[1:]) for u in events["user_id"].to_pylist()], days]), axis=1, return_counts=True)
    return seen[0], seen[1] - days.min(), rows


def test_users_return_on_many_days_where_little_happens_on_the_first():
    shape = {"users": 100, "days": 40, "rows_per_user": 100, "session_rows": 4}
    user, day, rows = visits(SyntheticSource(settings(**shape, first_share=0.04, arrival_share=0.1)))
    assert rows.max() == 4
    assert day[np.unique(user, return_index=True)[1]].max() < 4, "all have arrived in a tenth of the days"
    # 96 rows in visits of 4, after the day of arrival.
    assert np.bincount(user).mean() == pytest.approx(25, abs=1.5)
    user, day, rows = visits(SyntheticSource(settings(**shape)))
    assert rows.max() == 50
    assert day[np.unique(user, return_index=True)[1]].max() == 29


def test_vectors_tell_the_taste_of_an_item_at_any_scale():
    def items(scale):
        return SyntheticSource(settings(items=400, factors=3, vector_scale=scale)).catalogue()[1]

    assert "taste_vector" not in items(0.0).column_names
    found = {scale: np.array(items(scale)["taste_vector"].to_pylist()) for scale in (0.1, 1.0, 10.0)}
    np.testing.assert_allclose(found[0.1] * 10, found[1.0], rtol=1e-12)
    np.testing.assert_allclose(found[10.0], found[1.0] * 10, rtol=1e-12)
    _, loadings = SyntheticSource(settings(items=400, factors=3)).true_items()
    # Signal and noise in the ratio of 1 to VECTOR_NOISE; a correlation over 1,200 numbers deviates by 0.03 at most.
    assert np.corrcoef(found[1.0].ravel(), loadings.ravel())[0, 1] == pytest.approx(1 / np.hypot(1, VECTOR_NOISE), abs=0.05)


def test_a_vector_is_what_a_declared_one_must_be():
    feature = FeatureConfig(
        entity="item", name="taste_vector", type="vector", width=2, encoder="limaml.events.synthetic", licence="Apache-2.0"
    )
    items = SyntheticSource(settings(items=5, factors=2, vector_scale=10.0)).catalogue()[1]
    typed = with_types(items, schema.tables((feature,)).delivered("item"))
    numbers, known = vector_values(typed["taste_vector"])
    assert numbers.shape == (5, 2)
    assert known.all()


def test_a_vector_without_factors_is_refused():
    with pytest.raises(
        ValueError, match=r"synthetic_vector_scale must be 0 where synthetic_factors is 0.*got 1; plant a factor"
    ):
        settings(factors=0, vector_scale=1.0)
