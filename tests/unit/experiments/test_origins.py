"""Origins train, choose and judge on users and rows that never meet."""

import pytest

from experiments.origins import rolling_origins
from limaml.errors import DataError


@pytest.fixture(scope="module")
def logged(request):
    return request.getfixturevalue("make_planted")(num_users=90, rows_per_user=20)


def stamps(rows):
    return rows["timestamp"].cast("int64").to_numpy()


def test_no_validation_user_is_judged_and_no_row_is_judged_twice(logged):
    origins = rolling_origins(logged)
    assert len(origins) == 3
    validating = {user for origin in origins for user in origin.validation_users}
    judged = []
    for origin in origins:
        rows = origin.test_rows(logged)
        assert not set(rows["user_id"].to_pylist()) & validating
        late = rows.filter(stamps(rows) >= origin.validation_end_us)
        judged += late["event_id"].to_pylist()
        assert set(late["user_id"].to_pylist()) <= {*origin.returning_users, *origin.held_out_users}
    assert len(judged) == len(set(judged)) > 0
    tested = [set(origin.held_out_users) for origin in origins]
    assert not tested[0] & tested[1]
    assert not tested[1] & tested[2]
    assert not tested[0] & tested[2]


def test_training_sees_nothing_from_the_validation_users_arrival_on(logged):
    for origin in rolling_origins(logged):
        arrivals = [
            stamps(logged.filter([user == one for user in logged["user_id"].to_pylist()])).min()
            for one in (origin.validation_users[0], origin.held_out_users[0])
        ]
        assert origin.train_end_us == arrivals[0]
        assert origin.validation_end_us == arrivals[1]
        assert stamps(origin.train_rows(logged)).max() < origin.train_end_us
        assert stamps(origin.validation_rows(logged)).max() < origin.validation_end_us
        assert not set(origin.train_users) & {*origin.validation_users, *origin.held_out_users}


def test_too_few_users_are_refused(make_planted):
    with pytest.raises(DataError, match="rolling origins need users in each of 7 blocks, got 8 users"):
        rolling_origins(make_planted(num_users=8, rows_per_user=4))
