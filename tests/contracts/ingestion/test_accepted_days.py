"""What ingestion promises about days that pass: immutable, idempotent, corrected with the next revision, and without leaks."""

from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.config import FeatureConfig
from limaml.errors import DataError
from limaml.events import catalogue, ingest, snapshots
from limaml.events.day_store import EventStore
from limaml.events.logged import read_logged
from limaml.features import feature_store
from tests import declared

EVERYTHING = (
    "events",
    "events_superseded",
    "snapshots",
    "logged",
    "logged_superseded",
    "catalogue",
    "catalogue_history",
    "days",
)


def ids(changed):
    return {column: found.to_pylist() for column, found in changed.items()}


def test_one_load_and_day_by_day_write_the_same_bytes_and_a_second_run_changes_nothing(delivery, tmp_path):
    *_, third, second, last = delivery.days
    summary = delivery.history(third)
    assert (summary["status"], summary["ingested"], summary["no_data"]) == ("ingested", 4, 0)
    for day in (second, last):
        assert delivery.day(day)["status"] == "ingested"
    stepwise = delivery.files(*EVERYTHING)
    assert len([path for path in stepwise if path.startswith("logged/")]) == len(delivery.days)

    again = delivery.history(last)
    assert (again["status"], again["ingested"], again["unchanged"]) == ("unchanged", 0, 6)
    assert [delivery.day(day)["status"] for day in (last, second)] == ["unchanged", "unchanged"]
    assert delivery.files(*EVERYTHING) == stepwise

    for folder in EVERYTHING:
        delivery.storage.delete_dir(folder)
    delivery.history(last)
    at_once = delivery.files(*EVERYTHING)
    for path, content in stepwise.items():  # The history only warns about volume, so manifests may hold warnings.
        assert path.startswith("days/") or at_once[path] == content, path


def test_rows_in_another_order_are_the_same_day(delivery):
    first = delivery.days[0]
    delivery.day(first)
    table = delivery.table(first)
    delivery.deliver(first, table.take(pa.array(range(table.num_rows))[::-1]))
    assert delivery.day(first)["status"] == "unchanged"


@pytest.mark.fault(
    "an ingestion that dies before its manifest or its logged features",
    after="ingested again, files equal an undisturbed ingestion's, byte for byte",
)
def test_interrupted_ingestion_is_done_again(delivery):
    """A kill before the manifest, or before the logged features, leaves a day that the next run completes."""
    delivery.history(delivery.days[2])
    complete = delivery.files(*EVERYTHING)
    for lost in (f"days/dt={delivery.days[2]}.json", f"logged/dt={delivery.days[2]}/logged-r0001.parquet"):
        (delivery.folder / "data" / lost).unlink()
        delivery.day(delivery.days[2])
        assert delivery.files(*EVERYTHING) == complete


def test_no_data_is_recorded_and_a_late_day_goes_in(delivery):
    missing = delivery.days[2]
    late = delivery.table(missing)
    delivery.path(missing).unlink()
    assert delivery.history(delivery.days[3])["no_data"] == 1
    assert delivery.storage.read_json(f"days/dt={missing}.json")["status"] == "no_data"
    assert delivery.day(missing) == {"status": "no_data", "day": str(missing), "revision": 0, "rows": 0}
    assert EventStore(delivery.storage).days("no_data") == [missing]
    assert not delivery.storage.exists(f"snapshots/user/dt={missing}")

    delivery.deliver(missing, late)
    assert delivery.day(missing)["status"] == "ingested"
    assert EventStore(delivery.storage).lineage(delivery.days[3]) == {str(day): 1 for day in delivery.days[:4]}


def test_accepted_day_that_vanishes_from_the_source_stays(delivery):
    first = delivery.days[0]
    delivery.day(first)
    rows = delivery.table(first).num_rows
    delivery.path(first).unlink()
    assert delivery.day(first) == {"status": "unchanged", "day": str(first), "revision": 1, "rows": rows}


