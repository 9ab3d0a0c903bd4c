"""Sampled rows: what is drawn, how often, and that nothing but event, seed and known items decides it."""

from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import schema
from limaml.config import NegativesConfig
from limaml.events.negatives import with_negatives

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def events(pairs):
    """One positive event of each (user, item)."""
    columns = {
        "event_id": [f"e{n}" for n in range(len(pairs))],
        "user_id": [f"u{user}" for user, _ in pairs],
        "item_id": [f"i{item:03d}" for _, item in pairs],
        "timestamp": [NOON] * len(pairs),
        "label": [1] * len(pairs),
    }
    return pa.table(columns, schema=schema.EVENTS.arrow)


def known(num_items, rows=None):
    return pa.table(
        {"item_id": [f"i{n:03d}" for n in range(num_items)], "num_rows": pa.array(rows or [1] * num_items, pa.int64())}
    )


def sampled(pairs, items, **cfg):
    return with_negatives(events(pairs), items, NegativesConfig(**cfg)).slice(len(pairs)).to_pylist()


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 11)), min_size=1, max_size=40)


@given(pairs=pairs, per_positive=st.integers(1, 13), by=st.sampled_from(["uniform", "popularity"]), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_what_is_drawn_was_not_taken_and_the_order_of_rows_does_not_matter(pairs, per_positive, by, seed):
    items = known(12, [n + 1 for n in range(12)])
    cfg = NegativesConfig(per_positive=per_positive, by=by, seed=seed)
    table = with_negatives(events(pairs), items, cfg)
    backwards = with_negatives(events(pairs).take(pa.array(range(len(pairs) - 1, -1, -1))), items, cfg)
    order = [("event_id", "ascending")]
    assert table.sort_by(order).equals(backwards.sort_by(order))
    assert len(set(table["event_id"].to_pylist())) == table.num_rows
    rows = table.slice(len(pairs)).to_pylist()
    taken = {(f"u{user}", f"i{item:03d}") for user, item in pairs}
    assert not taken & {(row["user_id"], row["item_id"]) for row in rows}
    assert {row["label"] for row in rows} <= {0}
    per_user = Counter(user for user, _ in taken)
    want = sum(min(per_positive, 12 - per_user[f"u{user}"]) for user, _ in pairs)
    assert len(rows) == want


def test_an_event_draws_the_same_beside_other_events():
    alone = sampled([(0, 3)], known(100))
    beside = sampled([(0, 3), (1, 4), (1, 5)], known(100))
    assert [row for row in beside if row["user_id"] == "u0"] == alone


def test_another_seed_draws_others():
    assert sampled([(0, 3)], known(100), seed=1) != sampled([(0, 3)], known(100), seed=2)


@pytest.mark.parametrize("taken", [1, 15])
def test_uniform_draws_all_items_alike_and_weighs_them(taken):
    # 15 of 20 taken: most events end with a look at all items.
    rows = [row for n in range(400) for row in _of_event(n, [(n, item) for item in range(taken)], known(20), per_positive=4)]
    counts = Counter(row["item_id"] for row in rows)
    assert len(counts) == 20 - taken
    expected = len(rows) / (20 - taken)
    # Chi-square with 20 - taken - 1 degrees of freedom; its 99.9 % point is at most 42.3 (18 of them).
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 42.3
    assert {row["sampling_weight"] for row in rows} == {(20 - taken) / 4}


def _of_event(number, pairs, items, **cfg):
    """What the first of a user's events draws."""
    table = events(pairs)
    table = table.set_column(0, "event_id", pa.array([f"n{number}-{n}" for n in range(table.num_rows)]))
    return with_negatives(table, items, NegativesConfig(**cfg)).slice(len(pairs)).to_pylist()[: cfg["per_positive"]]


def test_popularity_draws_by_rows_and_weighs_against_it():
    shares = np.array([1, 2, 4, 8, 16, 32], float)
    rows = [
        row
        for n in range(3000)
        for row in _of_event(n, [(n, 0)], known(6, [1, 2, 4, 8, 16, 32]), per_positive=1, by="popularity")
    ]
    counts = Counter(row["item_id"] for row in rows)
    free = shares[1:] / shares[1:].sum()
    for item, share in enumerate(free, start=1):
        # Four standard deviations of a binomial share.
        assert abs(counts[f"i{item:03d}"] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    weights = {row["item_id"]: row["sampling_weight"] for row in rows}
    assert weights == pytest.approx({f"i{item:03d}": 1 / share for item, share in enumerate(free, start=1)})
    # Weighed rows stand for the five items that each user did not take.
    assert sum(row["sampling_weight"] for row in rows) / 3000 == pytest.approx(5, rel=0.1)


def test_weights_undo_what_sampling_does_to_the_logit():
    # 30 users took one item each of 1,000: the odds of a pair are 30 to 29,970, and of a sampled row 30 to 120.
    rows = sampled([(user, user) for user in range(30)], known(1000))
    odds = 30 / len(rows)
    assert np.log(odds) - np.log(rows[0]["sampling_weight"]) == pytest.approx(np.log(30 / (30 * 999)))


def test_other_columns_of_a_row_that_did_not_happen_are_its_moments():
    table = events([(0, 1)]).append_column("device", pa.array(["phone"]))
    rows = with_negatives(table, known(10), NegativesConfig(per_positive=2)).to_pylist()
    assert [row["device"] for row in rows] == ["phone"] * 3
    assert rows[0]["sampling_weight"] == 1.0
    assert {row["timestamp"] for row in rows} == {NOON}
