"""What a release leaves on disk, kept as test data: `python -m tools.release_data tests/data/release-0.1`.

One archive of a small installation on the generated world: storage root, a registered and filled model version, MLflow's and
Feast's databases, the online store, the lease. The world's last day is not taken in yet: a later release is to do that. Beside
it `expected.json`: scores of the last stored day's rows by the bundle. Run once a release; the releases before keep theirs.
"""

import json
import sys
import tarfile
import tempfile
from datetime import date, timedelta
from pathlib import Path

import torch

from limaml import schema
from limaml.config import Config, load
from limaml.embeddings import cutover, fill
from limaml.events.ingest import ingest_history
from limaml.events.logged import read_logged
from limaml.events.sources import open_source
from limaml.features.feature_store import apply
from limaml.io.storage import Storage
from limaml.models import bundle
from limaml.models.network import build_network
from limaml.registry import Registry
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import TaskRows
from limaml.tasks.splits import split_events
from limaml.training.prepare import fit_encoders, load_training_data
from limaml.training.scoring import score_specs
from limaml.training.step import Workers
from limaml.training.twin_and_refit import train_twin_and_refit

TODAY = date(2026, 6, 1)
ROOT = "/the/installation"
"""Stands for the folder that it lies in, in its configuration; MLflow's and Feast's databases hold absolute paths as well."""
RUN = "release-data"


def configuration(root: str | Path, base: str = "configs/synthetic.toml") -> Config:
    """A few users and days, everything below `root`."""
    values = {
        "source.synthetic_users": 24,
        "source.synthetic_items": 12,
        "source.synthetic_days": 8,
        "source.synthetic_rows_per_user": 24,
        "source.min_rows_ratio": 0.05,
        "source.max_rows_ratio": 20.0,
        "source.min_label_rate": 0.0,
        "source.max_label_rate": 1.0,
        "storage.root": f"{root}/data",
        "registry.tracking_uri": f"sqlite:///{root}/mlflow.db",
        "registry.artifact_root": f"{root}/artifacts",
        "feast.registry": f"{root}/registry.db",
        "feast.online_connection": f"{root}/online.db",
        "embeddings.lease_url": f"sqlite:///{root}/lease.db",
        "training.num_workers": 1,
        "training.max_steps": 10,
        "local.run_root": f"{root}/run",
        "serving.log_path": f"{root}/requests",
        "monitoring.textfile_dir": f"{root}/metrics",
        "training.storage_path": f"{root}/ray",
    }
    return load(base, [f"{key}={value}" for key, value in values.items()])


def scores(cfg: Config, model: bundle.Model, day: date) -> dict[str, float]:
    """Event -> as-served score, of every row of `day`."""
    logged = read_logged(Storage(cfg.storage.root), schema.tables(cfg.features), through=day)
    rows = TaskRows.from_logged(logged, model.encoder, cfg.task_kind)
    from_us = int(schema.day_start(day).timestamp() * 1e6)
    specs = as_served(rows, from_us=from_us, support_rows=cfg.meta.support_rows)
    events = logged["event_id"].take(rows.source_row[query_rows(rows, specs).rows]).to_pylist()
    return dict(zip(events, score_specs(model.network, rows, specs).tolist(), strict=True))


def make(root: Path) -> dict[str, object]:
    """Build the installation; returns what a later release is to find in it."""
    cfg = configuration(root)
    last = open_source(cfg, TODAY).days()[-1]
    through = last - timedelta(days=1)
    apply(cfg)
    ingest_history(cfg, through, TODAY)
    logged = read_logged(Storage(cfg.storage.root), schema.tables(cfg.features), through=through)
    encoders = fit_encoders(cfg, logged, split_events(logged, cfg.evaluation))
    data = load_training_data(cfg, through, *encoders)
    state = train_twin_and_refit(cfg, data, Workers(), torch.device("cpu"), resume=None, save=lambda _: None)
    networks = [build_network(cfg, encoder.dims) for encoder in encoders]
    for network, weights in zip(networks, (state.twin, state.network), strict=True):
        network.load_state_dict(weights)
    twin, refit = (bundle.Model(network.eval(), encoder) for network, encoder in zip(networks, encoders, strict=True))
    folder = root / "candidate"
    bundle.save(bundle.Bundle(cfg, refit, twin, {"training": {}}, {"through": through.isoformat()}), folder)
    registry = Registry(cfg.registry)
    version = registry.register(folder, registry.start_run(RUN), {})
    for shard in fill.plan_fill(cfg, version, through, RUN)["shards"]:
        fill.fill_shard(cfg, version, shard, RUN)
    cutover.cut_over(cfg, version, RUN)
    (root / "config.json").write_text(configuration(ROOT).model_dump_json(indent=1))
    return {
        "made_in": str(root),
        "version": version,
        "complete_day": through.isoformat(),
        "next_day": last.isoformat(),
        "bundle_format": bundle.FORMAT_VERSION,
        "scores": scores(cfg, refit, through),
    }


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="limaml-release-") as folder:
        expected = make(Path(folder))
        with tarfile.open(target / "installation.tar.xz", "w:xz") as archive:
            for path in sorted(Path(folder).iterdir()):
                if path.name not in ("candidate", "run", "metrics"):
                    archive.add(path, path.name)
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
