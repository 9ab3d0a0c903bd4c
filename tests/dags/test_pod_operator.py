"""The operator with pods, by how a pod ends: the provider's real operator and client, and an API server of our own."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, AirflowTaskTimeout
from structlog.testing import capture_logs

from tests.dags.kubernetes_api import Fate, KubernetesApi
from tests.dags.pod_task import OK, ROLE, ROOT, Task, fate
from tests.polling import wait_for


def only_pod(api: KubernetesApi) -> dict[str, Any]:
    [pod] = api.pods.values()
    return pod.body


def test_success_is_the_result_of_the_termination_message(api: KubernetesApi) -> None:
    fate(api, message={**OK, "shards": [0, 1]}, log=('{"event": "begin"}', "plain", "last"))
    task = Task(verb="plan-fill", arguments=["--version=7", ""], returns="shards")
    with capture_logs() as logs:
        assert task.run() == [0, 1]
    assert task.pushed["result"] == {**OK, "shards": [0, 1]}
    assert {'{"event": "begin"}', "plain", "last"} <= {line["event"].rstrip() for line in logs}
    [pod] = api.created
    container = pod["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "limaml.cli"]
    assert container["args"] == ["plan-fill", "--version=7", "--result=/dev/termination-log"]
    assert container["terminationMessagePath"] == "/dev/termination-log"
    assert api.pods == {}  # it succeeded, so it is deleted
    assert "return_value" not in task.pushed


def test_without_returns_there_is_no_return_value(api: KubernetesApi) -> None:
    fate(api, message={**OK, "shards": [0, 1]})
    assert Task().run() is None


@pytest.mark.parametrize("code", [2, 65])
def test_configuration_and_data_errors_fail_without_retry(api: KubernetesApi, code: int) -> None:
    fate(api, exit_code=code, message={"verb": "ingest", "status": "failed", "error": "GateError", "message": "label"})
    task = Task()
    with pytest.raises(AirflowFailException, match=r"^limaml ingest: GateError: label$"):
        task.run()
    assert task.pushed["result"]["message"] == "label"
    assert only_pod(api)["metadata"]["labels"]["already_checked"] == "True"  # it stays for a look, and no try takes it


def test_nothing_to_do_skips_with_the_reason(api: KubernetesApi) -> None:
    fate(api, exit_code=99, message={"verb": "evaluate", "status": "refused", "reason": "per-user AUC below"})
    task = Task(verb="evaluate")
    with pytest.raises(AirflowSkipException, match=r"^per-user AUC below$"):
        task.run()
    assert task.pushed["result"]["status"] == "refused"


def test_other_errors_are_left_to_the_retries(api: KubernetesApi) -> None:
    fate(api, exit_code=1, message={"verb": "publish", "status": "failed", "error": "BusyError", "message": "busy"})
    with pytest.raises(AirflowException, match=r"^limaml publish: BusyError: busy$") as caught:
        Task(verb="publish").run()
    assert not isinstance(caught.value, AirflowFailException)


def test_success_without_a_result_is_a_failure(api: KubernetesApi) -> None:
    fate(api)
    with pytest.raises(AirflowFailException, match="without a result"):
        Task().run()


ENDS = {
    "out of memory": (
        {"exit_code": 137, "reason": "OOMKilled"},
        r'killed for want of memory \(OOMKilled, limits.memory is 3Gi; raise that of "ingest" in \[limaml\] pod_resources\)',
    ),
    "evicted while it ran": (
        {"exit_code": 137, "reason": "Error", "pod_reason": "Evicted", "pod_message": "The node was low on memory."},
        r"was ended \(Evicted: The node was low on memory\.\)",
    ),
    "evicted before it ran": (
        {"starts": False, "pod_reason": "Evicted", "pod_message": "The node had condition: [DiskPressure]."},
        r"was ended \(Evicted: The node had condition",
    ),
    "past its deadline": (
        {"exit_code": 143, "reason": "Error", "pod_reason": "DeadlineExceeded", "pod_message": "Pod was active too long"},
        r"was ended \(DeadlineExceeded: Pod was active too long\)",
    ),
    "killed": ({"exit_code": 137, "reason": "Error"}, "ended with exit code 137, Error without a result"),
    "no such program": (
        {"exit_code": 128, "reason": "StartError", "message": "exec: python: not found"},
        "ended with exit code 128, StartError: exec: python: not found",
    ),
    "cut": ({"exit_code": 1, "reason": "Error", "message": '{"verb": "inge'}, 'exit code 1, Error: {"verb": "inge'),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_without_a_result_is_named_and_retried(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, message = ENDS[name]
    monkeypatch.setenv("AIRFLOW__LIMAML__POD_RESOURCES", '{"ingest": {"limits": {"memory": "3Gi"}}}')
    fate(api, **options)
    task = Task()
    with pytest.raises(AirflowException, match=message) as caught:
        task.run()
    assert not isinstance(caught.value, AirflowFailException)
    assert task.pushed["result"]["error"] == "NoResult"
    assert only_pod(api)["metadata"]["labels"]["already_checked"] == "True"
    api.fates = [Fate(message=OK)]
    Task(try_number=2).run()  # the next try has a pod of its own
    assert len(api.created) == 2


def test_an_image_that_cannot_be_pulled_fails_at_once_and_its_pod_is_deleted(api: KubernetesApi) -> None:
    fate(api, waiting=("ErrImagePull", "registry.example.com/limaml/train: not found"))
    task = Task()
    with pytest.raises(
        AirflowException, match=r"did not start and was deleted: Image cannot be pulled.*ErrImagePull\n.*not found"
    ):
        task.run()
    assert task.pushed["result"]["status"] == "failed"
    assert api.pods == {}  # else it might start beside the next try's


def test_a_pod_that_does_not_start_in_time_is_deleted(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__LIMAML__POD_START_TIMEOUT", "0")
    fate(api, waiting=("ContainerCreating", ""))
    with pytest.raises(AirflowException, match="did not start and was deleted: Pod took too long to start"):
        Task().run()
    assert api.pods == {}


def test_a_log_that_breaks_is_followed_further(api: KubernetesApi) -> None:
    fate(api, message=OK, cuts=1, log=("first", "second"))
    with capture_logs() as logs:
        Task().run()
    assert {"first", "second"} <= {line["event"].rstrip() for line in logs}
    assert len(api.created) == 1


def test_an_api_that_is_away_for_a_moment_is_asked_again(api: KubernetesApi) -> None:
    fate(api, message=OK)
    refusals = iter([503, 500, 429])
    api.refusal = lambda verb, what: next(refusals, None) if (verb, what) == ("get", "pods") else None
    task = Task()
    task.run()
    assert task.pushed["result"] == OK
    assert len(api.created) == 1


@pytest.mark.parametrize("stored", [True, False], ids=["by its state", "by its labels"])
def test_an_api_that_is_away_for_long_leaves_the_pod_to_the_next_try(api: KubernetesApi, stored: bool) -> None:
    """The pod is neither deleted nor marked; the next try reconnects, although the pod's own try number is another."""
    store: dict[str, Any] | None = {} if stored else None
    fate(api, message=OK, until=threading.Event())
    api.refusal = lambda verb, what: 503 if what == "pods/log" else None
    with pytest.raises(AirflowException, match=r"API answered 503 .*: not now; pod limaml-ingest-\w+ goes on"):
        Task(store=store).run()
    api.refusal = lambda verb, what: None
    assert "already_checked" not in only_pod(api)["metadata"]["labels"]
    assert api.fates[0].until is not None
    api.fates[0].until.set()
    again = Task(try_number=2, store=store)
    again.run()
    assert again.pushed["result"] == OK
    assert len(api.created) == 1


WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.dags.pod_task import Task
Task(verb="ingest").run()
"""


def test_the_pod_outlives_a_worker_that_is_killed_and_the_next_try_finds_it(api: KubernetesApi, tmp_path: Path) -> None:
    end = threading.Event()
    fate(api, message=OK, until=end)
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen([sys.executable, "-c", WORKER.format(root=str(ROOT))], stdout=log, stderr=log)
    try:
        wait_for(lambda: ("get", "pods/log") in api.asked or worker.poll() is not None, "the worker at the pod's log", 120)
        assert worker.poll() is None, (tmp_path / "log").read_text()
        os.kill(worker.pid, signal.SIGKILL)
    finally:
        worker.kill()
        worker.wait()
    again = Task(try_number=2)
    threading.Timer(0.2, end.set).start()
    again.run()
    assert again.pushed["result"] == OK
    assert len(api.created) == 1


def test_a_failure_that_nobody_saw_is_the_next_tries(api: KubernetesApi) -> None:
    """It ended while no worker looked: its outcome is told, the try after that starts anew."""
    fate(api, exit_code=65, message={"verb": "ingest", "status": "failed", "error": "GateError", "message": "label"})
    api.refusal = lambda verb, what: 503 if what == "pods/log" else None
    with pytest.raises(AirflowException, match="goes on"):
        Task().run()
    api.refusal = lambda verb, what: None
    [pod] = api.pods.values()
    pod.ended = True
    with pytest.raises(AirflowFailException, match="GateError: label"):
        Task(try_number=2).run()
    api.fates = [Fate(message=OK)]
    Task(try_number=3).run()
    assert len(api.created) == 2


def test_a_pod_that_somebody_deleted_is_named(api: KubernetesApi) -> None:
    fate(api, message=OK, until=threading.Event())
    task = Task()

    def drain() -> None:
        wait_for(lambda: ("get", "pods/log") in api.asked, "the log")
        [name] = api.pods
        api.delete(name)

    drainer = threading.Thread(target=drain)
    drainer.start()
    with pytest.raises(AirflowException, match=r"pod limaml-ingest-\w+ was deleted before its result was read"):
        task.run()
    drainer.join()


def test_a_time_out_stays_a_time_out_and_deletes_the_pod(api: KubernetesApi) -> None:
    """The provider's own clean-up would raise in its place, and Airflow would not end the pod."""
    fate(api, message=OK, until=threading.Event())
    with pytest.raises(AirflowTaskTimeout):
        # Long enough for the pod to be made on a busy machine.
        Task(execution_timeout=timedelta(seconds=5)).run()
    assert api.pods == {}
    assert api.created[0]["spec"]["activeDeadlineSeconds"] == 5


