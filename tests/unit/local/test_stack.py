"""The stack's bookkeeping: ports, secrets, the record, the lock, the environment of its processes, and waiting."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limaml.config import Config, LocalConfig, load
from limaml.errors import BusyError, ConfigError, LimamlError
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
        "local.prometheus_port=0",
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


def with_sections(cfg: Config, **sections: dict[str, object]) -> Config:
    changed = {name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    return cfg.model_copy(update=changed)


def test_airflow_and_mlflow_keep_their_state_where_they_are_told(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "p@ss")
    server = f"http://127.0.0.1:{cfg.local.mlflow_port}"
    local = {
        "airflow_database": "postgresql+psycopg2://me:${DB_PASSWORD}@db/airflow",
        "mlflow_database": "postgresql://db/mlflow",
    }
    ours = with_sections(cfg, local=local, registry={"tracking_uri": server})
    assert stack.starts_mlflow(ours)
    made = stack.new_stack(ours, tmp_path / "config.json")
    assert made.urls["mlflow"] == server
    assert made.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == "postgresql+psycopg2://me:p%40ss@db/airflow"
    with pytest.raises(ConfigError, match=rf"registry\.tracking_uri must be {server}, .* got http://elsewhere:5000; set it"):
        stack.new_stack(with_sections(ours, registry={"tracking_uri": "http://elsewhere:5000"}), tmp_path / "config.json")


def test_an_mlflow_of_somebody_else_is_not_started(cfg: Config, tmp_path: Path, listener: int) -> None:
    """Nor is the port looked at that it would have."""
    theirs = with_sections(cfg, local={"mlflow_port": listener}, registry={"tracking_uri": "https://mlflow.example"})
    assert not stack.starts_mlflow(theirs)
    assert stack.new_stack(theirs, tmp_path / "config.json").urls["mlflow"] == "https://mlflow.example"


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


AIRFLOW_RESOLVES = """
import asyncio, json
from airflow import settings
from airflow.configuration import conf
from airflow.executors.local_executor import LocalExecutor
from airflow.jobs.job import health_check_threshold
from airflow.sdk.api import client
from airflow.sdk.execution_time import supervisor
from airflow.dag_processing.manager import DagFileProcessorManager

with settings.engine.connect() as connection:
    lock_ms = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()

