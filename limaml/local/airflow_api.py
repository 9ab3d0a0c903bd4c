"""The part of Airflow's REST API (v2) that `make run` needs, with a token."""

import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from limaml.errors import LimamlError

ATTEMPTS = 5
RETRY_S = 1.0
RESULT_KEY = "result"
"""XCom key under which the operator leaves a verb's result, whatever the outcome."""


@dataclass(frozen=True)
class TaskInstance:
    """One task of a run; `map_index` is -1 unless the task is mapped. `state` is None before it is scheduled."""

    task_id: str
    map_index: int
    state: str | None
    try_number: int
    started: datetime | None
    ended: datetime | None

    @property
    def name(self) -> str:
        return self.task_id if self.map_index < 0 else f"{self.task_id}[{self.map_index}]"

    @property
    def seconds(self) -> float | None:
        return (self.ended - self.started).total_seconds() if self.started and self.ended else None


class AirflowApi:
    """A client of one Airflow on this machine; a busy SQLite or a starting server is asked again, an error is not.

    An answer may take `timeout_s`: where a request is given up too early and sent again, a run is triggered twice.
    """

    def __init__(self, url: str, user: str, password: str, timeout_s: float = 30.0) -> None:
        # Proxy settings of the environment are for other hosts.
        self._client = httpx.Client(base_url=url, timeout=timeout_s, trust_env=False)
        self._credentials = {"username": user, "password": password}
        self._token: str | None = None

    def close(self) -> None:
        self._client.close()

    def healthy(self, part: str) -> bool:
        """Whether Airflow says so of this part: metadatabase, scheduler or dag_processor."""
        try:
            response = self._client.get("/api/v2/monitor/health")
        except httpx.TransportError:
            return False
        if response.status_code != httpx.codes.OK:
            return False
        return bool((response.json().get(part) or {}).get("status") == "healthy")

    def has_dag(self, dag_id: str) -> bool:
        """Whether the DAG has been read. Raises LimamlError if a DAG file does not import."""
        errors = self._call("GET", "/api/v2/importErrors")["import_errors"]
        if errors:
            raise LimamlError(f"{errors[0]['filename']} does not import: {errors[0]['stack_trace']}")
        dags = self._call("GET", "/api/v2/dags", params={"dag_id_pattern": dag_id})["dags"]
        return any(dag["dag_id"] == dag_id for dag in dags)

    def set_paused(self, dag_id: str, paused: bool) -> None:
        self._call("PATCH", f"/api/v2/dags/{dag_id}", json={"is_paused": paused})

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Start a run without a logical date; returns its id."""
        run = self._call("POST", f"/api/v2/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": conf})
        return str(run["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        return str(self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task_instances(self, dag_id: str, run_id: str) -> list[TaskInstance]:
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        found = self._call("GET", path, params={"limit": 100})["task_instances"]
        return [
            TaskInstance(
                task["task_id"],
                task["map_index"],
                task["state"],
                task["try_number"],
                _instant(task["start_date"]),
                _instant(task["end_date"]),
            )
            for task in found
        ]

    def result(self, dag_id: str, run_id: str, task: TaskInstance) -> dict[str, Any]:
        """What the task's verb left, or an empty dict if it ended before its operator could say anything."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task.task_id}/xcomEntries/{RESULT_KEY}"
        try:
            value = self._call("GET", path, params={"map_index": task.map_index, "deserialize": "true"})["value"]
        except _NotFoundError:
            return {}
        return dict(value)

    def log_tail(self, dag_id: str, run_id: str, task: TaskInstance, lines: int = 15) -> str:
        """The last lines of the task's log."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task.task_id}/logs/{max(task.try_number, 1)}"
        try:
            content = self._call("GET", path, params={"map_index": task.map_index, "full_content": "true"})["content"]
        except _NotFoundError:
            return "(no log)"
        events = [line if isinstance(line, str) else str(line.get("event", "")) for line in content]
        return "\n".join([event for event in events if not re.match(r"::(end)?group::", event)][-lines:])

    def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = self._client.request(method, path, headers={"Authorization": f"Bearer {self._bearer()}"}, **request)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return dict(response.json())
                problem = f"{response.status_code}: {response.text[:500]}"
                if response.status_code == httpx.codes.NOT_FOUND:
                    raise _NotFoundError(f"Airflow knows nothing at {path}: {problem}")
                if response.status_code == httpx.codes.UNAUTHORIZED:
                    self._token = None
                elif response.status_code < httpx.codes.INTERNAL_SERVER_ERROR or method == "POST":
                    break
            if attempt < ATTEMPTS:
                time.sleep(RETRY_S)
        raise LimamlError(f"Airflow did not answer {method} {path}: {problem}")

    def _bearer(self) -> str:
        if self._token is None:
            response = self._client.post("/auth/token", json=self._credentials)
            if not response.is_success:
                raise LimamlError(
                    f"Airflow refused user {self._credentials['username']}: {response.status_code} {response.text[:200]}"
                )
            self._token = str(response.json()["access_token"])
        return self._token


class _NotFoundError(LimamlError):
    pass


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
