"""A person's way to a training: Airflow's page in a real browser, the form with other values than its defaults, the outcome."""

import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from limaml.config import Config
from limaml.local import run, stack
from limaml.local.airflow_api import AirflowApi
from limaml.local.stack import Stack
from tests.e2e.installed import installed

ROOT = Path(__file__).parents[2]
DEADLINE_S = 900.0


@pytest.fixture
def running(tmp_path: Path, free_ports: Callable[[int], list[int]]) -> Iterator[tuple[Config, Stack]]:
    """Airflow and MLflow as `make run` starts them, on generated data, nothing trained."""
    cfg = installed(tmp_path / "run", free_ports(3))
    try:
        yield cfg, run.ready_stack(cfg)
    finally:
        stack.stop(cfg)


@pytest.mark.services
def test_a_training_is_triggered_from_the_form_with_other_parameters(running: tuple[Config, Stack]) -> None:
    cfg, served = running
    through = run.read_status(cfg, date.today()).through
    browser = [ROOT / "tests" / ".venv" / "bin" / "python", ROOT / "tests" / "browser.py"]
    where = [served.urls["airflow"], served.root / "airflow" / "passwords.json", "limaml_train"]
    typed = [f"through={through}", "inner_steps=2", "workers=1"]
    done = subprocess.run(
        [str(part) for part in [*browser, *where, *typed]],
        env={**os.environ, "HOME": str(cfg.local.run_root)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Success"
    api = AirflowApi(served.urls["airflow"], "admin", served.password)
    try:
        [ran] = api._call("GET", "/api/v2/dags/limaml_train/dagRuns")["dag_runs"]
        assert (ran["state"], ran["run_type"]) == ("success", "manual")
        assert ran["conf"] == {"through": through.isoformat(), "inner_steps": 2, "workers": 1}
        [train] = [task for task in api.task_instances("limaml_train", ran["dag_run_id"]) if task.task_id == "train"]
        assert "--set=meta.inner_steps=2" in api.log_tail("limaml_train", ran["dag_run_id"], train, lines=10_000)
    finally:
        api.close()
