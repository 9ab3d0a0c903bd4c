"""The operator with real processes: injection, exit codes, results, kill, time-out, and a supervisor killed outright."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, AirflowTaskTimeout
from airflow.sdk.execution_time.task_runner import _run_execute_callable
from structlog.testing import capture_logs

from dags.process import KILL_GRACE_S
from dags.verb import VerbOperator

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0
HOSTILE = ["--day=$(touch pwned); rm -rf x", "`touch pwned`", "a b\tc\n--set=x", "'; touch pwned #", "--set=a.b=${HOME}"]
RECORD = "pathlib.Path(__file__).with_name('argv.json').write_text(json.dumps(sys.argv[1:]))\n"
SLEEP = """
import subprocess, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path(__file__).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


class Task:
    """One execution of an operator, as Airflow's task runner does it; `pushed` is what it pushed to XCom."""

    def __init__(self, **options: Any) -> None:
        self.operator = VerbOperator(task_id="t", **options)
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value

    def run(self) -> Any:
        context: Any = {"ti": self}
        return _run_execute_callable(context, self.operator.execute, self.operator)


def eventually(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S} s"
        time.sleep(0.02)
    return value


def written_pids(folder: Path) -> list[int]:
    path = folder / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_arguments_stay_literal_and_one_argument_each(verb_program: Callable[[str], Path]) -> None:
    folder = verb_program(RECORD + "leave()")
    task = Task(verb="ingest", arguments=[*HOSTILE, ""], shard=3)
    task.run()
    argv = json.loads((folder / "argv.json").read_text())
    assert argv[:3] == ["-m", "limaml.cli", "ingest"]
    assert argv[3:-1] == [*HOSTILE, "--shard=3"]  # the one that rendered to nothing is left out
    assert argv[-1].startswith("--result=")
    assert not list(folder.glob("**/pwned"))
    assert not (Path.cwd() / "pwned").exists()


def test_a_hostile_parameter_is_rendered_into_one_argument(verb_program: Callable[[str], Path]) -> None:
    folder = verb_program(RECORD + "leave()")
    task = Task(verb="ingest", arguments=["--day={{ params.day }}"])
    task.operator.render_template_fields({"params": {"day": HOSTILE[0]}})  # type: ignore[arg-type]
    task.run()
    assert json.loads((folder / "argv.json").read_text())[3:-1] == [f"--day={HOSTILE[0]}"]


def test_result_is_pushed_and_one_field_returned(verb_program: Callable[[str], Path]) -> None:
    verb_program("leave(shards=[0, 1], version='7')")
    task = Task(verb="plan-fill", returns="shards")
    assert task.run() == [0, 1]
    assert task.pushed == {"result": {"verb": "plan-fill", "status": "ok", "shards": [0, 1], "version": "7"}}
    plain = Task(verb="plan-fill")
    assert plain.run() is None


@pytest.mark.parametrize("code", [2, 65])
def test_configuration_and_data_errors_fail_without_retry(verb_program: Callable[[str], Path], code: int) -> None:
    verb_program(f"leave(status='failed', error='GateError', message='label must be 0 or 1')\nsys.exit({code})")
    task = Task(verb="ingest")
    with pytest.raises(AirflowFailException, match="limaml ingest: GateError: label must be 0 or 1"):
        task.run()
    assert task.pushed["result"]["message"] == "label must be 0 or 1"


@pytest.mark.parametrize("code", [1, 3])
def test_other_errors_are_left_to_the_retries(verb_program: Callable[[str], Path], code: int) -> None:
    verb_program(f"leave(status='failed', error='BusyError', message='busy')\nsys.exit({code})")
    with pytest.raises(AirflowException, match="BusyError: busy") as caught:
        Task(verb="publish").run()
    assert not isinstance(caught.value, AirflowFailException)


def test_nothing_to_do_skips_with_the_reason(verb_program: Callable[[str], Path]) -> None:
    verb_program("leave(status='refused', reason='per-user AUC below the global MLP')\nsys.exit(99)")
    task = Task(verb="evaluate")
    with pytest.raises(AirflowSkipException, match="per-user AUC below"):
        task.run()
    assert task.pushed["result"]["status"] == "refused"


@pytest.mark.fault("kill -9 of a verb under Airflow", after="the task says so and is retried")
def test_a_verb_killed_without_a_result_is_reported_and_retried(verb_program: Callable[[str], Path]) -> None:
    verb_program("os.kill(os.getpid(), 9)")
    task = Task(verb="train")
    with pytest.raises(AirflowException, match="ended by signal 9 without a result"):
        task.run()
    assert task.pushed["result"]["error"] == "NoResult"


