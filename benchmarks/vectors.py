"""A vector of 384 numbers on 100,000 items, end to end: what each part takes beside reading the table, in a process of its own.

    deliver   write the delivery: items with vectors, users, a few thousand events of eight days
    ingest    gate, catalogue, snapshots, logged rows
    train     encoders, training data, a few steps of the twin
    fit       item vectors of all items, each with events
    adapt     embeddings of all users
    serve     the catalogue's scorer

Prints a line a part and, last, all of them as JSON. With --limit-mib it fails where one peak is higher.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.options import ROOT, BenchmarkError
from limaml import schema
from limaml.config import Config

FIRST, NUM_DAYS, TODAY = date(2026, 1, 5), 8, date(2026, 2, 1)
NUM_USERS, TRAINING_STEPS = 200, 5
FEATURES: list[dict[str, Any]] = [
    {"entity": "user", "name": "user_events", "type": "number", "aggregate": "count"},
    {"entity": "item", "name": "kind", "type": "category"},
    {"entity": "item", "name": "text", "type": "vector", "encoder": "noise-1", "licence": "none needed"},
    {"entity": "item", "name": "item_positive_rate", "type": "number", "aggregate": "rate"},
    {"entity": "context", "name": "hour", "type": "cycle", "clock": "hour"},
]


@dataclass(frozen=True)
class Place:
    """The folder of one run and its sizes."""

    folder: Path
    num_items: int
    width: int
    num_events: int

    @property
    def cfg(self) -> Config:
        folder = self.folder
        features = [feature | ({"width": self.width} if feature["type"] == "vector" else {}) for feature in FEATURES]
        values = {
            "features": features,
            "source": {"kind": "parquet", "path": str(folder / "delivered"), "licence": "CC0-1.0"},
            "storage": {"root": str(folder / "data")},
            "training": {"max_steps": TRAINING_STEPS, "validate_every": TRAINING_STEPS},
            "evaluation": {"held_out_users": 0.2},
            "feast": {
                "repo_path": str(ROOT / "feature_repo"),
                "registry": str(folder / "registry.db"),
                "online_connection": str(folder / "online.db"),
            },
        }
        return Config.model_validate(values)

    @property
    def through(self) -> date:
        return FIRST + timedelta(days=NUM_DAYS - 1)

    def items(self) -> pa.Array:
        return pa.array([f"i{number:07d}" for number in range(self.num_items)])


def deliver(place: Place) -> None:
    folder = place.folder / "delivered"
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(place.num_items * place.width, np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers), place.width)
    kinds = pa.array([f"k{number % 20}" for number in range(place.num_items)])
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"item_id": place.items(), "kind": kinds, "text": vectors}), folder / "items.parquet")
    users = [f"u{number:04d}" for number in range(NUM_USERS)]
    pq.write_table(pa.table({"user_id": users}), folder / "users.parquet")
    for day in range(NUM_DAYS):
        size = place.num_events // NUM_DAYS
        second = rng.integers(0, 86_400, size)
        start = schema.day_start(FIRST + timedelta(days=day))
        table = _events(f"d{day}", [users[at] for at in rng.integers(0, NUM_USERS, size)], second, start, place, rng)
        path = folder / "events" / f"dt={FIRST + timedelta(days=day)}" / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)


def _events(
    name: str, users: list[str], second: np.ndarray[Any, Any], start: datetime, place: Place, rng: np.random.Generator
) -> pa.Table:
    stamps = np.datetime64(start.replace(tzinfo=None), "us") + second * np.timedelta64(1_000_000, "us")
    return pa.table(
        {
            "event_id": [f"{name}-{at}" for at in range(len(users))],
            "user_id": users,
            "item_id": place.items().take(pa.array(rng.integers(0, place.num_items, len(users)))),
            "timestamp": pa.array(stamps).cast(schema.TIMESTAMP),
            "label": pa.array(rng.integers(0, 2, len(users)), pa.int8()),
        }
    )


def ingest(place: Place) -> None:
    from limaml.events.ingest import ingest_history
    from limaml.features.feature_store import apply

    apply(place.cfg)
    ingest_history(place.cfg, place.through, TODAY)


def train(place: Place) -> None:
    from limaml.models import bundle
    from limaml.tasks.splits import split_events
    from limaml.training.prepare import fit_encoders, load_training_data, read_history
    from limaml.training.twin_and_refit import fit_twin

    cfg = place.cfg
    logged = read_history(cfg, place.through)
    twin, refit = fit_encoders(cfg, logged, split_events(logged, cfg.evaluation))
    data = load_training_data(cfg, place.through, twin, refit)
    network, _ = fit_twin(cfg, data.twin_rows, data.twin_dims, data.validator)
    model = bundle.Model(network, twin)
    bundle.save(bundle.Bundle(cfg, model, model), place.folder / "bundle")


def fit(place: Place) -> None:
    """Every item has two events of 20,000 users."""
    from limaml.events.catalogue import item_vectors
    from limaml.features.encoder import Encoder
    from limaml.io.storage import Storage
    from limaml.tasks.sampling import TaskRows
    from limaml.training.warm_start import fit_items

    cfg, rng = place.cfg, np.random.default_rng(1)
    tables = schema.tables(cfg.features)
    size = 2 * place.num_items
    users = [f"u{at:05d}" for at in rng.integers(0, place.num_items // 5, size)]
    events = _events("e", users, rng.integers(0, 86_400, size), schema.day_start(FIRST), place, rng)
    twice = pa.concat_arrays([place.items(), place.items()])
    logged = events.set_column(2, "item_id", twice)
    for column in tables.joined:
        logged = logged.append_column(column.name, pa.nulls(size, column.type))
    items = item_vectors(Storage(cfg.storage.root), tables)
    encoder = Encoder.fit(logged, cfg, items).with_items(items)
    del items
    fit_items(TaskRows.from_logged(logged, encoder, cfg.task_kind), cfg, encoder.dims)


def adapt(place: Place) -> None:
    from limaml.embeddings.adapt import active_entities
    from limaml.embeddings.adapt import adapt as adapt_entities
    from limaml.io.storage import Storage
    from limaml.models import bundle

    cfg, storage, as_of = place.cfg, Storage(place.cfg.storage.root), schema.day_end(place.through)
    entities = active_entities(storage, schema.tables(cfg.features), cfg.task_kind, as_of)
    found = adapt_entities(storage, bundle.load(place.folder / "bundle"), "1", cfg.task_kind, entities, as_of, 64).read_all()
    if found.num_rows != len(entities):
        raise BenchmarkError(f"adapting must give a row for each of {len(entities)} users, got {found.num_rows}")


def serve(place: Place) -> None:
    from limaml.events.catalogue import item_vectors
    from limaml.io.storage import Storage
    from limaml.models import bundle
    from serving.items import Items
    from serving.scorer import catalogue_scorer

    tables = schema.tables(place.cfg.features)
    loaded = bundle.load(place.folder / "bundle", parts=(bundle.REFIT,))
    items = Items(tables.names("item"), tuple(place.items().to_pylist()), {})
    vectors = item_vectors(Storage(place.cfg.storage.root), tables)
    scorer = catalogue_scorer(loaded.network, items.encode(loaded.encoder.with_items(vectors)))
    now = datetime.now(UTC)
    user, (_, context) = loaded.encoder.encode_user({}, now), loaded.encoder.encode_context({"hour": 12}, now)
    scores = scorer.score(list(range(100)), user, context, {k: v.numpy() for k, v in loaded.prior.items()})
    if not scores.std() > 0:
        raise BenchmarkError("items of other vectors must have other scores, got one score for 100 items")


PARTS: dict[str, Callable[[Place], None]] = {
    "deliver": deliver,
    "ingest": ingest,
    "train": train,
    "fit": fit,
    "adapt": adapt,
    "serve": serve,
}


def measure(place: Place) -> dict[str, dict[str, float]]:
    """Every part's seconds and peak, in order."""
    found = {}
    for part in PARTS:
        sizes = [str(size) for size in (place.num_items, place.width, place.num_events)]
        command = [sys.executable, "-m", "benchmarks.vectors", "--part", part, "--folder", str(place.folder), "--sizes", *sizes]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{part:8} {found[part]['seconds']:7.1f} s {found[part]['peak_mib']:7.0f} MiB", flush=True)
    return found


def _run(part: str, place: Place) -> dict[str, float]:
    started = time.perf_counter()
    PARTS[part](place)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs=3, default=[100_000, 384, 6_000], metavar=("ITEMS", "WIDTH", "EVENTS"))
    parser.add_argument("--limit-mib", type=int, help="fail where a part's peak is higher")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_run(options.part, Place(options.folder, *options.sizes))))
        return
    with tempfile.TemporaryDirectory(prefix="limaml-vectors-") as folder:
        found = measure(Place(Path(folder), *options.sizes))
    print(json.dumps(found, indent=1))
    over = {part: figures["peak_mib"] for part, figures in found.items() if figures["peak_mib"] > (options.limit_mib or 1e9)}
    if over:
        raise SystemExit(f"peak must be at most {options.limit_mib} MiB, got {over}")


if __name__ == "__main__":
    main()
