"""The one operator: a CLI verb as a process beside Airflow, its result file and exit code as the outcome of a task."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

RESULT_KEY = "result"
"""XCom key of the result file, pushed whatever the outcome; `make run` and the next task read it."""
REPOSITORY = Path(__file__).resolve().parents[1]
EXIT_SKIP = 99
EXITS_WITHOUT_RETRY = (2, 65)
KILL_GRACE_S = 5.0
POLL_S = 0.5


class VerbOperator(BaseOperator):
    """Run `limaml <verb> <arguments> --result FILE` from an argv list, never through a shell.

    Each element of `arguments` is a template of its own and stays one argument whatever it renders to; one that renders
    to nothing is left out. `shard` adds `--shard=N`, for mapped tasks. With `returns`, that field of the result is the
    task's return value, over which a later task can be mapped; the whole result is under the XCom key `result` either way.

    Exit codes: 0 success; 99 skips what follows, the run stays green; 2 and 65 fail without retry; others are retried.
    The process ends with its task: on kill and time-out with SIGTERM, then SIGKILL, and also if Airflow's supervisor dies.

    The interpreter is Airflow's own unless `[limaml] python` (AIRFLOW__LIMAML__PYTHON) names another.
    """

    template_fields: Collection[str] = ("arguments",)
    ui_color = "#dbe9f6"

    def __init__(
        self, *, verb: str, arguments: Sequence[str] = (), shard: int | None = None, returns: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.verb = verb
        self.arguments = list(arguments)
        self.shard = shard
        self.returns = returns
        self._process: subprocess.Popen[bytes] | None = None
        self._kill_at = float("inf")

    def execute(self, context: Context) -> Any:
        with tempfile.TemporaryDirectory(prefix="limaml-") as folder:
            path = Path(folder) / "result.json"
            exit_code = self._run([*self._argv(), f"--result={path}"])
            result = _read_result(path, self.verb, exit_code)
        context["ti"].xcom_push(RESULT_KEY, result)
        message = f"limaml {self.verb}: {result.get('error', '')}: {result.get('message', '')}"
        if exit_code == EXIT_SKIP:
            raise AirflowSkipException(result.get("reason", "nothing to do"))
        if exit_code in EXITS_WITHOUT_RETRY:
            raise AirflowFailException(message)
        if exit_code != 0:
            raise AirflowException(message)
        return result[self.returns] if self.returns else None

    def on_kill(self) -> None:
        """Called from a signal handler, so it only signals; the loop in `_run` waits, and sends SIGKILL after the grace."""
        if self._process is not None:
            self._kill_at = time.monotonic() + KILL_GRACE_S
            _signal_group(self._process, signal.SIGTERM)

    def _argv(self) -> list[str]:
        python = conf.get("limaml", "python", fallback=sys.executable)
        shard = [] if self.shard is None else [f"--shard={self.shard}"]
        return [python, "-m", "limaml.cli", self.verb, *(a for a in self.arguments if a), *shard]

    def _run(self, argv: list[str]) -> int:
        """Run to the end, every line of output into the task's log; returns the exit code (negative: ended by that signal)."""
        self.log.info("Running %s", argv)
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
                    raise AirflowException(f"Airflow's supervisor (pid {supervisor}) is gone; ending limaml {self.verb}")
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
            self.log.info("%s", line)


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


def _read_result(path: Path, verb: str, exit_code: int) -> dict[str, Any]:
    """The verb's own account, or ours if it ended without leaving one (killed, or wrong usage)."""
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    if exit_code == 0:
        raise AirflowFailException(f"limaml {verb} succeeded without a result file; every verb must leave one")
    how = f"ended by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return {"verb": verb, "status": "failed", "error": "NoResult", "message": f"{how} without a result; see the log above"}
