"""Gates of features and embeddings, and what a result says; gates of days are in tests/contracts/ingestion."""

from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import SourceConfig
from limaml.errors import GateError
from limaml.events import gates
from limaml.events.expectations import Finding, GateResult
from limaml.events.gate_report import report_html
from tests import declared

STAMP = datetime(2026, 1, 2, tzinfo=UTC)


def features(**changes):
    row = {
        "user_id": "u1",
        "event_timestamp": STAMP,
        "age_band": None,
        "gender": "F",
        "occupation": "artist",
        "user_events": 3,
        "user_positive_rate": 0.5,
    }
    return pa.Table.from_pylist([row, row | {"user_id": "u2", "age_band": "18_24"} | changes], declared.USER_FEATURES.arrow)


def replaced(table, column, values):
    return table.set_column(table.schema.get_field_index(column), column, values)


@pytest.mark.parametrize(
    ("table", "failed"),
    [
        (features(), ()),
        (features().slice(0, 0), ()),
        (features(age_band="ancient"), ("expect_column_values_to_be_in_set(age_band)",)),
        (features(user_events=-1), ("expect_column_values_to_be_between(user_events)",)),
        (features(user_positive_rate=1.5), ("expect_column_values_to_be_between(user_positive_rate)",)),
        (features(user_id="u1"), ("expect_compound_columns_to_be_unique",)),
        (features().drop_columns("gender"), ("expect_table_columns_to_match_set",)),
        (
            replaced(features(), "user_positive_rate", pa.array([0.5, None], pa.float32())),
            ("expect_column_values_to_not_be_null(user_positive_rate)",),
        ),
        (
            replaced(features(), "user_positive_rate", pa.array([0.5, float("nan")], pa.float32())),
            ("expect_column_values_to_not_be_null(user_positive_rate)",),
        ),
        (replaced(features(), "user_events", pa.array([1.0, 2.0])), ("expect_column_values_to_be_of_type(user_events)",)),
    ],
)
def test_features(table, failed):
    delivered = gates.check_features(table, declared.USER_FEATURES, "snapshots")
    assert delivered.failed == failed
    own = gates.check_snapshots(table, declared.USER_FEATURES, "snapshots")
    assert plain(own) == plain(delivered), "our own rules find what Great Expectations finds"


def plain(result):
    """Findings without examples, which are Great Expectations' choice of rows."""
    return [(f.expectation, f.critical, f.success, f.rule, f.unexpected, bool(f.examples)) for f in result.findings]


def test_own_rules_name_the_values():
    wrong = features(user_events=-1, age_band="ancient")
    assert gates.check_snapshots(wrong, declared.USER_FEATURES, "s").explain() == (
        gates.check_features(wrong, declared.USER_FEATURES, "s").explain()
    )
    (twice,) = [f for f in gates.check_snapshots(features(user_id="u1"), declared.USER_FEATURES, "s").findings if not f.success]
    assert twice.examples == (f"user_id u1, event_timestamp {STAMP}",)


def test_item_features_with_lists_and_missing_years():
    rows = [
        {"item_id": "a", "event_timestamp": STAMP, "year": None, "genres": [], "item_events": 0, "item_positive_rate": 0.5},
        {
            "item_id": "b",
            "event_timestamp": STAMP,
            "year": 1999,
            "genres": ["x", "y"],
            "item_events": 0,
            "item_positive_rate": 0.5,
        },
    ]
    table = pa.Table.from_pylist(rows, declared.ITEM_FEATURES.arrow)
    assert gates.check_features(table, declared.ITEM_FEATURES, "snapshots").failed == ()
    wrong = replaced(table, "genres", pa.array(["x", "x y"]))
    assert gates.check_features(wrong, declared.ITEM_FEATURES, "s").failed == ("expect_column_values_to_be_of_type(genres)",)


def embeddings(vectors=((3.0, 4.0), (0.6, 0.8)), **columns):
    values = {
        "user_id": ["u1", "u2"],
        "kind": ["user"] * 2,
        "embedding": [list(vector) for vector in vectors],
        "model_version": ["7"] * 2,
        "support_size": [0, 5],
        "as_of": [STAMP] * 2,
        "last_event_at": [None, STAMP],
    }
    return pa.table(values | columns, schema=schema.embeddings("user_id", len(vectors[0])).arrow)


def check(*pieces, planned=("u1", "u2"), dim=2):
    return gates.check_embeddings(
        pieces,
        entity_column="user_id",
        kind="user",
        dim=dim,
        planned=pa.array(sorted(planned), pa.string()),
        version="7",
        min_norm=0.5,
        max_norm=10.0,
    )


