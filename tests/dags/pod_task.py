"""One try of the operator with pods, against an API server of our own, set up as docs/pods.md says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk.execution_time.task_runner import _run_execute_callable

from dags.verb import VerbOperator
from tests.dags.kubernetes_api import Fate, KubernetesApi

ROOT = Path(__file__).parents[2]
TEMPLATE, ROLE = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pods.md").read_text(), re.DOTALL)
OK = {"verb": "ingest", "status": "ok"}


class Task:
    """One try of an operator, as Airflow's task runner does it; `pushed` is what it pushed to XCom."""

    dag_id, task_id, map_index = "limaml_daily", "ingest", -1

    def __init__(self, try_number: int = 1, store: dict[str, Any] | None = None, **options: Any) -> None:
        self.operator = VerbOperator(task_id="ingest", **({"verb": "ingest"} | options))
        self.try_number = try_number
        self.pushed: dict[str, Any] = {}
        self.store = store

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value

    def run(self) -> Any:
        context: Any = {"ti": self, "run_id": "manual__2026-01-31T00:00:00+00:00", "dag": None}
        if self.store is not None:
            context["task_state_store"] = Store(self.store)
        return _run_execute_callable(context, self.operator.execute, self.operator)


class Store:
    """Airflow's store of a task's state, which outlives a try."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.get = values.get
        self.set = values.__setitem__


def fate(api: KubernetesApi, **options: Any) -> Fate:
    api.fates = [Fate(**options)]
    return api.fates[0]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """An API server with the documented role, and Airflow set to run verbs there with the documented template."""
    server = KubernetesApi(yaml.safe_load(ROLE)["rules"])
    clusters = [{"name": "c", "cluster": {"server": server.url}}]
    contexts = [{"name": "c", "context": {"cluster": "c", "user": "u"}}]
    users = [{"name": "u", "user": {"token": "t"}}]
    kubeconfig = {"apiVersion": "v1", "kind": "Config", "clusters": clusters, "contexts": contexts, "users": users}
    (tmp_path / "kubeconfig").write_text(json.dumps({**kubeconfig, "current-context": "c"}))
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    connection = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(tmp_path / "kubeconfig")}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW__LIMAML__RUNNER", "pod")
    monkeypatch.setenv("AIRFLOW__LIMAML__POD_TEMPLATE", str(tmp_path / "pod.yaml"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("dags.pod.START_POLL_S", 0.02)
    # Calls that fail for the moment are tried five times; here without 15 s of waiting in between.
    monkeypatch.setattr("airflow.providers.cncf.kubernetes.kubernetes_helper_functions._default_wait", lambda _: 0.02)
    yield server
    server.close()
