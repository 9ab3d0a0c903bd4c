"""Adapting entities in a stream: entities a second and peak memory, from a sorted Parquet file to a Parquet file.

A configuration that ships, 16 support rows an entity, MovieLens' widths. The network is untrained and the rows are random, both
from a seed: neither changes what there is to compute.

    python -m benchmarks.adapt --row task_vector --entities 1000000     prints one JSON object
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from benchmarks.drawn import draw, values_of
from benchmarks.work import DIMS, ROWS, TASK_ROWS
from limaml import config, schema, telemetry
from limaml.config import FeatureConfig
from limaml.embeddings.adapt import adapt_sorted
from limaml.features.columns import CategoryEncoder, ColumnEncoder, CycleEncoder, NumberEncoder
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.models.bundle import Bundle, Model
from limaml.models.network import build_network

_CATEGORIES = {"category": iter((2, 21)), "categories": iter((19,))}
"""MovieLens', of the features that declare none, in the configuration's order."""


def _with_values(feature: FeatureConfig) -> FeatureConfig:
    if feature.values or feature.type not in _CATEGORIES:
        return feature
    names = tuple(f"{feature.name} {number:02d}" for number in range(next(_CATEGORIES[feature.type])))
    return feature.model_copy(update={"values": names})


FEATURES = tuple(_with_values(feature) for feature in config.load(ROWS["task_vector"][0]).features if feature.type != "text")
_TABLES = schema.tables(FEATURES)
DAY = date(2026, 1, 31)
SOURCE, TARGET = "logged.parquet", "embeddings.parquet"
_GENERATED_ENTITIES = 16_384
_ROOT = Path(__file__).parents[1]


def measure(row: str, entities: int, steps: int | None = None) -> dict[str, float]:
    """Adapt `entities` entities by the product's streaming path in a process of its own, with the configured steps or so many.

    Returns entities_per_s (from the first byte read to the file written) and peak_rss_bytes of that process.
    """
    with TemporaryDirectory(prefix="limaml-adapt-") as folder:
        write_partition(Storage(folder), entities)
        command = [sys.executable, "-m", "benchmarks.adapt", "--row", row, "--adapt", folder]
        command += [] if steps is None else ["--steps", str(steps)]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write_partition(storage: Storage, entities: int) -> None:
    """A sorted file of logged events: `entities` entities with 16 rows each, the same for the same number."""
    storage.write_batches(SOURCE, pa.RecordBatchReader.from_batches(_TABLES.logged_events.arrow, _generate(entities)))


def untrained_bundle(row: str, steps: int | None = None) -> Bundle:
    """A row's network, untrained, with its configured steps or so many; its encoder knows all that the generated rows hold, but
    no entity.
    """
    path, settings = ROWS[row]
    cfg = config.load(path, settings if steps is None else [*settings, f"meta.inner_steps={steps}"])
    cfg = cfg.model_copy(update={"features": FEATURES})
    columns: dict[str, ColumnEncoder] = {}
    for feature in FEATURES:
        if feature.type == "number":
            columns[feature.name] = NumberEncoder({"count": "log", "rate": "logit", None: "plain"}[feature.aggregate], 4.0, 2.0)
        else:
            columns[feature.name] = CycleEncoder(24) if feature.type == "cycle" else CategoryEncoder(values_of(feature))
    encoder = Encoder(FEATURES, tuple(_items()), (), columns)
    assert encoder.dims.num_features == DIMS.num_features
    return Bundle(config=cfg, refit=Model(build_network(cfg, encoder.dims, seed=1), encoder))


def _generate(entities: int) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng(0)
    catalogue = _catalogue(rng)
    for first in range(0, entities, _GENERATED_ENTITIES):
        yield _rows(rng, catalogue, first, min(_GENERATED_ENTITIES, entities - first))


def _rows(rng: np.random.Generator, catalogue: dict[str, pa.Array], first: int, entities: int) -> pa.RecordBatch:
    num_rows = entities * TASK_ROWS
    owner = pa.array(np.repeat(np.arange(entities), TASK_ROWS))
    item = pa.array(rng.integers(0, DIMS.num_items, num_rows))
    # In order within an entity: a day, cut into as many parts as there are rows, one row somewhere in each.
    part_us = 86_400_000_000 // TASK_ROWS
    offset_us = np.tile(np.arange(TASK_ROWS) * part_us, entities) + rng.integers(0, part_us, num_rows)
    users, items = (_TABLES.of(entity) for entity in ("user", "item"))
    columns = {
        "event_id": pa.array(np.arange(first * TASK_ROWS, first * TASK_ROWS + num_rows)).cast(pa.string()),
        "user_id": pa.array([f"u{number:08d}" for number in range(first, first + entities)]).take(owner),
        "item_id": pa.array(_items()).take(item),
        "timestamp": pa.array(int(schema.day_start(DAY).timestamp()) * 1_000_000 + offset_us).cast(schema.TIMESTAMP),
        "label": pa.array(rng.integers(0, 2, num_rows).astype(np.int8)),
        **{f.name: draw(f, rng, num_rows) if f.aggregate else draw(f, rng, entities).take(owner) for f in users},
        **{f.name: draw(f, rng, num_rows) if f.aggregate else catalogue[f.name].take(item) for f in items},
    }
    return pa.record_batch([columns[name] for name in _TABLES.logged_events.names], schema=_TABLES.logged_events.arrow)


def _items() -> list[str]:
    return [f"i{number:05d}" for number in range(DIMS.num_items)]


def _catalogue(rng: np.random.Generator) -> dict[str, pa.Array]:
    """What does not change of the items, by feature."""
    return {feature.name: draw(feature, rng, DIMS.num_items) for feature in _TABLES.of("item") if not feature.aggregate}


def _adapt(folder: str, row: str, steps: int | None) -> dict[str, float]:
    storage, bundle = Storage(folder), untrained_bundle(row, steps)
    started = time.perf_counter()
    batch_entities = bundle.config.embeddings.batch_entities
    kind, as_of = bundle.config.task_kind, schema.day_end(DAY)
    done = storage.write_batches(TARGET, adapt_sorted(storage, bundle, "1", kind, SOURCE, as_of, batch_entities))
    elapsed_s = time.perf_counter() - started
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = bundle.config.meta.inner_steps
    return {"entities": done, "steps": steps, "entities_per_s": done / elapsed_s, "peak_rss_bytes": peak_kib * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=sorted(ROWS), default="task_vector")
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, help="other than the configured ones")
    parser.add_argument("--adapt", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    telemetry.configure()
    found = (
        _adapt(options.adapt, options.row, options.steps)
        if options.adapt
        else measure(options.row, options.entities, options.steps)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
