"""What is ended is exactly what was started: by process id and start time, and by the stack's id in the environment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from limaml.local import processes

DEADLINE_S = 20.0
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a child in a session of its own, as Ray does with its daemons, writes its id and goes on.
WITH_DAEMON = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""
STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(600)
"""


@pytest.fixture
def stack_id() -> Iterator[str]:
    marker = f"test-{os.getpid()}-{time.monotonic_ns()}"
    yield marker
    for process in processes.marked(marker):
        process.kill()
        process.wait(5)


@pytest.fixture
def start(tmp_path: Path, stack_id: str) -> Callable[..., processes.Recorded]:
    def begin(argv: list[str], marker: str = stack_id) -> processes.Recorded:
        environment = {**os.environ, processes.MARKER: marker}
        return processes.start("p", argv, environment=environment, log=tmp_path / "p.log")

    return begin


def written(path: Path) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()


def test_start_leads_a_session_and_logs(start: Callable[..., processes.Recorded], stack_id: str) -> None:
    recorded = start([sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(600)"])
    assert processes.is_alive(recorded)
    assert os.getsid(recorded.pid) == recorded.pid
    assert written(Path(recorded.log)) == "hello\n"
    assert Path(recorded.log).stat().st_mode & 0o077 == 0
    assert processes.end([recorded], stack_id) == 1
    assert not processes.is_alive(recorded)


def test_a_process_id_given_to_somebody_else_is_not_ours(start: Callable[..., processes.Recorded], stack_id: str) -> None:
    other = start(SLEEP, "another-stack")
    earlier = replace(other, started=other.started - 100.0)
    try:
        assert not processes.is_alive(earlier)
        assert processes.end([earlier], stack_id) == 0
        assert processes.is_alive(other)
    finally:
        processes.end([other], "another-stack")


def test_daemons_in_other_sessions_end_too_and_strangers_stay(
    start: Callable[..., processes.Recorded], stack_id: str, tmp_path: Path
) -> None:
    recorded = start([sys.executable, "-c", WITH_DAEMON, str(tmp_path / "pid")])
    daemon = psutil.Process(int(written(tmp_path / "pid")))
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        assert processes.end([recorded], stack_id) == 2
        assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_daemon_is_found_after_its_parent_is_gone(
    start: Callable[..., processes.Recorded], stack_id: str, tmp_path: Path
) -> None:
    recorded = start([sys.executable, "-c", WITH_DAEMON, str(tmp_path / "pid")])
    daemon = int(written(tmp_path / "pid"))
    os.kill(recorded.pid, signal.SIGKILL)
    os.waitpid(recorded.pid, 0)
    assert [process.pid for process in processes.marked(stack_id)] == [daemon]
    assert processes.end([recorded], stack_id) == 1


def test_what_ignores_sigterm_is_killed_after_the_grace(
    start: Callable[..., processes.Recorded], stack_id: str, tmp_path: Path
) -> None:
    recorded = start([sys.executable, "-c", STUBBORN, str(tmp_path / "ready")])
    written(tmp_path / "ready")
    started = time.monotonic()
    processes.end([recorded], stack_id, grace_s=1.0)
    assert not processes.is_alive(recorded)
    assert time.monotonic() - started >= 1.0


def test_tail_is_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(100)))
    assert processes.tail(path, 2) == "line 98\nline 99"
    assert processes.tail(tmp_path / "none") == "(no log)"


def test_recorded_survives_json(start: Callable[..., processes.Recorded], stack_id: str) -> None:
    recorded = start(SLEEP)
    values: dict[str, Any] = recorded.to_dict()
    assert processes.is_alive(processes.Recorded(**values))
    # The kernel shows a new process's environment a moment after it is started, so the fixture may not find it.
    processes.end([recorded], stack_id)