def test_correction_gets_the_next_revision_and_changes_what_depends_on_it_only(delivery):
    delivery.history(delivery.days[-1])
    before = delivery.files(*EVERYTHING)
    day = delivery.days[2]
    delivery.flip(day, 0)
    user, item = (delivery.table(day)[column][0].as_py() for column in ("user_id", "item_id"))

    result = delivery.day(day)
    assert (result["status"], result["revision"]) == ("corrected", 2)
    store = EventStore(delivery.storage)
    assert store.lineage(delivery.days[-1])[str(day)] == 2
    assert delivery.storage.list(f"events/dt={day}") == ["events-r0002.parquet"]
    superseded = f"dt={day}/events-r0001.parquet"
    assert delivery.storage.read_bytes(f"events_superseded/{superseded}") == before[f"events/{superseded}"]
    assert ids(store.changed_entities(day, 2, since=1)) == {"user_id": [user], "item_id": [item]}
    everybody = {column: sorted(set(delivery.table(day)[column].to_pylist())) for column in ("user_id", "item_id")}
    assert ids(store.changed_entities(day, 2, since=0)) == everybody
    for revision, since in ((2, 2), (0, 0), (0, 1)):
        assert ids(store.changed_entities(day, revision, since)) == {"user_id": [], "item_id": []}

    after = delivery.files(*EVERYTHING)
    changed = {path for path in before.keys() & after.keys() if before[path] != after[path]}
    assert {path.split("/")[0] for path in changed} == {"snapshots", "days"}, "features logged with other days stay"
    assert min(path.split("dt=")[1][:10] for path in changed) == str(day)
    for kind, entity in (("user", user), ("item", item)):
        for path in [p for p in changed if p.startswith(f"snapshots/{kind}")]:
            old, new = (pq.read_table(pa.BufferReader(files[path])).to_pylist() for files in (before, after))
            assert {row[f"{kind}_id"] for row, other in zip(old, new, strict=True) if row != other} == {entity}
    logged = f"logged/dt={day}/logged-r000{{}}.parquet"
    assert logged.format(1) not in after
    old, new = before[logged.format(1)], after[logged.format(2)]
    columns = [*declared.USER_FEATURE_NAMES, *declared.ITEM_FEATURE_NAMES]
    assert pq.read_table(pa.BufferReader(old), columns=columns).equals(pq.read_table(pa.BufferReader(new), columns=columns))


def test_a_correction_keeps_the_features_of_rows_that_stay_and_joins_those_that_come(delivery):
    """A corrected older day changes what a row joined now would get; a row that stays keeps what it was served with."""
    delivery.history(delivery.days[-1])
    older, day = delivery.days[1], delivery.days[3]
    before = read_logged(delivery.storage, declared.TABLES, first=day, through=day)
    for row in range(delivery.table(older).num_rows):
        delivery.flip(older, row)
    delivery.day(older)
    table = delivery.table(day)
    new = table.slice(0, 1).set_column(0, "event_id", pa.array(["new"])).cast(table.schema)
    delivery.deliver(day, pa.concat_tables([table.slice(1), new]))
    delivery.flip(day, 2)
    delivery.day(day)

    after = read_logged(delivery.storage, declared.TABLES, first=day, through=day)
    old, now = ({row["event_id"]: row for row in rows.to_pylist()} for rows in (before, after))
    [gone], [come] = old.keys() - now.keys(), now.keys() - old.keys()
    features = [*declared.USER_FEATURE_NAMES, *declared.ITEM_FEATURE_NAMES]
    for event in old.keys() & now.keys():
        assert [now[event][name] for name in features] == [old[event][name] for name in features]
    assert [now[come][name] for name in features] != [old[gone][name] for name in features]
    assert sum(now[event]["label"] != old[event]["label"] for event in old.keys() & now.keys()) == 1

    # An ingestion that died before its features were written has moved the old ones aside.
    complete = delivery.files(*EVERYTHING)
    manifest = f"days/dt={day}.json"
    delivery.storage.write_json(manifest, delivery.storage.read_json(manifest) | {"revision": 1, "sha256": "of the first"})
    (delivery.folder / "data" / f"logged/dt={day}/logged-r0002.parquet").unlink()
    assert delivery.day(day)["revision"] == 2
    assert delivery.files(*EVERYTHING) == complete


def test_logged_features_do_not_depend_on_labels_of_their_day_or_later(delivery):
    """No leak: a row's own label, or anything from its day on, leaves its features byte-equal; an earlier label does not."""

    def features_of_first_three_days():
        for folder in EVERYTHING:
            delivery.storage.delete_dir(folder)
        delivery.history(delivery.days[-1])
        table = read_logged(delivery.storage, declared.TABLES, through=delivery.days[2])
        return table.select([name for name in table.column_names if name != "label"]), table["label"]

    before, labels = features_of_first_three_days()
    delivery.flip(delivery.days[2], 3)
    own_flipped, own_labels = features_of_first_three_days()
    assert own_flipped.equals(before)
    assert not own_labels.equals(labels)

    for later in delivery.days[2:]:
        table = delivery.table(later)
        turned = pa.array([1 - label for label in table["label"].to_pylist()], pa.int8())
        delivery.deliver(later, table.set_column(4, "label", turned))
    all_flipped, _ = features_of_first_three_days()
    assert all_flipped.equals(before)

    delivery.flip(delivery.days[1], 0)
    earlier_flipped, _ = features_of_first_three_days()
    assert not earlier_flipped.equals(before)