def test_on_kill_deletes_the_pod(api: KubernetesApi) -> None:
    fate(api, message=OK, until=threading.Event())
    task = Task()

    def kill() -> None:
        wait_for(lambda: ("get", "pods/log") in api.asked, "the log")
        task.operator.on_kill()

    killer = threading.Thread(target=kill)
    killer.start()
    started = time.monotonic()
    with pytest.raises(AirflowException, match="was deleted"):
        task.run()
    killer.join()
    assert api.pods == {}
    assert time.monotonic() - started < 60  # Its pod would run for ever.


def test_a_role_that_lacks_a_right_is_a_plain_error(api: KubernetesApi) -> None:
    fate(api, message=OK)
    api.refusal = lambda verb, what: 403 if verb == "create" else None
    with pytest.raises(AirflowException, match=r"answered 403 .*create pods is forbidden; docs/pods.md has the role"):
        Task().run()


def test_the_documented_role_is_just_what_is_needed(api: KubernetesApi) -> None:
    """The server enforces it in all tests; these ends use all of it."""
    api.fates = [Fate(waiting=("ErrImagePull", "not found")), Fate(exit_code=1), Fate(message=OK)]
    for number in (1, 2, 3):
        try:
            Task(try_number=number).run()
        except AirflowException:
            assert number < 3
    granted = {(verb, what) for rule in yaml.safe_load(ROLE)["rules"] for what in rule["resources"] for verb in rule["verbs"]}
    assert api.asked == granted