async def asynchronous():
    async with settings.async_engine.connect() as connection:
        waits_ms = (await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar()
    await settings.async_engine.dispose()
    return waits_ms

manager = DagFileProcessorManager(max_runs=1)
print(json.dumps({
    "lock_s": lock_ms / 1000,
    "asynchronous_lock_s": asyncio.run(asynchronous()) / 1000,
    "request_s": client.API_TIMEOUT,
    "scheduler_s": health_check_threshold("SchedulerJob", 5),
    "dag_processor_s": health_check_threshold("DagProcessorJob", 5),
    "overtime_s": supervisor.TASK_OVERTIME_THRESHOLD,
    "import_s": settings.get_dagbag_import_timeout("limaml_daily.py"),
    "file_s": manager.processor_timeout,
    "stale_s": manager.stale_dag_threshold,
    "queued_s": conf.getfloat("scheduler", "task_queued_timeout"),
    "heartbeat_s": supervisor.HEARTBEAT_TIMEOUT,
}))
"""


def test_airflow_waits_as_long_as_the_settings_say(cfg: Config, tmp_path: Path) -> None:
    local = cfg.local.model_copy(update={"ready_timeout_s": 233.5, "start_timeout_s": 3456.5})
    running = stack.new_stack(cfg.model_copy(update={"local": local}), tmp_path / "config.json")
    command = [sys.executable, "-c", AIRFLOW_RESOLVES]
    done = subprocess.run(command, cwd=ROOT, env=running.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout.splitlines()[-1])
    signs = ("lock_s", "asynchronous_lock_s", "request_s", "scheduler_s", "dag_processor_s", "overtime_s")
    work = ("import_s", "file_s", "stale_s", "queued_s", "heartbeat_s")
    assert resolved == dict.fromkeys(signs, 234) | dict.fromkeys(work, 3457)


# A child that misses its cue ends by itself, and then fails the test as a process that has ended.
PROCESS = "import pathlib, sys, time\nend = time.monotonic() + 60\n"
TALKS_THEN_READY = f"""{PROCESS}
for step in range(10):
    print("step", step, flush=True)
    time.sleep(0.4)
pathlib.Path(sys.argv[1]).touch()
while time.monotonic() < end: time.sleep(0.1)
"""
WORKS_THEN_READY = f"""{PROCESS}
done = time.monotonic() + 4
while time.monotonic() < done: pass
pathlib.Path(sys.argv[1]).touch()
while time.monotonic() < end: time.sleep(0.1)
"""
# 0.6 % of a core, whatever the machine's speed.
POLLS = f"""{PROCESS}
print("before the silence", flush=True)
while time.monotonic() < end:
    time.sleep(0.5)
    asleep = time.process_time()
    while time.process_time() - asleep < 0.003: pass
"""
CHATS = f"{PROCESS}\nwhile time.monotonic() < end: time.sleep(0.1); print('heartbeat', flush=True)"
SPINS = f"{PROCESS}\nwhile time.monotonic() < end: pass"
SILENCE_S = 2.0


@pytest.fixture
def running(cfg: Config, tmp_path: Path) -> Iterator[stack.Stack]:
    """A stack without processes; what a test starts ends with it."""
    yield stack.new_stack(cfg, tmp_path / "config.json")
    stack.stop(cfg)


def begin(running: stack.Stack, name: str, program: str, *arguments: str) -> None:
    running.start(name, [sys.executable, "-c", program, *arguments])


def limits(**values: float) -> LocalConfig:
    return LocalConfig.model_validate({"ready_timeout_s": SILENCE_S, "start_timeout_s": 50.0} | values)


@pytest.mark.parametrize("program", [TALKS_THEN_READY, WORKS_THEN_READY], ids=["its log grows", "it works"])
def test_what_makes_progress_is_waited_for_beyond_the_limit_of_silence(
    running: stack.Stack, tmp_path: Path, program: str
) -> None:
    begin(running, "slow", program, str(tmp_path / "ready"))
    started = time.monotonic()
    stack.wait_until((tmp_path / "ready").exists, "the slow one", running, "slow", limits())
    assert time.monotonic() - started > SILENCE_S


def test_what_goes_silent_is_given_up_whatever_the_others_say(running: stack.Stack) -> None:
    begin(running, "silent", POLLS)
    begin(running, "chatty", CHATS)
    begin(running, "busy", SPINS)
    with pytest.raises(LimamlError) as caught:
        # Long enough for the kernel's clock of processor time, which ticks every 10 ms, to show what the polling uses.
        stack.wait_until(lambda: False, "the moon", running, "silent", limits(ready_timeout_s=4.0))
    message = str(caught.value)
    assert message.startswith("the moon must be ready, write to its log or work within local.ready_timeout_s (4 s), got ")
    assert f"without a sign of life of silent (pid {running.processes[0].pid})" in message
    assert "--set local.ready_timeout_s=SECONDS" in message
    assert message.endswith(f"the end of {running.root}/logs/silent.log:\nbefore the silence")


@pytest.mark.parametrize("program", [CHATS, SPINS], ids=["it talks", "it works"])
def test_what_is_never_ready_is_given_up_at_the_upper_bound(running: stack.Stack, program: str) -> None:
    begin(running, "endless", program)
    with pytest.raises(
        LimamlError, match=r"the moon must be ready within local\.start_timeout_s \(4 s\), got \d+\.\d s of waiting"
    ):
        stack.wait_until(lambda: False, "the moon", running, "endless", limits(start_timeout_s=2 * SILENCE_S))


def test_waiting_ends_with_the_log_of_a_process_that_died(running: stack.Stack) -> None:
    begin(running, "sound", POLLS)
    begin(running, "broken", "raise SystemExit('no such table: dag')")
    with pytest.raises(LimamlError, match=r"(?s)broken \(pid \d+\) has ended.*no such table: dag"):
        stack.wait_until(lambda: False, "the sound one", running, "sound", limits(ready_timeout_s=30.0))


def test_one_run_at_a_time(cfg: Config) -> None:
    with stack.exclusive(cfg), pytest.raises(BusyError, match="another `make run` is at work"), stack.exclusive(cfg):
        raise AssertionError("two at once")
    with stack.exclusive(cfg):
        assert processes.marked("nobody") == []