def test_new_and_changed_catalogue_rows_are_known_from_the_end_of_their_day(delivery):
    """What the online store cannot have held during a day, no row of that day has."""
    *earlier, last = delivery.days
    delivery.history(earlier[-1])
    items_path = delivery.folder / "delivered" / "items.parquet"
    items = pq.read_table(items_path)
    new = pa.Table.from_pylist([{"item_id": "i99", "title": "New", "year": 1999, "genres": ["sunny"]}], declared.ITEMS.arrow)
    rows = items.to_pylist()
    rows[0]["year"] = 1900
    delivery.write("items.parquet", pa.concat_tables([pa.Table.from_pylist(rows, declared.ITEMS.arrow), new]))
    table = delivery.table(last)
    delivery.deliver(last, table.set_column(2, "item_id", pa.array(["i99", "i0", *table["item_id"].to_pylist()[2:]])))
    delivery.day(last)

    logged = {
        row["item_id"]: row for row in read_logged(delivery.storage, declared.TABLES, first=last, through=last).to_pylist()
    }
    assert (logged["i99"]["year"], logged["i99"]["genres"], logged["i99"]["item_events"]) == (None, None, None)
    assert logged["i0"]["year"] == items["year"][0].as_py()
    known = {
        row["item_id"]: row
        for row in snapshots.changed(delivery.storage, catalogue.kinds(declared.TABLES)["item"], last).to_pylist()
    }
    assert (known["i99"]["year"], known["i99"]["item_events"]) == (1999, 1)
    assert known["i0"]["year"] == 1900


def test_read_logged_selects_days_columns_and_entities(delivery):
    delivery.history(delivery.days[-1])
    whole = read_logged(delivery.storage, declared.TABLES, through=delivery.days[-1])
    assert whole.schema.equals(declared.LOGGED_EVENTS.arrow)
    keys = list(zip(*(whole[name].to_pylist() for name in ("user_id", "timestamp", "event_id")), strict=True))
    assert keys == sorted(keys)
    assert whole.num_rows == sum(delivery.table(day).num_rows for day in delivery.days)

    span = read_logged(
        delivery.storage, declared.TABLES, first=delivery.days[1], through=delivery.days[2], columns=["label", "user_id"]
    )
    assert span.column_names == ["label", "user_id"]
    assert span.num_rows == sum(delivery.table(day).num_rows for day in delivery.days[1:3])
    some = read_logged(delivery.storage, declared.TABLES, through=delivery.days[-1], entities=("user_id", ["u1", "u5"]))
    assert some.equals(whole.filter(pa.compute.is_in(whole["user_id"], value_set=pa.array(["u1", "u5"]))).combine_chunks())
    assert read_logged(delivery.storage, declared.TABLES, through=delivery.days[0] - timedelta(days=1)).num_rows == 0


def test_the_same_rows_in_another_zone_are_the_same_day(delivery):
    first = delivery.days[0]
    delivery.day(first)
    table = delivery.table(first)
    zoned = table["timestamp"].cast(pa.timestamp("ns", tz="America/New_York"))
    delivery.deliver(first, table.set_column(3, "timestamp", zoned))
    assert delivery.day(first)["status"] == "unchanged"


def test_a_column_that_no_feature_reads_changes_nothing(delivery):
    first = delivery.days[0]
    delivery.day(first)
    table = delivery.table(first)
    delivery.deliver(first, table.append_column("rating", table["label"]))
    items = delivery.folder / "delivered" / "items.parquet"
    delivery.write("items.parquet", pq.read_table(items).append_column("price", pa.array([1.5] * 12)))
    assert delivery.day(first)["status"] == "unchanged"
    assert delivery.day(delivery.days[1])["status"] == "ingested"
    assert "price" not in delivery.storage.read_table("catalogue/items.parquet").column_names


def test_a_storage_root_keeps_to_the_features_it_was_ingested_with(delivery):
    delivery.day(delivery.days[0])
    before = delivery.files(*EVERYTHING)
    year = next(feature for feature in declared.FEATURES if feature.name == "year")
    others = tuple(feature for feature in declared.FEATURES if feature not in (year,))
    price = year.model_copy(update={"name": "price"})
    for features, message in (
        ((*others, price), "added: price; removed: year"),
        ((*others, year.model_copy(update={"column": "release"})), "changed: year"),
    ):
        delivery.cfg = delivery.cfg.model_copy(update={"features": features})
        with pytest.raises(DataError, match=rf"features must be declared as .*, got {message}; restore the declaration"):
            delivery.day(delivery.days[1])
    assert delivery.files(*EVERYTHING) == before
    bounded = (*others, year.model_copy(update={"minimum": 1900.0}))
    delivery.cfg = delivery.cfg.model_copy(update={"features": bounded})
    assert delivery.day(delivery.days[1])["status"] == "ingested", "bounds decide what is refused, not what is stored"

    (delivery.folder / "data" / "features.json").unlink()
    with pytest.raises(DataError, match="they are of an older release; give this configuration its own storage"):
        delivery.day(delivery.days[2])


