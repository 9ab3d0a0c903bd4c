"""Which embedding is used: contracts 3 (two ages), 4 (another version counts as missing) and 6 (the prior and why)."""

from datetime import UTC, datetime, timedelta

import pytest

from serving.freshness import StoredEmbedding, judge

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
DAY_S = 86400.0


def row(*, as_of=NOW - timedelta(days=1), version="4", vector=(0.5, -1.0), last_event_at=NOW - timedelta(days=300)):
    return StoredEmbedding(vector, version, as_of, last_event_at)


def judged(stored, *, complete_through=None, max_lag_s=3 * DAY_S, use_stale=False):
    return judge(
        stored,
        version="4",
        dim=2,
        complete_through=complete_through,
        max_lag_s=max_lag_s,
        use_stale=use_stale,
        now=NOW,
    )


def test_a_recent_row_is_used():
    lookup = judged(row())
    assert (lookup.status, lookup.vector, lookup.age_s, lookup.inactivity_s) == ("fresh", (0.5, -1.0), DAY_S, 300 * DAY_S)


def test_a_silent_users_old_row_is_exact_while_publishing_goes_on():
    old = row(as_of=NOW - timedelta(days=200))
    assert judged(old).status == "stale"
    lookup = judged(old, complete_through=NOW - timedelta(hours=12))
    assert (lookup.status, lookup.age_s) == ("fresh", DAY_S / 2)


def test_the_lag_counts_from_whichever_is_later():
    assert judged(row(as_of=NOW - timedelta(hours=6)), complete_through=NOW - timedelta(days=2)).age_s == DAY_S / 4


def test_an_instant_in_the_future_is_no_lag():
    assert judged(row(as_of=NOW + timedelta(hours=5))).age_s == 0.0


@pytest.mark.parametrize(("lag_s", "status"), [(3 * DAY_S, "fresh"), (3 * DAY_S + 1, "stale")])
def test_the_limit_itself_is_still_fresh(lag_s, status):
    lookup = judged(row(as_of=NOW - timedelta(seconds=lag_s)))
    assert (lookup.status, lookup.age_s, lookup.vector is None) == (status, lag_s, status == "stale")


def test_a_stale_embedding_is_used_where_the_configuration_says_so():
    lookup = judged(row(as_of=NOW - timedelta(days=4)), use_stale=True)
    assert (lookup.status, lookup.vector, lookup.age_s) == ("stale", (0.5, -1.0), 4 * DAY_S)
    assert judged(row(as_of=NOW - timedelta(days=4), version="3"), use_stale=True).vector is None


def test_without_a_row_there_is_no_age():
    lookup = judged(None, complete_through=NOW)
    assert (lookup.status, lookup.vector, lookup.age_s, lookup.inactivity_s) == ("missing", None, None, None)


def test_a_row_of_another_version_counts_as_missing():
    lookup = judged(row(version="3"))
    assert (lookup.status, lookup.vector, lookup.age_s) == ("version_mismatch", None, None)


@pytest.mark.parametrize("vector", [(0.5,), (0.5, -1.0, 2.0), (0.5, float("nan")), (float("inf"), 0.0), ()])
def test_a_vector_the_model_cannot_read_is_the_stores_fault(vector):
    lookup = judged(row(vector=vector))
    assert (lookup.status, lookup.vector) == ("store_error", None)
