"""Logged rows to experiment on, ingested once through the project's own gates, snapshots and point-in-time join."""

from datetime import date
from pathlib import Path

import pyarrow as pa

from limaml.config import Config
from limaml.events.logged import read_logged
from limaml.events.sources import open_source
from limaml.io.storage import Storage
from limaml.schema import tables

WORK = Path("experiments/.work")
MOVIELENS = WORK / "movielens"
TODAY = date(2026, 11, 25)
"""Fixed: replayed days keep their place in time, so that the same command reads the same rows whenever it runs."""


def placed(cfg: Config, root: Path) -> Config:
    """`cfg` with its storage, Feast's files and its run folder below `root`."""
    return cfg.model_copy(
        update={
            "storage": cfg.storage.model_copy(update={"root": str(root / "data")}),
            "feast": cfg.feast.model_copy(
                update={
                    "registry": str(root / "feast" / "registry.db"),
                    "online_connection": str(root / "feast" / "online.db"),
                }
            ),
            "local": cfg.local.model_copy(update={"run_root": str(root)}),
        }
    )


def logged_rows(cfg: Config) -> pa.Table:
    """All rows of the configured source, ingested where they are not yet."""
    from limaml.events.ingest import ingest_history
    from limaml.features.feature_store import apply

    through = open_source(cfg, TODAY).days()[-1]
    apply(cfg)
    ingest_history(cfg, through, TODAY)
    return read_logged(Storage(cfg.storage.root), tables(cfg.features), through=through)
