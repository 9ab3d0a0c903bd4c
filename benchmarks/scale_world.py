"""An installation of many entities for `benchmarks.scale`: logged rows with a long tail, snapshots, Feast, a network.

Rows are drawn a day and a part of the entities at a time, so memory follows a day's counts, not the rows. They are written as
`ingest` leaves them; gates and joins are not what is measured here (`make bench-data` does).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.drawn import draw
from benchmarks.options import ROOT, BenchmarkError
from limaml import schema
from limaml.config import Config, load
from limaml.events.catalogue import Kind, kinds
from limaml.events.day_store import DayManifest, EventStore, partition
from limaml.events.logged import logged_path, read_logged
from limaml.io.storage import Storage
from limaml.registry import Registry

FIRST, NUM_DAYS = date(2026, 1, 1), 28
LAST = FIRST + timedelta(days=NUM_DAYS - 1)
NEXT = LAST + timedelta(days=1)
"""The day that a daily run takes in, with rows of CHANGED_SHARE of the entities."""
ROWS_A_ENTITY = 16
CHANGED_SHARE = 0.02
NUM_ITEMS = 5000
# The busiest 1 % of the entities have a tenth of the rows, and 3 % have more than the 64 that adaptation takes.
_LOG_SIGMA = 1.0
_DRAWN_ENTITIES = 131_072
_DAY_US = 86_400_000_000
_SAMPLE_ROWS = 50_000
_CHECKED = 200


@dataclass(frozen=True)
class World:
    """Where it lies and how many entities it has."""

    folder: Path
    entities: int
    redis: str
    num_shards: int

    @cached_property
    def cfg(self) -> Config:
        """The shipped configuration, its places in our folder."""
        values = {
            "storage.root": f"{self.folder}/data",
            "registry.tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
            "registry.artifact_root": f"{self.folder}/artifacts",
            "feast.repo_path": f"{ROOT}/feature_repo",
            "feast.registry": f"{self.folder}/registry.db",
            "feast.online_store": "redis",
            "feast.online_connection": self.redis,
            "embeddings.lease_url": f"sqlite:///{self.folder}/lease.db",
            # A shard waits for the one that publishes; Airflow would try it again.
            "embeddings.lease_wait_s": "600",
            "embeddings.num_shards": str(self.num_shards),
            # An untrained network leaves an entity of one row, which it does not adapt, at a prior of zero.
            "embeddings.min_norm": "0",
        }
        return load(ROOT / "configs" / "movielens.toml", [f"{key}={value}" for key, value in values.items()])

    @property
    def storage(self) -> Storage:
        return Storage(self.cfg.storage.root)

    @property
    def tables(self) -> schema.Tables:
        return schema.tables(self.cfg.features)

    @cached_property
    def users(self) -> pa.Array:
        return pa.array([f"u{number:09d}" for number in range(self.entities)])

    @cached_property
    def items(self) -> pa.Array:
        return pa.array([f"i{number:05d}" for number in range(NUM_ITEMS)])


def write(world: World) -> int:
    """Logged rows of the days up to LAST, the day after it whole, snapshots of all; returns the rows up to LAST."""
    rng, storage = np.random.default_rng(0), world.storage
    draws = _Draws(world, rng)
    events = EventStore(storage)
    left, total = _activity(rng, world.entities), 0
    for number in range(NUM_DAYS):
        day = FIRST + timedelta(days=number)
        counts = rng.binomial(left, 1 / (NUM_DAYS - number))
        left -= counts
        rows = storage.write_batches(logged_path(day, 1), draws.day(day, counts))
        events.commit(DayManifest(day, "passed", 1, rows))
        total += rows
    _write_next(world, draws, rng)
    every = np.arange(world.entities)
    for name, ids in (("user", every), ("item", np.arange(NUM_ITEMS))):
        _write_snapshots(world, rng, name, ids, FIRST)
    return total


def register(world: World) -> str:
    """Feast's views, and an untrained network as version 1: what it holds does not change what there is to compute."""
    from limaml.features.encoder import Encoder
    from limaml.features.feature_store import apply
    from limaml.models.bundle import Bundle, Model, save
    from limaml.models.network import build_network

    cfg = world.cfg
    apply(cfg)
    logged = read_logged(world.storage, world.tables, first=LAST, through=LAST).slice(0, _SAMPLE_ROWS)
    encoder = Encoder.fit(logged, cfg)
    model = Model(build_network(cfg, encoder.dims, seed=1), encoder)
    save(Bundle(config=cfg, refit=model, twin=model), world.folder / "bundle")
    registry = Registry(cfg.registry)
    return registry.register(world.folder / "bundle", registry.start_run("train"), {})


