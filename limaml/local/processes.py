"""Processes that outlive the command which started them: recorded exactly, found exactly, ended exactly.

A process id alone may have been given to somebody else since, so the start time is recorded beside it. What the recorded
processes start in their turn, Ray's daemons among it, is known by the stack's id in the environment they inherit.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

MARKER = "LIMAML_STACK_ID"
START_TIME_TOLERANCE_S = 2.0
"""The kernel counts from boot; seen as clock time, it moves when the clock is corrected."""


@dataclass(frozen=True)
class Recorded:
    """One process of the stack: `started` is its start time in seconds since the epoch."""

    name: str
    pid: int
    started: float
    log: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def start(name: str, argv: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Recorded:
    """Start `argv` as the leader of a session of its own, standard output and error appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(argv[0], list(argv), dict(environment), file_actions=actions, setsid=True)
    return Recorded(name, pid, psutil.Process(pid).create_time(), str(log))


def is_alive(recorded: Recorded) -> bool:
    try:
        process = psutil.Process(recorded.pid)
        same_start: bool = abs(process.create_time() - recorded.started) < START_TIME_TOLERANCE_S
        return same_start and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def activity(recorded: Recorded) -> tuple[int, float]:
    """Bytes in its log, and processor seconds of the process and of all that it started; both grow while it gets on."""
    path, seconds = Path(recorded.log), 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(recorded.pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return path.stat().st_size if path.exists() else 0, seconds


def marked(stack_id: str) -> list[psutil.Process]:
    """Every running process that inherited the stack's id, this one and its ancestors excepted."""
    own = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    return [p for p in psutil.process_iter() if p.pid not in own and _marker(p) == stack_id]


def end(recorded: Sequence[Recorded], stack_id: str, *, grace_s: float = 5.0) -> int:
    """End the recorded processes and all that inherited the stack's id; returns how many there were.

    SIGTERM to the recorded ones first, so that they end their own children; whatever is left after the grace gets SIGKILL.
    """
    ended: set[int] = set()
    left = _recorded(recorded) or marked(stack_id)
    deadline = time.monotonic() + grace_s
    while left:
        ended.update(process.pid for process in left)
        for process in left:
            _quietly(process.terminate if time.monotonic() < deadline else process.kill)
        psutil.wait_procs(left, timeout=1.0)
        left = list({*_recorded(recorded), *marked(stack_id)})
    return len(ended)


def tail(log: str | Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(Path(log).read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"


def _recorded(recorded: Sequence[Recorded]) -> list[psutil.Process]:
    """Those of the recorded processes that still run."""
    found = []
    for one in recorded:
        try:
            found += [psutil.Process(one.pid)] if is_alive(one) else []
        except psutil.NoSuchProcess:
            continue
    return found


def _marker(process: psutil.Process) -> str | None:
    try:
        marker: str | None = process.environ().get(MARKER)
        return marker
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None  # gone, a zombie, or another user's


def _quietly(signal: Any) -> None:
    try:
        signal()
    except psutil.NoSuchProcess:
        return
