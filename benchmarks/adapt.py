"""Adapting entities in a stream: entities a second and peak memory, from a sorted Parquet file to a Parquet file.

The reference work: 16 support rows an entity, 64 features a row, meta block 64 -> 64 -> 32, global block (32 + 64) -> 128 -> 64
-> 1. The network is untrained and the rows are random, both from a seed: neither changes what there is to compute.

    python -m benchmarks.adapt --entities 1000000 --steps 1     prints one JSON object
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
from limaml import schema, telemetry
from limaml.config import DEFAULT_FEATURES, Config, FeatureConfig
from limaml.embeddings.adapt import adapt_sorted
from limaml.features.columns import CategoryEncoder, ColumnEncoder, CycleEncoder, NumberEncoder
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.models.bundle import Bundle, Model
from limaml.models.network import build_network

SUPPORT_ROWS = 16
NUM_ITEMS = 5000
# 64 features in all: 31 + 2 + 2 of the user, 20 + 2 + 2 + 2 of the item, 3 of the hour.
FEATURES = (
    FeatureConfig(entity="user", name="segment", type="category", values=tuple(f"segment {n:02d}" for n in range(31))),
    FeatureConfig(entity="item", name="tags", type="categories"),
    FeatureConfig(entity="item", name="price", type="number", minimum=1.0, maximum=100.0),
    *DEFAULT_FEATURES,
)
_TABLES = schema.tables(FEATURES)
DAY = date(2026, 1, 31)
SOURCE, TARGET = "logged.parquet", "embeddings.parquet"
_GENERATED_ENTITIES = 16_384
_ROOT = Path(__file__).parents[1]


def measure(entities: int, steps: int) -> dict[str, float]:
    """Adapt `entities` entities by the product's streaming path in a process of its own.

    Returns entities_per_s (from the first byte read to the file written) and peak_rss_bytes of that process.
    """
    with TemporaryDirectory(prefix="limaml-adapt-") as folder:
        write_partition(Storage(folder), entities)
        command = [sys.executable, "-m", "benchmarks.adapt", "--steps", str(steps), "--adapt", folder]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write_partition(storage: Storage, entities: int) -> None:
    """A sorted file of logged events: `entities` entities with 16 rows each, the same for the same number."""
    storage.write_batches(SOURCE, pa.RecordBatchReader.from_batches(_TABLES.logged_events.arrow, _generate(entities)))


def reference_bundle(steps: int) -> Bundle:
    """The reference network, untrained; its encoder knows all that the generated rows hold, but no entity."""
    cfg = _config(steps)
    columns: dict[str, ColumnEncoder] = {"hour": CycleEncoder(24)}
    for feature in FEATURES:
        if feature.type == "number":
            columns[feature.name] = NumberEncoder({"count": "log", "rate": "logit", None: "plain"}[feature.aggregate], 4.0, 2.0)
        elif feature.type != "cycle":
            columns[feature.name] = CategoryEncoder(values_of(feature))
    encoder = Encoder(cfg.features, tuple(_items()), (), columns)
    assert encoder.dims.item_dense + encoder.dims.user_dense + encoder.dims.context == 64
    return Bundle(config=cfg, refit=Model(build_network(cfg, encoder.dims, seed=1), encoder))


def _config(steps: int) -> Config:
    return Config.model_validate(
        {
            "source": {"kind": "synthetic"},
            "features": FEATURES,
            "model": {
                "meta_block": "row_mlp",
                "embedding_dim": 32,
                "meta_hidden": (64,),
                "global_hidden": (128, 64),
                "interaction": "concat",
                "row_age": False,
                "dropout": 0.0,
            },
            "meta": {
                "learn_inner_lr": False,
                "learn_damping": False,
                "damping": 0.0,
                "inner_lr": 0.1,
                "inner_steps": steps,
                "support_rows": SUPPORT_ROWS,
            },
        }
    )


def _generate(entities: int) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng(0)
    catalogue = _catalogue(rng)
    for first in range(0, entities, _GENERATED_ENTITIES):
        yield _rows(rng, catalogue, first, min(_GENERATED_ENTITIES, entities - first))


def _rows(rng: np.random.Generator, catalogue: dict[str, pa.Array], first: int, entities: int) -> pa.RecordBatch:
    num_rows = entities * SUPPORT_ROWS
    owner = pa.array(np.repeat(np.arange(entities), SUPPORT_ROWS))
    item = pa.array(rng.integers(0, NUM_ITEMS, num_rows))
    # In order within an entity: a day, cut into as many parts as there are rows, one row somewhere in each.
    part_us = 86_400_000_000 // SUPPORT_ROWS
    offset_us = np.tile(np.arange(SUPPORT_ROWS) * part_us, entities) + rng.integers(0, part_us, num_rows)
    users, items = (_TABLES.of(entity) for entity in ("user", "item"))
    columns = {
        "event_id": pa.array(np.arange(first * SUPPORT_ROWS, first * SUPPORT_ROWS + num_rows)).cast(pa.string()),
        "user_id": pa.array([f"u{number:08d}" for number in range(first, first + entities)]).take(owner),
        "item_id": pa.array(_items()).take(item),
        "timestamp": pa.array(int(schema.day_start(DAY).timestamp()) * 1_000_000 + offset_us).cast(schema.TIMESTAMP),
        "label": pa.array(rng.integers(0, 2, num_rows).astype(np.int8)),
        **{f.name: draw(f, rng, num_rows) if f.aggregate else draw(f, rng, entities).take(owner) for f in users},
        **{f.name: draw(f, rng, num_rows) if f.aggregate else catalogue[f.name].take(item) for f in items},
    }
    return pa.record_batch([columns[name] for name in _TABLES.logged_events.names], schema=_TABLES.logged_events.arrow)


def _items() -> list[str]:
    return [f"i{number:05d}" for number in range(NUM_ITEMS)]


def _catalogue(rng: np.random.Generator) -> dict[str, pa.Array]:
    """What does not change of the items, by feature."""
    return {feature.name: draw(feature, rng, NUM_ITEMS) for feature in _TABLES.of("item") if not feature.aggregate}


def _adapt(folder: str, steps: int) -> dict[str, float]:
    storage, bundle = Storage(folder), reference_bundle(steps)
    started = time.perf_counter()
    batch_entities = bundle.config.embeddings.batch_entities
    kind, as_of = bundle.config.task_kind, schema.day_end(DAY)
    done = storage.write_batches(TARGET, adapt_sorted(storage, bundle, "1", kind, SOURCE, as_of, batch_entities))
    elapsed_s = time.perf_counter() - started
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"entities": done, "steps": steps, "entities_per_s": done / elapsed_s, "peak_rss_bytes": peak_kib * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--adapt", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    telemetry.configure()
    found = _adapt(options.adapt, options.steps) if options.adapt else measure(options.entities, options.steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