@pytest.mark.parametrize(
    ("table", "failed"),
    [
        (embeddings(), ()),
        (embeddings(vectors=((np.nan, 4.0), (1.0, 1.0))), ("expect_column_values_to_be_in_set(embedding_nonfinite)",)),
        (embeddings(vectors=((np.inf, 4.0), (1.0, 1.0))), ("expect_column_values_to_be_in_set(embedding_nonfinite)",)),
        (
            embeddings(vectors=((3.0, 4.0, 0.0), (1.0, 1.0, 0.0))),
            ("expect_column_values_to_be_of_type(embedding)", "expect_column_values_to_be_in_set(embedding_width)"),
        ),
        (embeddings(vectors=((0.0, 0.0), (1.0, 1.0))), ("expect_column_values_to_be_between(embedding_norm)",)),
        (embeddings(vectors=((30.0, 40.0), (1.0, 1.0))), ("expect_column_values_to_be_between(embedding_norm)",)),
        (embeddings(model_version=["7", "6"]), ("expect_column_values_to_be_in_set(model_version)",)),
        (embeddings(kind=["user", "item"]), ("expect_column_values_to_be_in_set(kind)",)),
        (embeddings(support_size=[0, -1]), ("expect_column_values_to_be_between(support_size)",)),
        (
            embeddings(user_id=["u1", "u1"]),
            ("expect_column_values_to_be_unique(user_id)", "expect_column_values_to_be_null(entity_not_ascending)"),
        ),
        (embeddings(user_id=["u1", "u9"]), ("expect_column_values_to_be_null(entity_not_planned)",)),
        (embeddings().slice(0, 1), ("expect_table_row_count_to_equal",)),
        (embeddings().drop_columns("as_of"), ("expect_table_columns_to_match_set",)),
        (embeddings().drop_columns("embedding"), ("expect_table_columns_to_match_set",)),
    ],
)
def test_embeddings(table, failed):
    assert check(table).failed == failed


def test_partition_without_planned_entities_is_empty_and_passes():
    assert check(embeddings().slice(0, 0), planned=()).success


def test_a_partition_in_pieces_is_judged_as_one():
    table = embeddings(vectors=((0.1, 0.0), (30.0, 40.0)))
    whole, pieces = check(table), check(table.slice(0, 1), table.slice(1))
    assert pieces == whole
    (failed,) = [finding for finding in pieces.findings if not finding.success]
    assert (failed.unexpected, failed.examples, pieces.rows) == (2, ("0.10000000149011612", "50.0"), 2)


def test_an_entity_in_two_pieces_fails():
    assert check(embeddings(), embeddings(), planned=("u1", "u2", "u3", "u4")).failed == (
        "expect_column_values_to_be_null(entity_not_ascending)",
    )


def test_an_entity_that_does_not_belong_is_named():
    message = check(embeddings(user_id=["u2", "u1 "])).explain()
    assert "entity_not_planned): user_id must be one of the 2 planned [1 rows, e.g. 'u1 ']" in message
    assert "entity_not_ascending): user_id must be greater than the one before it [1 rows, e.g. 'u1 ']" in message


def items(**columns):
    values = {
        "item_id": ["a", "b", "c"],
        "title": ["A", "B", "C"],
        "year": [None, 1999, 2000],
        "genres": [[], ["x"], ["x", "y"]],
    }
    return pa.table(values | columns, schema=declared.ITEMS.arrow)


def test_a_catalogue_must_know_somebody():
    assert gates.check_catalogue(items(), declared.ITEMS).success
    result = gates.check_catalogue(items().slice(0, 0), declared.ITEMS)
    assert result.failed == ("expect_table_row_count_to_be_between",)
    assert "min_value 1 [e.g. 0]" in result.explain()


def test_a_null_inside_a_list_is_refused_by_its_row():
    result = gates.check_catalogue(items(genres=[["x", None], [None], ["y"]]), declared.ITEMS)
    assert result.failed == ("list_values_to_not_be_null(genres)",)
    assert "no null inside a list [2 rows, e.g. item_id a, item_id b]" in result.explain()


def test_sets_of_categories_hold_allowed_ones_only():
    genres = next(feature for feature in declared.FEATURES if feature.name == "genres").model_copy(
        update={"values": ("x", "y")}
    )
    table = schema.tables((genres,)).catalogue("item")
    rows = pa.table({"item_id": ["a", "b", "c"], "genres": [["x"], None, ["y", "z", "x "]]}, schema=table.arrow)
    result = gates.check_catalogue(rows, table)
    assert result.failed == ("list_values_to_be_in_set(genres)",)
    assert "value_set ['x', 'y'] [2 rows, e.g. z, 'x ']" in result.explain()
    assert gates.check_catalogue(rows.slice(0, 2), table).success


