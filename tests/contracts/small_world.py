"""A generated world of a few hundred rows, a candidate trained on it in this process, and the service without HTTP.

Ingestion, gates, training, registry, Feast and the service's parts are the real ones; Ray, Airflow and BentoML are left out.
"""

import asyncio
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from limaml import schema
from limaml.config import Config
from limaml.governance import leakage
from limaml.registry import FINGERPRINT, Registry
from limaml.tasks.splits import split_events
from limaml.training.candidate import Candidate, fingerprint, lineage_of, save_candidate
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.step import Workers
from limaml.training.twin_and_refit import train_twin_and_refit
from serving.api import request_model
from serving.champion import Champion
from serving.metrics import Metrics
from serving.ranker import Ranker
from serving.request_log import RequestLog
from serving.store_calls import StoreCalls
from tests import declared
from tests.polling import wait_for

ROOT = Path(__file__).parents[2]


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    """A few steps of training, a gate that lets pass whatever it can measure; sections are added to by keyword."""
    values: dict[str, Any] = {
        "features": declared.FEATURES,
        "source": {
            "kind": "synthetic",
            "synthetic_users": 30,
            "synthetic_items": 20,
            "synthetic_days": 24,
            "synthetic_rows_per_user": 20,
            "synthetic_arrival_share": 0.2,
            "synthetic_first_share": 0.3,
            "min_rows_ratio": 0.01,
        },
        "storage": {"root": str(folder / "data")},
        # The days lie in the past: how far does not matter here.
        "task_kinds": [{"name": "user", "max_lag_s": 1e10}],
        "model": {"embedding_dim": 6, "global_hidden": [8], "meta_hidden": [8], "id_dim": 4, "sequence_width": 8},
        # Rates that no block diverges with, before it has learned its own.
        "meta": {"support_rows": 8, "query_rows": 6, "inner_steps": 2, "inner_lr": 0.3, "factor_inner_lr": 3.0},
        "training": {"num_workers": 1, "max_steps": 6, "tasks_per_step": 6, "validate_every": 3, "outer_lr": 0.02},
        "evaluation": {"first_k": [0, 2], "min_query_rows": 1, "bootstrap_draws": 20, "baseline_steps": 3},
        "promotion": {
            "gate_k": 2,
            "per_user_margin": 1.0,
            "as_served_margin": 1.0,
            "champion_margin": 1.0,
            "max_refit_psi": 1e3,
        },
        "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")},
        "feast": {
            "repo_path": str(ROOT / "feature_repo"),
            "registry": str(folder / "registry.db"),
            "online_connection": str(folder / "online.db"),
        },
        "embeddings": {"lease_url": f"sqlite:///{folder}/lease.db", "min_dwell_s": 0.0, "min_norm": 0.0},
        # On a busy machine a read may take longer than the default; here it must not fall back.
        "serving": {"store_timeout_s": 4.0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


def train(cfg: Config, through: date, folder: Path) -> Path:
    """What `limaml train` leaves, by this process alone; returns the candidate's folder."""
    registry, logged = Registry(cfg.registry), read_history(cfg, through)
    split = split_events(logged, cfg.evaluation)
    encoders = fit_encoders(cfg, logged, split)
    findings = leakage.check(cfg, logged, split, encoders[0])
    data = load_training_data(cfg, through, *encoders)
    state = train_twin_and_refit(cfg, data, Workers(), torch.device("cpu"), resume=None, save=lambda _: None)
    assert state.twin_progress is not None
    mark, best = fingerprint(cfg, through), state.twin_progress
    run_id = registry.start_run(f"train-{through}", {}, {FINGERPRINT: mark})
    found = Candidate(mark, run_id, through.isoformat(), best.best_step, float(best.best_value or "nan"), 1.0)
    save_candidate(cfg, folder, state, encoders, lineage_of(cfg, through, mark, split), found, findings)
    registry.end_run(run_id)
    return folder


class Service:
    """The service's poller and ranker; a question polls the registry first, as the thread does."""

    def __init__(self, cfg: Config) -> None:
        metrics = Metrics(CollectorRegistry())
        metrics.start([kind.name for kind in cfg.task_kinds], [])
        self._champion, self._calls, self._log = Champion(cfg, metrics), StoreCalls(cfg.serving), RequestLog(cfg)
        self._ranker = Ranker(cfg, metrics, self._champion, self._calls, self._log)
        self._request = request_model(cfg.serving.max_candidates, schema.tables(cfg.features))

    def ranked(self, user: str, items: list[str], context: dict[str, Any]) -> dict[str, Any]:
        self._champion.poll()
        body = {"user_id": user, "item_ids": items, "context": {"at": datetime.now(UTC).isoformat()} | context}
        answer = asyncio.run(self._ranker.rank(self._request.model_validate_json(json.dumps(body))))
        found: dict[str, Any] = json.loads(answer)
        return found

    def ranked_when(self, condition: Any, user: str, items: list[str], context: dict[str, Any]) -> None:
        wait_for(lambda: condition(self.ranked(user, items, context)), "an answer that fulfils the condition")

    def stop(self) -> None:
        self._champion.stop()
        self._calls.stop()
        self._log.close()
