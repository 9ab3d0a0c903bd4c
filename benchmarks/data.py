"""What events cost until they are logged: a history beside one query that gives the same columns, and one more day of it.

    history.seconds             gate, snapshots, point-in-time join and files of 1,000,000 events over 365 days
    history.ratio_to_query      to one duckdb query of the same columns over the same files, on as many cores, in the same run
    history.peak_mib            of the process that did it
    day_seconds.<days>          one more day, 2,740 events, after so many days of history
    adapt_seconds.<days>        embeddings of that day's users, an untrained network's, from logged events to a gated partition

Each is measured in a process of its own, without its imports; a day is the median of three on end.

    python -m benchmarks.data [--quick]     writes benchmarks/results/data.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import results
from limaml import telemetry
from limaml.config import Config

_ROOT = Path(__file__).parents[1]
_FIRST, _TODAY = date(2022, 1, 1), date(2026, 1, 1)
_EVENTS_A_DAY, _USERS, _ITEMS = 2740, 5000, 2000
_MORE_DAYS = 3
_TIMED = 3
_DAY_US = 86_400_000_000
_QUERY = """
CREATE TABLE joined AS
WITH events AS (SELECT *, epoch_us("timestamp") // {day} AS day FROM read_parquet('{files}', hive_partitioning = false)),
users AS (
    SELECT user_id, day + 1 AS day, sum(n) OVER past AS n, sum(p) OVER past AS p
    FROM (SELECT user_id, day, count(*) AS n, sum(label) AS p FROM events GROUP BY ALL)
    WINDOW past AS (PARTITION BY user_id ORDER BY day)
), items AS (
    SELECT item_id, day + 1 AS day, sum(n) OVER past AS n, sum(p) OVER past AS p
    FROM (SELECT item_id, day, count(*) AS n, sum(label) AS p FROM events GROUP BY ALL)
    WINDOW past AS (PARTITION BY item_id ORDER BY day)
)
SELECT events.*, users.n AS user_events, (users.p + 5) / (users.n + 10) AS user_rate,
    items.n AS item_events, (items.p + 5) / (items.n + 10) AS item_rate
FROM events ASOF LEFT JOIN users ON events.user_id = users.user_id AND events.day >= users.day
    ASOF LEFT JOIN items ON events.item_id = items.item_id AND events.day >= items.day
ORDER BY events.user_id, events."timestamp"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a history of 30 days only")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "data.json")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "FOLDER", "DAYS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, folder, days = arguments.measure
        measures = {"history": _history, "days": _more_days, "adapt": _adapt, "query": _query}
        print(json.dumps(measures[what](Path(folder), int(days))))
        return
    lengths = [30] if arguments.quick else [30, 365, 1000]
    found: dict[str, Any] = {"machine": results.machine(), "day_seconds": {}, "adapt_seconds": {}}
    for length in lengths:
        with TemporaryDirectory(prefix="limaml-data-") as name:
            folder = Path(name)
            _deliver(folder, length + _MORE_DAYS)
            history = _measured("history", folder, length)
            if length == (365 if 365 in lengths else lengths[0]):
                query = min(_measured("query", folder, length)["seconds"] for _ in range(3))
                found["history"] = history | {"query_seconds": query, "ratio_to_query": history["seconds"] / query}
                found["history"] |= {"events": length * _EVENTS_A_DAY, "days": length}
            found["day_seconds"][str(length)] = _measured("days", folder, length)["seconds"]
            found["adapt_seconds"][str(length)] = _measured("adapt", folder, length)["seconds"]
            more = ", ".join(f"{name} {found[name][str(length)]:.2f}" for name in ("day_seconds", "adapt_seconds"))
            print(f"{length} days: history {history}, {more}", file=sys.stderr)
    results.write(found, arguments.out)
    print(json.dumps({name: value for name, value in found.items() if name != "machine"}, indent=1))


def _measured(what: str, folder: Path, days: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data", "--measure", what, str(folder), str(days)]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "source": {"kind": "parquet", "path": str(folder / "delivered"), "licence": "CC0-1.0"},
            "storage": {"root": str(folder / "data")},
            "feast": {"registry": str(folder / "registry.db"), "online_connection": str(folder / "online.db")},
        }
    )