def _activity(rng: np.random.Generator, entities: int) -> npt.NDArray[np.int64]:
    """Rows of every entity: lognormal, at least one, ROWS_A_ENTITY in the mean."""
    drawn = rng.lognormal(0.0, _LOG_SIGMA, entities)
    counts = 1 + (drawn * ((ROWS_A_ENTITY - 1) / drawn.mean())).round().astype(np.int64)
    rng.shuffle(counts)
    return counts


class _Draws:
    """Rows of days, with what stays of users and items."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world, self._rng, self._schema = world, rng, world.tables.logged_events.arrow
        tables = world.tables
        self._users = {f.name: draw(f, rng, world.entities) for f in tables.of("user") if not f.aggregate}
        self._items = {f.name: draw(f, rng, NUM_ITEMS) for f in tables.of("item") if not f.aggregate}

    def day(self, day: date, counts: npt.NDArray[np.int64]) -> pa.RecordBatchReader:
        """`counts` rows of every entity, sorted by entity and time."""
        return pa.RecordBatchReader.from_batches(self._schema, self._parts(day, counts))

    def _parts(self, day: date, counts: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        for first in range(0, self._world.entities, _DRAWN_ENTITIES):
            part = counts[first : first + _DRAWN_ENTITIES]
            owner = first + np.repeat(np.arange(len(part)), part)
            if len(owner):
                yield self._rows(day, first, owner)

    def _rows(self, day: date, first: int, owner: npt.NDArray[np.int64]) -> pa.RecordBatch:
        rng, size, tables = self._rng, len(owner), self._world.tables
        users, items = pa.array(owner), pa.array(rng.integers(0, NUM_ITEMS, size))
        time_us = rng.integers(0, _DAY_US, size)
        time_us = time_us[np.lexsort((time_us, owner))] + int(schema.day_start(day).timestamp()) * 1_000_000
        number = day.toordinal() * 10_000_000_000 + first * 1000 + np.arange(size)
        columns = {
            "event_id": pa.array(number).cast(pa.string()),
            "user_id": self._world.users.take(users),
            "item_id": self._world.items.take(items),
            "timestamp": pa.array(time_us).cast(schema.TIMESTAMP),
            "label": pa.array(rng.integers(0, 2, size).astype(np.int8)),
            **{name: values.take(users) for name, values in self._users.items()},
            **{name: values.take(items) for name, values in self._items.items()},
            **{f.name: draw(f, rng, size) for entity in ("user", "item") for f in tables.of(entity) if f.aggregate},
        }
        return pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema)


def _write_next(world: World, draws: _Draws, rng: np.random.Generator) -> None:
    """The day after the fill's, as ingestion leaves it."""
    storage, events = world.storage, world.tables.events
    changed = np.sort(rng.choice(world.entities, max(1, round(CHANGED_SHARE * world.entities)), replace=False))
    counts = np.zeros(world.entities, np.int64)
    counts[changed] = rng.integers(1, 4, len(changed))
    rows = draws.day(NEXT, counts).read_all()
    EventStore(storage).place(NEXT, rows.select(events.names), 1)
    storage.write_table(logged_path(NEXT, 1), rows)
    EventStore(storage).commit(DayManifest(NEXT, "passed", 1, rows.num_rows))
    items = np.unique(rng.integers(0, NUM_ITEMS, rows.num_rows))
    for name, ids in (("user", changed), ("item", items)):
        _write_snapshots(world, rng, name, ids, NEXT)


def _write_snapshots(world: World, rng: np.random.Generator, name: str, ids: npt.NDArray[np.int64], day: date) -> None:
    kind: Kind = kinds(world.tables)[name]
    known = world.users if name == "user" else world.items
    columns = {
        kind.key: known.take(pa.array(ids)),
        "event_timestamp": pa.repeat(pa.scalar(schema.day_end(day), schema.TIMESTAMP), len(ids)),
        **{feature.name: draw(feature, rng, len(ids)) for feature in kind.features},
    }
    table = pa.table([columns[column] for column in kind.snapshots.names], schema=kind.snapshots.arrow)
    world.storage.write_table(f"snapshots/{name}/{partition(day)}/part.parquet", table)


def check(world: World) -> int:
    """Embeddings of some entities as Feast's normal read path gives them, from the slot of the champion.

    Raises BenchmarkError where one is missing.
    """
    from limaml.features.feature_store import open_store

    names = world.users.take(pa.array(np.linspace(0, world.entities - 1, _CHECKED).astype(np.int64))).to_pylist()
    view = schema.embedding_view("user", schema.SLOTS[0])
    answer = open_store(world.cfg).get_online_features([f"{view}:embedding"], {"user_id": names}).to_dict()
    missing = [name for name, vector in zip(names, answer["embedding"], strict=True) if not vector]
    if missing:
        raise BenchmarkError(
            f"Feast must serve an embedding of every entity, {len(missing)} of {_CHECKED} have none: {missing[0]}"
        )
    return len(names)
