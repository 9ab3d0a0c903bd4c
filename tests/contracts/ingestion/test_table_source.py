"""A table of events, ingested: who is known grows with the days, bad rows refuse their day, and nothing else is written."""

import json
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from limaml import schema
from limaml.config import Config
from limaml.errors import ConfigError, DataError, GateError
from limaml.events import ingest
from limaml.events.day_store import EventStore
from limaml.features import feature_store
from limaml.io.storage import Storage
from tests.contracts.ingestion.conftest import ROOT

TODAY = date(2026, 6, 1)
FIRST = date(2026, 5, 1)
DOWNSTREAM = ("events", "events_superseded", "snapshots", "logged", "catalogue", "catalogue_history", "days")


class Shop:
    """Purchases of four days in one file; nobody says who the users and the items are."""

    def __init__(self, folder, **source):
        self.path = folder / "purchases.parquet"
        self.write(self.rows(4))
        columns = {"user_id": "customer", "item_id": "sku", "timestamp": "at", "label": "stars >= 3"}
        self.cfg = Config.model_validate(
            {
                "source": {"kind": "table", "events": str(self.path), "columns": columns, **source},
                "storage": {"root": str(folder / "data")},
                "feast": {
                    "repo_path": str(ROOT / "feature_repo"),
                    "registry": str(folder / "feast" / "registry.db"),
                    "online_connection": str(folder / "feast" / "online.db"),
                },
            }
        )
        self.storage = Storage(self.cfg.storage.root)
        feature_store.apply(self.cfg)

    def rows(self, num_days):
        """Forty rows a day; on every day two customers and an item come for the first time."""
        return [
            {
                "customer": n % (2 * day + 4),
                "sku": f"s{n % (day + 3)}",
                "at": datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC) + timedelta(days=day, minutes=n),
                "stars": n % 5,
            }
            for day in range(num_days)
            for n in range(40)
        ]

    def write(self, rows):
        pq.write_table(pa.Table.from_pylist(rows), self.path, row_group_size=40)

    def known(self, which):
        return self.storage.read_table(f"catalogue/{which}s.parquet")[f"{which}_id"].to_pylist()

    def files(self):
        return [path for folder in DOWNSTREAM for path in self.storage.walk(folder)]

    def history(self, day):
        return ingest.ingest_history(self.cfg, day, TODAY)

    def day(self, day):
        return ingest.ingest_day(self.cfg, day, TODAY)


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def test_who_is_known_grows_with_the_days(shop):
    assert shop.history(FIRST + timedelta(days=1))["ingested"] == 2
    assert (len(shop.known("user")), len(shop.known("item"))) == (6, 4)
    assert shop.day(FIRST + timedelta(days=2))["status"] == "ingested"
    assert (len(shop.known("user")), len(shop.known("item"))) == (8, 5)
    assert shop.day(FIRST + timedelta(days=2))["status"] == "unchanged"
    # A corrected older day leaves those of later days known, and its other rows the ids they had.
    rows = shop.rows(4)
    rows[0]["stars"] = 4
    before = EventStore(shop.storage).read([FIRST])
    shop.write(rows)
    assert shop.day(FIRST) == {"day": "2026-05-01", "revision": 2, "rows": 40, "status": "corrected"}
    after = EventStore(shop.storage).read([FIRST])
    assert before["event_id"].equals(after["event_id"])
    assert len(shop.known("user")) == 8


def test_one_more_day_reads_as_the_history_does(shop, tmp_path):
    shop.history(FIRST + timedelta(days=2))
    shop.day(FIRST + timedelta(days=3))
    (tmp_path / "again").mkdir()
    again = Shop(tmp_path / "again")
    again.history(FIRST + timedelta(days=3))
    days = [FIRST + timedelta(days=n) for n in range(4)]
    assert EventStore(shop.storage).read(days).equals(EventStore(again.storage).read(days))


def test_a_label_that_is_none_refuses_its_day_with_the_row(shop):
    rows = shop.rows(2)
    rows[45]["stars"] = None
    shop.write(rows)
    with pytest.raises(
        GateError, match=r"label must be boolean or 0 and 1 after mapping, got null .*user_id '5', item_id 's1'"
    ):
        shop.history(FIRST + timedelta(days=1))
    assert [json.loads(shop.storage.read_bytes(path))["status"] for path in shop.files()] == ["quarantined"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": "costumer"}, "there are: customer,"),
        ({"label": "star > 3"}, "there are: stars,"),
        ({"timestamp": 'CAST("at" AS TIMESTAMP)'}, r"source\.timezone must say.*the first value '2026-05-01 00:00:00'"),
    ],
)
def test_a_mapping_that_does_not_fit_writes_nothing(shop, columns, message):
    source = shop.cfg.source
    mapped = source.model_copy(update={"columns": source.columns.model_copy(update=columns)})
    shop.cfg = shop.cfg.model_copy(update={"source": mapped})
    for verb in (shop.history, shop.day):
        with pytest.raises(ConfigError, match=message):
            verb(FIRST)
    assert shop.files() == []


