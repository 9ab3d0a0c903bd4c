"""The stack's bookkeeping: ports, secrets, the record, the lock, the environment of its processes, and waiting."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limaml.config import Config, load
from limaml.errors import BusyError, LimamlError
from limaml.local import processes, stack

ROOT = Path(__file__).parents[3]


@pytest.fixture
def cfg(tmp_path: Path, free_ports: Callable[[int], list[int]]) -> Config:
    airflow, mlflow, service = free_ports(3)
    overrides = [
        f"local.run_root={tmp_path}/run",
        f"local.airflow_port={airflow}",
        f"local.mlflow_port={mlflow}",
        f"serving.port={service}",
    ]
    return load(ROOT / "configs" / "movielens.toml", overrides)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_taken_port_is_named_with_its_owner_and_the_setting_before_anything_starts(cfg: Config, listener: int) -> None:
    local = cfg.local.model_copy(update={"mlflow_port": listener})
    with pytest.raises(LimamlError) as caught:
        stack.new_stack(cfg.model_copy(update={"local": local}), Path("unused"))
    message = str(caught.value)
    assert f"nothing was started: port {listener} (for MLflow) is taken by" in message
    assert f"(pid {os.getpid()})" in message
    assert "--set local.mlflow_port=PORT" in message
    assert not Path(cfg.local.run_root).exists()


def test_secrets_are_made_once_and_are_the_owners_alone(cfg: Config, tmp_path: Path) -> None:
    first = stack.new_stack(cfg, tmp_path / "config.json")
    secret = (first.root / "airflow" / "jwt_secret").read_text()
    again = stack.new_stack(cfg, tmp_path / "config.json")
    assert len(secret) >= 64
    assert first.password == again.password
    assert (again.root / "airflow" / "jwt_secret").read_text() == secret
    for name in ("airflow/jwt_secret", "airflow/passwords.json", "stack.json"):
        assert (first.root / name).stat().st_mode & 0o077 == 0, name
    assert secret not in (first.root / "stack.json").read_text()


def test_the_environment_keeps_homes_under_the_run_folder_and_foreign_settings_out(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "SequentialExecutor")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    environment = stack.new_stack(cfg, tmp_path / "config.json").environment
    root = str(tmp_path / "run")
    for name in ("HOME", "AIRFLOW_HOME", "BENTOML_HOME", "MPLCONFIGDIR"):
        assert environment[name].startswith(root), name
    assert environment["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert "XDG_CACHE_HOME" not in environment
    assert "MLFLOW_TRACKING_URI" not in environment
    assert "127.0.0.1" in environment["NO_PROXY"].split(",")
    assert environment["TZ"] == "UTC"
    assert environment["LIMAML_CONFIG"] == str(tmp_path / "config.json")


def test_a_recorded_stack_is_found_while_it_runs_and_ended_by_stop(cfg: Config, tmp_path: Path) -> None:
    assert stack.load_stack(cfg, tmp_path / "config.json") is None
    assert stack.stop(cfg) == 0
    running = stack.new_stack(cfg, tmp_path / "config.json")
    running.start("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"])
    found = stack.load_stack(cfg, tmp_path / "config.json")
    assert found is not None
    assert found.whole()
    assert found.running("sleeper")
    assert not found.running("service")
    assert found.urls == running.urls
    assert stack.stop(cfg) == 1
    assert not running.running("sleeper")
    assert stack.load_stack(cfg, tmp_path / "config.json") is None
    assert stack.stop(cfg) == 0


def test_waiting_ends_with_the_log_of_a_process_that_died(cfg: Config, tmp_path: Path) -> None:
    running = stack.new_stack(cfg, tmp_path / "config.json")
    running.start("broken", [sys.executable, "-c", "raise SystemExit('no such table: dag')"])
    with pytest.raises(LimamlError, match=r"(?s)broken \(pid \d+\) has ended.*no such table: dag"):
        stack.wait_until(lambda: False, "the broken one", running, timeout_s=20.0)


def test_waiting_has_a_limit(cfg: Config, tmp_path: Path) -> None:
    running = stack.new_stack(cfg, tmp_path / "config.json")
    with pytest.raises(LimamlError, match=r"the moon was not ready within 0\.1 s"):
        stack.wait_until(lambda: False, "the moon", running, timeout_s=0.1)


def test_one_run_at_a_time(cfg: Config) -> None:
    with stack.exclusive(cfg), pytest.raises(BusyError, match="another `make run` is at work"), stack.exclusive(cfg):
        raise AssertionError("two at once")
    with stack.exclusive(cfg):
        assert processes.marked("nobody") == []
