"""Embeddings of items in memory: each candidate is judged as a user's row is, and what cannot be read is the prior."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import telemetry
from serving.api import RankResponse
from serving.freshness import Lookup, StoredEmbedding, judge
from serving.held_embeddings import HeldEmbeddings
from serving.metrics import Metrics
from serving.ranking import respond

NOW = datetime(2026, 3, 1, 14, 59, 3, 7, tzinfo=UTC)
PRIOR = np.float32([0.5, -0.5, 0.25])
MAX_LAG_S = 3 * 86400.0

instants = st.datetimes(datetime(2026, 2, 20), datetime(2026, 3, 2), timezones=st.just(UTC))
stored = st.none() | st.builds(
    StoredEmbedding,
    vector=st.lists(st.sampled_from([1.0, -2.0, np.nan]), min_size=2, max_size=4).map(np.float32),
    model_version=st.sampled_from(["7", "8"]),
    as_of=instants,
    last_event_at=st.none() | instants,
)


def embeddings(rows, complete_through=None):
    """Of items i0, i1, …; a row that is no StoredEmbedding and not None could not be read."""
    catalogue = [f"i{at}" for at in range(len(rows))]
    known = {item: row for item, row in zip(catalogue, rows, strict=True) if row != "unread"}
    of_version = {"version": "7", "complete_through": complete_through, "prior_D": PRIOR}
    return HeldEmbeddings.of(catalogue, known, of_items=catalogue, **of_version)


def row(**changes):
    values = {"vector": np.float32([1, 2, 3]), "model_version": "7", "as_of": NOW - timedelta(days=1), "last_event_at": None}
    return StoredEmbedding(**values | changes)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(stored, min_size=1, max_size=6), complete_through=st.none() | instants, use_stale=st.booleans())
def test_every_candidate_is_judged_as_a_user_s_row_is(rows, complete_through, use_stale):
    found = embeddings(rows, complete_through).look_up(range(len(rows)), max_lag_s=MAX_LAG_S, use_stale=use_stale, now=NOW)
    each = [
        judge(
            one,
            version="7",
            dim=3,
            complete_through=complete_through,
            max_lag_s=MAX_LAG_S,
            use_stale=use_stale,
            now=NOW,
        )
        for one in rows
    ]
    assert [telemetry.LOOKUP_STATUSES[code] for code in found.status_R] == [one.status for one in each]
    for vector, one in zip(found.vector_RD, each, strict=True):
        np.testing.assert_array_equal(vector, PRIOR if one.vector is None else one.vector)
    assert found.num_prior == sum(one.vector is None for one in each)
    ages = [one.age_s for one in each if one.age_s is not None]
    silences = [one.inactivity_s for one in each if one.inactivity_s is not None]
    assert found.age_s == (max(ages) if ages else None)
    assert found.inactivity_s == (pytest.approx(max(silences), abs=1e-6) if silences else None)
    assert sum(found.counts.values()) == len(rows)


@settings(max_examples=60, deadline=None)
@given(one=stored, complete_through=st.none() | instants, use_stale=st.booleans())
def test_what_a_request_names_is_judged_as_a_user_s_row_is(one, complete_through, use_stale):
    of_now = {"max_lag_s": MAX_LAG_S, "use_stale": use_stale, "now": NOW}
    of_version = {"version": "7", "complete_through": complete_through}
    held = HeldEmbeddings.of(["north", "south"], {"north": None, "south": one}, prior_D=PRIOR, **of_version)
    found, wanted = held.look_up([3, 1], "south", **of_now), judge(one, dim=3, **of_version, **of_now)
    assert (found.status, found.age_s) == (wanted.status, wanted.age_s)
    assert found.inactivity_s == (None if wanted.inactivity_s is None else pytest.approx(wanted.inactivity_s, abs=1e-6))
    np.testing.assert_array_equal(found.vector, wanted.vector)
    each = held.look_up([3, 1], ["south", None], **of_now)
    assert [telemetry.LOOKUP_STATUSES[code] for code in each.status_R] == [wanted.status, "missing"]


def test_what_a_request_names_may_be_unknown_unread_or_nothing():
    of_kind = {"version": "7", "complete_through": None, "prior_D": PRIOR}
    of_now = {"max_lag_s": MAX_LAG_S, "use_stale": False, "now": NOW}
    held = HeldEmbeddings.of(["garbled", "north"], {"north": row()}, **of_kind)
    for said, status in (("north", "fresh"), ("garbled", "store_error"), ("never seen", "missing"), (None, "missing")):
        assert held.look_up([0], said, **of_now).status == status
    each = held.look_up([5, 6, 7], ["never seen", "north", None], **of_now)
    np.testing.assert_array_equal(each.vector_RD, [PRIOR, [1, 2, 3], PRIOR])
    assert (each.counts, each.num_prior) == ({"fresh": 1, "missing": 2}, 2)
    unread = HeldEmbeddings.of([], None, **of_kind)
    assert unread.look_up([0], "north", **of_now) == Lookup("store_error")


def test_items_share_what_they_have_in_common_and_some_have_nothing():
    of_kind = {"version": "7", "complete_through": None, "prior_D": PRIOR}
    held = HeldEmbeddings.of(["s1", "s2"], {"s1": row(), "s2": None}, of_items=["s2", "s1", None, "s1"], **of_kind)
    found = held.look_up([3, 2, 1, 0], max_lag_s=MAX_LAG_S, use_stale=False, now=NOW)
    np.testing.assert_array_equal(found.vector_RD, [[1, 2, 3], PRIOR, [1, 2, 3], PRIOR])
    assert found.counts == {"fresh": 2, "missing": 2}


def test_withheld_candidates_are_scored_with_the_prior_and_keep_what_else_is_wrong():
    rows = [row(), None, row(as_of=NOW - timedelta(days=9)), row(model_version="8")]
    found = embeddings(rows).look_up([3, 2, 1, 0, 0], max_lag_s=MAX_LAG_S, use_stale=True, now=NOW)
    withheld = found.withheld(PRIOR)
    statuses = ["version_mismatch", "stale", "missing", "withheld", "withheld"]
    assert [telemetry.LOOKUP_STATUSES[code] for code in withheld.status_R] == statuses
    np.testing.assert_array_equal(withheld.vector_RD, np.tile(PRIOR, (5, 1)))
    assert (withheld.num_prior, found.num_prior) == (5, 2)
    assert withheld.counts == {"stale": 1, "missing": 1, "version_mismatch": 1, "withheld": 2}
    assert (withheld.age_s, withheld.inactivity_s) == (found.age_s, found.inactivity_s)
    answer = RankResponse.model_validate_json(respond("7", list("abcde"), np.float32([1, 2, 3, 4, 5]), {"item": withheld}))
    assert (answer.embeddings["item"].prior, answer.embeddings["item"].statuses) == (5, withheld.counts)


def test_candidates_are_taken_by_their_number_and_the_memory_stays_as_it_is():
    known = embeddings([row(), None, row(vector=np.float32([4, 5, 6]), as_of=NOW - timedelta(days=9)), "unread"])
    for _ in range(2):
        found = known.look_up([3, 2, 0, 1], max_lag_s=MAX_LAG_S, use_stale=False, now=NOW)
        np.testing.assert_array_equal(found.vector_RD, [PRIOR, PRIOR, [1, 2, 3], PRIOR])
        assert found.counts == {"fresh": 1, "stale": 1, "missing": 1, "store_error": 1}
    assert found.num_prior == 3
    kept = known.look_up([2], max_lag_s=MAX_LAG_S, use_stale=True, now=NOW)
    np.testing.assert_array_equal(kept.vector_RD, [[4, 5, 6]])
    assert (kept.num_prior, kept.counts, kept.age_s) == (0, {"stale": 1}, 9 * 86400.0)


def test_the_answer_and_the_metrics_say_it_by_kind():
    from prometheus_client import CollectorRegistry

    found = embeddings([row(last_event_at=NOW - timedelta(days=2)), None]).look_up(
        [0, 1], max_lag_s=MAX_LAG_S, use_stale=False, now=NOW
    )
    lookups = {"user": Lookup("missing"), "item": found}
    answer = RankResponse.model_validate_json(respond("7", ["a", "b"], np.array([0.5, 0.25]), lookups))
    assert answer.embeddings["user"].fallback == "missing"
    said = answer.embeddings["item"]
    assert (said.statuses, said.prior) == ({"fresh": 1, "missing": 1}, 1)
    assert (said.age_s, said.inactivity_s) == (86400.0, 2 * 86400.0)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.start(["user", "item"])
    for kind, lookup in lookups.items():
        metrics.looked_up(kind, lookup)
    metrics.looked_up("item", found)
    metrics.flush()

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    assert value(telemetry.LOOKUPS_TOTAL, kind="item", status="fresh") == 2
    assert value(telemetry.LOOKUPS_TOTAL, kind="item", status="missing") == 2
    assert value(telemetry.LOOKUPS_TOTAL, kind="user", status="missing") == 1
    assert value(f"{telemetry.LAG_SECONDS}_count", kind="item") == 2