def test_an_expression_that_fails_on_a_row_of_a_day_refuses_that_day(shop):
    rows = [row | {"grade": "A" if n == 50 else "3"} for n, row in enumerate(shop.rows(2))]
    shop.write(rows)
    columns = shop.cfg.source.columns.model_copy(update={"label": "CAST(grade AS INTEGER) >= 3"})
    shop.cfg = shop.cfg.model_copy(update={"source": shop.cfg.source.model_copy(update={"columns": columns})})
    assert shop.history(FIRST)["ingested"] == 1
    with pytest.raises(GateError, match=r"source\.columns\.label must not fail on any row.*on the row grade 'A'") as caught:
        shop.day(FIRST + timedelta(days=1))
    assert caught.value.failed == ("day_to_be_readable",)


def with_users(shop, folder, ids):
    """The shop with a table of users, whose key is text."""
    pq.write_table(pa.table({"customer": pa.array(ids, pa.string())}), folder / "users.parquet")
    source = shop.cfg.source.model_copy(
        update={
            "users": str(folder / "users.parquet"),
            "user_columns": shop.cfg.source.user_columns.model_copy(update={"user_id": "customer"}),
        }
    )
    shop.cfg = shop.cfg.model_copy(update={"source": source})


def test_integer_ids_of_events_are_the_text_ids_of_users(shop, tmp_path):
    with_users(shop, tmp_path, [str(n) for n in range(4)])
    assert shop.history(FIRST)["ingested"] == 1


def test_ids_with_a_leading_zero_are_unknown_with_a_hint(shop, tmp_path):
    with_users(shop, tmp_path, [f"0{n}" for n in range(4)])
    with pytest.raises(GateError, match=r"user_id must be one of the 4 in the catalogue, where '0' is '00': write ids alike"):
        shop.history(FIRST)
    assert [json.loads(shop.storage.read_bytes(path))["status"] for path in shop.files()] == ["quarantined"]


def test_an_id_of_300_characters_is_refused_and_nothing_is_written(shop, tmp_path):
    rows = [row | {"customer": str(row["customer"])} for row in shop.rows(1)]
    rows[3]["customer"] = "c" * 300
    shop.write(rows)
    message = r"user_id must have 1 to 256 characters.*'c{80}'… \(300 characters\)"
    with pytest.raises(GateError, match=rf"catalogue of users.*{message}"):
        shop.history(FIRST)
    assert shop.files() == []
    with_users(shop, tmp_path, {row["customer"] for row in rows} - {"c" * 300})
    with pytest.raises(GateError, match=r"events of 2026-05-01.*e\.g\. event_id [0-9a-f]{32}: 'c{80}'"):
        shop.history(FIRST)


def test_rows_that_did_not_happen_are_the_same_in_every_ingestion(tmp_path):
    sampling = {"columns": {"user_id": "customer", "item_id": "sku", "timestamp": "at"}, "negatives": {"per_positive": 1}}
    days = [FIRST + timedelta(days=n) for n in range(3)]
    stored = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shop = Shop(tmp_path / name, **sampling)
        if name == "other":
            shop.write(shop.rows(4)[::-1])
        shop.history(days[1])
        assert shop.day(days[2])["status"] == "ingested"
        stored.append(EventStore(shop.storage).read(days))
    assert stored[0].equals(stored[1])
    negative = stored[0].filter(pc.equal(stored[0]["label"], 0))
    assert 0 < negative.num_rows < stored[0].num_rows
    # Items that first come on the last day are drawn on no earlier one.
    early = negative.filter(pc.less(negative["timestamp"], pa.scalar(datetime(2026, 5, 2, tzinfo=UTC), schema.TIMESTAMP)))
    assert set(early["item_id"].to_pylist()) <= {"s0", "s1", "s2"}


def test_a_source_without_events_says_so(shop):
    shop.path.unlink()
    with pytest.raises(DataError, match=r"source\.events must name Parquet.*found none"):
        shop.day(FIRST)
