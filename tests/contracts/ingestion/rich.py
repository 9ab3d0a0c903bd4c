"""Events with columns of their own, and features of every origin: what a table of any shop has."""

import random
from datetime import UTC, datetime, time, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from limaml.config import Config
from limaml.features import feature_store
from limaml.io.storage import Storage
from tests.contracts.ingestion.conftest import ROOT, TODAY

KINDS = ("fruit", "bread", None, "tea")
PLACES = ("shelf", "door", None)
MAX_KEYS = 3
FEATURES = [
    {"entity": "user", "name": "region", "type": "category"},
    {"entity": "user", "name": "seen", "type": "number", "aggregate": "count", "retention_days": 1},
    {"entity": "user", "name": "bought_of_two", "type": "number", "aggregate": "rate", "window_days": 2, "prior": 0.2},
    {"entity": "user", "name": "paid", "type": "number", "aggregate": "mean", "of": "price"},
    {"entity": "user", "name": "paid_of_two", "type": "number", "aggregate": "mean", "of": "price", "window_days": 2},
    {"entity": "user", "name": "away", "type": "number", "aggregate": "days_since"},
    {"entity": "item", "name": "sort", "type": "category", "column": "kind"},
    {"entity": "item", "name": "popular", "type": "number", "aggregate": "rate", "prior": 0.3, "prior_rows": 4.0},
    {"entity": "item", "name": "unsold", "type": "number", "aggregate": "days_since", "retention_days": 1},
    {"entity": "user", "name": "same", "type": "number", "aggregate": "count", "by": "item_id", "max_keys": MAX_KEYS},
    {
        "entity": "user",
        "name": "same_rate",
        "type": "number",
        "aggregate": "rate",
        "by": "item_id",
        "max_keys": MAX_KEYS,
        "window_days": 3,
        "prior_rows": 2.0,
    },
    {"entity": "user", "name": "same_away", "type": "number", "aggregate": "days_since", "by": "item_id", "max_keys": MAX_KEYS},
    {
        "entity": "user",
        "name": "same_bought",
        "type": "number",
        "aggregate": "days_since",
        "positive": True,
        "by": "item_id",
        "max_keys": MAX_KEYS,
    },
    {"entity": "user", "name": "bought", "type": "number", "aggregate": "days_since", "positive": True},
    {"entity": "user", "name": "sort_rate", "type": "number", "aggregate": "rate", "by": "sort", "max_keys": 2},
    {"entity": "context", "name": "place", "type": "category", "column": "page", "per_candidate": True},
    {"entity": "context", "name": "temperature", "type": "number"},
    {"entity": "context", "name": "weekday", "type": "cycle", "clock": "weekday"},
    {"entity": "event", "name": "price", "type": "number"},
]
_COLUMNS = {
    "event_id": pa.string(),
    "user_id": pa.string(),
    "item_id": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "label": pa.int8(),
    "page": pa.string(),
    "temperature": pa.float32(),
    "price": pa.float64(),
}


def day_of_events(day, draw, num_users=5, num_items=7, num_rows=14):
    """A day of random rows; some values are not known."""
    rows = []
    for number in range(num_rows):
        at = datetime.combine(day, time(), tzinfo=UTC) + timedelta(seconds=draw.randrange(86_400))
        user, item = f"u{draw.randrange(num_users)}", f"i{draw.randrange(num_items)}"
        price = None if draw.random() < 0.3 else draw.randrange(1, 1000) / 100
        values = (draw.randrange(2), draw.choice(PLACES), draw.random() * 30, price)
        rows.append((f"{day}-{number}", user, item, at, *values))
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), _COLUMNS.values(), strict=True)],
        list(_COLUMNS),
    )


class Shop:
    """A delivery folder and the storage it is ingested into."""

    def __init__(self, folder, days, seed=0):
        self.folder, self.days, self.today = folder, days, TODAY
        self.cfg = Config.model_validate(
            {
                "features": FEATURES,
                "source": {"kind": "parquet", "path": str(folder / "delivered"), "min_rows_ratio": 0.0},
                "storage": {"root": str(folder / "data")},
                "feast": {
                    "repo_path": str(ROOT / "feature_repo"),
                    "registry": str(folder / "feast" / "registry.db"),
                    "online_connection": str(folder / "feast" / "online.db"),
                },
            }
        )
        self.storage = Storage(self.cfg.storage.root)
        draw = random.Random(seed)
        self.write("users.parquet", pa.table({"user_id": [f"u{n}" for n in range(5)], "region": ["n", "s", None, "n", "e"]}))
        kinds = [KINDS[n % len(KINDS)] for n in range(7)]
        self.write("items.parquet", pa.table({"item_id": [f"i{n}" for n in range(7)], "kind": kinds}))
        self.events = {day: day_of_events(day, draw) for day in days}
        feature_store.apply(self.cfg)

    def deliver(self, day):
        self.write(f"events/dt={day}/part.parquet", self.events[day])

    def write(self, name, table):
        path = self.folder / "delivered" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    def files(self, *folders):
        """What is stored, but for states that are kept of days before the last."""
        return {path: self.storage.read_bytes(path) for folder in folders for path in self.storage.walk(folder)}
