"""The runner `pod`: a verb in a pod of its own, its result as the container's termination message.

Settings, in Airflow's section `[limaml]` (AIRFLOW__LIMAML__POD_TEMPLATE and so on), read by the task, never by a DAG file:

    pod_template        path of a Pod (YAML) with what is the installation's own: namespace, image by digest, service account,
                        configuration, secrets by reference, volumes, where to schedule
    pod_resources       JSON, verb -> {"requests": …, "limits": …}; "default" is for those not named
    pod_start_timeout   seconds until the pod must have been scheduled, and again until it must run (600)

No init container, sidecar or exec is involved. What a pod needs beyond the template is written over it here.
"""

import json
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import (
    PodLaunchFailedException,
    PodLaunchTimeoutException,
    PodPhase,
)
from airflow.sdk import Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import V1ContainerStateTerminated, V1Pod
from kubernetes.client.exceptions import ApiException

VERBS = (
    "apply", "embed-items", "ingest", "train", "evaluate", "plan-fill", "fill", "cut-over", "adapt", "publish", "consistency",
    "drift", "retain",
)  # fmt: skip
"""What `pod_resources` may name; a test compares it with the command line, which must not be imported here."""
RESULT_PATH = "/dev/termination-log"
CONTAINER = "base"
START_TIMEOUT_S = 600
"""A node may have to be started first, and an image of some gigabytes be pulled."""
START_POLL_S = 2.0

_PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
_SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
"""With the next, all that the Pod Security Standard `restricted` asks for; other fields are the template's."""
_CONTAINER_SECURITY = {**_SECURITY, "allowPrivilegeEscalation": False, "privileged": False, "capabilities": {"drop": ["ALL"]}}


class PodRunner:
    """Not deferrable: that loses XComs (airflow#73117). A try whose worker died is followed by one that finds its pod."""

    def __init__(self, task_id: str, verb: str, timeout: timedelta | None, log: Any) -> None:
        self._task_id = task_id
        self._verb = verb
        self._timeout = timeout
        self._log = log
        self._pod: VerbPod | None = None

    def run(self, arguments: Sequence[str], context: Context) -> tuple[int, dict[str, Any] | None, str]:
        """Run to the end; returns the exit code, the result if there is one, and how it ended without one."""
        self._pod = pod = self._new(arguments, context)
        self._log.info("Running %s in a pod", list(arguments))
        try:
            # Not `execute`: Airflow warns of an operator's `execute` inside another's.
            pod.execute_sync(context)
            ended = pod.remote_pod
        except (PodLaunchFailedException, PodLaunchTimeoutException) as error:
            if (ended := pod.settle()) is None:
                return 1, None, f"pod {pod.pod.metadata.name} did not start and was deleted: {error}"
        except ApiException as error:
            ended = self._after(error, pod)
        return outcome(ended, self._verb)

    def kill(self) -> None:
        if self._pod is not None:
            self._pod.on_kill()

    def _after(self, error: ApiException, pod: "VerbPod") -> V1Pod:
        """The pod as it ended, if it did: a log that cannot be read any more does not matter then. Else AirflowException."""
        if pod.pod is None:
            what_now = "the next try finds the pod, if one was made"
        else:
            what_now = f"pod {pod.pod.metadata.name} goes on, and the next try finds it"
            try:
                if (ended := pod.settle(delete=False)) is not None:
                    return ended
            except ApiException as newer:
                error = newer
                if newer.status == 404:
                    what_now = f"pod {pod.pod.metadata.name} was deleted before its result was read"
        if error.status in (401, 403):
            what_now = "docs/pods.md has the role that Airflow needs"
        said = f"the Kubernetes API answered {error.status} {error.reason}: {_message(error)}"
        raise AirflowException(f"limaml {self._verb}: {said}; {what_now}") from error

    def _new(self, arguments: Sequence[str], context: Context) -> "VerbPod":
        start_timeout_s = conf.getint("limaml", "pod_start_timeout", fallback=START_TIMEOUT_S)
        return VerbPod(
            task_id=self._task_id,
            name=f"limaml-{self._verb}",
            pod_template_dict=complete(_template(), _resources(self._verb)),
            base_container_name=CONTAINER,
            cmds=["python", "-m", "limaml.cli"],
            arguments=[_literal(argument) for argument in (*arguments, f"--result={RESULT_PATH}")],
            # The lease says by it who holds it.
            env_vars={"AIRFLOW_CTX_DAG_RUN_ID": _literal(str(context["run_id"]))},
            # The provider adds dag_id, task_id, run_id, map_index and try_number.
            labels={"app.kubernetes.io/name": "limaml", "app.kubernetes.io/component": self._verb},
            active_deadline_seconds=int(self._timeout.total_seconds()) if self._timeout else None,
            startup_timeout_seconds=start_timeout_s,
            schedule_timeout_seconds=start_timeout_s,
            startup_check_interval_seconds=START_POLL_S,
            deferrable=False,
            durable=True,
            do_xcom_push=False,
            on_finish_action="delete_succeeded_pod",
            log_events_on_failure=True,
            container_name_log_prefix_enabled=False,
        )


