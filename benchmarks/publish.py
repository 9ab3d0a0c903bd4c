"""How fast embeddings are published: rows a second through the product's own path, on SQLite or on Redis.

    python -m benchmarks.publish --store redis --rows 1000000

Publishes `rows` synthetic embeddings of 64 floats into an empty view, reads every one back as a cut-over does, publishes the
next model version's rows over them, and compares a sample with what Feast's normal read path answers. Everything it needs it
makes for itself in a temporary folder; for Redis it starts a server of its own on a free port of 127.0.0.1, without files.
Rows come in tables of 100,000, as a fill's shards do, so memory does not grow with their number; making them is not timed.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from limaml import schema
from limaml.config import Config, EmbeddingsConfig, FeastConfig, ModelConfig, SourceConfig, StorageConfig
from limaml.embeddings.publish import OnlineView, publish, require_published, sample
from limaml.features.feature_store import apply, open_store
from limaml.io.lease import lease

if TYPE_CHECKING:
    from feast import FeatureStore

DIM = 64
TABLE_ROWS = 100_000
SAMPLE_ROWS = 200
AS_OF = datetime(2026, 1, 10, tzinfo=UTC)
_REDIS_READY_S = 20.0
_REPO = Path(__file__).parents[1] / "feature_repo"

Store = Literal["sqlite", "redis"]


def measure(store: Store, num_rows: int, batch_rows: int | None = None, again_rows: int | None = None) -> dict[str, Any]:
    """Publish `num_rows` rows into an empty view, read the first `again_rows` of them back, publish as many over them.

    `batch_rows` is as configured if None, `again_rows` all rows; `seconds` and `rows_per_s` are of the empty view.

    Raises RuntimeError if a program is missing, or if Feast's read path answers anything but what was published.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limaml-publish-")))
        connection = stack.enter_context(redis_server(folder)) if store == "redis" else str(folder / "online.db")
        cfg = configuration(folder, store, connection)
        batch_rows, again = batch_rows or cfg.embeddings.write_batch_rows, again_rows or num_rows
        apply(cfg)
        opened = open_store(cfg)
        view = OnlineView(opened, schema.embedding_view("user", "blue"))
        held = stack.enter_context(lease(cfg, "benchmark of publish"))
        seconds = timed(num_rows, "1", lambda table: publish(view, table, held, batch_rows))
        check_sample(opened, view, num_rows, "1")
        read_s = timed(again, "1", lambda table: require_published(view, table, batch_rows))
        over_s = timed(again, "2", lambda table: publish(view, table, held, batch_rows))
        check_sample(opened, view, again, "2")
    return {
        "store": store,
        "rows": num_rows,
        "batch_rows": batch_rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(num_rows / seconds),
        "rows_per_s_over_existing": round(again / over_s),
        "require_published_rows_per_s": round(again / read_s),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def configuration(folder: Path, store: Store, connection: str) -> Config:
    """An installation in `folder`, everything else as by default."""
    return Config(
        source=SourceConfig(kind="synthetic"),
        storage=StorageConfig(root=str(folder / "data")),
        model=ModelConfig(embedding_dim=DIM),
        feast=FeastConfig(
            repo_path=str(_REPO), registry=str(folder / "registry.db"), online_store=store, online_connection=connection
        ),
        embeddings=EmbeddingsConfig(lease_url=f"sqlite:///{folder}/lease.db"),
    )


def tables(num_rows: int, version: str) -> Iterator[pa.Table]:
    """The version's embeddings, one table after the other, sorted by entity as partitions are."""
    for start in range(0, num_rows, TABLE_ROWS):
        yield embeddings(start, min(TABLE_ROWS, num_rows - start), version)


def embeddings(start: int, num_rows: int, version: str) -> pa.Table:
    """Rows `start` and following; each version has vectors of its own."""
    rng = np.random.default_rng((int(version), start))
    at_us = int(AS_OF.timestamp() * 1e6)
    vectors = rng.standard_normal(num_rows * DIM, dtype=np.float32)
    last_events = at_us - rng.integers(1, int(timedelta(days=365).total_seconds()), num_rows) * 1_000_000
    columns = [
        pa.array([f"user-{number:09}" for number in range(start, start + num_rows)]),
        pa.repeat("user", num_rows),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors), DIM),
        pa.repeat(version, num_rows),
        pa.array(rng.integers(0, 65, num_rows)),
        pa.array(np.full(num_rows, at_us)).cast(schema.TIMESTAMP),
        pa.array(last_events).cast(schema.TIMESTAMP),
    ]
    return pa.table(columns, schema=schema.embeddings("user_id", DIM).arrow)


def timed(num_rows: int, version: str, step: Callable[[pa.Table], Any]) -> float:
    """Seconds that `step` takes over all tables."""
    seconds = 0.0
    for table in tables(num_rows, version):
        start = time.perf_counter()
        step(table)
        seconds += time.perf_counter() - start
    return seconds


def check_sample(store: "FeatureStore", view: OnlineView, num_rows: int, version: str) -> None:
    """Rows of every table as Feast serves them are the published ones. Raises RuntimeError if not."""
    features = [f"{view.name}:{name}" for name in schema.EMBEDDING_FEATURE_NAMES]
    for table in tables(num_rows, version):
        part = sample(table, SAMPLE_ROWS)
        answer = store.get_online_features(features, {"user_id": part["user_id"].to_pylist()}).to_dict()
        for name in schema.EMBEDDING_FEATURE_NAMES:
            if answer[name] != part[name].to_pylist():
                raise RuntimeError(f"Feast must serve the published rows, but {name} of version {version} differs")


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """`host:port` of a Redis server of our own, empty and without files. Raises RuntimeError if it cannot be had."""
    program = shutil.which("redis-server")
    if program is None:
        raise RuntimeError("redis-server must be installed for this benchmark: apt-get install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(_REDIS_READY_S)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    import redis

    deadline = time.monotonic() + _REDIS_READY_S
    with redis.Redis(port=port) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.ping():
                    return
            except redis.ConnectionError:
                time.sleep(0.05)
    raise RuntimeError(f"redis-server on port {port} did not answer within {_REDIS_READY_S:g} s (exit code {process.poll()})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["sqlite", "redis"], required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-rows", type=int, help="rows a write; as configured if left out")
    parser.add_argument("--again", type=int, help="rows read back, and rows published over them; all if left out")
    arguments = parser.parse_args()
    os.environ["TZ"] = "UTC"  # SQLite's event timestamps pass through the process's time zone
    time.tzset()
    print(json.dumps(measure(arguments.store, arguments.rows, arguments.batch_rows, arguments.again)))


if __name__ == "__main__":
    main()
