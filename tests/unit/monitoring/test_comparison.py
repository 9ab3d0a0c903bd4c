"""What counts as a row, a missing one, a differing value and the largest difference."""

import math
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from limaml.monitoring.comparison import EXAMPLES, MAX_EXAMPLES, PRESENT, Tally, compare_features, compare_vector

AT = datetime(2026, 3, 1, tzinfo=UTC)
WHERE = {"view": "v", "entity": "u1", "compared_at": AT}


def features(logged, offline):
    """A tally of rows (events, rate, band, number of such rows) against (events, rate, band); `events` is never lacking."""
    names, tally = ("events", "rate", "band"), Tally()
    types = (pa.int64(), pa.float32(), pa.string())

    def table(rows):
        columns = list(zip(*rows, strict=True))
        values = {name: pa.array(columns[at], types[at]) for at, name in enumerate(names)}
        return pa.table(values | {PRESENT: values["events"].is_valid()})

    keys = {"entity": [f"u{at}" for at in range(len(logged))], "compared_at": [AT] * len(logged)}
    counted = table([row[:3] for row in logged])
    for name, values in (keys | {"rows": [row[3] for row in logged]}).items():
        counted = counted.append_column(name, pa.array(values))
    compare_features(tally, "v", counted, table(offline), names)
    return tally


def test_equal_rows_count_each_value_of_each_logged_row():
    tally = features([(1, 0.5, "a", 3), (2, 0.25, None, 1)], [(1, 0.5, "a"), (2, 0.25, None)])
    assert (tally.rows, tally.values, tally.mismatched, tally.missing) == (4, 12, 0, 0)
    assert (tally.mismatch_ratio, tally.missing_ratio, tally.max_difference) == (0.0, 0.0, 0.0)


def test_differing_values_weigh_as_often_as_they_were_logged():
    tally = features([(1, 0.5, "a", 3), (5, 0.25, None, 1)], [(1, 0.75, "a"), (2, 0.25, "b")])
    assert (tally.values, tally.mismatched, tally.max_difference) == (12, 5, 3.0)
    assert [(one["entity"], one["feature"], one["difference"], one["rows"]) for one in tally.examples] == [
        ("u1", "events", 3.0, 1),
        ("u0", "rate", 0.25, 3),
        ("u1", "band", None, 1),
    ]
    assert pa.Table.from_pylist(tally.examples, EXAMPLES).num_rows == 3


def test_a_row_that_only_one_side_has():
    lost = features([(None, None, None, 2)], [(1, 0.5, "a")])
    assert (lost.rows, lost.values, lost.mismatched, lost.missing) == (2, 6, 6, 0)
    unknown = features([(1, 0.5, "a", 2)], [(None, None, None)])
    assert (unknown.rows, unknown.values, unknown.missing, unknown.missing_ratio) == (2, 0, 2, 1.0)
    neither = features([(None, None, None, 2)], [(None, None, None)])
    assert (neither.rows, neither.values, neither.missing) == (2, 0, 0)
    assert math.isnan(neither.mismatch_ratio)
    assert neither.row("v")["mismatch_ratio"] is None


def vector(*values):
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("logged", "offline", "expected"),
    [
        (vector(1, 2), [vector(1, 2)], (2, 0, 0, 0.0)),
        (vector(1, 2), [vector(1, 4), vector(1, 2)], (2, 0, 0, 0.0)),
        (vector(1, 2), [vector(1, 4)], (2, 1, 0, 2.0)),
        (vector(1, math.nan), [vector(1, 4)], (2, 1, 0, math.inf)),
        (vector(1, 2, 3), [vector(1, 2)], (2, 2, 0, 0.0)),
        (None, [vector(1, 2)], (2, 2, 0, 0.0)),
        (vector(1, 2), [], (0, 0, 1, 0.0)),
        (None, [], (0, 0, 0, 0.0)),
    ],
    ids=["equal", "either", "one differs", "not a number", "width", "lost", "unknown", "neither"],
)
def test_an_embedding(logged, offline, expected):
    tally = Tally()
    compare_vector(tally, WHERE, logged, offline)
    assert tally.rows == 1
    assert (tally.values, tally.mismatched, tally.missing, tally.max_difference) == expected
    assert pa.Table.from_pylist(tally.examples, EXAMPLES).num_rows == (expected[1] + expected[2] > 0)


def test_examples_are_bounded_and_counts_are_not():
    many = MAX_EXAMPLES + 10
    tally = features([(1, 0.5, "a", 1)] * many, [(2, 0.5, "a")] * many)
    assert (tally.mismatched, len(tally.examples)) == (many, MAX_EXAMPLES)
