"""A small delivered data set and the installation that follows it, for tests of versions, slots and days.

Source files, gates, Feast, MLflow on SQLite and untrained networks: nothing stands in for anything.
"""

import sqlite3
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from limaml import registry, schema
from limaml.config import (
    Config,
    EmbeddingsConfig,
    FeastConfig,
    FeatureConfig,
    MetaConfig,
    ModelConfig,
    RegistryConfig,
    SourceConfig,
    StorageConfig,
    TaskKindConfig,
)
from limaml.embeddings.daily import adapt_day, publish_day
from limaml.embeddings.fill import fill_shard, plan_fill
from limaml.events.ingest import ingest_day, ingest_history
from limaml.events.logged import read_logged
from limaml.features.encoder import Encoder
from limaml.features.feature_store import apply
from limaml.io.storage import Storage
from limaml.models.bundle import Bundle, Model, save
from limaml.models.network import build_network
from limaml.registry import Registry
from tests import declared

FIRST = date(2026, 1, 5)
HISTORY_DAYS = 5
TODAY = date(2026, 6, 1)
USERS = [f"u{number:02}" for number in range(14)]
ITEMS = [f"i{number}" for number in range(10)]
STUDIO: dict[str, str | None] = {item: None if number % 5 == 4 else f"s{number % 3}" for number, item in enumerate(ITEMS)}
PLACES = ("p0", "p1", "p2")
SILENT = USERS[-1]
"""Has rows on the first day only, and so is not active in a window of four days."""
ONE_DAY = timedelta(days=1)

Dump = dict[tuple[bytes, str], tuple[bytes, int]]


