"""Verbs as real processes that kill or stop themselves at an exact point of the code.

Each is forked from a server that has imported the packages (multiprocessing's forkserver): it starts in a tenth of a second,
not in the six that the imports take.
"""

import ctypes
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.polling import wait_for

DEADLINE_S = 1800.0
"""A verb takes about a second, a training ten; on a machine with a load of 25 on two cores a training was seen to take 640."""
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        "feast",
        "mlflow",
        "great_expectations",
        "limaml.cli",
        "limaml.embeddings.daily",
        "limaml.embeddings.cutover",
        "limaml.events.gates",
        "limaml.events.ingest",
        "limaml.features.feature_store",
        "limaml.models.bundle",
        "limaml.monitoring.published",
    ]
)


@dataclass(frozen=True)
class Point:
    """Where a process sends itself a signal: before call number `call` of a function, named as `module:Class.method`.

    With `of`, only calls count whose first argument has this name.
    """

    where: str
    call: int = 1
    sends: signal.Signals = signal.SIGKILL
    of: str = ""

    def arm(self) -> None:
        module, _, path = self.where.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        original, calls = getattr(owner, name), itertools.count(1)

        @functools.wraps(original)
        def reached(*arguments: Any, **named: Any) -> Any:
            counts = not self.of or arguments[0].name == self.of
            if counts and next(calls) == self.call:
                os.kill(os.getpid(), self.sends)
            return original(*arguments, **named)

        setattr(owner, name, reached)


class Verb:
    """A process of the command line, its log, and its result once it has ended."""

    def __init__(
        self, folder: Path, arguments: list[str], at: Point | None = None, clock_back_s: float = 0.0, **environment: str
    ) -> None:
        """Start it; its clock, and its lease's database's, show `clock_back_s` less than this process's."""
        number = len(list(folder.glob("verb*.log")))
        self.log_path, self._result_path = folder / f"verb{number}.log", folder / f"verb{number}.json"
        argv = ["limaml", *arguments, "--result", str(self._result_path)]
        self.log_path.touch()
        self.process = _FORKED.Process(target=_run, args=(argv, str(self.log_path), at, clock_back_s, environment), daemon=True)
        self.process.start()

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for_log(self, text: str) -> None:
        def logged() -> bool:
            assert self.process.is_alive() or text in self.log(), self.log()
            return text in self.log()

        wait_for(logged, f"{text} in the log of {self.log_path}", DEADLINE_S)

    def wait_until_stopped(self) -> None:
        """Wait for its `Point` of SIGSTOP."""
        state = Path(f"/proc/{self.process.pid}/stat")

        def stopped() -> bool:
            assert self.process.is_alive(), self.log()
            return state.read_text().rpartition(") ")[2].startswith("T")

        wait_for(stopped, "the process to stand still", DEADLINE_S)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def killed(self) -> None:
        """It ended by SIGKILL, as its `Point` says."""
        assert self._code() == -signal.SIGKILL, self.log()

    def ended(self) -> tuple[int, dict[str, Any]]:
        """Its exit code and its result."""
        code = self._code()
        assert self._result_path.exists(), self.log()
        return code, json.loads(self._result_path.read_text())

    def done(self) -> dict[str, Any]:
        """Its result, once it has ended well."""
        code, result = self.ended()
        assert code == 0, self.log()
        return result

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join(DEADLINE_S)

    def _code(self) -> int:
        self.process.join(DEADLINE_S)
        assert self.process.exitcode is not None, f"it did not end within {DEADLINE_S} s:\n{self.log()}"
        return self.process.exitcode


def _run(argv: list[str], log_path: str, at: Point | None, clock_back_s: float, environment: Mapping[str, str]) -> None:
    """What the forked process does."""
    pr_set_pdeathsig = 1  # prctl(2)
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update(environment)
    if clock_back_s:
        _set_clock_back(clock_back_s)
    if at is not None:
        at.arm()
    from limaml import cli

    sys.argv = argv
    cli.main()


def _set_clock_back(seconds: float) -> None:
    """Of what reads it in the verbs of an installation: instants in tags, and the lease."""
    from limaml.embeddings import cutover, fill
    from limaml.io import lease

    instant = fill.now
    fill.now = cutover.now = lambda: instant() - timedelta(seconds=seconds)
    lease._NOW["sqlite"] = f"({lease._NOW['sqlite']} - {seconds})"
