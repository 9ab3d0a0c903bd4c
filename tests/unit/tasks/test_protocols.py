"""The two protocols on hand-made histories: no query row in a support, nothing as old as it, the same query for all k."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from limaml.features.encoder import Encoder
from limaml.tasks.protocols import as_served, days_seen, first_k, query_rows
from limaml.tasks.sampling import MICROSECONDS_PER_DAY, TaskRows

KS = (0, 2, 5, 10)


@pytest.fixture
def rows(planted_logged, small_config):
    cfg = small_config()
    return TaskRows.from_logged(planted_logged, Encoder.fit(planted_logged, cfg), cfg.task_kind)


def test_first_k_supports_are_the_first_rows_and_all_k_share_their_query(rows):
    tasks = first_k(rows, rows.entities, KS, min_query_rows=3, support_rows=64)
    assert len(tasks[0]) > 20
    for k in KS:
        assert [spec.entity for spec in tasks[k]] == [spec.entity for spec in tasks[0]]
        for spec, other in zip(tasks[k], tasks[0], strict=True):
            assert spec.support_start == rows.offsets[spec.entity]
            assert spec.support_size == k
            np.testing.assert_array_equal(spec.query, other.query)
            assert len(spec.query) >= 3
            assert spec.query[-1] == rows.offsets[spec.entity + 1] - 1
            if k:
                newest = rows.timestamp_us[spec.support_start : spec.support_stop].max()
                assert newest < rows.timestamp_us[spec.query].min()


def test_rows_of_the_last_support_rows_own_second_are_in_no_query(rows):
    # A user whose row 10 shares its second with row 9: the query must begin later.
    shared = [
        entity
        for entity in range(rows.num_entities)
        if rows.timestamp_us[rows.offsets[entity] + 9] == rows.timestamp_us[rows.offsets[entity] + 10]
    ]
    assert shared
    tasks = {spec.entity: spec for spec in first_k(rows, rows.entities, KS, min_query_rows=1, support_rows=64)[10]}
    for entity in shared:
        assert tasks[entity].query[0] > rows.offsets[entity] + 10


def test_users_with_too_few_query_rows_and_users_not_asked_for_are_left_out(rows):
    lengths = np.diff(rows.offsets)
    assert first_k(rows, rows.entities, KS, min_query_rows=int(lengths.max()), support_rows=64)[0] == []
    chosen = rows.entities[3]
    tasks = first_k(rows, [chosen, "nobody"], KS, min_query_rows=1, support_rows=64)
    assert [rows.entities[spec.entity] for spec in tasks[5]] == [chosen]


def test_as_many_query_rows_as_are_asked_for_are_enough(rows):
    for k in (0, 10):
        [spec] = first_k(rows, rows.entities[:1], (k,), min_query_rows=1, support_rows=64)[k]
        for least, count in ((len(spec.query), 1), (len(spec.query) + 1, 0)):
            assert len(first_k(rows, rows.entities[:1], (k,), min_query_rows=least, support_rows=64)[k]) == count
    [spec] = first_k(rows, rows.entities[:1], (0,), min_query_rows=1, support_rows=64)[0]
    assert len(spec.query) == rows.offsets[1] - rows.offsets[0], "without support rows every row is asked for"


def test_a_support_is_never_longer_than_support_rows_and_keeps_the_latest(rows):
    spec = first_k(rows, rows.entities, (10,), min_query_rows=1, support_rows=4)[10][0]
    assert spec.support_size == 4
    assert spec.support_stop == rows.offsets[spec.entity] + 10


def test_as_served_covers_every_later_row_once_with_supports_before_its_day(rows, planted_logged):
    cut = int(np.quantile(rows.timestamp_us, 0.6))
    specs = as_served(rows, from_us=cut, support_rows=12)
    covered = np.concatenate([spec.query for spec in specs])
    np.testing.assert_array_equal(np.sort(covered), np.flatnonzero(rows.timestamp_us >= cut))
    for spec in specs:
        days = rows.timestamp_us[spec.query] // MICROSECONDS_PER_DAY
        assert len(set(days)) == 1
        day_start = int(days[0]) * MICROSECONDS_PER_DAY
        assert spec.as_of_us == day_start
        before = np.flatnonzero(rows.timestamp_us[rows.offsets[spec.entity] : rows.offsets[spec.entity + 1]] < day_start)
        assert spec.support_size == min(len(before), 12)
        assert spec.support_stop == rows.offsets[spec.entity] + len(before)
    assert {spec.support_size for spec in specs} >= {0, 12}
    assert len({(s.entity, s.as_of_us) for s in specs}) == len(specs)


def test_days_seen_counts_the_days_with_rows_before_the_task(rows):
    """Beyond the support's limit, too: a count over all of the user's earlier rows."""
    specs = as_served(rows, from_us=int(np.quantile(rows.timestamp_us, 0.4)), support_rows=3)
    found = days_seen(rows, specs)
    expected = []
    for spec in specs:
        mine = rows.timestamp_us[rows.offsets[spec.entity] : rows.offsets[spec.entity + 1]]
        expected.append(len({int(at) // MICROSECONDS_PER_DAY for at in mine if at < spec.as_of_us}))
    assert found.tolist() == expected
    assert {0, 1, 5} <= set(expected)
    assert days_seen(rows, []).tolist() == []


def test_a_day_that_ends_one_user_and_begins_the_next_counts_for_both(rows):
    """Ten rows a day; each user's first day is the last one of the user before."""
    place = np.arange(len(rows.timestamp_us)) - np.repeat(rows.offsets[:-1], np.diff(rows.offsets))
    users = np.repeat(np.arange(rows.num_entities), np.diff(rows.offsets))
    days = replace(rows, timestamp_us=(2 * users + place // 10) * MICROSECONDS_PER_DAY)
    specs = as_served(days, from_us=0, support_rows=12)
    assert days_seen(days, specs).tolist() == [0, 1, 2] * rows.num_entities


def test_as_served_of_named_users_only(rows):
    specs = as_served(rows, from_us=0, support_rows=12, users=rows.entities[:2])
    assert {spec.entity for spec in specs} == {0, 1}


def test_query_rows_number_users_and_carry_their_support_sizes(rows):
    specs = as_served(rows, from_us=0, support_rows=12, users=rows.entities[4:7])
    queries = query_rows(rows, specs)
    assert queries.num_users == 3
    assert len(queries) == sum(len(spec.query) for spec in specs)
    at = 0
    for spec in specs:
        stop = at + len(spec.query)
        assert set(queries.users[at:stop]) == {spec.entity - 4}
        assert set(queries.support_sizes[at:stop]) == {spec.support_size}
        np.testing.assert_array_equal(queries.labels[at:stop], rows.label[spec.query])
        at = stop
    assert len(query_rows(rows, [])) == 0


def test_protocols_do_not_depend_on_later_rows(rows, planted_logged, small_config):
    """Cutting the newest day off leaves the supports of all earlier tasks as they were."""
    cfg = small_config()
    newest = planted_logged["timestamp"].to_pylist()
    end = max(newest).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=3)
    earlier = planted_logged.filter([stamp < end for stamp in newest])
    cut = TaskRows.from_logged(earlier, Encoder.fit(earlier, cfg), cfg.task_kind)

    def supports(of: TaskRows) -> dict[tuple[str, int], list[int]]:
        specs = as_served(of, from_us=0, support_rows=12)
        return {(of.entities[s.entity], s.as_of_us): of.timestamp_us[s.support_start : s.support_stop].tolist() for s in specs}

    all_supports = supports(rows)
    for key, stamps in supports(cut).items():
        assert all_supports[key] == stamps
