"""A candidate trained in this process on planted rows, with the logged rows it came from in a storage."""

from datetime import UTC, timedelta

import pyarrow.compute as pc
import pytest
import torch

from limaml import schema
from limaml.events.logged import write_logged
from limaml.governance import leakage
from limaml.io.storage import Storage
from limaml.tasks.splits import split_events
from limaml.training.candidate import Candidate, fingerprint, lineage_of, save_candidate
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.step import Workers
from limaml.training.twin_and_refit import train_twin_and_refit


@pytest.fixture(scope="session")
def planted_logged_large(make_planted):
    """3,600 rows of 90 users over 40 days: enough test users for a table."""
    return make_planted(num_users=90, rows_per_user=40)


@pytest.fixture
def make_candidate(planted_logged_large, small_config, tmp_path):
    """make_candidate(name, through=None, **sections) -> (cfg, folder, through); days are written once."""
    days = {value.astimezone(UTC).date() for value in pc.unique(planted_logged_large["timestamp"]).to_pylist()}
    storage = Storage(str(tmp_path / "data"))
    stamps = planted_logged_large["timestamp"]
    for day in sorted(days):
        mine = pc.and_(pc.greater_equal(stamps, schema.day_start(day)), pc.less(stamps, schema.day_end(day)))
        write_logged(storage, day, planted_logged_large.filter(mine), 1)

    def make(name: str, *, days_less: int = 0, **sections):
        through = max(days) - timedelta(days=days_less)
        cfg = small_config(storage={"root": str(tmp_path / "data")}, **sections)
        logged = read_history(cfg, through)
        split = split_events(logged, cfg.evaluation)
        encoders = fit_encoders(cfg, logged, split)
        findings = leakage.check(cfg, logged, split, encoders[0])
        data = load_training_data(cfg, through, *encoders)
        state = train_twin_and_refit(cfg, data, Workers(), torch.device("cpu"), resume=None, save=lambda _: None)
        mark = fingerprint(cfg, through)
        best = state.twin_progress
        found = Candidate(mark, "no-run", through.isoformat(), best.best_step, best.best_value, 1.0)
        save_candidate(cfg, tmp_path / name, state, encoders, lineage_of(cfg, through, mark, split), found, findings)
        return cfg, tmp_path / name, through

    return make
