"""Every kind of bad day: its gate names what failed, with rule and value, and nothing is written downstream."""

import re
from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.errors import ConfigError, DataError, GateError
from limaml.events import ingest
from limaml.events.casting import with_types
from tests import declared

DOWNSTREAM = ("events", "events_superseded", "snapshots", "logged", "catalogue", "catalogue_history")


def replaced(table, column, values):
    return table.set_column(table.schema.get_field_index(column), column, values)


def first_row(table, column, value):
    """The column with its first value replaced, in the column's own type."""
    values = [value, *table[column].to_pylist()[1:]]
    return replaced(table, column, pa.array(values, table.schema.field(column).type))


def shifted(table, **delta):
    """The first row's timestamp moved."""
    return first_row(table, "timestamp", table["timestamp"][0].as_py() + timedelta(**delta))


def in_zone(table, zone):
    return replaced(table, "timestamp", table["timestamp"].cast(pa.timestamp("us", tz=zone)))


SPOILED = {
    "missing column": (
        lambda t: t.drop_columns("item_id"),
        "expect_table_columns_to_match_set",
        r"column_set \['event_id', 'user_id', 'item_id', 'timestamp', 'label'\].*e\.g\. event_id, label, timestamp, user_id",
    ),
    "wrong type": (
        lambda t: replaced(t, "label", t["label"].cast(pa.string())),
        "expect_column_values_to_be_of_type(label)",
        r"type_ int8 \[e\.g\. string: event_id synthetic-\d+-0: [01]\]",
    ),
    "label that is no whole number": (
        lambda t: replaced(t, "label", pc.multiply(t["label"].cast(pa.float64()), 0.5)),
        "expect_column_values_to_be_of_type(label)",
        r"type_ int8 \[e\.g\. double: event_id synthetic-\d+-\d+: 0\.5\]",
    ),
    "wrong type of a key": (
        lambda t: replaced(t, "user_id", pa.array([0.5] * t.num_rows)),
        "expect_column_values_to_be_of_type(user_id)",
        r"type_ string \[e\.g\. double: event_id synthetic-\d+-0: 0\.5\]",
    ),
    "key that is a number elsewhere": (
        lambda t: replaced(t, "user_id", pa.array(range(t.num_rows), pa.int64())),
        "expect_column_values_to_be_null(user_id_not_in_catalogue)",
        r"user_id must be one of the 24 in the catalogue \[\d+ rows, e\.g\. 0, 1, 10, 11, 12\]",
    ),
    "timestamp without zone": (
        lambda t: replaced(t, "timestamp", t["timestamp"].cast(pa.timestamp("us"))),
        "expect_column_values_to_be_of_type(timestamp)",
        r"type_ timestamp\[us, tz=UTC\] \[e\.g\. timestamp\[us\]: event_id synthetic-\d+-0: 2026-05-31 [\d:]+\]",
    ),
    "null key": (
        lambda t: first_row(t, "user_id", None),
        "expect_column_values_to_not_be_null(user_id)",
        r"expect_column_values_to_not_be_null\(user_id\): no exception \[1 rows, e\.g\. None\]",
    ),
    "duplicate event id": (
        lambda t: first_row(t, "event_id", t["event_id"][1].as_py()),
        "expect_column_values_to_be_unique(event_id)",
        r"\[2 rows, e\.g\. synthetic-",
    ),
    "label of 2": (
        lambda t: first_row(t, "label", 2),
        "expect_column_values_to_be_in_set(label)",
        r"value_set \[0, 1\] \[1 rows, e\.g\. 2\]",
    ),
    "timestamp before its day": (
        lambda t: shifted(t, days=-1),
        "expect_column_values_to_be_between(timestamp)",
        r"min_value 2026-05-31T00:00:00\+00:00, max_value 2026-06-01T00:00:00\+00:00.*\[1 rows, e\.g\. 2026-05-30",
    ),
    "timestamp before its day, in local time": (
        lambda t: in_zone(shifted(t, days=-1), "Europe/Berlin"),
        "expect_column_values_to_be_between(timestamp)",
        r"\[1 rows, e\.g\. 2026-05-30",
    ),
    "timestamp of no year that Python knows": (
        lambda t: replaced(t, "timestamp", pa.array([2**62] * t.num_rows, pa.int64()).cast(schema.TIMESTAMP)),
        "expect_column_values_to_be_between(timestamp)",
        r"e\.g\. 148108-07-06",
    ),
    "timestamp in the future": (
        lambda t: shifted(t, days=400),
        "expect_column_values_to_be_between(timestamp)",
        r"\[1 rows, e\.g\. 2027-0",
    ),
    "timestamp of the next midnight": (
        lambda t: first_row(t, "timestamp", schema.day_end(t["timestamp"][0].as_py().date())),
        "expect_column_values_to_be_between(timestamp)",
        r"\[1 rows, e\.g\. 2026-06-01 00:00:00",
    ),
    "unknown item": (
        lambda t: first_row(t, "item_id", "i999"),
        "expect_column_values_to_be_null(item_id_not_in_catalogue)",
        r"item_id must be one of the 12 in the catalogue \[1 rows, e\.g\. i999\]",
    ),
    "user with a space behind": (
        lambda t: first_row(t, "user_id", "u1 "),
        "expect_column_values_to_be_null(user_id_not_in_catalogue)",
        r"user_id must be one of the 24 in the catalogue, where 'u1 ' is 'u1': write ids alike.* \[1 rows, e\.g\. 'u1 '\]",
    ),
    "empty day": (
        lambda t: t.slice(0, 0),
        "expect_column_values_to_be_between(rows)",
        r"expect_column_values_to_be_between\(rows\): min_value 1 \[e\.g\. 0\]",
    ),
    "a tenth of the usual rows": (
        lambda t: t.slice(0, t.num_rows // 10),
        "expect_column_values_to_be_between(rows_to_recent_median)",
        r"min_value 0\.3, max_value 3\.0 \[e\.g\. 0\.0",
    ),
    "only positive labels": (
        lambda t: replaced(t, "label", pa.array([1] * t.num_rows, pa.int8())),
        "expect_column_values_to_be_between(label_rate)",
        r"min_value 0\.2, max_value 0\.8 \[e\.g\. 1\]",
    ),
}


@pytest.fixture(scope="module")
def good(ingested):
    """The last day as it should be."""
    return ingested.table(ingested.days[-1])


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_day_is_refused_with_its_reason_and_nothing_downstream_runs(ingested, good, kind):
    spoil, expectation, message = SPOILED[kind]
    last, before = ingested.days[-1], ingested.files(*DOWNSTREAM)
    ingested.deliver(last, spoil(good))

    with pytest.raises(GateError, match=message) as caught:
        ingested.day(last)

    assert expectation in caught.value.failed
    assert "correct the day at its source and ingest it again" in str(caught.value)
    assert ingested.files(*DOWNSTREAM) == before
    manifest = ingested.storage.read_json(f"days/dt={last}.json")
    assert manifest["status"] == "quarantined"
    assert expectation in manifest["failed"]
    folder = f"quarantine/dt={last}/r{manifest['revision']:04d}"
    kept = ingested.storage.read_table(f"{folder}/events.parquet")
    assert as_numbers(kept) == as_numbers(with_types(spoil(good), schema.EVENTS))
    findings = ingested.storage.read_json(f"{folder}/result.json")["findings"]
    assert expectation in [f["expectation"] for f in findings if not f["success"]]
    page = ingested.storage.read_bytes(f"{folder}/report.html").decode()
    assert expectation in page
    assert not re.search(r"(src|href)\s*=|@import|url\(", page), "the report must not load anything"


def as_numbers(table):
    """Rows in one order, instants as numbers: Python does not know every year."""
    at = table.schema.get_field_index("timestamp")
    if pa.types.is_timestamp(table.schema.field(at).type):
        table = table.set_column(at, "timestamp", table["timestamp"].cast(pa.int64()))
    return sorted(table.select(sorted(table.column_names)).to_pylist(), key=str)


@pytest.mark.parametrize("content", [b"PAR1 this is no Parquet file", b""], ids=["corrupt", "no bytes"])
@pytest.mark.fault(
    "a truncated or corrupt delivered partition", after="it is in quarantine as it came, and nothing downstream ran"
)
def test_corrupt_parquet_file_is_put_aside_as_it_came(ingested, content):
    last, before = ingested.days[-1], ingested.files(*DOWNSTREAM)
    ingested.path(last).write_bytes(content)
    with pytest.raises(GateError, match=r"part\.parquet must be a readable Parquet file: .*; deliver it again") as caught:
        ingested.day(last)
    assert caught.value.failed == ("day_to_be_readable",)
    assert ingested.files(*DOWNSTREAM) == before
    folder = f"quarantine/dt={last}/r{ingested.storage.read_json(f'days/dt={last}.json')['revision']:04d}"
    assert ingested.storage.read_bytes(f"{folder}/raw.bin") == content
    assert b"day_to_be_readable" in ingested.storage.read_bytes(f"{folder}/report.html")


def test_same_bad_content_again_keeps_its_quarantine_folder_and_other_content_gets_the_next(ingested, good):
    last = ingested.days[-1]
    base = len(ingested.storage.list(f"quarantine/dt={last}"))
    for value, folders in ((5, base + 1), (5, base + 1), (6, base + 2)):
        ingested.deliver(last, first_row(good, "label", value))
        with pytest.raises(GateError):
            ingested.day(last)
        assert len(ingested.storage.list(f"quarantine/dt={last}")) == folders


def test_correction_that_fails_its_gate_leaves_the_accepted_day(ingested):
    before, day = ingested.files(*DOWNSTREAM, "days"), ingested.days[2]
    kept = ingested.table(day)
    ingested.deliver(day, first_row(kept, "label", 2))
    with pytest.raises(GateError):
        ingested.day(day)
    ingested.deliver(day, kept)
    assert ingested.files(*DOWNSTREAM, "days") == before


def test_day_that_is_not_over_or_not_of_the_source_is_refused(ingested):
    last = ingested.days[-1]
    with pytest.raises(ConfigError, match=rf"must be before {last}, got {last}; choose an earlier day"):
        ingest.ingest_day(ingested.cfg, last, today=last)
    with pytest.raises(ConfigError, match="choose an earlier day"):
        ingest.ingest_history(ingested.cfg, last, today=last)
    with pytest.raises(ConfigError, match=f"through must be a day of the source, from {ingested.days[0]} on"):
        ingested.history(ingested.days[0] - timedelta(days=1))
    with pytest.raises(DataError, match=rf"before the first day ingested \({ingested.days[0]}\)"):
        ingested.day(ingested.days[0] - timedelta(days=1))


def test_refused_day_that_is_fixed_at_its_source_goes_in(ingested, good):
    last = ingested.days[-1]
    ingested.deliver(last, good)
    assert ingested.day(last) == {"status": "ingested", "day": str(last), "revision": 1, "rows": good.num_rows}
    assert ingested.storage.exists(f"logged/dt={last}/logged-r0001.parquet")


def test_history_with_bad_days_writes_nothing_and_names_each(delivery):
    for day, value in ((delivery.days[1], 2), (delivery.days[3], 3)):
        delivery.deliver(day, first_row(delivery.table(day), "label", value))
    with pytest.raises(GateError) as caught:
        delivery.history(delivery.days[-1])
    for day in (delivery.days[1], delivery.days[3]):
        assert f"events of {day} failed its gate" in str(caught.value)
    assert str(delivery.days[2]) not in str(caught.value)
    assert caught.value.failed == ("expect_column_values_to_be_in_set(label)",)
    assert delivery.files(*DOWNSTREAM) == {}


def test_volume_is_a_warning_in_the_history_unless_the_day_was_refused_for_it(delivery):
    third = delivery.days[2]
    delivery.deliver(third, delivery.table(third).slice(0, 5))
    summary = delivery.history(delivery.days[3])
    assert (summary["status"], summary["warned_days"]) == ("ingested", 1)
    manifest = delivery.storage.read_json(f"days/dt={third}.json")
    assert manifest["warnings"] == ["expect_column_values_to_be_between(rows_to_recent_median)"]
    report = delivery.storage.read_json(f"reports/ingest-{delivery.days[3]}.json")
    assert [day["what"] for day in report["days"]] == [f"events of {third}"]

    fifth = delivery.days[4]
    delivery.deliver(fifth, delivery.table(fifth).slice(0, 5))
    with pytest.raises(GateError):
        delivery.day(fifth)
    with pytest.raises(GateError, match="rows_to_recent_median"):
        delivery.history(fifth)


def test_bad_catalogue_is_refused_before_any_day(delivery):
    users = pq.read_table(delivery.folder / "delivered" / "users.parquet")
    delivery.write("users.parquet", pa.concat_tables([users, users.slice(0, 1)]))
    with pytest.raises(GateError, match=r"gate of catalogue of users failed: expect_column_values_to_be_unique\(user_id\)"):
        delivery.history(delivery.days[-1])
    assert delivery.files(*DOWNSTREAM) == {}


def test_a_day_of_files_that_are_not_read_is_no_day_without_data(ingested):
    last, before = ingested.days[-1], ingested.files(*DOWNSTREAM)
    path = ingested.path(last)
    path.rename(path.with_suffix(".csv"))
    with pytest.raises(GateError, match=r"must hold Parquet files, got only part\.csv; deliver them as Parquet"):
        ingested.day(last)
    path.with_suffix(".csv").rename(path)
    assert ingested.storage.read_json(f"days/dt={last}.json")["status"] != "no_data"
    attempts = [f"quarantine/dt={last}/{name}/raw.bin" for name in ingested.storage.list(f"quarantine/dt={last}")]
    assert b"part.csv" in [ingested.storage.read_bytes(path) for path in attempts if ingested.storage.exists(path)]
    assert ingested.files(*DOWNSTREAM) == before


def test_no_catalogue_is_blamed_on_the_catalogue(delivery):
    delivery.write("users.parquet", declared.USERS.arrow.empty_table())
    with pytest.raises(GateError, match=r"gate of catalogue of users failed: .*min_value 1 \[e\.g\. 0\]; correct the users"):
        delivery.history(delivery.days[-1])
    assert delivery.files(*DOWNSTREAM) == {}


def test_a_day_whose_logged_rows_are_not_its_events_fails(delivery, monkeypatch):
    """Whatever the cause: here a join that loses a row, and one that gives a row another label."""
    whole = ingest.join

    def losing(*arguments):
        return whole(*arguments).slice(1)

    def mistaking(*arguments):
        joined = whole(*arguments)
        return joined.set_column(4, "label", pa.array([1 - label for label in joined["label"].to_pylist()], pa.int8()))

    for join, message in ((losing, r"must be its \d+ events, got \d+ rows;"), (mistaking, "rows that differ from them;")):
        monkeypatch.setattr(ingest, "join", join)
        with pytest.raises(
            DataError, match=rf"logged rows of {delivery.days[0]} {message if join is losing else '.*' + message}"
        ):
            delivery.day(delivery.days[0])
        assert delivery.files("days", "logged") == {}
    monkeypatch.setattr(ingest, "join", whole)
    assert delivery.day(delivery.days[0])["status"] == "ingested"


def test_a_row_of_a_neighbouring_day_fails_its_day_among_others_too(delivery):
    """Days are validated together: those instants lie inside the span of three days, and outside the middle one."""
    day = delivery.days[1]
    for instant in (schema.day_end(day), schema.day_start(day) - timedelta(microseconds=1)):
        delivery.deliver(day, first_row(delivery.table(day), "timestamp", instant))
        with pytest.raises(GateError, match=f"events of {day} failed its gate") as caught:
            delivery.history(delivery.days[-1])
        assert caught.value.failed == ("expect_column_values_to_be_between(timestamp)",)
    delivery.deliver(day, first_row(delivery.table(day), "timestamp", schema.day_start(day)))
    assert delivery.history(delivery.days[-1])["ingested"] == len(delivery.days)


def test_a_day_is_judged_by_the_days_of_the_window_before_it(delivery, monkeypatch):
    """`rows_window_days` = 3: the three days before, of those that have rows."""
    asked, check = [], ingest.gates.check_days
    monkeypatch.setattr(ingest.gates, "check_days", lambda days, **named: asked.append(named) or check(days, **named))
    *earlier, last = delivery.days
    rows = {day: delivery.table(day).num_rows for day in delivery.days}
    delivery.path(earlier[-2]).unlink()
    delivery.history(earlier[-1])
    delivery.day(last)
    history, daily = (named["recent_rows"] for named in asked)
    assert history[earlier[0]] == []
    assert daily[last] == [rows[earlier[-1]], rows[earlier[-3]]]
