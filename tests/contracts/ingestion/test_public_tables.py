"""Configurations of large public tables, on small samples made here with the columns of the public files."""

import csv
import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from limaml import config, schema
from limaml.config import Config
from limaml.events.check import check
from limaml.events.ingest import ingest_history
from limaml.events.logged import read_logged
from limaml.io.storage import Storage

TODAY = date(2026, 11, 28)
CONFIGS = Path(__file__).parents[3] / "configs"
NUM_DAYS, USERS, ITEMS, ROWS_A_DAY = 6, 20, 12, 40


def movielens(folder: Path) -> date:
    """ratings.csv and movies.csv; the last day."""
    rng, first = random.Random(0), datetime(2015, 3, 1, tzinfo=UTC)
    with (folder / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["userId", "movieId", "rating", "timestamp"])
        for n in range(NUM_DAYS * ROWS_A_DAY):
            at = first + timedelta(days=n // ROWS_A_DAY, minutes=n % ROWS_A_DAY)
            writer.writerow([rng.randrange(1, USERS), rng.randrange(1, ITEMS), rng.randrange(1, 11) / 2, int(at.timestamp())])
    with (folder / "movies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["movieId", "title", "genres"])
        writer.writerow([1, "Toy Story (1995)", "Adventure|Animation|Children"])
        writer.writerow([2, "American President, The (1995) ", "Comedy"])
        writer.writerow([3, "Untitled", "(no genres listed)"])
        writer.writerows([n, f"Film {n} ({1980 + n})", "Drama"] for n in range(4, ITEMS))
    return (first + timedelta(days=NUM_DAYS - 1)).date()


def yambda(folder: Path) -> date:
    """listens.parquet; the last day."""
    rng = random.Random(0)
    rows = [
        {
            "uid": rng.randrange(USERS) * 10,
            "timestamp": (n // ROWS_A_DAY) * 86_400 + (n % ROWS_A_DAY) * 600,
            "item_id": rng.randrange(ITEMS),
            "is_organic": rng.randrange(2),
            "played_ratio_pct": rng.choice((0, 12, 49, 50, 100)),
            "track_length_seconds": 180,
        }
        for n in range(NUM_DAYS * ROWS_A_DAY)
    ]
    types = {"uid": pa.uint32(), "timestamp": pa.uint32(), "item_id": pa.uint32(), "is_organic": pa.uint8()}
    columns = types | {"played_ratio_pct": pa.uint16(), "track_length_seconds": pa.uint32()}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(columns.items()))), folder / "listens.parquet")
    return date(1970, 1, NUM_DAYS)


def ingested(folder: Path, name: str, last: date) -> Config:
    cfg = config.load(CONFIGS / name, [f"source.path={folder}", f"storage.root={folder / 'data'}"])
    assert check(cfg, TODAY).wrong == []
    summary = ingest_history(cfg, last, TODAY)
    assert (summary["ingested"], summary["rows"]) == (NUM_DAYS, NUM_DAYS * ROWS_A_DAY)
    return cfg


def test_movielens_25m(tmp_path: Path) -> None:
    last = movielens(tmp_path)
    cfg = ingested(tmp_path, "movielens_25m.toml", last)
    items = {row["item_id"]: row for row in Storage(cfg.storage.root).read_table("catalogue/items.parquet").to_pylist()}
    assert [items[n]["genres"] for n in "123"] == [["Adventure", "Animation", "Children"], ["Comedy"], None]
    assert [items[n]["year"] for n in "123"] == [1995, 1995, None]
    logged = read_logged(Storage(cfg.storage.root), schema.tables(cfg.features), through=last)
    with (tmp_path / "ratings.csv").open() as file:
        assert sum(logged["label"].to_pylist()) == sum(float(row["rating"]) >= 4 for row in csv.DictReader(file))


def test_yambda(tmp_path: Path) -> None:
    last = yambda(tmp_path)
    cfg = ingested(tmp_path, "yambda.toml", last)
    logged = read_logged(Storage(cfg.storage.root), schema.tables(cfg.features), through=last)
    given = pq.read_table(tmp_path / "listens.parquet")
    assert sum(logged["label"].to_pylist()) == sum(ratio >= 50 for ratio in given["played_ratio_pct"].to_pylist())
    assert set(logged["is_organic"].to_pylist()) == {"0", "1"}
    assert logged["timestamp"].to_pylist()[0].second % 5 == 0
