"""Follow a DAG run to its end: which task runs, how long each took, and the failing task's own error."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from limaml.errors import LimamlError
from limaml.local.airflow_api import AirflowApi, TaskInstance

POLL_S = 0.5
DONE_STATES = ("success", "failed", "skipped", "upstream_failed", "removed")
ACTIVE_STATES = ("queued", "running", "up_for_retry", "restarting")


class TaskFailedError(LimamlError):
    """A task of a followed run failed; the message is its own."""


@dataclass
class Timing:
    """What a run's tasks took, in order, and whether one of them was skipped (with its reason)."""

    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, object]] = field(default_factory=dict)


class Display:
    """One line a task: live where there is a terminal, printed at its end where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, name: str, state: str | None, seconds: float | None) -> None:
        if state in ACTIVE_STATES and name not in self._ended:
            if name not in self._lines:
                self._lines[name] = self._progress.add_task(name)
                if not self._console.is_terminal:
                    self._console.print(f"  {name} …", highlight=False)
            self._progress.update(self._lines[name], description=name if state == "running" else f"{name} ({state})")
        elif state in DONE_STATES and name not in self._ended:
            self._ended.add(name)
            if name in self._lines:
                self._progress.remove_task(self._lines[name])
            took = "" if seconds is None else f"{seconds:7.1f} s"
            self._console.print(f"  {name:<28} {state:<16}{took}", highlight=False)


def follow(api: AirflowApi, dag_id: str, run_id: str, display: Display, check_alive: Callable[[], None]) -> Timing:
    """Poll the run until it ends. Raises TaskFailedError with the error of the task that failed it."""
    while True:
        check_alive()
        # The run's state first: what is read of the tasks afterwards is at least as new.
        state = api.run_state(dag_id, run_id)
        tasks = api.task_instances(dag_id, run_id)
        for task in sorted(tasks, key=lambda task: (task.started is None, task.started, task.name)):
            display.show(f"{dag_id}.{task.name}", task.state, task.seconds)
        if state in ("success", "failed"):
            break
        time.sleep(POLL_S)
    failed = [task for task in tasks if task.state == "failed"]
    if state == "failed":
        raise TaskFailedError(
            "; ".join(_explain(api, dag_id, run_id, task) for task in failed) or f"{dag_id} failed without a failed task"
        )
    return _timing(api, dag_id, run_id, tasks)


def _timing(api: AirflowApi, dag_id: str, run_id: str, tasks: list[TaskInstance]) -> Timing:
    timing = Timing()
    for task in sorted((t for t in tasks if t.started), key=lambda task: (task.started, task.name)):
        if task.seconds is not None and task.state == "success":
            timing.seconds[f"{dag_id}.{task.name}"] = task.seconds
        result = api.result(dag_id, run_id, task)
        timing.results[task.name] = result
        if task.state == "skipped" and result:
            timing.skipped[task.name] = str(result.get("reason", ""))
    return timing


def _explain(api: AirflowApi, dag_id: str, run_id: str, task: TaskInstance) -> str:
    where = f"{dag_id}.{task.name} failed (try {task.try_number})"
    result = api.result(dag_id, run_id, task)
    if result.get("status") == "failed" and result.get("error") != "NoResult":
        return f"{where}: {result['error']}: {result['message']}"
    return f"{where}; the end of its log:\n{api.log_tail(dag_id, run_id, task)}"