def test_windows_pass_on_days_without_data_whichever_way_the_days_came(delivery):
    lately = FeatureConfig(entity="user", name="seen_lately", type="number", aggregate="count", window_days=2)
    delivery.cfg = delivery.cfg.model_copy(update={"features": (*declared.FEATURES, lately)})
    feature_store.apply(delivery.cfg)
    first, second, missing, *later = delivery.days
    late = delivery.table(missing)
    delivery.path(missing).unlink()
    delivery.history(second)
    for day in (missing, *later):
        delivery.day(day)
    stepwise = delivery.files("snapshots", "logged")
    gone = snapshots.changed(delivery.storage, catalogue.kinds(schema.tables(delivery.cfg.features))["user"], missing)
    of_first = set(delivery.table(first)["user_id"].to_pylist()) - set(delivery.table(second)["user_id"].to_pylist())
    assert of_first
    assert of_first <= {row["user_id"] for row in gone.to_pylist() if row["seen_lately"] == 0}

    def from_scratch():
        for folder in EVERYTHING:
            delivery.storage.delete_dir(folder)
        delivery.history(delivery.days[-1])
        return delivery.files("snapshots", "logged")

    assert from_scratch() == stepwise
    delivery.deliver(missing, late)
    delivery.day(missing)
    snapshots_of_late = delivery.files("snapshots")
    assert {path: content for path, content in from_scratch().items() if path in snapshots_of_late} == snapshots_of_late


def test_a_correction_reaches_the_windows_of_a_later_day_without_data(delivery):
    lately = FeatureConfig(entity="user", name="seen_lately", type="number", aggregate="count", window_days=2)
    delivery.cfg = delivery.cfg.model_copy(update={"features": (*declared.FEATURES, lately)})
    feature_store.apply(delivery.cfg)
    first, second, missing = delivery.days[:3]
    delivery.path(missing).unlink()
    users = delivery.table(second)["user_id"].to_pylist()
    at = next(at for at, user in enumerate(users) if user in delivery.table(first)["user_id"].to_pylist())

    def ingested():
        delivery.history(second)
        delivery.day(missing)

    ingested()
    delivery.deliver(second, delivery.table(second).filter(pa.array([n != at for n in range(len(users))])))
    assert delivery.day(second)["status"] == "corrected"
    corrected = delivery.files("snapshots")
    for folder in EVERYTHING:
        delivery.storage.delete_dir(folder)
    ingested()
    assert delivery.files("snapshots") == corrected


def test_what_is_not_read_is_named_in_manifest_report_and_result(delivery):
    first = delivery.days[0]
    (delivery.path(first).parent / "part.csv").write_text("event_id\n")
    (delivery.folder / "delivered" / "events" / "dt=1970-01-01").mkdir()
    result = delivery.day(first)
    assert result["num_left_out"] == 1
    assert "events/dt=1970-01-01: must lie at most source.max_gap_days" in result["left_out"][0]
    assert delivery.storage.read_json(f"days/dt={first}.json")["warnings"] == ["every_file_of_the_day_to_be_read"]

    second = delivery.days[1]
    (delivery.path(second).parent / "rest.json").write_text("{}")
    summary = delivery.history(second)
    assert (summary["no_data"], summary["warned_days"], summary["num_left_out"]) == (0, 1, 1)
    report = delivery.storage.read_bytes(f"reports/ingest-{second}.html").decode()
    assert "every_file_of_the_day_to_be_read" in report
    assert "rest.json" in report
    assert delivery.storage.list("days") == [f"dt={day}.json" for day in (first, second)]


def test_a_day_counts_only_once_its_logged_features_are_there(delivery, monkeypatch):
    """The manifest is the last write: an ingestion that dies before it is done again."""

    def die(*_):
        raise KeyboardInterrupt

    first = delivery.days[0]
    with monkeypatch.context() as broken:
        broken.setattr(ingest, "write_logged", die)
        with pytest.raises(KeyboardInterrupt):
            delivery.day(first)
    assert EventStore(delivery.storage).manifest(first) is None
    assert delivery.day(first)["status"] == "ingested"