ODD = {
    "dictionary": pa.array(["u1", "u2"]).dictionary_encode(),
    "binary": pa.array([b"u1", b"u2"]),
    "list": pa.array([["u1"], ["u2"]]),
    "null": pa.nulls(2),
    "string_view": pa.array(["u1", "u2"]).cast(pa.string_view()),
    "decimal": pa.array([1, 2]).cast(pa.decimal128(20, 0)),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_column_of_any_other_type_is_refused_whatever_pandas_makes_of_it(kind):
    result = gates.check_features(replaced(features(), "user_id", ODD[kind]), declared.USER_FEATURES, "snapshots")
    assert "expect_column_values_to_be_of_type(user_id)" in result.failed
    first = {"binary": ": row 1: b'u1'", "list": ": row 1: ['u1']", "decimal": ": row 1: 1"}.get(kind, "")
    assert f"type_ string [e.g. {ODD[kind].type}{first}]" in result.explain()


def test_require_names_rule_value_and_remedy():
    gates.require(check(embeddings()), "adapt again")
    with pytest.raises(GateError) as caught:
        gates.require(check(embeddings(model_version=["7", "6"])), "adapt again")
    assert str(caught.value) == (
        "gate of embeddings of kind user, version 7 failed: expect_column_values_to_be_in_set(model_version): "
        "value_set ['7'] [1 rows, e.g. 6]; adapt again"
    )
    assert caught.value.failed == ("expect_column_values_to_be_in_set(model_version)",)


def test_warnings_do_not_fail_a_gate_and_the_report_escapes_what_it_shows():
    finding = Finding("expect_x(label)", critical=False, success=False, rule="min 1", unexpected=2, examples=("<b>&",))
    result = GateResult("events of 2026-01-01", 3, (finding, Finding("expect_y", True, True, "max 2")))
    assert (result.success, result.warnings, result.failed) == (True, ("expect_x(label)",), ())
    page = report_html("Title", "note", [result])
    assert "&lt;b&gt;&amp;" in page
    assert "expect_y" in page
    assert "expect_y" not in report_html("Title", "note", [result], full=False)


def test_a_label_rate_is_judged_from_as_many_rows_as_the_setting_says():
    source = SourceConfig(kind="synthetic", min_rows_for_label_rate=3)
    for labels, rate in (([1, 0, 1], 2 / 3), ([1, 0], None)):
        table = pa.table({"label": pa.array(labels, pa.int8())})
        assert gates._volume(table, (), source)["label_rate"] == rate


DAY = date(2026, 5, 1)


def check_day(known_users=("1", "u2"), source=None, **columns):
    values = {
        "event_id": [f"e{n}" for n in range(4)],
        "user_id": ["u2"] * 4,
        "item_id": ["i"] * 4,
        "timestamp": [schema.day_start(DAY)] * 4,
        "label": [0, 1, 0, 1],
    }
    results = gates.check_days(
        {DAY: pa.table(values | columns, schema=schema.EVENTS.arrow)},
        known_users=pa.array(known_users),
        known_items=pa.array(["i"]),
        recent_rows={},
        source=source or SourceConfig(kind="synthetic", min_rows_for_label_rate=4),
        strict_volume={DAY},
    )
    return results[DAY]


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [("01", "'01' is '1'"), (" 1", "' 1' is '1'"), ("U2", "'U2' is 'u2'")],
)
def test_an_unknown_id_that_is_another_one_written_otherwise_is_told_so(unknown, hint):
    result = check_day(user_id=["u2", unknown, "u2", "u2"])
    assert result.failed == ("expect_column_values_to_be_null(user_id_not_in_catalogue)",)
    assert f"one of the 2 in the catalogue, where {hint}: write ids alike in both" in result.explain()
    assert "where" not in check_day(user_id=["u2", "12", "u2", "u2"]).explain()


def test_an_id_longer_than_a_request_may_hold_is_refused_with_row_and_length():
    longest = "x" * schema.MAX_ID_LENGTH
    assert check_day(known_users=("u2", longest), user_id=["u2", longest, "u2", "u2"]).success
    result = check_day(known_users=("u2", "y" * 300), user_id=["u2", "u2", "y" * 300, "u2"])
    assert result.failed == ("expect_column_value_lengths_to_be_between(user_id)",)
    assert "user_id must have 1 to 256 characters" in result.explain()
    assert f"[1 rows, e.g. event_id e2: '{'y' * 80}'… (300 characters)]" in result.explain()
    catalogue = gates.check_catalogue(items(item_id=["a", "", "z" * 257]), declared.ITEMS)
    assert catalogue.failed == ("expect_column_value_lengths_to_be_between(item_id)",)
    assert f"[2 rows, e.g. row 2: '', row 3: '{'z' * 80}'… (257 characters)]" in catalogue.explain()


@pytest.mark.parametrize("label", [0, 1])
def test_a_day_of_one_label_is_a_warning(label):
    warning = "expect_column_values_to_be_between(distinct_labels)"
    result = check_day(label=[label] * 4)
    assert (result.success, result.warnings) == (True, (warning,))
    assert check_day().warnings == ()
    few = SourceConfig(kind="synthetic", min_rows_for_label_rate=5)
    assert check_day(label=[label] * 4, source=few).warnings == ()
