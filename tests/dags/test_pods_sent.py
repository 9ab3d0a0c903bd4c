"""What pods the operator asks for, held against Kubernetes' strict schemas, and what settings and templates it refuses."""

import json
import re
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from limaml import cli
from tests.dags.kubernetes_api import Fate, KubernetesApi
from tests.dags.pod_task import OK, ROLE, ROOT, TEMPLATE, Task, fate

DEPLOY = ROOT / "tests" / ".deploy" / "bin" / "python"
VERSIONS = ("1.33.0", "1.37.0")


def sent(api: KubernetesApi, **options: Any) -> dict[str, Any]:
    """The pod that a task asks for."""
    fate(api, message=OK)
    task = Task(**options)
    task.map_index = 3 if options.get("shard") is not None else -1
    task.run()
    return api.created[-1]


def test_hostile_arguments_stay_literal(api: KubernetesApi) -> None:
    """The kubelet replaces $(NAME) by a variable of the container, and $$ by $: the inverse of what is sent."""
    hostile = ["--day=$(touch pwned); rm -rf x", "$(POSTGRES_PASSWORD)", "$$(X)", "a b\tc\n--set=x", "{{ params }}", "$"]
    pod = sent(api, arguments=hostile)
    arguments = pod["spec"]["containers"][0]["args"]
    assert [argument.replace("$$", "$") for argument in arguments[1:-1]] == hostile
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", argument) for argument in arguments)


def test_the_pod_is_labelled_with_dag_task_run_and_shard(api: KubernetesApi) -> None:
    labels = sent(api, verb="fill", shard=3)["metadata"]["labels"]
    assert (labels["dag_id"], labels["task_id"], labels["map_index"], labels["try_number"]) == (
        "limaml_daily",
        "ingest",
        "3",
        "1",
    )
    assert labels["run_id"].startswith("manual__2026-01-31T000000")
    assert (labels["app.kubernetes.io/name"], labels["app.kubernetes.io/component"]) == ("limaml", "fill")
    assert "--shard=3" in api.created[-1]["spec"]["containers"][0]["args"]


def test_two_shards_do_not_take_each_others_pod(api: KubernetesApi) -> None:
    api.fates = [Fate(message=OK, until=threading.Event()), Fate(message={**OK, "shard": 4})]
    api.refusal = lambda verb, what: 503 if what == "pods/log" else None
    first, second = Task(verb="fill", shard=3), Task(verb="fill", shard=4)
    first.map_index, second.map_index = 0, 1
    with pytest.raises(AirflowException, match="goes on"):
        first.run()
    api.refusal = lambda verb, what: None
    second.run()
    assert second.pushed["result"]["shard"] == 4
    assert len(api.created) == 2


