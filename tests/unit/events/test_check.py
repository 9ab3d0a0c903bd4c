"""`limaml check`: all gates over all days, one screen, nothing stored."""

import re
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml.config import Config
from limaml.errors import ConfigError
from limaml.events.check import check

TODAY = date(2026, 6, 1)
FIRST = datetime(2026, 5, 1, tzinfo=UTC)


def rows(num_days=10, rows_a_day=40):
    return [
        {
            "user_id": f"u{n % 9}",
            "item_id": f"i{n % 5}",
            "timestamp": FIRST + timedelta(days=day, minutes=n),
            "label": n % 4 // 3,
        }
        for day in range(num_days)
        for n in range(rows_a_day)
    ]


VECTOR = {"entity": "item", "name": "text", "type": "vector", "width": 2, "encoder": "hashes-1", "licence": "MIT"}


@pytest.mark.parametrize(
    ("last", "wrong"),
    [("[0.5, 1]", None), ("[0.5]", "vector_width_to_be(text): width 2 [1 rows, e.g. item_id i4: 1 numbers]")],
)
def test_vectors_of_a_csv_are_judged_as_at_ingestion(tmp_path, last, wrong):
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "events.parquet")
    lines = [f"i{n};[0.1, {n}]" for n in range(4)] + [f"i4;{last}"]
    (tmp_path / "items.csv").write_text("\n".join(["item_id;text", *lines, ""]))
    source = {"kind": "table", "events": str(tmp_path / "events.parquet"), "items": str(tmp_path / "items.csv")}
    report = check(Config.model_validate({"source": source | {"columns": {"label": "label"}}, "features": [VECTOR]}), TODAY)
    assert len(report.wrong) == (wrong is not None)
    assert wrong is None or wrong in report.wrong[0]


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [
        (["0", "1", "2", "3", "4"], None),
        (["00", "01", "02", "03", "04"], "one of the 5 in the catalogue, where '0' is '00': write ids alike in both"),
        ([0.5, 1.5, 2.5, 3.5, 4.5], "source.item_columns.item_id must be whole numbers or text, got"),
    ],
)
def test_ids_of_another_type_in_the_catalogue_are_the_same_ones_or_refused(tmp_path, ids, wrong):
    """Whole numbers in the events."""
    events = [row | {"item_id": int(row["item_id"][1:])} for row in rows()]
    pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")
    pq.write_table(pa.table({"item_id": ids}), tmp_path / "items.parquet")
    source = {"kind": "table", "events": str(tmp_path / "events.parquet"), "items": str(tmp_path / "items.parquet")}
    cfg = Config.model_validate({"source": source | {"columns": {"label": "label"}}})
    try:
        found = check(cfg, TODAY).wrong
    except ConfigError as error:
        found = [str(error)]
    assert len(found) == (wrong is not None)
    assert wrong is None or wrong in found[0]


def test_an_aggregate_of_a_column_that_is_no_number_is_refused_by_its_type(tmp_path):
    events = [row | {"paid": "4.50 EUR"} for row in rows()]
    pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")
    features = [
        {"entity": "event", "name": "paid", "type": "number"},
        {"entity": "user", "name": "mean_paid", "type": "number", "aggregate": "mean", "of": "paid"},
    ]
    source = {"kind": "table", "events": str(tmp_path / "events.parquet"), "columns": {"label": "label"}}
    report = check(Config.model_validate({"source": source, "features": features}), TODAY)
    [wrong] = report.wrong
    made = re.search(r"event_id (\w{32}):", wrong)[1]  # The table names no event.
    kind = f"expect_column_values_to_be_of_type(paid): type_ double [e.g. string: event_id {made}: 4.50 EUR]"
    assert wrong == f"events of 2026-05-01 and 9 more days: {kind}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Check a table of rows; the working directory must stay empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cwd").mkdir()

    def checked(events, **source):
        pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")
        monkeypatch.chdir(tmp_path / "cwd")
        columns = {"label": "label"}
        cfg = Config.model_validate(
            {"source": {"kind": "table", "events": str(tmp_path / "events.parquet"), "columns": columns, **source}}
        )
        report = check(cfg, TODAY)
        assert list((tmp_path / "cwd").iterdir()) == []
        return report

    return checked


def test_a_sound_table_has_nothing_wrong_and_bounds(run):
    report = run(rows())
    assert (report.wrong, report.odd, report.rows, report.users, report.items) == ([], [], 400, 9, 5)
    assert report.lines()[0] == "10 days (2026-05-01 to 2026-05-10, 0 without rows), 400 events, 9 users, 5 items"
    assert report.lines()[-1] == "Nothing is wrong."
    # A quarter of the labels is positive, every day has as many rows.
    assert {name: value for name, (value, _) in report.bounds.items()} == {
        "min_rows_ratio": 0.5,
        "max_rows_ratio": 2.0,
        "min_label_rate": 0.12,
        "max_label_rate": 0.63,
    }


def test_everything_wrong_is_said_once_with_its_row_and_what_to_do(run):
    events = rows()
    for n in (45, 85, 125):  # On three days.
        events[n]["user_id"] = "u" * 300
    events[200]["label"] = 7
    for n in range(320, 360):
        events[n]["label"] = 0
    report = run(events)
    text = "\n".join(report.lines())
    assert len(report.wrong) == 3
    assert "catalogue of users: expect_column_value_lengths_to_be_between(user_id): user_id must have 1 to 256" in text
    assert "events of 2026-05-02 and 2 more days: expect_column_value_lengths_to_be_between(user_id)" in text
    assert "2026-05-06: label must be boolean or 0 and 1 after mapping, got 7 from source.columns.label ('label')" in text
    assert "events of 2026-05-09: expect_column_values_to_be_between(distinct_labels): min_value 2 [e.g. 1]" in text
    assert "(300 characters)" in text
    assert len(report.lines()) < 25
    assert "check again. Nothing was stored." in report.lines()[-1]


def test_days_out_of_bounds_are_odd_as_a_historical_load_lets_them_through(run):
    report = run([row for n, row in enumerate(rows()) if not 200 < n < 240], min_rows_ratio=0.5)
    assert report.wrong == []
    what = "expect_column_values_to_be_between(rows_to_recent_median)"
    assert report.odd == [f"events of 2026-05-06: {what}: min_value 0.5, max_value 20.0 [e.g. 0.025]"]


def test_rows_of_no_day_are_left_out_and_named(run):
    events = rows()
    events[0]["timestamp"] = datetime(2099, 1, 1, tzinfo=UTC)
    report = run(events)
    assert report.left_out == ["1 rows: must not be after today (2026-06-01); correct their times"]
    assert any(line == f"  - {report.left_out[0]}" for line in report.lines())


def test_a_replayed_source_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.model_validate({"source": {"kind": "synthetic", "synthetic_users": 20, "synthetic_days": 6}})
    report = check(cfg, TODAY)
    assert (report.wrong, report.days) == ([], 6)
    assert list(tmp_path.iterdir()) == []
