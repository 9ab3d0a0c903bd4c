"""A delivery of Parquet files that a test can spoil, and the storage it is ingested into."""

from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from limaml.config import Config
from limaml.events import ingest
from limaml.events.synthetic import SyntheticSource
from limaml.features import feature_store
from limaml.io.storage import Storage
from tests import declared

ROOT = Path(__file__).parents[3]
TODAY = date(2026, 6, 1)
NUM_DAYS = 6


class Delivery:
    """Six days of synthetic events as somebody else would deliver them: `events/dt=D/part.parquet` and two catalogues."""

    def __init__(self, folder):
        self.folder = folder
        self.today = TODAY
        self.cfg = Config.model_validate(
            {
                "features": declared.FEATURES,
                "source": {
                    "kind": "parquet",
                    "path": str(folder / "delivered"),
                    "min_rows_ratio": 0.3,
                    "max_rows_ratio": 3.0,
                    "min_label_rate": 0.2,
                    "max_label_rate": 0.8,
                    "rows_window_days": 3,
                },
                "storage": {"root": str(folder / "data")},
                "feast": {
                    "repo_path": str(ROOT / "feature_repo"),
                    "registry": str(folder / "feast" / "registry.db"),
                    "online_connection": str(folder / "feast" / "online.db"),
                },
            }
        )
        self.storage = Storage(self.cfg.storage.root)
        world = self.cfg.source.model_copy(
            update={"synthetic_users": 24, "synthetic_items": 12, "synthetic_days": NUM_DAYS, "synthetic_rows_per_user": 24}
        )
        source = SyntheticSource(world, TODAY - timedelta(days=NUM_DAYS) - date(2000, 1, 3))
        self.days = source.days()
        users, items = source.catalogue()
        self.write("users.parquet", users)
        self.write("items.parquet", items)
        for day in self.days:
            self.deliver(day, source.read_day(day))
        feature_store.apply(self.cfg)

    def write(self, name, table):
        path = self.folder / "delivered" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    def path(self, day):
        return self.folder / "delivered" / "events" / f"dt={day}" / "part.parquet"

    def deliver(self, day, table):
        self.write(f"events/dt={day}/part.parquet", table)

    def table(self, day):
        return pq.read_table(self.path(day), partitioning=None)

    def flip(self, day, row):
        """Deliver `day` again with the label of one row turned."""
        table = self.table(day)
        mask = pa.array([n == row for n in range(table.num_rows)])
        label = pc.if_else(mask, pc.subtract(pa.scalar(1, pa.int8()), table["label"]), table["label"])
        self.deliver(day, replace(table, "label", label))

    def history(self, through):
        return ingest.ingest_history(self.cfg, through, TODAY)

    def day(self, day):
        return ingest.ingest_day(self.cfg, day, TODAY)

    def files(self, *folders):
        """Every stored file under `folders` with its bytes."""
        return {path: self.storage.read_bytes(path) for folder in folders for path in self.storage.walk(folder)}


def replace(table, column, values):
    return table.set_column(table.schema.get_field_index(column), column, values)


@pytest.fixture
def delivery(tmp_path):
    """Delivered, nothing ingested."""
    return Delivery(tmp_path)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """All days but the last ingested; for tests that leave what was accepted as it is."""
    delivery = Delivery(tmp_path_factory.mktemp("ingested"))
    delivery.history(delivery.days[-2])
    return delivery
