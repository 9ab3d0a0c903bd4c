"""The runner `process`: a verb beside Airflow, on the same machine, its output in the task's log line by line."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from airflow.sdk import Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException

REPOSITORY = Path(__file__).resolve().parents[1]
KILL_GRACE_S = 5.0
POLL_S = 0.5


class ProcessRunner:
    """The process ends with its task: on kill and time-out with SIGTERM, then SIGKILL, and also if Airflow's supervisor dies.

    The interpreter is Airflow's own unless `[limaml] python` (AIRFLOW__LIMAML__PYTHON) names another.
    """

    def __init__(self, verb: str, log: Any) -> None:
        self._verb = verb
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._kill_at = float("inf")

    def run(self, arguments: Sequence[str], context: Context) -> tuple[int, dict[str, Any] | None, str]:  # noqa: ARG002
        """Run to the end; returns the exit code, the result if there is one, and how it ended without one."""
        python = conf.get("limaml", "python", fallback=sys.executable)
        with tempfile.TemporaryDirectory(prefix="limaml-") as folder:
            path = Path(folder) / "result.json"
            exit_code = self._run([python, "-m", "limaml.cli", *arguments, f"--result={path}"])
            result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        how = f"ended by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return exit_code, result, f"{how} without a result; see the log above"

    def kill(self) -> None:
        """Called from a signal handler, so it only signals; the loop in `_run` waits, and sends SIGKILL after the grace."""
        if self._process is not None:
            self._kill_at = time.monotonic() + KILL_GRACE_S
            _signal_group(self._process, signal.SIGTERM)

    def _run(self, argv: list[str]) -> int:
        """Run to the end, every line of output into the task's log; returns the exit code (negative: ended by that signal)."""
        self._log.info("Running %s", argv)
        # Airflow's own settings, its secrets among them, are no business of a verb.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("AIRFLOW__")}
        environment["LIMAML_PARENT_PID"] = str(os.getpid())
        supervisor = os.getppid()
        self._process = process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            lines = _Lines(process.stdout)
            while process.poll() is None:
                self._log_lines(lines.read(POLL_S))
                if os.getppid() != supervisor:
                    raise AirflowException(f"Airflow's supervisor (pid {supervisor}) is gone; ending limaml {self._verb}")
                if time.monotonic() > self._kill_at:
                    _signal_group(process, signal.SIGKILL)
            # Not until end of file: a daemon that the verb left behind may hold the pipe open.
            self._log_lines(lines.read(0.0))
            self._log_lines(lines.rest())
            return process.returncode
        finally:
            _end(process)
            self._process = None

    def _log_lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._log.info("%s", line)


class _Lines:
    """Whole lines from a pipe, without ever blocking longer than asked."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._buffer = b""
        os.set_blocking(pipe.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def read(self, timeout_s: float) -> list[str]:
        """Wait at most `timeout_s` for output, then return all whole lines there are."""
        if self._selector.get_map() and self._selector.select(timeout_s):
            self._drain()
        elif not self._selector.get_map():
            time.sleep(min(timeout_s, 0.05))  # output is closed, the process still there
        *whole, self._buffer = self._buffer.split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def rest(self) -> list[str]:
        """The last line, if it did not end in a newline."""
        line, self._buffer = self._buffer, b""
        return [line.decode(errors="replace")] if line else []

    def _drain(self) -> None:
        while True:
            try:
                chunk = os.read(self._pipe.fileno(), 65536)
            except BlockingIOError:
                return
            if not chunk:
                self._selector.unregister(self._pipe)
                return
            self._buffer += chunk


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Signal the verb and what it started; it leads its own process group and is not reaped yet, so the id is still its."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Make sure that nothing of the verb is left: SIGTERM, a grace, SIGKILL."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