class VerbPod(KubernetesPodOperator):
    """The provider's operator as far as the end of the pod; what the end means is `outcome`'s."""

    def cleanup(self, pod: V1Pod, remote_pod: V1Pod | None, *others: Any, **more: Any) -> None:  # noqa: ARG002
        """Never raises: this runs in a `finally`, where an exception of its own would replace a time-out or the outcome.

        A pod that has not ended (the worker is being stopped, the API does not answer) is left as it is: marked as done with,
        it would run on unseen while the next try starts another. After a kill or a time-out `on_kill` deletes it.
        """
        if remote_pod is not None and remote_pod.status.phase in PodPhase.terminal_states:
            self._leave(remote_pod)

    def settle(self, *, delete: bool = True) -> V1Pod | None:
        """The pod as it ended; None if it has not, and then it is deleted, so that it cannot start beside the next try's."""
        seen = self.pod_manager.read_pod(self.pod)
        if seen.status.phase in PodPhase.terminal_states:
            self._leave(seen)
            return seen
        if delete:
            self.pod_manager.delete_pod(seen)
        return None

    def _leave(self, ended: V1Pod) -> None:
        """Mark it as done with, so that no later try takes it for its own; one that succeeded is deleted."""
        if not self._killed:
            self.patch_already_checked(ended, reraise=False)
            self.process_pod_deletion(ended, reraise=False)


def complete(template: dict[str, Any], resources: dict[str, Any] | None) -> dict[str, Any]:
    """The template with what every pod of ours must have. Raises AirflowFailException for an image without a digest."""
    spec = template["spec"]
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        image = container.get("image", "")
        if not _PINNED.fullmatch(image):
            raise AirflowFailException(
                f"[limaml] pod_template: an image must be pinned by its digest (name@sha256:…), got {image!r}: a tag may be "
                "moved between train and evaluate; `skopeo inspect` shows the digest of a tag"
            )
        container["securityContext"] = {**container.get("securityContext", {}), **_CONTAINER_SECURITY}
    verb = spec["containers"][0]
    verb |= {"name": CONTAINER, "terminationMessagePath": RESULT_PATH, "terminationMessagePolicy": "File"}
    if resources is not None:
        verb["resources"] = resources
    spec["securityContext"] = {**spec.get("securityContext", {}), **_SECURITY}
    # A verb has nothing to say to the Kubernetes API.
    spec.setdefault("automountServiceAccountToken", False)
    return template


def outcome(pod: V1Pod, verb: str) -> tuple[int, dict[str, Any] | None, str]:
    """Exit code, result if there is one, and how it ended without one, of a pod that has ended."""
    ended = _terminated(pod)
    exit_code, result = (ended.exit_code, _result(ended.message)) if ended else (1, None)
    if result is not None or pod.status.phase == PodPhase.SUCCEEDED:
        return exit_code, result, f"pod {pod.metadata.name} left no result"
    return exit_code or 1, None, f"pod {pod.metadata.name} {_why(pod, ended, verb)} without a result; see the log above"


def _why(pod: V1Pod, ended: V1ContainerStateTerminated | None, verb: str) -> str:
    if pod.status.reason:  # Evicted, DeadlineExceeded, …
        return f"was ended ({pod.status.reason}: {pod.status.message or 'no more is said'})"
    if ended is None:
        return f"failed before its container started ({pod.status.message or 'no more is said'})"
    if ended.reason == "OOMKilled":
        resources = pod.spec.containers[0].resources
        limit = (resources.limits if resources else None) or {}
        return (
            f"was killed for want of memory (OOMKilled, limits.memory is {limit.get('memory', 'not set')}; "
            f'raise that of "{verb}" in [limaml] pod_resources)'
        )
    said = f", {ended.reason}: {ended.message}" if ended.message else f", {ended.reason}" if ended.reason else ""
    return f"ended with exit code {ended.exit_code}{said}"


def _terminated(pod: V1Pod) -> V1ContainerStateTerminated | None:
    statuses = [status for status in pod.status.container_statuses or () if status.name == CONTAINER]
    return statuses[0].state.terminated if statuses else None


def _result(message: str | None) -> dict[str, Any] | None:
    """What a verb wrote; a container that did not start has the runtime's own words there."""
    try:
        value = json.loads(message or "")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _template() -> dict[str, Any]:
    path = conf.get("limaml", "pod_template", fallback="")
    if not path:
        raise AirflowFailException(
            "[limaml] pod_template must be the path of a pod template when runner = pod, and is not set; docs/pods.md has one"
        )
    try:
        template = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AirflowFailException(f"[limaml] pod_template must be a YAML file that can be read: {error}") from None
    is_pod = isinstance(template, dict) and template.get("kind") == "Pod"
    if not is_pod or not isinstance(template.get("spec"), dict) or not template["spec"].get("containers"):
        raise AirflowFailException(
            f"[limaml] pod_template must hold a Pod with a container, and {path} does not; see docs/pods.md"
        )
    return dict(template)


def _resources(verb: str) -> dict[str, Any] | None:
    """What `pod_resources` says of a verb; None leaves what the template says."""
    text = conf.get("limaml", "pod_resources", fallback="") or "{}"
    try:
        resources = json.loads(text)
    except ValueError as error:
        raise AirflowFailException(f"[limaml] pod_resources must be JSON, got {text!r}: {error}") from None
    if not isinstance(resources, dict) or not all(isinstance(value, dict) for value in resources.values()):
        raise AirflowFailException(f'[limaml] pod_resources must be {{"verb": {{"requests": …, "limits": …}}}}, got {text!r}')
    if unknown := sorted(resources.keys() - {*VERBS, "default"}):
        raise AirflowFailException(f"[limaml] pod_resources must name verbs ({', '.join(VERBS)}) or default, got {unknown}")
    found: dict[str, Any] | None = resources.get(verb, resources.get("default"))
    return found


def _literal(text: str) -> str:
    """The kubelet replaces $(NAME) in arguments by the container's variables, secrets among them; $$ stands for $."""
    return text.replace("$", "$$")


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        return str(error.body or "no more is said")