def _history(folder: Path, days: int) -> dict[str, float]:
    from limaml.events import gates, ingest

    _warm(gates)
    started = time.perf_counter()
    ingest.ingest_history(_config(folder), _FIRST + timedelta(days=days - 1), _TODAY)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _more_days(folder: Path, days: int) -> dict[str, float]:
    from limaml.events import gates, ingest

    _warm(gates)
    taken = []
    for number in range(_MORE_DAYS):
        started = time.perf_counter()
        ingest.ingest_day(_config(folder), _FIRST + timedelta(days=days + number), _TODAY)
        taken.append(time.perf_counter() - started)
    return {"seconds": statistics.median(taken)}


def _adapt(folder: Path, days: int) -> dict[str, float]:
    """Once the newest rows are in their files, as they are on any but a first day."""
    from limaml import schema
    from limaml.embeddings.partition import Partition, write_partition
    from limaml.events.logged import read_logged
    from limaml.features.encoder import Encoder
    from limaml.io.storage import Storage
    from limaml.models.bundle import Bundle, Model
    from limaml.models.network import build_network

    cfg, day = _config(folder), _FIRST + timedelta(days=days + _MORE_DAYS - 1)
    storage, kind = Storage(cfg.storage.root), cfg.task_kind
    logged = read_logged(storage, schema.tables(cfg.features), first=day, through=day)
    encoder = Encoder.fit(logged, cfg)
    bundle = Bundle(config=cfg, refit=Model(build_network(cfg, encoder.dims, seed=1), encoder))
    users = logged[kind.entity_column].unique().to_pylist()
    taken = []
    for number in range(1 + _TIMED):
        started = time.perf_counter()
        where = Partition(kind, "1", day, f"shard-{number:03d}")
        write_partition(cfg, storage, bundle, where, users, schema.day_end(day), {})
        taken.append(time.perf_counter() - started)
    return {"seconds": statistics.median(taken[1:])}


def _query(folder: Path, days: int) -> dict[str, float]:
    import duckdb

    del days  # all that is delivered
    started = time.perf_counter()
    with duckdb.connect() as connection:
        connection.execute(_QUERY.format(day=_DAY_US, files=f"{folder}/delivered/events/*/*.parquet"))
    return {"seconds": time.perf_counter() - started}


def _warm(gates: Any) -> None:
    """Great Expectations' imports."""
    from limaml import schema

    gates.check_features(pa.table({"event_id": ["a"]}), schema.EVENTS, "nothing")


def _deliver(folder: Path, days: int) -> None:
    """Users come at random; items are as popular as a power law makes them."""
    draw = np.random.default_rng(0)
    users, items = ([f"{name}{number:05d}" for number in range(count)] for name, count in (("u", _USERS), ("i", _ITEMS)))
    popular = 1.0 / np.arange(1, _ITEMS + 1)
    for name, ids in (("users", users), ("items", items)):
        path = folder / "delivered" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({f"{name[:-1]}_id": ids}), path)
    for number in range(days):
        day = _FIRST + timedelta(days=number)
        start = (day - date(1970, 1, 1)).days * _DAY_US
        table = pa.table(
            {
                "event_id": [f"{number:04d}-{row:05d}" for row in range(_EVENTS_A_DAY)],
                "user_id": pa.array(users).take(pa.array(draw.integers(0, _USERS, _EVENTS_A_DAY))),
                "item_id": pa.array(items).take(pa.array(draw.choice(_ITEMS, _EVENTS_A_DAY, p=popular / popular.sum()))),
                "timestamp": pa.array(start + draw.integers(0, _DAY_US, _EVENTS_A_DAY), pa.timestamp("us", "UTC")),
                "label": pa.array(draw.random(_EVENTS_A_DAY) < 0.2).cast(pa.int8()),
            }
        )
        path = folder / "delivered" / "events" / f"dt={day}" / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)


if __name__ == "__main__":
    telemetry.configure(level=30)
    main()