def test_success_without_a_result_is_a_failure(verb_program: Callable[[str], Path]) -> None:
    verb_program("")
    with pytest.raises(AirflowFailException, match="without a result file"):
        Task(verb="train").run()


def test_output_reaches_the_log_while_the_verb_runs(verb_program: Callable[[str], Path]) -> None:
    """The program goes on only once its first line has been seen in the log, and gives up after the deadline."""
    folder = verb_program(
        "import time\nprint('first', flush=True)\nprint('to stderr', file=sys.stderr, flush=True)\n"
        f"go, end = pathlib.Path(__file__).with_name('go'), time.monotonic() + {DEADLINE_S}\n"
        "while not go.exists():\n    if time.monotonic() > end: sys.exit(3)\n    time.sleep(0.01)\n"
        "sys.stdout.write('no newline at the end')\nleave()"
    )
    with capture_logs() as logs:

        def release() -> None:
            eventually(lambda: "first" in [line["event"] for line in logs], "the first line in the log")
            (folder / "go").touch()

        releaser = threading.Thread(target=release)
        releaser.start()
        task = Task(verb="train")
        task.run()
        releaser.join()
    assert {"first", "to stderr", "no newline at the end"} <= {line["event"] for line in logs}
    assert list(task.pushed) == ["result"]  # output is no XCom


def test_a_daemon_that_keeps_the_pipe_open_does_not_hold_the_task(verb_program: Callable[[str], Path]) -> None:
    folder = verb_program(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "pathlib.Path(__file__).with_name('pids').write_text(str(child.pid))\nleave()"
    )
    started = time.monotonic()
    Task(verb="train").run()
    assert time.monotonic() - started < DEADLINE_S
    [daemon] = written_pids(folder)
    os.kill(daemon, signal.SIGKILL)


def test_on_kill_ends_the_verb_and_its_children(verb_program: Callable[[str], Path]) -> None:
    folder = verb_program(SLEEP)
    task = Task(verb="train")

    def kill() -> None:
        eventually(lambda: len(written_pids(folder)) == 2, "the verb's start")
        task.operator.on_kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(AirflowException, match="ended by signal 15"):
        task.run()
    killer.join()
    for pid in written_pids(folder):
        eventually(lambda pid=pid: gone(pid), f"the end of {pid}")


def test_a_verb_that_ignores_sigterm_is_killed_after_the_grace(verb_program: Callable[[str], Path]) -> None:
    folder = verb_program("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
    task = Task(verb="train")

    def kill() -> None:
        eventually(lambda: len(written_pids(folder)) == 2, "the verb's start")
        task.operator.on_kill()

    killer = threading.Thread(target=kill)
    killer.start()
    started = time.monotonic()
    with pytest.raises(AirflowException, match="ended by signal 9"):
        task.run()
    killer.join()
    assert time.monotonic() - started >= KILL_GRACE_S


def test_a_time_out_ends_the_verb(verb_program: Callable[[str], Path]) -> None:
    folder = verb_program(SLEEP)
    task = Task(verb="train", execution_timeout=timedelta(seconds=1))
    with pytest.raises(AirflowTaskTimeout):
        task.run()
    for pid in written_pids(folder):
        eventually(lambda pid=pid: gone(pid), f"the end of {pid}")


SUPERVISOR = """
import os, sys, time
sys.path.insert(0, {root!r})
pid = os.fork()
if pid == 0:
    from airflow.sdk.execution_time.task_runner import _run_execute_callable
    from dags.verb import VerbOperator
    operator = VerbOperator(task_id="t", verb="train")
    class Ti:
        def xcom_push(self, key, value): pass
    _run_execute_callable(dict(ti=Ti()), operator.execute, operator)
    os._exit(0)
open({task_pid!r}, "w").write(str(pid))
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["supervisor", "task"])
@pytest.mark.fault("kill -9 of a task's supervisor, and of the task", after="the verb ends with it, so that a retry is alone")
def test_the_verb_ends_when_a_parent_is_killed_outright(verb_program: Callable[[str], Path], victim: str) -> None:
    """SIGKILL gives nobody a chance to clean up: the task notices a lost supervisor, the verb a lost task."""
    folder = verb_program(
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom limaml.cli import _die_with_parent\n_die_with_parent()\n"
        "import time\npathlib.Path(__file__).with_name('pids').write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    task_pid = folder / "task_pid"
    script = SUPERVISOR.format(root=str(ROOT), task_pid=str(task_pid))
    with (folder / "log").open("w") as log:
        supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log)
    try:
        [verb] = eventually(lambda: written_pids(folder), "the verb's start")
        killed = supervisor.pid if victim == "supervisor" else int(task_pid.read_text())
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: gone(verb), "the verb's end")
    finally:
        supervisor.kill()
        supervisor.wait()