def day_of_events(day: date) -> pa.Table:
    """About half of the users, two to four rows each, several in the same second."""
    rng = np.random.default_rng(day.toordinal())
    users = USERS if day == FIRST else sorted(rng.choice(USERS[:-1], 6, replace=False).tolist())
    rows = []
    for number, user in enumerate(users):
        for k in range(int(rng.integers(2, 5))):
            rows.append(
                {
                    "event_id": f"{day}-{user}-{k}",
                    "user_id": user,
                    "item_id": str(rng.choice(ITEMS)),
                    "timestamp": datetime(day.year, day.month, day.day, 8, tzinfo=UTC)
                    + timedelta(minutes=number, seconds=k // 2),
                    "label": int(rng.integers(0, 2)),
                }
            )
    return pa.Table.from_pylist(rows, schema=schema.EVENTS.arrow)


def place_of(row: dict[str, Any]) -> str | None:
    """Where an event was: a user's are all at one place, and some at none."""
    return None if row["event_id"].endswith("-3") else PLACES[USERS.index(row["user_id"]) % len(PLACES)]


class World:
    """A source that delivers day after day, and the installation that follows it."""

    def __init__(self, root: Path, redis: str = "", *others: TaskKindConfig) -> None:
        """`others`: task kinds beside users; where one hangs on the items' studio or the events' place, that is declared."""
        features = declared.FEATURES
        if any(kind.entity_column == "studio" for kind in others):
            features += (FeatureConfig(entity="item", name="studio", type="category"),)
        if any(kind.entity_column == "place" for kind in others):
            features += (FeatureConfig(entity="context", name="place", type="category"),)
        self.delivered = root / "source"
        self.cfg = Config(
            features=features,
            source=SourceConfig(kind="parquet", path=str(self.delivered), licence="CC0-1.0"),
            storage=StorageConfig(root=str(root / "data")),
            task_kinds=(TaskKindConfig(active_days=4), *others),
            model=ModelConfig(embedding_dim=4, global_hidden=(8,)),
            meta=MetaConfig(support_rows=5),
            registry=RegistryConfig(tracking_uri=f"sqlite:///{root}/mlflow.db", artifact_root=str(root / "artifacts")),
            feast=FeastConfig(
                registry=str(root / "registry.db"),
                online_store="redis" if redis else "sqlite",
                online_connection=redis or str(root / "online.db"),
            ),
            embeddings=EmbeddingsConfig(
                lease_url=f"sqlite:///{root}/lease.db",
                lease_wait_s=0,
                min_dwell_s=0,
                write_batch_rows=4,
                batch_entities=5,
                min_norm=0,  # an untrained network gives a zero vector where all its rectifiers are shut
            ),
        )
        self.storage = Storage(self.cfg.storage.root)
        self.registry = Registry(self.cfg.registry)
        self.last = FIRST + (HISTORY_DAYS - 1) * ONE_DAY
        self.uncorrected: list[date] = []
        """Days that a daily run published, as they were delivered first."""
        self.root = root
        users = [{"user_id": u, "age_band": "25_34", "gender": "F", "occupation": "writer"} for u in USERS]
        items = [{"item_id": i, "title": f"Title {i}", "year": 1995, "genres": ["Drama"], "studio": STUDIO[i]} for i in ITEMS]
        self.tables = schema.tables(features)
        self.delivered.mkdir()
        pq.write_table(pa.Table.from_pylist(users, schema=declared.USERS.arrow), self.delivered / "users.parquet")
        pq.write_table(
            pa.Table.from_pylist(items, schema=self.tables.catalogue("item").arrow), self.delivered / "items.parquet"
        )
        for offset in range(HISTORY_DAYS):
            self.deliver(FIRST + offset * ONE_DAY)
        apply(self.cfg)
        ingest_history(self.cfg, self.last, TODAY)

    def deliver(self, day: date, table: pa.Table | None = None) -> None:
        folder = self.delivered / "events" / f"dt={day}"
        folder.mkdir(parents=True, exist_ok=True)
        table = day_of_events(day) if table is None else table
        if "place" in self.tables.events.names and "place" not in table.column_names:
            table = table.append_column("place", pa.array([place_of(row) for row in table.to_pylist()], pa.string()))
        pq.write_table(table, folder / "events.parquet")

    def next_day(self) -> date:
        """Deliver and ingest the day after the last."""
        self.last += ONE_DAY
        self.deliver(self.last)
        ingest_day(self.cfg, self.last, TODAY)
        return self.last

    def daily(self, day: date) -> dict[str, Any]:
        adapt_day(self.cfg, day)
        result = publish_day(self.cfg, day, "daily-run")
        if not result["versions"][0]["corrected"]:
            self.uncorrected.append(day)
        return result

    def published_days(self, count: int) -> list[date]:
        """The first days that a daily run published and nobody has corrected; at least one later day is published too."""
        while len(self.uncorrected) < count + 1:
            self.daily(self.next_day())
        return self.uncorrected[:count]

    def correct(self, day: date, table: pa.Table) -> None:
        self.deliver(day, table)
        assert ingest_day(self.cfg, day, TODAY)["status"] == "corrected"
        if day in self.uncorrected:
            self.uncorrected.remove(day)

    def new_version(self, seed: int) -> str:
        logged = read_logged(self.storage, self.tables, through=FIRST + ONE_DAY)
        encoder = Encoder.fit(logged, self.cfg)
        model = Model(build_network(self.cfg, encoder.dims, seed), encoder)
        folder = self.root / f"bundle-{seed}"
        save(Bundle(config=self.cfg, refit=model, twin=model), folder)
        return self.registry.register(folder, self.registry.start_run("train"), {})

    def fill(self, version: str, run: str = "train-run") -> dict[str, Any]:
        plan = plan_fill(self.cfg, version, self.last, run)
        for shard in plan["shards"]:
            fill_shard(self.cfg, version, shard, run)
        return plan

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.registry.get(version).tags)

    def champion(self) -> registry.ModelVersion:
        champion = self.registry.champion()
        assert champion is not None
        return champion

    def online(self, view: str = "") -> Dump:
        """Every stored value of a view (of the champion's slot by default), as SQLite holds it."""
        name = view or schema.embedding_view("user", self.champion().tags[registry.SLOT])
        connection = sqlite3.connect(self.cfg.feast.online_connection)
        try:
            rows = connection.execute(f'SELECT entity_key, feature_name, value, event_ts FROM "limaml_{name}"').fetchall()
        finally:
            connection.close()
        return {(key, feature): (value, stamp) for key, feature, value, stamp in rows}

    def everything(self) -> dict[str, Dump]:
        slots = [schema.embedding_view("user", slot) for slot in schema.SLOTS]
        return {view: self.online(view) for view in (*slots, declared.USER_FEATURES.name, declared.ITEM_FEATURES.name)}


def users_in(dump: Dump) -> set[str]:
    return {user for user in USERS for key, _ in dump if user.encode() in key}


def changed_users(before: Dump, after: Dump) -> set[str]:
    return users_in({key: value for key, value in after.items() if before.get(key) != value})


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def flipped(table: pa.Table, user: str) -> pa.Table:
    rows = [row | {"label": 1 - row["label"]} if row["user_id"] == user else row for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=schema.EVENTS.arrow)


def without(table: pa.Table, user: str) -> pa.Table:
    return table.filter(pa.array([name != user for name in table["user_id"].to_pylist()]))


def die(*_: Any) -> None:
    raise KeyboardInterrupt