def test_resources_are_the_verbs_or_the_default_or_the_templates(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def requested(verb: str) -> Any:
        return sent(api, verb=verb)["spec"]["containers"][0].get("resources", {}).get("requests")

    template = yaml.safe_load(TEMPLATE)
    template["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "1"}}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(template))
    assert requested("train") == {"cpu": "1"}
    monkeypatch.setenv("AIRFLOW__LIMAML__POD_RESOURCES", '{"train": {"requests": {"cpu": "4"}}}')
    assert (requested("train"), requested("adapt")) == ({"cpu": "4"}, {"cpu": "1"})
    resources = {"train": {"requests": {"cpu": "4"}}, "default": {"requests": {"cpu": "2"}}}
    monkeypatch.setenv("AIRFLOW__LIMAML__POD_RESOURCES", json.dumps(resources))
    assert (requested("train"), requested("adapt")) == ({"cpu": "4"}, {"cpu": "2"})


def test_security_is_restricted_whatever_the_template_says(api: KubernetesApi, tmp_path: Path) -> None:
    template = yaml.safe_load(TEMPLATE)
    spec = template["spec"]
    spec["securityContext"] = {"runAsNonRoot": False, "fsGroup": 1000}
    spec["containers"][0]["securityContext"] = {"privileged": True, "capabilities": {"add": ["SYS_ADMIN"]}, "runAsUser": 1000}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(template))
    pod = sent(api)["spec"]
    seccomp = {"type": "RuntimeDefault"}
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": seccomp, "fsGroup": 1000}
    assert pod["containers"][0]["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": seccomp,
    }
    assert pod["automountServiceAccountToken"] is False
    assert pod["restartPolicy"] == "Never"
    assert len(pod["containers"]) == 1  # no sidecar


def test_secrets_are_references_and_airflows_own_stay_behind(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "hunter2")
    pod = sent(api)
    container = pod["spec"]["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "limaml"}}]
    assert {variable["name"] for variable in container["env"]} == {"LIMAML_CONFIG", "AIRFLOW_CTX_DAG_RUN_ID"}
    assert "hunter2" not in json.dumps(pod)


# What is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["limaml/train:1.0", "limaml/train", "limaml/train@sha256:0123", ""])
def test_an_image_without_a_digest_is_refused(api: KubernetesApi, tmp_path: Path, image: str) -> None:
    template = yaml.safe_load(TEMPLATE)
    template["spec"]["containers"][0]["image"] = image
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(template))
    with pytest.raises(AirflowFailException, match=re.escape(f"must be pinned by its digest (name@sha256:…), got {image!r}")):
        Task().run()
    assert api.created == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"pod_template must be a YAML file that can be read: .*No such file"),
        ("a: [", r"pod_template must be a YAML file that can be read"),
        ("kind: Deployment\nspec: {}", r"pod_template must hold a Pod with a container, .*pod.yaml does not"),
        ("kind: Pod\nspec: {containers: []}", r"pod_template must hold a Pod with a container"),
    ],
)
def test_a_template_that_is_none_is_refused(api: KubernetesApi, tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "pod.yaml").unlink()
    if text is not None:
        (tmp_path / "pod.yaml").write_text(text)
    with pytest.raises(AirflowFailException, match=message):
        Task().run()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RUNNER", "docker", r"\[limaml\] runner must be process or pod, got 'docker'"),
        ("POD_TEMPLATE", "", r"\[limaml\] pod_template must be the path of a pod template when runner = pod, and is not set"),
        ("POD_RESOURCES", "{", r"\[limaml\] pod_resources must be JSON, got '{'"),
        ("POD_RESOURCES", '{"train": 4}', r"\[limaml\] pod_resources must be {\"verb\""),
        (
            "POD_RESOURCES",
            '{"trian": {}}',
            r"\[limaml\] pod_resources must name verbs \(apply, .*\) or default, got \['trian'\]",
        ),
    ],
)
def test_a_setting_that_is_wrong_is_refused(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"AIRFLOW__LIMAML__{name}", value)
    with pytest.raises(AirflowFailException, match=message):
        Task().run()
    assert api.created == []


def test_the_verbs_that_settings_may_name_are_those_of_the_dags() -> None:
    from dags.pod import VERBS

    commands = cli.app.registered_commands
    assert set(VERBS) == {command.name for command in commands if command.rich_help_panel == cli.DAG_TASKS}


# Schema -------------------------------------------------------------------------------------------------------------------

# The tool's command reads one file for one version and takes two seconds to start.
VALIDATE = """
import json, sys, kubernetes_validate
documents = json.load(sys.stdin)
for version in sys.argv[1:]:
    for document in documents:
        try:
            kubernetes_validate.validate(document, version, strict=True)
            print("passes")
        except kubernetes_validate.ValidationError as error:
            print(error.message.replace(chr(10), " "))
"""


def test_the_pods_keep_to_the_strict_schema(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the documented role; a field with a wrong name fails, so this can."""
    if not DEPLOY.exists():
        pytest.fail("kubernetes-validate must be installed for this test: make tests/.deploy/installed")
    resources = re.search(r"POD_RESOURCES=(\{.*?\}\})$", (ROOT / "docs" / "pods.md").read_text(), re.DOTALL | re.MULTILINE)
    assert resources is not None
    monkeypatch.setenv("AIRFLOW__LIMAML__POD_RESOURCES", resources[1])
    pods = [sent(api, verb=verb, execution_timeout=timedelta(hours=2)) for verb in ("apply", "train")]
    pods.append(sent(api, verb="fill", shard=3))
    wrong = json.loads(json.dumps(pods[0]))
    wrong["spec"]["containers"][0]["terminationMessagePat"] = "/dev/termination-log"
    documents = json.dumps([*pods, yaml.safe_load(ROLE), wrong])
    command = [DEPLOY, "-c", VALIDATE, *VERSIONS]
    done = subprocess.run(command, input=documents, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 5 * len(VERSIONS)
    for good, bad in ((said[:4], said[4]), (said[5:9], said[9])):
        assert good == ["passes"] * 4
        assert "terminationMessagePat" in bad
